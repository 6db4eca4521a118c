"""Populations that stay off the device: in host memory, in files, or behind a function.

A `Source` knows how many rows each client has, and fetches one client's rows when asked. That is all
`jfed.run.stream` needs to train on more clients than fit on the device, or on the host. It has no
source in the literature.

Letters: N clients, E examples.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jfed.core import Tree
from jfed.data._checks import arrays, check_sizes

_FORMAT = 1  # of a folder of memory-mapped clients
_MANIFEST = "manifest.json"
_MOST_ROWS_OF_ONE = 2**31 - 1  # a client's size is int32


class Source(NamedTuple):
    """What is known of a population whose examples are not on the device."""

    size: np.ndarray  # [N] int32, number of rows of each client
    row: Tree  # of jax.ShapeDtypeStruct: one row of each leaf, as `load` gives it
    load: Callable[[int], Tree]  # client -> its examples, leaves [size[i], ...], numpy


def on_host(examples: Tree, size: Any) -> Source:
    """A source over arrays in client order, in host memory or mapped from files; nothing is copied.

    Values are not looked at, as `population` does: an infinity shows as a dropped client.

    Args:
      examples: tree of numpy arrays or `np.memmap`s [E, ...], client 0's rows first.
      size: [N] integers, rows of each client, 0 allowed; they sum to E.

    Raises:
      ValueError: if leaves are not numbers or differ in length, or sizes do not sum to E.

    >>> source = on_host({"y": np.arange(5)}, [2, 3])
    >>> source.load(1)["y"].tolist()
    [2, 3, 4]
    """
    size = _sizes("on_host", size)
    leaves = arrays("on_host", examples)
    end = np.cumsum(size, dtype=np.int64)
    for name, leaf in leaves or [("examples", np.zeros(()))]:
        if leaf.shape[:1] != (end[-1],):
            raise ValueError(
                f"on_host(size): sizes sum to {end[-1]} but leaf {name} has shape {list(leaf.shape)}; "
                "every leaf must be [E, ...] with E the sum of the sizes."
            )
    structure = jax.tree.structure(examples)

    def load(i: int) -> Tree:
        return jax.tree.unflatten(structure, [leaf[end[i] - size[i] : end[i]] for _, leaf in leaves])

    return Source(size, row_of("on_host", examples), load)


def from_loader(size: Any, load: Callable[[int], Tree]) -> Source:
    """A source that asks a function for one client's examples at a time.

    The first client that has rows is loaded at once, to learn what a row looks like.

    Args:
      size: [N] integers, rows of each client, 0 allowed; at least one has rows.
      load: `(i) -> tree of numpy arrays [size[i], ...]`; called from another thread, one call at a
        time, and never for a client without rows. What it raises reaches the caller of the run as it
        is, with a note that names the client.

    Raises:
      ValueError: if no client has rows, or what is loaded is not arrays of `size[i]` rows.

    >>> source = from_loader([1, 3], lambda i: {"x": np.full((2 * i + 1, 4), i)})
    >>> print(source.row["x"].shape)
    (4,)
    """
    size = _sizes("from_loader", size)
    if not size.any():
        raise ValueError("from_loader(size): no client has rows; at least one must, so that there is a row to look at.")
    i = int(np.argmax(size > 0))
    tree = _loaded(load, i)
    row = row_of(f"from_loader(client {i})", tree)
    check_rows(f"from_loader(client {i})", tree, row, int(size[i]))
    return Source(size, row, load)


def save_memory_mapped(folder: str | os.PathLike, clients: Iterable[Tree]) -> Source:
    """Writes clients, one after another, to files that `memory_mapped` opens; never holds more than one.

    Args:
      folder: made if it does not exist; must be empty.
      clients: trees of numpy arrays [n_i, ...], alike but for n_i: a single array, or arrays in a
        dict, nested or not. A generator will do.

    Returns:
      The source of what was written.

    Raises:
      ValueError: if the folder holds something, there is no client, a client differs from the first
        in structure, shape or dtype of its rows, or examples are not arrays in dicts.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     source = save_memory_mapped(folder, ({"y": np.full(n, n)} for n in (2, 3)))
    ...     print(source.size, source.load(1)["y"])
    [2 3] [3 3 3]
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if held := sorted(os.listdir(folder)):
        raise ValueError(f"save_memory_mapped({folder}): the folder holds {held[0]}; choose an empty or a new one.")
    size: list[int] = []
    row, files = None, []
    try:
        for i, tree in enumerate(clients):
            if row is None:
                row = row_of(f"save_memory_mapped(client {i})", tree)
                names = _names(row)
                # The array starts with no row and grows; numpy leaves room in the header for its length.
                files = [open(folder / f"leaf_{k}.npy", "wb+") for k in range(len(names))]
                for file, one in zip(files, jax.tree.leaves(row), strict=True):
                    _write_header(file, one, 0)
            size.append(check_rows(f"save_memory_mapped(client {i})", tree, row))
            for file, leaf in zip(files, jax.tree.leaves(tree), strict=True):
                file.write(np.asarray(leaf).tobytes())
        if row is None:
            raise ValueError("save_memory_mapped(clients): there must be a client; pass one tree of arrays for each.")
        rows = sum(size)
        for file, one in zip(files, jax.tree.leaves(row), strict=True):
            _write_header(file, one, rows)
    finally:
        for file in files:
            file.close()
    np.save(folder / "size.npy", _sizes("save_memory_mapped", size))
    leaves = [
        {"path": name, "row": list(one.shape), "dtype": one.dtype.name}
        for name, one in zip(names, jax.tree.leaves(row), strict=True)
    ]
    # Last and at once: a folder that has a manifest is whole.
    partial = folder / f"{_MANIFEST}.tmp"
    partial.write_text(json.dumps({"format": _FORMAT, "rows": rows, "leaves": leaves}, indent=2), encoding="utf-8")
    os.replace(partial, folder / _MANIFEST)
    return memory_mapped(folder)


