"""Readers of arrays: IDX files and Hugging Face data sets. `federated` has those of clients.

A reader gives numpy arrays as the file holds them. A file is foreign material: what it promises is
checked against what is there before memory is taken.

Source: the IDX format, LeCun, Cortes and Burges, "The MNIST database".

Letters: E examples.
"""

import gzip
import math
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jfed.core import Population
from jfed.data._columns import MOST_EXPANSION, column
from jfed.data.population import by_owner

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Reads an IDX file, plain or gzip: MNIST, Fashion-MNIST, EMNIST, QMNIST.

    Args:
      path: the file; gzip is recognised by its first bytes, not by its name.

    Returns:
      The array, in the machine's byte order; images are uint8 [E, rows, columns], labels uint8 [E].

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not IDX, is cut short, damaged, or has bytes left over.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "labels-idx1-ubyte")
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    ...     print(read_idx(path))
    [7 2 1]
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _idx(path, raw, path.stat().st_size)
            with gzip.GzipFile(fileobj=raw) as file:
                return _idx(path, file, path.stat().st_size * MOST_EXPANSION)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip data are cut short or damaged ({error}); fetch the file again.") from error


def _idx(path: Path, file: Any, most: int) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not 1 <= head[3] <= 8:
        raise ValueError(f"{path}: is not an IDX file; its first bytes are {head.hex(' ') or 'missing'}.")
    dims = file.read(4 * head[3])
    if len(dims) < 4 * head[3]:
        raise ValueError(f"{path}: ends inside its header; fetch the file again.")
    shape = tuple(int(n) for n in np.frombuffer(dims, ">u4"))
    dtype = np.dtype(_IDX_TYPES[head[2]])
    want = math.prod(shape) * dtype.itemsize
    if want > most:
        raise ValueError(f"{path}: its shape {list(shape)} needs {want} bytes, more than the file can hold.")
    if want == 0 and math.prod(filter(None, shape)) * dtype.itemsize > sys.maxsize:
        raise ValueError(f"{path}: its shape {list(shape)} has no entries, but sides that no array can have.")
    data = file.read(want)
    if len(data) < want:
        raise ValueError(f"{path}: its shape {list(shape)} needs {want} bytes but {len(data)} follow; fetch it again.")
    if file.read(1):
        raise ValueError(f"{path}: has bytes left over after its shape {list(shape)}; it is not what it says.")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def from_hugging_face(
    dataset: Any, *, client: str | None = None, columns: Sequence[str] | None = None
) -> dict[str, np.ndarray] | tuple[Population, list[str]]:
    """Takes a `datasets.Dataset`, already loaded, as arrays or as a population.

    The data set is known by what it does (`column_names`, `with_format`, indexing by a column), so the
    package `datasets` is not imported here. Images must all have one size.

    Args:
      dataset: one split, of E rows.
      client: column of client ids, numbers or text; without it no client is formed.
      columns: columns to take; by default all but `client`.

    Returns:
      A dict of arrays [E, ...]: float32, integers of at most 32 bits, text as uint8 bytes. With
      `client`, `(population, names)`, the ids in sorted order.

    Raises:
      ValueError: if `dataset` is a dict of splits, a column is missing, or one cannot be an array.
    """
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list | tuple) or not hasattr(dataset, "with_format"):
        raise ValueError(
            f"from_hugging_face({type(dataset).__name__}): needs one split of a data set held in memory or on disk; "
            'take one, as in load_dataset(...)["train"], and do not stream it.'
        )
    columns = [name for name in names if name != client] if columns is None else list(columns)
    for name in [*columns, *([] if client is None else [client])]:
        if name not in names:
            raise ValueError(f"from_hugging_face: there is no column {name!r}; the data set has {list(names)}.")
    if not columns:
        raise ValueError("from_hugging_face(columns=[]): there must be a column to take.")
    arrays = dataset.with_format("numpy")
    # A newer `datasets` gives a lazy column, which a slice makes an array of at once.
    read = {name: arrays[name][:] for name in {*columns, *([] if client is None else [client])}}
    examples = {name: column(f"from_hugging_face: column {name!r}", _stacked(read[name])) for name in columns}
    if client is None:
        return examples
    ids, owner = np.unique(np.asarray(read[client]), return_inverse=True)
    return by_owner(examples, owner.astype(np.int32)), [str(name) for name in ids.tolist()]


def _stacked(values: Any) -> Any:
    """Rows that came as an array of arrays, as one array where their shapes agree."""
    rows = values if isinstance(values, np.ndarray) else list(values)
    if len(rows) and isinstance(rows[0], np.ndarray) and len({np.shape(row) for row in rows}) == 1:
        return np.stack(list(rows))
    return rows
