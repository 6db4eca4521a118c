"""Readers of federated formats: LEAF's JSON, the SQLite of TFF and of FedJAX, TFF's HDF5.

Each gives `(population, names)`: all clients' examples end to end, and the clients' names in the same
order. Whatever the format, features become float32, integers of at most 32 bits, or, for text, the
bytes of its UTF-8 form (uint8, followed by zeros up to the longest in the file). Clients without
examples are left out.

Sources: LEAF, Caldas et al. 2018, arXiv:1812.01097; `SqlClientData` and `HDF5ClientData` of TensorFlow
Federated; FedJAX, Ro, Suresh and Wu 2021, arXiv:2108.02117, `SQLiteFederatedData`.

Letters: E examples, N clients.
"""

import contextlib
import json
import lzma
import os
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np

from jfed.core import Population
from jfed.data._columns import MOST_EXPANSION, join
from jfed.data._tfexample import parse_example

_NDARRAY_OF_BYTES = 4  # FedJAX's own msgpack extension; the others are flax's


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


def read_sqlite(
    path: str | os.PathLike,
    *,
    split: str | None = None,
    features: Sequence[str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Population, list[str]]:
    """Reads federated SQLite: TFF's (table `examples` of tf.Example records) or FedJAX's (`federated_data`).

    Args:
      path: the database; one compressed as `.lzma` or `.xz` is unpacked to a temporary file first.
      split: TFF keeps all splits in one file; this is the one to read, such as "train". May be left
        out where there is only one.
      features: features to read; by default all.
      shapes: TFF's records are flat: the shape of one example's feature, as in
        `{"pixels": (28, 28)}`. A feature of one value an example has shape () without being told.

    Returns:
      `(population, names)`; TFF's clients in sorted order, FedJAX's in the file's.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is neither kind of database, is damaged, or has no such split or feature.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_sqlite({str(path)!r}): there is no such file.")
    with contextlib.ExitStack() as stack:
        database = path
        if path.suffix in (".lzma", ".xz"):
            database = Path(stack.enter_context(tempfile.TemporaryDirectory()), "unpacked.sqlite")
            try:
                with lzma.open(path) as source, open(database, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            except (lzma.LZMAError, EOFError) as error:
                raise ValueError(f"{path}: the compressed data are cut short or damaged ({error}).") from error
        # Read-only and immutable: nothing is written beside the file, not even a journal.
        address = database.resolve().as_uri() + "?mode=ro&immutable=1"
        try:
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(address, uri=True)))
            connection.execute("PRAGMA trusted_schema=OFF")  # the file's own views may call no risky function
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if "federated_data" in tables:
                if split is not None:
                    raise ValueError(f"{path}: split={split!r}: FedJAX keeps each split in a file; leave split out.")
                return join(path, _fedjax_clients(path, connection, features))
            if "examples" in tables:
                return join(path, _tff_clients(path, connection, split, features, shapes or {}))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: SQLite cannot read it ({error}).") from error
    raise ValueError(
        f"{path}: has neither a table `examples` (TFF) nor `federated_data` (FedJAX), but {sorted(tables)}."
    )


def _tff_clients(
    path: Path,
    connection: sqlite3.Connection,
    split: str | None,
    wanted: Sequence[str] | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if split is None:
        splits = [str(name) for (name,) in connection.execute("SELECT DISTINCT split_name FROM examples")]
        if len(splits) > 1:
            raise ValueError(f"{path}: holds the splits {sorted(splits)}; name one with split=.")
        rows = connection.execute("SELECT client_id, serialized_example_proto FROM examples")
    else:
        query = "SELECT client_id, serialized_example_proto FROM examples WHERE split_name = ?"
        rows = connection.execute(query, [split])
    clients: dict[str, list[bytes]] = {}
    for name, record in rows:
        if not isinstance(record, bytes):
            raise ValueError(f"{path}: client {name!r} has a record of {type(record).__name__}, not of bytes.")
        clients.setdefault(str(name), []).append(record)
    if not clients:
        raise ValueError(f"{path}: split={split!r} has no examples; the splits are in the column split_name.")
    for name in sorted(clients):
        try:
            examples = [parse_example(record) for record in clients[name]]
        except ValueError as error:
            raise ValueError(f"{path}: client {name!r}: {error}.") from error
        clients[name] = []  # the records are not needed again; keep one copy of the data
        where = f"{path}: client {name!r}"
        keys = _select(where, examples[0], wanted)
        yield name, {key: _stack(f"{where}: {key}", [e.get(key) for e in examples], shapes.get(key)) for key in keys}


def _stack(where: str, rows: list[Any], shape: tuple[int, ...] | None) -> Any:
    """Flat lists of one feature, one an example, as [E, *shape]."""
    lengths = {-1 if row is None else len(row) for row in rows}
    if len(lengths) > 1 or -1 in lengths:
        raise ValueError(f"{where}: examples have different numbers of values; leave this feature out with features=.")
    shape = shape if shape is not None else (() if lengths == {1} else (lengths.pop(),))
    try:
        if isinstance(rows[0], list):
            return np.array(rows, object).reshape(len(rows), *shape)
        return np.stack(rows).reshape(len(rows), *shape)
    except ValueError as error:
        raise ValueError(f"{where}: cannot have shape {shape} ({error}); mend shapes=.") from error


def _fedjax_clients(
    path: Path, connection: sqlite3.Connection, wanted: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, data, count in connection.execute("SELECT client_id, data, num_examples FROM federated_data"):
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        where = f"{path}: client {name!r}"
        try:
            content = flax.serialization.msgpack_restore(zlib.decompress(data))
        except Exception as error:  # hostile bytes can raise whatever msgpack and numpy come across
            raise ValueError(f"{where}: its data are not zlib over msgpack ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"{where}: its data are {type(content).__name__}, not named arrays.")
        features = {key: _restored(where, content[key]) for key in _select(where, content, wanted)}
        if any(len(leaf) != count for leaf in features.values()):
            raise ValueError(f"{where}: is said to have {count} examples, but its features have another number.")
        yield name, features


def _restored(where: str, value: Any) -> np.ndarray:
    """An array as flax restores it, or FedJAX's array of byte strings, which flax does not know."""
    if getattr(value, "code", None) == _NDARRAY_OF_BYTES:
        try:
            # The payload is plain msgpack of (shape, words), so flax's reader takes it as it stands.
            shape, words = flax.serialization.msgpack_restore(value.data)
            value = np.array(words, object).reshape(shape)
        except Exception as error:
            raise ValueError(f"{where}: an array of byte strings is damaged ({error}).") from error
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        raise ValueError(f"{where}: a feature is {type(value).__name__}, not an array of examples.")
    return value


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
        if dataset.size is None or dataset.nbytes > most:
            raise ValueError(f"{path}: {dataset.name} promises more than the file can hold.")
        return dataset[()]

    def clients(file: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if "examples" not in file:
            raise ValueError(f"{path}: has no group `examples`; it is not TFF's HDF5.")
        examples = member(file, "examples", h5py.Group)
        for name in sorted(examples):
            group = member(examples, name, h5py.Group)
            keys = _select(f"{path}: client {name!r}", dict.fromkeys(group), features)
            yield name, {key: read(member(group, key, h5py.Dataset)) for key in keys}

    most = path.stat().st_size * MOST_EXPANSION
    try:
        with h5py.File(path, "r") as file:
            return join(path, clients(file))
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: HDF5 cannot read it ({error}).") from error


def _select(where: str, available: Mapping[str, Any], wanted: Sequence[str] | None) -> list[str]:
    keys = sorted(map(str, available)) if wanted is None else list(wanted)
    for key in keys:
        if key not in available:
            raise ValueError(f"{where}: there is no feature {key!r}; it has {sorted(map(str, available))}.")
    return keys
