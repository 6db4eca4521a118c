"""What one operation sends each time it runs; all counters count in these.

An array has the bytes that JAX gives it: a number of fewer than 8 bits, such as an int4, counts as a whole byte,
though a compiler may pack several into one.

Letters: n devices, g devices a group, k bytes that a device puts in.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = {"all_reduce", "reduce_scatter", "all_to_all", "all_gather"}
"""Those of XLA's own whose least bytes are known, by StableHLO's names."""

UNKNOWN = {"send", "recv", "collective_broadcast", "ragged_all_to_all"}
"""What sends and cannot be counted."""


class Sent(NamedTuple):
    """What one operation sends each time it runs."""

    pairs: np.ndarray | None  # [m, 2] int, from and to; None of a collective of XLA's own
    size: int  # bytes of each message; 0 of a collective of XLA's own
    sent: np.ndarray  # [n] int64 bytes
    received: np.ndarray  # [n] int64
    waits: bool = True  # whether nothing else can be done meanwhile


def permuted(n: int, pairs: Any, size: int, *, waits: bool = True) -> Sent:
    """Messages of `size` bytes along pairs; what a device would send to itself is none."""
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if not size:
        pairs = pairs[:0]
    return Sent(pairs, size, *(np.bincount(side, minlength=n).astype(np.int64) * size for side in pairs.T), waits)


def least(kind: str, n: int, groups: Iterable[Iterable[int]], k: int) -> Sent:
    """What a collective of XLA's own must send at least.

    Args:
      kind: one of `COLLECTIVES`.
      n: devices.
      groups: devices that take part together; those in none send nothing.
      k: bytes that a device puts in.
    """
    sent = np.zeros(n, np.int64)
    for group in groups:
        group = np.asarray(group)
        g = group.size
        parts = {"all_reduce": 2, "reduce_scatter": 1, "all_to_all": 1, "all_gather": g}[kind]
        sent[group] = -(-parts * k * (g - 1) // g)
    return Sent(None, 0, sent, sent)


def bytes_of(dtype: str, sizes: Iterable[int]) -> int:
    """Of an array, its dtype as compilers write it: "f32", "bf16", "s8", "ui32", "i1", "complex<f32>", "pred"."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) * (2 if dtype.startswith("complex") else 1)
    return math.prod(sizes) * max(bits // 8, 1)


def unknown(where: str, kind: str) -> ValueError:
    """The error of what cannot be counted."""
    return ValueError(f"{where}: what {kind} sends is not known; use ppermute, psum or their siblings.")


def same_in_all(where: str, branches: list[list[tuple[Sent, int]]]) -> list[tuple[Sent, int]]:
    """What each of several branches sends.

    Raises:
      ValueError: if they send differently.
    """

    def both_ways(branch):
        return sum((np.stack([send.sent, send.received]) * times for send, times in branch), start=np.zeros((), int))

    if any(np.any(both_ways(branch) != both_ways(branches[0])) for branch in branches):
        raise ValueError(f"{where}(f): branches send differently; count a program with the one that you mean.")
    return branches[0] if branches else []


def groups(sizes: dict[str, int], names: Sequence[str]) -> np.ndarray:
    """Who belongs together along axes of a mesh, devices numbered row by row; [groups, size] int.

    Args:
      sizes: of all axes of the mesh.
      names: axes, the last running fastest within a group.
    """
    others = [axis for axis in sizes if axis not in names]
    order = [list(sizes).index(axis) for axis in (*others, *names)]
    ids = np.arange(math.prod(sizes.values())).reshape([*sizes.values()]).transpose(order)
    return ids.reshape(-1, math.prod(sizes[axis] for axis in names))
