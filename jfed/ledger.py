"""The bytes of a run, client by client.

Every round's metrics have, under `"traffic"`, what each client of the cohort sent and was sent (`core.Traffic`); a
ledger adds them up, on the host, in whole numbers of any size. `experiment.record` keeps one, checkpoints it with the
run and writes it to the run folder.

Letters: N clients, C clients in a cohort, T rounds.
"""

import csv
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jfed import _validate
from jfed.core import Traffic


class Ledger(NamedTuple):
    """Bytes since a run began."""

    up: np.ndarray  # [N] int64, sent by each client
    down: np.ndarray  # [N] int64, sent to each client


def empty(num_clients: int) -> Ledger:
    """A ledger of nothing.

    Raises:
      ValueError: if `num_clients` is not a whole number of at least 1.
    """
    _validate.at_least_one("empty", "num_clients", num_clients, "it is the number of clients in the population")
    return Ledger(np.zeros(num_clients, np.int64), np.zeros(num_clients, np.int64))


def add(ledger: Ledger, traffic: Traffic) -> Ledger:
    """The ledger after more rounds.

    Args:
      ledger: before.
      traffic: of one round, leaves [C], or of several, leaves [T, C]; ids that are not in [0, N) are empty slots. What
        a device uploads besides, such as `data.upload_bytes`, joins it in the same way.

    >>> two = add(empty(3), Traffic(np.array([2, 3]), up=np.array([5, 0]), down=np.array([7, 0])))
    >>> print(two.up, two.down)
    [0 0 5] [0 0 7]
    >>> images = Traffic(np.arange(3), up=np.array([900, 800, 700]), down=np.zeros(3))
    >>> print(add(two, images).up)
    [900 800 705]
    """
    ids, up, down = (np.asarray(x).reshape(-1) for x in jax.device_get(traffic[:3]))
    here = (ids >= 0) & (ids < ledger.up.size)
    sums = []
    for held, sent in ((ledger.up, up), (ledger.down, down)):
        new = held.copy()
        np.add.at(new, ids[here], sent[here].astype(np.int64))
        sums.append(new)
    return Ledger(*sums)


def by_edge(topology: Any, traffic: Traffic, *, start: int = 0) -> dict[tuple[int, int], int]:
    """What went over each link of peers without a server, one way.

    Args:
      topology: of `jfed.gossip.topology`, on which the rounds were run.
      traffic: of several rounds in a row, `edges` of shape [T, S, n], or of one, [S, n]: of a method with `by_edge`.
      start: the number of the first.

    Returns:
      `{(from, to): bytes that came}`; links over which nothing came are left out.

    Raises:
      ValueError: if the traffic does not tell.

    >>> from jfed.gossip.topology import ring
    >>> one = Traffic(np.arange(3), np.full(3, 8), np.full(3, 8), np.full((2, 3), 4))
    >>> by_edge(ring(3), one)[0, 1]
    4
    """
    if isinstance(traffic.edges, tuple):
        raise ValueError("by_edge(traffic): it does not tell links apart; make the method with by_edge=True.")
    edges = np.asarray(jax.device_get(traffic.edges))
    edges = edges[None] if edges.ndim == 2 else edges
    if edges.shape[1:] != topology.source.shape[1:]:
        raise ValueError(
            f"by_edge(topology={topology.name!r}): it has {list(topology.source.shape[1:])} slots and peers, and the "
            f"traffic {list(edges.shape[1:])}; give the topology that was run."
        )
    found: dict[tuple[int, int], int] = {}
    for t, slots in enumerate(edges.astype(np.int64), start):
        source = topology.source[t % len(topology.source)]
        for s, i in zip(*np.nonzero(slots), strict=True):
            link = int(source[s, i]), int(i)
            found[link] = found.get(link, 0) + int(slots[s, i])
    return found


def write(ledger: Ledger, folder: str | os.PathLike) -> Path:
    """Writes `bytes_by_client.csv`, a line for each client that sent or was sent anything; returns its path."""
    path = Path(folder) / "bytes_by_client.csv"
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["client", "up", "down"])
        for i in np.flatnonzero(ledger.up + ledger.down):
            table.writerow([i, ledger.up[i], ledger.down[i]])
    partial.replace(path)
    return path
