"""A message array by array, and how the arrays that operators pack are unpacked again.

`Coder` says what is done to each array: `lossless` has one that writes and one that reads, `_estimate` one that counts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jfed.compress import _entropy, _pack, sparse
from jfed.compress._pack import Codes, Places
from jfed.compress.message import Encoded, is_encoded
from jfed.core import Tree


class Coder(NamedTuple):
    """What is done to each array; `live` says which of its numbers are not in empty slots, or is None."""

    plain: Callable  # (array, live) -> array
    packed: Callable  # (array, Codes, live) -> array
    places: Callable  # (array, Places) -> array, live


def through(message: Tree, coder: Coder) -> Tree:
    """Hands every array of a message to a coder, positions before the values that lie there."""

    def one(node, live=None):
        if not is_encoded(node):
            return coder.plain(node, live)
        packings, rest = _packings(node), {}
        for name in sorted(node.rest):
            array, packing = node.rest[name], packings.get(name)
            if isinstance(packing, Places):
                rest[name], live = coder.places(array, packing)
            elif packing is not None:
                rest[name] = coder.packed(array, packing, live)
            else:
                rest[name] = coder.plain(array, live)
        payload = jax.tree.map(lambda x: one(x, live), node.payload, is_leaf=is_encoded)
        return dataclasses.replace(node, payload=payload, rest=rest)

    return jax.tree.map(one, message, is_leaf=is_encoded)


def _packings(node: Encoded) -> dict[str, Codes | Places]:
    """How arrays of a node are packed, by name, if they have the shapes that they were packed in."""
    return {name: packing for name, packing in node.decoder.packed if node.rest[name].size == _nbytes(packing)}


def _nbytes(packing: Codes | Places) -> int:
    if isinstance(packing, Places):
        _, b, k = packing
        each = -(-b // 8) if sparse.as_bitmap(b, k) else _pack.nbytes(k, sparse.width(b))
        return packing.blocks * each
    left = packing.count - packing.main
    return packing.main * packing.width // 8 + (_pack.nbytes(left, packing.width) if left else 0)


def unpacked(array: Any, packing: Codes, xp: Any) -> Any:
    """The codes [count] of packed bytes, in the order of the numbers."""
    array = array.reshape(-1)
    cut = packing.main * packing.width // 8
    parts = [_entropy.unpack(part, packing.width, xp) for part in (array[:cut], array[cut:]) if part.size]
    return xp.concatenate(parts)[: packing.count]


def repacked(codes: np.ndarray, packing: Codes) -> np.ndarray:
    """The inverse of `unpacked`: [bytes]."""
    parts = (codes[: packing.main], codes[packing.main :])
    return np.concatenate([_entropy.pack(part, packing.width) for part in parts if part.size])


def slots(array: Any, places: Places, xp: Any) -> Any:
    """Positions [blocks, k] in their block, b in empty slots; of a bitmap, flags [blocks, b]."""
    n, b, k = places
    rows = array.reshape(n, -1)
    if not sparse.as_bitmap(b, k):
        return _entropy.unpack(rows, sparse.width(b), xp)[:, :k].astype(np.int32)
    return ((rows[:, :, None] >> np.arange(8, dtype=np.uint8)[None, None]) & 1).reshape(n, -1)[:, :b].astype(bool)


def placed(positions: np.ndarray, places: Places) -> tuple[np.ndarray, np.ndarray]:
    """Codes bytes of positions in all blocks laid end to end, and which slots [blocks k] hold one."""
    n, b, k = places
    live = np.arange(k) < np.bincount(positions // b, minlength=n)[:, None]
    if sparse.as_bitmap(b, k):
        marks = np.zeros(n * b, np.uint8)
        marks[positions] = 1
        packed = np.packbits(marks.reshape(n, b), axis=1, bitorder="little")
    else:
        slots = np.full((n, k), b, np.uint32)
        slots[live] = positions % b
        packed = _entropy.pack(slots, sparse.width(b))
    return packed, live.reshape(-1)


def by_byte(x: Any) -> bool:
    """Whether an array holds codes of 8 or 16 bits."""
    return np.dtype(x.dtype) in (np.uint8, np.uint16)
