"""jfed: a functional research kit in JAX for learning that is not done in one place.

    core        the types everything is written with
    clients     how the work of one client runs for a whole cohort
    local       what one client does in a round
    compress    fewer bytes for an update
    collectives sums over devices, and what they cost
    parallel    training over devices
    aggregate   one message out of many, some of them malicious
    algorithms  the methods
    gossip      peers with no server
    sampling    who takes part in a round
    availability                                stragglers, absence, growing data, simulated time
    data        populations, partitions, sets
    models      small models, losses, adapters
    run         many rounds, evaluation
    report, ledger, checkpoint, plot, experiment        run folders, bytes, resuming, pictures, scripts
    launch      a script as several processes

Modules are loaded when first asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "aggregate",
    "algorithms",
    "availability",
    "checkpoint",
    "clients",
    "collectives",
    "compress",
    "core",
    "data",
    "experiment",
    "gossip",
    "launch",
    "ledger",
    "local",
    "mesh",
    "models",
    "parallel",
    "plot",
    "report",
    "run",
    "sampling",
    "shuffle",
    "tree",
)

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Loads a module of the kit when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
