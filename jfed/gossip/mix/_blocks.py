"""Which rows devices send each other, where each of them has a block of peers.

A device is sent every row once that some of its peers hear, however many do. Who sends to whom is taken apart into
permutations of devices, each carrying as many rows as its busiest pair needs.

Letters: n peers, m devices, b = n / m peers of a device, S slots.
"""

from typing import NamedTuple

import numpy as np

from jfed.gossip.topology.graph import permutations_of


class Transfer(NamedTuple):
    """One permutation of devices."""

    pairs: tuple[tuple[int, int], ...]  # (from, to)
    rows: np.ndarray  # [m, k] int32, which of its rows a device sends


class Blocks(NamedTuple):
    """How devices come by what their peers hear."""

    transfers: tuple[Transfer, ...]
    place: np.ndarray  # [m, S, b] int32, where a peer finds what it hears: own rows first, then those of each transfer


def blocks_of(source: np.ndarray, devices: int) -> Blocks:
    """The transfers of one round.

    Args:
      source: [S, n] int, whom a peer hears in a slot; itself where nobody.
      devices: m, which divides n.

    >>> ring = (np.arange(6)[None] + np.array([[1], [-1]])) % 6
    >>> [transfer.pairs for transfer in blocks_of(ring, 3).transfers]
    [((2, 0), (0, 1), (1, 2)), ((1, 0), (2, 1), (0, 2))]
    """
    slots, n = source.shape
    b = n // devices
    if b == 1:  # a slot is a transfer as it is
        heard = source != np.arange(n)
        transfers = tuple(
            Transfer(tuple((int(a), d) for d, a in enumerate(row) if a != d), np.zeros((n, 1), np.int32))
            for row in source
        )
        return Blocks(transfers, np.where(heard, 1 + np.arange(slots)[:, None], 0).T[..., None].astype(np.int32))
    owner, home = source // b, np.arange(n) // b
    # wanted[d][a]: rows of device a that device d is sent, in order
    wanted = [[np.unique(source[:, d * b : (d + 1) * b][owner[:, d * b : (d + 1) * b] == a]) for a in range(devices)]
              for d in range(devices)]  # fmt: skip
    heard = np.array([[a != d and len(wanted[d][a]) > 0 for a in range(devices)] for d in range(devices)])
    transfers, found = [], np.where(owner == home, source % b, -1)
    first = b
    for whom in permutations_of(heard) if heard.any() else ():
        pairs = tuple((int(a), d) for d, a in enumerate(whom) if a != d)
        count = max(len(wanted[d][a]) for a, d in pairs)
        rows = np.zeros((devices, count), np.int32)
        for a, d in pairs:
            here = wanted[d][a]
            rows[a, : len(here)] = here - a * b
            block = slice(d * b, (d + 1) * b)
            mine = owner[:, block] == a
            found[:, block] = np.where(mine, first + np.searchsorted(here, source[:, block]), found[:, block])
        transfers.append(Transfer(pairs, rows))
        first += count
    return Blocks(tuple(transfers), found.reshape(slots, devices, b).swapaxes(0, 1).astype(np.int32))
