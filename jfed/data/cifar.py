"""Reader of the Python version of CIFAR-10 and CIFAR-100, whose files are pickles.

A pickle is a program, and this one comes from elsewhere. It is looked through before it is run, so that
it takes no more memory than its length accounts for, and run by an unpickler that knows stand-ins for
arrays of bytes and nothing else, so that it reaches no code but that of this file and can change none.

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".

Letters: E examples.
"""

import io
import os
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Split = dict[str, np.ndarray]

CIFAR_10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR_100_FILES = ("train", "test")


def read_cifar(folder: str | os.PathLike) -> tuple[Split, Split]:
    """Reads the Python version of CIFAR-10 or CIFAR-100, whichever the folder holds.

    Args:
      folder: holds `data_batch_1` to `data_batch_5` and `test_batch` (CIFAR-10), or `train` and `test`
        (CIFAR-100). Where it holds both, CIFAR-10 is read.

    Returns:
      `(train, test)`, dicts of `x` uint8 [E, 32, 32, 3] and `y` int32 [E]; in CIFAR-100 `y` is the
      fine label and `coarse` int32 [E] the superclass.

    Raises:
      FileNotFoundError: if the folder holds neither, or a part only.
      ValueError: if there is another `data_batch_`, or a file is damaged or is a pickle of anything
        but arrays and plain values.
    """
    folder = Path(folder)
    if any(folder.glob("data_batch_*")) or (folder / "test_batch").exists():
        return read_cifar_10(folder)
    if any((folder / name).is_file() for name in CIFAR_100_FILES):
        return read_cifar_100(folder)
    raise FileNotFoundError(
        f"read_cifar({str(folder)!r}): found neither data_batch_1 ... and test_batch (CIFAR-10) nor train and test "
        "(CIFAR-100); name the folder the archive of the Python version unpacks to."
    )


def read_cifar_10(folder: Path) -> tuple[Split, Split]:
    """CIFAR-10 from a folder with exactly its batches; as `read_cifar`."""
    _require(folder, CIFAR_10_FILES)
    if others := sorted({path.name for path in folder.glob("data_batch_*")} - {*CIFAR_10_FILES}):
        raise ValueError(f"{folder}: holds {', '.join(others)}, which CIFAR-10 does not have; move it elsewhere.")
    *train, test = (folder / name for name in CIFAR_10_FILES)
    return _batches(train, {"y": b"labels"}), _batches([test], {"y": b"labels"})


def read_cifar_100(folder: Path) -> tuple[Split, Split]:
    """CIFAR-100 from a folder with both its files; as `read_cifar`."""
    _require(folder, CIFAR_100_FILES)
    labels = {"y": b"fine_labels", "coarse": b"coarse_labels"}
    train, test = (_batches([folder / name], labels) for name in CIFAR_100_FILES)
    return train, test


def _require(folder: Path, names: Sequence[str]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder}: has no {', '.join(missing)}; it must hold {', '.join(names)}, so unpack the archive again."
        )


def _batches(paths: Sequence[Path], labels: dict[str, bytes]) -> Split:
    parts: list[Split] = []
    for path in paths:
        batch = _unpickle(path)
        if not isinstance(batch, dict):
            raise ValueError(f"{path}: is a pickle of {type(batch).__name__}, not of a CIFAR batch.")
        # Batches written by Python 3 have str keys.
        batch = {key.encode("utf-8", "replace") if isinstance(key, str) else key: v for key, v in batch.items()}
        data = batch.get(b"data")
        data = getattr(data, "array", None) if isinstance(data, _Array) else None
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


# The stand-ins. Each has `__setstate__`, for without one the opcode BUILD sets whatever attributes the file names;
# on the class itself, which a file can reach too, the call lacks an argument and fails.


class _Array:
    """Stands in for an array while a pickle is read; only bytes of uint8 or int8 get through."""

    __slots__ = ("array",)

    def __init__(self, *_: Any):
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise ValueError("an array that is not of bytes")
        # Views only: a file may build any number of arrays over the same bytes.
        self.array = np.frombuffer(data, np.uint8).reshape(tuple(map(int, shape)), order="F" if fortran else "C")


class _Dtype:
    """Stands in for numpy's dtype while a pickle is read; int8 is read as the uint8 of the same bits."""

    __slots__ = ()

    def __init__(self, name: Any, *_: Any):
        if name not in ("u1", "i1", "|u1", "|i1", "uint8", "int8", b"u1", b"i1", b"|u1", b"|i1"):
            # Not in full: nested lists that share their parts can take more memory to print than there is.
            raise ValueError(f"an array of {name[:16] if isinstance(name, str | bytes) else 'objects'}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment; a byte has neither


class _Encode:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes in the pickle protocols of Python 2."""

    __slots__ = ("left",)

    def __init__(self, most: int):
        self.left = most  # bytes; a file may name one text any number of times

    def __call__(self, text: Any, codec: Any = "latin1") -> bytes:
        if not isinstance(text, str) or codec not in ("latin1", b"latin1"):
            raise ValueError("text that is not in the codec latin1")
        self.left -= len(text)
        if self.left < 0:
            raise ValueError("more text than the file can hold")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        raise ValueError("refused to change a function")


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")
        # What a CIFAR batch may name, and what stands in for it: nothing of numpy is reached from the file.
        self._permitted = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy._core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): _Encode(len(content)),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._permitted:
            raise ValueError(f"refused to load the global {module}.{name}, which no CIFAR batch needs")
        return self._permitted[module, name]


def _look_through(content: bytes) -> None:
    """Refuses what would make the unpickler take memory that the length of the file does not account for."""
    # Reads every argument, and so finds strings that promise more than follows, for which room would be made.
    for opcode, argument, _ in pickletools.genops(content):
        # The unpickler keeps its memo as an array, as long as the largest index; writers count up from 0 or 1.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"refused the memo index {argument} in a file of {len(content)} bytes")


def _unpickle(path: Path) -> Any:
    content = path.read_bytes()
    try:
        _look_through(content)
        return _Unpickler(content).load()
    except Exception as error:  # a hostile pickle can raise whatever its opcodes come across
        raise ValueError(f"{path}: {error or type(error).__name__}; it is not a CIFAR batch or is damaged.") from error
