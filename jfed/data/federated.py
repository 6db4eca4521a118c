"""Readers of federated formats: LEAF's JSON and TFF's HDF5; `sqlite` has the databases of TFF and FedJAX.

Each gives `(population, names)`: all clients' examples end to end, and the clients' names in the same
order. Whatever the format, features become float32, integers of at most 32 bits, or, for text, the
bytes of its UTF-8 form (uint8, followed by zeros up to the longest in the file). Clients without
examples are left out.

Sources: LEAF, Caldas et al. 2018, arXiv:1812.01097; `HDF5ClientData` of TensorFlow Federated.

Letters: E examples.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jfed.core import Population
from jfed.data._columns import MOST_EXPANSION, join, select


def read_leaf(path: str | os.PathLike) -> tuple[Population, list[str]]:
    """Reads LEAF's JSON: one file, or every `*.json` of a folder.

    Args:
      path: a file of `{"users": [...], "num_samples": [...], "user_data": {user: {"x": ..., "y": ...}}}`,
        or a folder of them that share no user. Train and test are two folders; read each.

    Returns:
      `(population, names)` with leaves `x` and `y` [E, ...], users in the order listed.

    Raises:
      FileNotFoundError: if there is no such file, or no JSON in the folder.
      ValueError: if a file is not LEAF's JSON, or users and numbers of samples do not agree with it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "data.json")
    ...     user = {"x": [[0.5], [1.5]], "y": [1, 0]}
    ...     _ = path.write_text(json.dumps({"users": ["ann"], "num_samples": [2], "user_data": {"ann": user}}))
    ...     population, names = read_leaf(path)
    >>> print(names, population.size, population.examples["y"])
    ['ann'] [2] [1 0]
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"read_leaf({str(path)!r}): the folder holds no *.json; name LEAF's train or test folder."
        )
    clients: dict[str, Mapping[str, Any]] = {}
    for file in files:
        for user, features in _leaf_users(file):
            if user in clients:
                raise ValueError(f"{file}: user {user!r} occurs twice; read train and test separately.")
            clients[user] = features
    return join(path, clients.items())


def _leaf_users(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({error}).") from error
    content = content if isinstance(content, dict) else {}
    users, counts, data = content.get("users"), content.get("num_samples"), content.get("user_data")
    if not (isinstance(users, list) and isinstance(counts, list) and isinstance(data, dict)):
        raise ValueError(
            f"{file}: is not LEAF's JSON; it needs the lists `users` and `num_samples` and the dict `user_data`."
        )
    if len(users) != len(counts):
        raise ValueError(f"{file}: lists {len(users)} users but {len(counts)} numbers of samples.")
    for user, count in zip(users, counts, strict=True):
        features = data.get(user) if isinstance(user, str) else None
        if not isinstance(features, dict) or not all(isinstance(features.get(key), list) for key in ("x", "y")):
            raise ValueError(f"{file}: user {user!r} has no lists `x` and `y` in `user_data`.")
        if not len(features["x"]) == len(features["y"]) == count:
            raise ValueError(
                f"{file}: user {user!r} is said to have {count} samples but has {len(features['x'])} `x` and "
                f"{len(features['y'])} `y`."
            )
        yield user, {"x": features["x"], "y": features["y"]}


def read_h5(path: str | os.PathLike, *, features: Sequence[str] | None = None) -> tuple[Population, list[str]]:
    """Reads TFF's HDF5: a group `examples`, in it a group a client, in it a dataset a feature.

    Args:
      path: the file.
      features: features to read; by default all.

    Returns:
      `(population, names)`, clients in sorted order.

    Raises:
      ImportError: if h5py is not installed.
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not TFF's HDF5, is damaged, or points at other files.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('read_h5 needs h5py; install it with: pip install "jfed[h5]"') from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_h5({str(path)!r}): there is no such file.")

    def member(group: Any, name: str, kind: type) -> Any:
        # An external link would open whatever file it names.
        if not isinstance(group.get(name, getlink=True), h5py.HardLink) or not isinstance(group[name], kind):
            raise ValueError(f"{path}: {group.name}/{name} is not a {kind.__name__.lower()} of this file.")
        return group[name]

    def read(dataset: Any) -> np.ndarray:
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"{path}: {dataset.name} keeps its data in another file, which is not followed.")
        nonlocal left  # of what all datasets together may take: many may share what is stored once
        left -= left + 1 if dataset.size is None else dataset.nbytes
        if left < 0:
            raise ValueError(f"{path}: {dataset.name} promises more than the file can hold.")
        return dataset[()]

    def clients(file: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if "examples" not in file:
            raise ValueError(f"{path}: has no group `examples`; it is not TFF's HDF5.")
        examples = member(file, "examples", h5py.Group)
        for name in sorted(examples):
            group = member(examples, name, h5py.Group)
            keys = select(f"{path}: client {name!r}", dict.fromkeys(group), features)
            yield name, {key: read(member(group, key, h5py.Dataset)) for key in keys}

    left = path.stat().st_size * MOST_EXPANSION
    try:
        with h5py.File(path, "r") as file:
            return join(path, clients(file))
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: HDF5 cannot read it ({error}).") from error