def memory_mapped(folder: str | os.PathLike) -> Source:
    """Opens what `save_memory_mapped` wrote; rows are read from the files when they are needed.

    Raises:
      ValueError: if the folder holds no such files, was not written to its end, or a file is damaged.
    """
    folder = Path(folder)
    cure = "write the folder anew with save_memory_mapped."
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this version reads {_FORMAT}")
        size = np.load(folder / "size.npy")
        if int(size.sum()) != manifest["rows"]:
            raise ValueError(f"size.npy sums to {size.sum()}, the manifest has {manifest['rows']} rows")
        examples: Any = {}
        for k, told in enumerate(manifest["leaves"]):
            leaf = np.load(folder / f"leaf_{k}.npy", mmap_mode="r")
            if leaf.dtype != _stored(np.dtype(told["dtype"])) or list(leaf.shape) != [manifest["rows"], *told["row"]]:
                raise ValueError(f"leaf_{k}.npy holds {leaf.dtype}{list(leaf.shape)}, the manifest tells otherwise")
            leaf = leaf.view(np.dtype(told["dtype"]))
            if not told["path"]:
                examples = leaf
                continue
            inner = examples
            for name in told["path"][:-1]:
                inner = inner.setdefault(name, {})
            inner[told["path"][-1]] = leaf
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{Path(error.filename).name} is missing" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"memory_mapped({folder}): {reason}; {cure}") from error
    return on_host(examples, size)


def row_of(where: str, tree: Tree) -> Tree:
    """What one row of the examples `tree` looks like: a `jax.ShapeDtypeStruct` for each leaf."""
    leaves = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for _, leaf in arrays(where, tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def check_rows(where: str, tree: Tree, row: Tree, size: int | None = None) -> int:
    """Raises a `ValueError` in the name of `where` unless `tree` is `size` rows like `row`; returns how many.

    Without a `size`, any number that all leaves share.
    """
    if jax.tree.structure(tree) != jax.tree.structure(row):
        raise ValueError(
            f"{where}: its structure {jax.tree.structure(tree)} is not the first client's "
            f"{jax.tree.structure(row)}; give every client the same leaves."
        )
    leaves = arrays(where, tree)
    if not leaves or any(leaf.ndim == 0 for _, leaf in leaves):
        raise ValueError(f"{where}: a client must be a tree of arrays [n, ...]; stack its examples.")
    size = leaves[0][1].shape[0] if size is None else size
    for (name, leaf), one in zip(leaves, jax.tree.leaves(row), strict=True):
        if leaf.shape != (size, *one.shape) or leaf.dtype != one.dtype:
            raise ValueError(
                f"{where}: leaf {name} is {leaf.dtype}{list(leaf.shape)}, expected {one.dtype}"
                f"{[size, *one.shape]}; give a client all its rows, of one shape and dtype."
            )
    return size


def fetch(source: Source, i: int) -> list[np.ndarray]:
    """The leaves of client `i`, checked to be what the source said they are."""
    tree = _loaded(source.load, i)
    check_rows(f"client {i} of the source", tree, source.row, int(source.size[i]))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _loaded(load: Callable[[int], Tree], i: int) -> Tree:
    try:
        return load(i)
    except Exception as error:
        error.add_note(f"This was raised while loading client {i}.")
        raise


def _sizes(where: str, size: Any) -> np.ndarray:
    size = np.asarray(size)
    if size.ndim != 1 or not size.size or not np.issubdtype(size.dtype, np.integer):
        raise ValueError(
            f"{where}(size={size.dtype}{list(size.shape)}): size must be integers of shape [N], N at least 1; "
            "give the number of rows of each client."
        )
    check_sizes(where, size, allow_empty=True)
    if size.max() > _MOST_ROWS_OF_ONE:
        i = int(np.argmax(size))
        raise ValueError(f"{where}(size): client {i} has {size[i]} rows, more than int32 can count; split it in two.")
    return size.astype(np.int32)


def _names(row: Tree) -> list[list[str]]:
    """Of every leaf the dict keys that lead to it."""
    out = []
    for path, _ in jax.tree_util.tree_leaves_with_path(row):
        if not all(isinstance(part, jax.tree_util.DictKey) and isinstance(part.key, str) for part in path):
            raise ValueError(
                f"save_memory_mapped(clients): leaf {jax.tree_util.keystr(path)} is not in a dict under a name; "
                "give a single array, or arrays in dicts."
            )
        out.append([part.key for part in path])
    return out


def _stored(dtype: np.dtype) -> np.dtype:
    """The dtype a leaf has in its file: numpy's format does not know bfloat16 and its kin."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype


def _write_header(file: Any, one: jax.ShapeDtypeStruct, rows: int) -> None:
    descr = np.lib.format.dtype_to_descr(_stored(one.dtype))
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (rows, *one.shape)})
