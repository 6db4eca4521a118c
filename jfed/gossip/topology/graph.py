"""Who hears whom, round by round, with which weights, and as permutations.

In round t a peer i replaces its model by `sum_j W[i, j] x_j`, W the mixing matrix of the round. A `Topology` holds W by
slots: in each a peer hears at most one other, and is heard by at most one, so that a slot is a partial permutation of
peers, one collective permute between devices. A matrix is taken apart into as many as its busiest peer has neighbours
and no more, which is the least possible (König 1916).

Letters: n peers, P rounds until the sequence repeats, S slots of a round, W mixing matrix.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-6
"""How far a sum of weights may be from 1."""


class Topology(NamedTuple):
    """Who hears whom; round t is that of `t mod P`."""

    name: str
    own: np.ndarray  # [P, n] float64, the weight a peer gives to its own model
    source: np.ndarray  # [P, S, n] int32, whom a peer hears in a slot; itself: nobody
    weight: np.ndarray  # [P, S, n] float64, the weight it gives to what it hears; 0 where nobody


def peers(topology: Topology) -> int:
    """How many there are, n."""
    return topology.own.shape[1]


def period(topology: Topology) -> int:
    """Rounds until the sequence repeats, P; 1 if the topology never changes."""
    return topology.own.shape[0]


def matrices(topology: Topology) -> np.ndarray:
    """[P, n, n] float64, the mixing matrices; entry [t, i, j] is the weight that i gives to what j sends.

    >>> print(matrices(from_matrix([[0.5, 0.5], [0.25, 0.75]]))[0])
    [[0.5  0.5 ]
     [0.25 0.75]]
    """
    rounds, slots, n = topology.source.shape
    dense = np.zeros((rounds, n, n))
    t, _, i = np.meshgrid(np.arange(rounds), np.arange(slots), np.arange(n), indexing="ij")
    np.add.at(dense, (t, i, topology.source), topology.weight)
    dense[:, np.arange(n), np.arange(n)] += topology.own
    return dense


def from_matrix(matrix: np.ndarray | Sequence, *, name: str = "matrix") -> Topology:
    """A topology of any mixing matrices.

    Args:
      matrix: [n, n], or [P, n, n] for one that changes; rows or columns must add up to 1, within 1e-6.
      name: for reports.

    Raises:
      ValueError: if it is not square, has a weight that is negative or not finite, or neither all its rows nor all its
        columns add up to 1; the message names the offending row.
    """
    w = np.asarray(matrix, np.float64)
    w = w[None] if w.ndim == 2 else w
    if w.ndim != 3 or w.shape[1] != w.shape[2] or not w.size:
        raise ValueError(f"from_matrix(matrix of shape {np.shape(matrix)}): give [n, n], or [P, n, n] for P rounds.")
    bad = np.argwhere(~(np.isfinite(w) & (w >= 0)))
    if bad.size:
        t, i, j = bad[0]
        raise ValueError(
            f"from_matrix(matrix): row {i}{_when(w, t)} gives peer {j} the weight {w[t, i, j]}; weights must be finite "
            "and at least 0."
        )
    if _off(w.sum(2)) and _off(w.sum(1)):
        rows = _complaint("from_matrix(matrix)", "row", w.sum(2))
        raise ValueError(f"{rows} (nor do the columns); divide each row by its sum.")
    rounds = [permutations_of(one != 0) for one in w]
    return of_slots(
        name, np.einsum("tii->ti", w), rounds, [w[t][np.arange(w.shape[1]), source] for t, source in enumerate(rounds)]
    )


def of_slots(
    name: str, own: np.ndarray, source: Sequence[np.ndarray], weight: Sequence[np.ndarray | float]
) -> Topology:
    """A topology of slots known beforehand; rounds of fewer slots are filled up with empty ones.

    Args:
      name: for reports.
      own: [P, n].
      source: of each round, [S_t, n]; a peer itself where it hears nobody.
      weight: of each round, [S_t, n] or what can be broadcast to it; taken for 0 where nobody is heard.
    """
    own = np.asarray(own, np.float64)
    rounds, n = own.shape
    slots = max(len(one) for one in source)
    sources = np.broadcast_to(np.arange(n, dtype=np.int32), (rounds, slots, n)).copy()
    weights = np.zeros((rounds, slots, n))
    for t in range(rounds):
        count = len(source[t])
        if count:
            sources[t, :count] = source[t]
            weights[t, :count] = np.where(sources[t, :count] == np.arange(n), 0.0, weight[t])
    return Topology(name, own, sources, weights)


def permutations_of(heard: np.ndarray) -> np.ndarray:
    """Takes a graph apart into as few partial permutations as there can be.

    Every peer in turn gives each of its edges the first slot that is free at both ends; where none is, a path of edges
    that alternate between a slot free here and one free there is flipped.

    Args:
      heard: [n, n] bool, `heard[i, j]`: i hears j; the diagonal is ignored.

    Returns:
      [S, n] int32, whom each peer hears in each slot, itself where nobody; S is the largest number of peers that
      anybody hears or is heard by.
    """
    n = heard.shape[0]
    edges = np.asarray(heard, bool) & ~np.eye(n, dtype=bool)
    slots = int(max(edges.sum(0).max(), edges.sum(1).max()))
    source, target = (np.full((n, slots), -1) for _ in range(2))  # of receivers by slot, of senders by slot
    for i, j in np.argwhere(edges):
        here, there = (int(np.argmax(row == -1)) for row in (source[i], target[j]))
        if source[i, there] != -1:
            # Along a path from i, `there` becomes `here` and the reverse; it never comes to j, whose `there` is free.
            path, receiver, slot, other = [], i, there, here
            while receiver != -1 and source[receiver, slot] != -1:
                sender = source[receiver, slot]
                path.append((receiver, sender, slot))
                receiver = target[sender, other]
                if receiver != -1:
                    path.append((receiver, sender, other))
            for receiver, sender, slot in path:
                source[receiver, slot] = target[sender, slot] = -1
            for receiver, sender, slot in path:
                slot = here + there - slot
                source[receiver, slot], target[sender, slot] = sender, receiver
        source[i, there], target[j, there] = j, i
    return np.where(source == -1, np.arange(n)[:, None], source).T.astype(np.int32)


def edges(topology: Topology) -> Iterator[tuple[int, int, int, float]]:
    """All `(t, from, to, weight)`, round by round.

    >>> print(*edges(from_matrix([[0.5, 0.5], [0.0, 1.0]])))
    (0, 1, 0, 0.5)
    """
    for t, s, i in zip(*np.nonzero(topology.source != np.arange(peers(topology))), strict=True):
        yield int(t), int(topology.source[t, s, i]), int(i), float(topology.weight[t, s, i])


def pairs(topology: Topology, t: int = 0) -> list[list[tuple[int, int]]]:
    """The edges of a round as partial permutations: for each slot, all `(from, to)`.

    >>> print(pairs(from_matrix([[0.5, 0.5], [0.5, 0.5]])))
    [[(1, 0), (0, 1)]]
    """
    rows = topology.source[t % period(topology)]
    return [[(int(j), i) for i, j in enumerate(row) if i != j] for row in rows]


def check(where: str, topology: Topology) -> None:
    """Refuses what is no topology, such as a bare matrix.

    Raises:
      ValueError: saying what to do about it.
    """
    if not isinstance(topology, Topology):
        raise ValueError(
            f"{where}(topology of {type(topology).__name__}): give one of jfed.gossip.topology, such as ring(16), or "
            "from_matrix(...)."
        )


def check_rows(where: str, topology: Topology) -> None:
    """Refuses weights of which not every row adds up to 1: what a peer makes of models would be no mean of them.

    Raises:
      ValueError: naming the row.
    """
    check(where, topology)
    sums = topology.own + topology.weight.sum(1)
    if _off(sums):
        raise ValueError(
            _complaint(f"{where}(topology={topology.name!r})", "row", sums)
            + "; take weights such as topology.metropolis, or push_sum, which can do with columns."
        )


def check_columns(where: str, topology: Topology) -> None:
    """Refuses weights of which not every column adds up to 1: what a peer sends would not be all it has.

    Raises:
      ValueError: naming the column.
    """
    check(where, topology)
    sums = topology.own.copy()
    for t, slots in enumerate(topology.source):
        np.add.at(sums[t], slots, topology.weight[t])
    if _off(sums):
        raise ValueError(
            _complaint(f"{where}(topology={topology.name!r})", "column", sums)
            + "; take weights such as topology.metropolis, or topology.push for directed graphs."
        )


def check_keeps(where: str, topology: Topology) -> None:
    """Refuses weights by which a peer keeps nothing of its own.

    Raises:
      ValueError: naming the peer.
    """
    check(where, topology)
    bad = np.argwhere(topology.own <= 0)
    if bad.size:
        t, i = bad[0]
        raise ValueError(
            f"{where}(topology={topology.name!r}): peer {i}{_when(topology.own, t)} gives its own model no weight; "
            "take topology.push, or topology.lazy(topology)."
        )


def check_symmetric(where: str, topology: Topology) -> None:
    """Refuses matrices that are not symmetric.

    Raises:
      ValueError: naming two peers.
    """
    check(where, topology)
    w = matrices(topology)
    bad = np.argwhere(np.abs(w - w.swapaxes(1, 2)) > TOLERANCE)
    if bad.size:
        t, i, j = bad[0]
        raise ValueError(
            f"{where}(topology={topology.name!r}): row {i}{_when(w, t)} gives peer {j} {w[t, i, j]:.6g}, and row {j} "
            f"gives peer {i} {w[t, j, i]:.6g}; take an undirected graph with topology.metropolis weights."
        )


def check_static(where: str, topology: Topology) -> None:
    """Refuses a topology that changes.

    Raises:
      ValueError: if its period is not 1.
    """
    check(where, topology)
    if period(topology) > 1:
        raise ValueError(
            f"{where}(topology={topology.name!r}): it changes, with a period of {period(topology)} rounds, and what "
            "peers remember of their neighbours would be of others; take one that stays."
        )


def _off(sums: np.ndarray) -> bool:
    return bool(np.any(np.abs(sums - 1) > TOLERANCE))


def _complaint(where: str, what: str, sums: np.ndarray) -> str:
    t, i = np.argwhere(np.abs(sums - 1) > TOLERANCE)[0]
    return f"{where}: {what} {i}{_when(sums, t)} adds up to {sums[t, i]:.6g}, not 1"


def _when(rounds: np.ndarray, t: int) -> str:
    return f" of round {t}" if len(rounds) > 1 else ""
