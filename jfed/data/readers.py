"""Readers of arrays: IDX files, CIFAR's pickles, and Hugging Face data sets. `federated` has those of clients.

A reader gives numpy arrays as the file holds them. A file is foreign material: what it promises is
checked against what is there before memory is taken, and a pickle is read by an unpickler that knows
arrays and nothing else, so that no file can run code.

Sources: the IDX format, LeCun, Cortes and Burges, "The MNIST database"; the CIFAR pickles,
Krizhevsky 2009, "Learning multiple layers of features from tiny images".

Letters: E examples.
"""

import gzip
import io
import math
import os
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jfed.core import Population
from jfed.data._columns import MOST_EXPANSION, column
from jfed.data.federated import read_h5, read_leaf, read_sqlite
from jfed.data.population import by_owner

__all__ = ["from_hugging_face", "read_cifar", "read_h5", "read_idx", "read_leaf", "read_sqlite"]

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
    data = file.read(want)
    if len(data) < want:
        raise ValueError(f"{path}: its shape {list(shape)} needs {want} bytes but {len(data)} follow; fetch it again.")
    if file.read(1):
        raise ValueError(f"{path}: has bytes left over after its shape {list(shape)}; it is not what it says.")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def read_cifar(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Reads the Python version of CIFAR-10 or CIFAR-100.

    Args:
      folder: holds `data_batch_1` ... and `test_batch` (CIFAR-10), or `train` and `test` (CIFAR-100).

    Returns:
      `(train, test)`, dicts of `x` uint8 [E, 32, 32, 3] and `y` int32 [E]; in CIFAR-100 `y` is the
      fine label and `coarse` int32 [E] the superclass.

    Raises:
      FileNotFoundError: if the folder holds neither.
      ValueError: if a file is damaged, or is a pickle of anything but arrays and plain values.
    """
    folder = Path(folder)
    batches = sorted(folder.glob("data_batch_*"))
    if batches and (folder / "test_batch").is_file():
        return _cifar(batches, {"y": b"labels"}), _cifar([folder / "test_batch"], {"y": b"labels"})
    if (folder / "train").is_file() and (folder / "test").is_file():
        labels = {"y": b"fine_labels", "coarse": b"coarse_labels"}
        return _cifar([folder / "train"], labels), _cifar([folder / "test"], labels)
    raise FileNotFoundError(
        f"read_cifar({str(folder)!r}): found neither data_batch_1 ... and test_batch (CIFAR-10) nor train and test "
        "(CIFAR-100); name the folder the archive of the Python version unpacks to."
    )


def _cifar(paths: Sequence[Path], labels: dict[str, bytes]) -> dict[str, np.ndarray]:
    parts: list[dict[str, np.ndarray]] = []
    for path in paths:
        batch = _unpickle(path)
        if not isinstance(batch, dict):
            raise ValueError(f"{path}: is a pickle of {type(batch).__name__}, not of a CIFAR batch.")
        # Batches written by Python 3 have str keys.
        batch = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
        data = batch.get(b"data")
        data = data.array if isinstance(data, _Array) else None
        if data is None or data.ndim != 2 or data.shape[1] != 3072:
            raise ValueError(f"{path}: has no `data` of shape [E, 3072]; it is not a CIFAR batch.")
        part = {"x": data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)}
        for name, key in labels.items():
            values = batch.get(key)
            plain = isinstance(values, list) and all(type(v) is int and 0 <= v < 256 for v in values)
            if not plain or len(values) != len(data):
                raise ValueError(f"{path}: `{key.decode()}` is not a list of {len(data)} labels.")
            part[name] = np.array(values, np.int32)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Array:
    """Stands in for an array while a pickle is read; only bytes of uint8 or int8 get through."""

    def __init__(self, *_: Any):
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise ValueError("an array that is not of bytes")
        array = np.frombuffer(data, dtype.name)
        self.array = array.reshape(tuple(map(int, shape)), order="F" if fortran else "C").astype(np.uint8)


class _Dtype:
    """Stands in for numpy's dtype while a pickle is read."""

    def __init__(self, name: Any, *_: Any):
        self.name = name.decode() if isinstance(name, bytes) else name
        if self.name not in ("u1", "i1", "|u1", "|i1", "uint8", "int8"):
            raise ValueError(f"an array of {self.name}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment; a byte has neither


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes in the pickle protocols of Python 2."""
    if not isinstance(text, str) or codec not in ("latin1", b"latin1"):
        raise ValueError(f"text in the codec {codec!r}")
    return text.encode("latin1")


# What a CIFAR batch may name, and what stands in for it: nothing of numpy is reached from the file.
_PERMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PERMITTED:
            raise ValueError(f"refused to load the global {module}.{name}, which no CIFAR batch needs")
        return _PERMITTED[module, name]


def _unpickle(path: Path) -> Any:
    try:
        return _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a hostile pickle can raise whatever its opcodes come across
        raise ValueError(f"{path}: {error or type(error).__name__}; it is not a CIFAR batch or is damaged.") from error


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
