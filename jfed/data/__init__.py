"""Data: who owns which rows, how unlike the clients are, and the sets themselves.

`population` builds what a round reads; the modules `partition`, `shift` and `skew` deal rows to
clients, change what they see, and measure how unlike they are. Names that read files are loaded when
first asked for, so that importing this package stays light.
"""

import importlib
from typing import Any

from jfed.data import partition, shift, skew
from jfed.data._checks import check, check_labels
from jfed.data.population import by_owner, client, from_clients, owner, population, split
from jfed.data.source import Source, from_loader, memory_mapped, on_host, save_memory_mapped
from jfed.data.synthetic import quadratic_loss, quadratics, synthetic, synthetic_iid

# The functions `population` and `synthetic` hide the modules of those names; `from jfed.data.population import ...`
# still finds them.

_LAZY = {
    "Codec": "codecs",
    "image_codec": "codecs",
    "token_codec": "codecs",
    "upload_bytes": "codecs",
    "read_idx": "readers",
    "read_cifar": "cifar",
    "read_leaf": "federated",
    "read_sqlite": "sqlite",
    "read_h5": "federated",
    "from_hugging_face": "readers",
    "downscale": "sets",
    "fashion_small": "sets",
    "fashion_mnist": "sets",
    "mnist": "sets",
    "mnist_writers": "sets",
    "emnist": "sets",
    "cifar10": "sets",
    "cifar100": "sets",
    "shakespeare": "natural",
    "heart": "natural",
    "HEART_FEATURES": "natural",
}

__all__ = [
    "Source",
    "by_owner",
    "check",
    "check_labels",
    "client",
    "from_clients",
    "from_loader",
    "memory_mapped",
    "on_host",
    "owner",
    "partition",
    "population",
    "quadratic_loss",
    "quadratics",
    "save_memory_mapped",
    "shift",
    "skew",
    "split",
    "synthetic",
    "synthetic_iid",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    """Loads a reader or a set when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
