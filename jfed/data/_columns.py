"""One column of foreign data as an array a model can take, and many clients' columns as a population.

Files of federated data hold Python lists, wide integers and text. Here they become what jax keeps as
it is: float32, integers of at most 32 bits, and text as the bytes of its UTF-8 form.

Letters: E examples.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jfed.core import Population
from jfed.data.population import from_clients

# Deflate cannot shrink anything further than this, so a file that promises more is damaged or hostile.
MOST_EXPANSION = 1032


def column(where: str, values: Any) -> np.ndarray:
    """Narrows numbers to what jax keeps, and text to bytes.

    Args:
      where: file and column, for errors.
      values: nested lists or an array, [E, ...].

    Returns:
      [E, ...]: float32 (float16 stays), integers of at most 32 bits, bool; text as uint8
      [E, ..., longest], its UTF-8 bytes followed by zeros.

    Raises:
      ValueError: if rows differ in shape, an integer needs more than 32 bits, or the values are
        neither numbers nor text.

    >>> column("file: y", [3, 1]).dtype, column("file: text", ["ab", "c"]).tolist()
    (dtype('int32'), [[97, 98], [99, 0]])
    """
    return _column(where, values)[0]


def join(path: Any, clients: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[Population, list[str]]:
    """Joins named clients into a population; those without examples are left out.

    Args:
      path: the file they come from, for errors.
      clients: pairs of a name and its features, each [E_i, ...].

    Returns:
      `(population, names)`, in the order of the clients.

    Raises:
      ValueError: if there is no example at all, or clients differ in their features, shapes or types.

    >>> population, names = join("file", [("ann", {"y": [3, 1]}), ("bob", {"y": []}), ("cy", {"y": [2]})])
    >>> print(names, population.size)
    ['ann', 'cy'] [2 1]
    """
    names: list[str] = []
    trees: list[dict[str, np.ndarray]] = []
    text: set[str] = set()
    for name, features in clients:
        tree = {}
        for key, values in features.items():
            tree[key], is_text = _column(f"{path}: client {name!r}: {key}", values)
            if is_text:
                text.add(key)
        if not tree or all(leaf.shape[0] == 0 for leaf in tree.values()):
            continue
        if trees and tree.keys() != trees[0].keys():
            raise ValueError(
                f"{path}: client {name!r} has the features {sorted(tree)}, client {names[0]!r} has "
                f"{sorted(trees[0])}; give every client the same."
            )
        names.append(name)
        trees.append(tree)
    if not trees:
        raise ValueError(f"{path}: holds no examples.")
    for key in trees[0]:
        leaves = [tree[key] for tree in trees]
        width = max(leaf.shape[-1] for leaf in leaves) if key in text else 0
        # A list of JSON numbers is of integers wherever none happens to have a fraction.
        common = np.result_type(*leaves)
        floats = common.kind == "f" and common.itemsize > 2
        for tree in trees:
            leaf = tree[key]
            if key in text:
                tree[key] = np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, width - leaf.shape[-1])])
            elif leaf.dtype.kind in "fiu":
                tree[key] = leaf.astype(np.float32 if floats else common, copy=False)
    try:
        return from_clients(trees), names
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def select(where: str, available: Mapping[str, Any], wanted: Sequence[str] | None) -> list[str]:
    """Names of the features to read: those wanted, which must be there, or all of them, sorted."""
    keys = sorted(map(str, available)) if wanted is None else list(wanted)
    for key in keys:
        if key not in available:
            raise ValueError(f"{where}: there is no feature {key!r}; it has {sorted(map(str, available))}.")
    return keys


def _column(where: str, values: Any) -> tuple[np.ndarray, bool]:
    """The array, and whether it is text."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: rows differ in shape ({error}); leave this feature out.") from error
    if array.ndim == 0:
        raise ValueError(f"{where}: is a single value; a feature must be a list with one entry an example.")
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind in "SUO":
        return _text(where, array), True
    if kind not in "fbiu":
        raise ValueError(f"{where}: {array.dtype} is neither numbers nor text; leave this feature out.")
    if kind == "f" and size > 4:
        with np.errstate(over="ignore"):  # becomes an infinity, which the builders of populations report
            return array.astype(np.float32), False
    if kind == "b" or size < 4 or array.dtype.newbyteorder("=") in (np.int32, np.float32):
        return array.astype(array.dtype.newbyteorder("="), copy=False), False
    limits = np.iinfo(np.int32)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{where}: holds integers beyond int32, which jax would wrap; leave this feature out.")
    return array.astype(np.int32), False


def _text(where: str, array: np.ndarray) -> np.ndarray:
    """Bytes of strings [E, ...] as uint8 [E, ..., longest]."""
    words = []
    for word in array.ravel().tolist():
        if not isinstance(word, str | bytes):
            raise ValueError(f"{where}: mixes {type(word).__name__} with text or other shapes; leave this feature out.")
        # JSON may hold lone surrogates, which have no UTF-8 form of their own.
        words.append(word.encode("utf-8", "surrogatepass") if isinstance(word, str) else word)
    width = max([1, *map(len, words)])
    return np.array(words, f"S{width}").view(np.uint8).reshape(*array.shape, width)
