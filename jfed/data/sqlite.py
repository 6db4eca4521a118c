"""Reader of federated SQLite databases: those of TensorFlow Federated and of FedJAX.

What comes out is as in `federated`. A database is a program as much as a table: a view can be endless,
and damaged pages can lead in circles. So only real tables are read, no longer than a file of its length
can take and into no more memory.

Sources: `SqlClientData` of TensorFlow Federated; FedJAX, Ro, Suresh and Wu 2021, arXiv:2108.02117,
`SQLiteFederatedData`.

Letters: E examples.
"""

import contextlib
import itertools
import lzma
import os
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np

from jfed.core import Population
from jfed.data._columns import join, select
from jfed.data._tfexample import parse_example

_NDARRAY_OF_BYTES = 4  # FedJAX's own msgpack extension; the others are flax's
_BLOCK = 1 << 20


def read_sqlite(
    path: str | os.PathLike,
    *,
    split: str | None = None,
    features: Sequence[str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    max_unpacked: int = 16 * 2**30,
) -> tuple[Population, list[str]]:
    """Reads federated SQLite: TFF's (table `examples` of tf.Example records) or FedJAX's (`federated_data`).

    Only real tables are read, not views, which a file can make endless.

    Args:
      path: the database; one compressed as `.lzma` or `.xz` is unpacked to a temporary file first.
      split: TFF keeps all splits in one file; this is the one to read, such as "train". May be left
        out where there is only one.
      features: features to read; by default all.
      shapes: TFF's records are flat: the shape of one example's feature, as in
        `{"pixels": (28, 28)}`. A feature of one value an example has shape () without being told.
      max_unpacked: bytes a compressed database may unpack to; 16 GiB unless told.

    Returns:
      `(population, names)`; TFF's clients in sorted order, FedJAX's in the file's.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is neither kind of database, is damaged, unpacks to too much, or has no
        such split or feature.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_sqlite({str(path)!r}): there is no such file.")
    with contextlib.ExitStack() as stack:
        database = path
        if path.suffix in (".lzma", ".xz"):
            database = Path(stack.enter_context(tempfile.TemporaryDirectory()), "unpacked.sqlite")
            _unpack(path, database, max_unpacked)
        # Read-only and immutable: nothing is written beside the file, not even a journal.
        address = database.resolve().as_uri() + "?mode=ro&immutable=1"
        try:
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(address, uri=True)))
            connection.execute("PRAGMA trusted_schema=OFF")  # what the file defines may call no risky function
            size = database.stat().st_size
            # A row takes at least 8 bytes and about 8 steps. Damaged pages can lead in circles, where no row is found.
            steps = itertools.chain(itertools.repeat(0, 10 + 16 * size // _BLOCK), itertools.repeat(1))
            connection.set_progress_handler(steps.__next__, _BLOCK)
            # A column can be computed; no value that is stored is longer than the file.
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(max(size, _BLOCK), 2**31 - 1))
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "federated_data" in tables:
                if split is not None:
                    raise ValueError(f"{path}: split={split!r}: FedJAX keeps each split in a file; leave split out.")
                return join(path, _fedjax_clients(path, connection, size, features))
            if "examples" in tables:
                return join(path, _tff_clients(path, connection, size, split, features, shapes or {}))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: SQLite cannot read it ({error}).") from error
    raise ValueError(
        f"{path}: has neither a table `examples` (TFF) nor `federated_data` (FedJAX), but {sorted(tables)}."
    )


def _unpack(path: Path, target: Path, most: int) -> None:
    try:
        with lzma.open(path) as source, open(target, "wb") as file:
            while block := source.read(_BLOCK):
                if file.tell() + len(block) > most:
                    raise ValueError(
                        f"{path}: max_unpacked={most}: it unpacks to more bytes than that; raise max_unpacked if you "
                        "trust the file."
                    )
                file.write(block)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: the compressed data are cut short or damaged ({error}).") from error


def _held(path: Path, rows: Iterator[tuple], most: int) -> Iterator[tuple]:
    """The rows, as long as the file, of `most` bytes, can hold what they come to."""
    for row in rows:
        most -= 1 + sum(len(value) for value in row if isinstance(value, str | bytes))
        if most < 0:
            raise ValueError(f"{path}: its rows come to more than the file can hold; it is damaged.")
        yield row


def _tff_clients(
    path: Path,
    connection: sqlite3.Connection,
    size: int,
    split: str | None,
    wanted: Sequence[str] | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if split is None:
        rows = connection.execute("SELECT DISTINCT split_name FROM examples")
        splits = [str(name) for (name,) in _held(path, rows, size)]
        if len(splits) > 1:
            raise ValueError(f"{path}: holds the splits {sorted(splits)}; name one with split=.")
        rows = connection.execute("SELECT client_id, serialized_example_proto FROM examples")
    else:
        query = "SELECT client_id, serialized_example_proto FROM examples WHERE split_name = ?"
        rows = connection.execute(query, [split])
    clients: dict[str, list[bytes]] = {}
    for name, record in _held(path, rows, size):
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
        keys = select(where, examples[0], wanted)
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
    path: Path, connection: sqlite3.Connection, size: int, wanted: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = connection.execute("SELECT client_id, data, num_examples FROM federated_data")
    for name, data, count in _held(path, rows, size):
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        where = f"{path}: client {name!r}"
        try:
            content = flax.serialization.msgpack_restore(zlib.decompress(data))
        except Exception as error:  # hostile bytes can raise whatever msgpack and numpy come across
            raise ValueError(f"{where}: its data are not zlib over msgpack ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"{where}: its data are {type(content).__name__}, not named arrays.")
        features = {key: _restored(where, content[key]) for key in select(where, content, wanted)}
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
