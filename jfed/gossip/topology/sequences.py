"""Graphs that change from round to round, so that few neighbours at a time do the work of many.

Rows and columns add up to 1 in every round, and a peer hears few at a time, one as a rule; yet after the last round of
a period of `one_peer_exponential` (n a power of 2) or `base_graph` (any n) everyone has the exact mean.

Letters: n peers, P rounds of the period, k the most neighbours in a round, W mixing matrix.
"""

import functools
from typing import NamedTuple

import numpy as np

from jfed import _validate
from jfed.gossip.topology.graph import Topology, from_matrix, of_slots, peers
from jfed.gossip.topology.random_graphs import generator


def one_peer_exponential(n: int) -> Topology:
    """In round t everyone averages with whoever is 2^(t mod P) further on, P = ceil(log2 n); directed.

    If n is a power of 2, P rounds from the first of a period on make the exact mean. Source: Assran et al. 2019
    (arXiv:1811.10792); that the mean is exact, Ying et al. 2021 (arXiv:2110.13363).

    Args:
      n: peers.

    Raises:
      ValueError: if n is no whole number of at least 1.

    >>> print(one_peer_exponential(4).source[:, 0])
    [[1 2 3 0]
     [2 3 0 1]]
    """
    _validate.at_least_one("one_peer_exponential", "n", n, "a good start is 16")
    rounds = (n - 1).bit_length()
    if not rounds:
        return _alone("one-peer exponential")
    sources = [(np.arange(n)[None] + (1 << t)) % n for t in range(rounds)]
    return of_slots("one-peer exponential", np.full((rounds, n), 0.5), sources, [0.5] * rounds)


def base_graph(n: int, degree: int) -> Topology:
    """The Base-(k+1) graph: the exact mean after one period, for any number of peers; undirected.

    If no prime factor of n is above k + 1, peers are the corners of a box of sides of at most k + 1, one for each
    round, in which all along that side average. Any other n is written in base k + 1, and peers form a group for each
    digit. Each group finds its mean; one after another then passes it on to all later groups, and levels out within
    itself what it got in return. Peers that would be idle meanwhile average with others of their group. Where that
    takes no more rounds, what n has of factors up to k + 1 is put off to a box at the end. P is at most
    2 log_(k+1)(n) + 2.

    Source: Takezawa et al. 2023 (arXiv:2305.11420), Algorithms 1 to 3.

    Args:
      n: peers.
      degree: k, how many a peer hears in a round at most.

    Raises:
      ValueError: if one is no whole number of at least 1.

    >>> graph = base_graph(5, 1)
    >>> print(graph.source[:, 0])
    [[1 0 3 2 4]
     [2 3 0 1 4]
     [4 2 1 3 0]
     [1 0 3 2 4]
     [2 3 0 1 4]]
    """
    _validate.at_least_one("base_graph", "n", n, "a good start is 16")
    _validate.at_least_one("base_graph", "degree", degree, "a good start is 1")
    box = functools.reduce(lambda p, f: p * f ** _times(n // p, f), range(2, degree + 2), 1)
    last = [np.kron(w, np.eye(n // box)) for w in _box(box, degree)]
    composed = [np.kron(np.eye(box), w) for w in _digits(n // box, degree)] + last
    rounds = min(composed, _digits(n, degree), key=len)
    return from_matrix(np.stack(rounds or [np.eye(n)]), name=f"base-{degree + 1}")


def random_matchings(n: int, rounds: int, *, seed: int) -> Topology:
    """In every round all peers meet in pairs, drawn anew, and average; one sits out if n is odd (Boyd et al. 2006).

    Source of gossip in random pairs, though one pair at a time: doi:10.1109/TIT.2006.874516.

    Args:
      n: peers.
      rounds: drawn before the sequence repeats, P.
      seed: a whole number of at least 0.

    Raises:
      ValueError: if an argument is out of bounds.

    >>> print(random_matchings(5, 2, seed=0).source[:, 0])
    [[4 1 3 2 0]
     [1 0 4 3 2]]
    """
    _validate.at_least_one("random_matchings", "n", n, "a good start is 16")
    _validate.at_least_one("random_matchings", "rounds", rounds, "a good start is 1000")
    rng, half = generator(f"random_matchings(n={n}, rounds={rounds})", seed), n // 2
    if n == 1:
        return _alone("random matchings", rounds)
    source = np.tile(np.arange(n), (rounds, 1, 1))
    for row in source[:, 0]:
        order = rng.permutation(n)
        row[order[:half]], row[order[half : 2 * half]] = order[half : 2 * half], order[:half]
    return of_slots("random matchings", np.where(source[:, 0] == np.arange(n), 1, 0.5), source, [0.5] * rounds)


def sequence(*topologies: Topology, name: str = "sequence") -> Topology:
    """The rounds of one topology after those of another, and over again.

    Args:
      *topologies: of equally many peers.
      name: for reports.

    Raises:
      ValueError: if there is none, or they differ in the number of peers.

    >>> from jfed.gossip import topology
    >>> print(topology.period(sequence(topology.ring(8), topology.one_peer_exponential(8))))
    4
    """
    if len({peers(one) for one in topologies}) != 1:
        sizes = ", ".join(f"{one.name} of {peers(one)}" for one in topologies)
        raise ValueError(f"sequence({sizes}): give one or more topologies, all of equally many peers.")
    rounds = [(source, weight) for one in topologies for source, weight in zip(one.source, one.weight, strict=True)]
    return of_slots(name, np.concatenate([one.own for one in topologies]), *zip(*rounds, strict=True))


def _alone(name: str, rounds: int = 1) -> Topology:
    """A single peer, which hears nobody."""
    return of_slots(name, np.ones((rounds, 1)), [np.zeros((0, 1))] * rounds, [0.0] * rounds)


def _times(n: int, factor: int) -> int:
    """How often it divides n."""
    return 0 if n % factor else 1 + _times(n // factor, factor)


@functools.cache
def _sides(n: int, limit: int) -> tuple[int, ...] | None:
    """As few numbers of at most `limit` as can be whose product is n; None if there are none."""
    if n == 1:
        return ()
    rest = {f: _sides(n // f, limit) for f in range(min(n, limit), 1, -1) if n % f == 0}
    return min(((f, *sides) for f, sides in rest.items() if sides is not None), key=len, default=None)


def _box(n: int, k: int) -> list[np.ndarray]:
    """Algorithm 1, the k-peer hyper-hypercube; no rounds for one peer."""
    rounds, inner = [], 1
    for side in _sides(n, k + 1):
        outer = np.eye(n // (inner * side))
        rounds.append(np.kron(np.kron(outer, np.full((side, side), 1 / side)), np.eye(inner)))
        inner *= side
    return rounds


class _Group(NamedTuple):
    """The peers of one digit of n in base k + 1."""

    start: int  # the first of them
    digit: int
    power: int  # digit parts of so many peers
    together: list[np.ndarray]  # rounds by which all find their mean
    apart: list[np.ndarray]  # rounds by which each part does, or all if parts are single peers


def _digits(n: int, k: int) -> list[np.ndarray]:
    """Algorithm 2, the simple Base-(k+1) graph."""
    if _sides(n, k + 1) is not None:
        return _box(n, k)
    groups, start, power = [], 0, 1
    while power * (k + 1) <= n:
        power *= k + 1
    while power:
        if digit := (n - start) // power:
            together = _box(digit * power, k) or [np.eye(1)]
            apart = [np.kron(np.eye(digit), w) for w in _box(power, k)] or together
            groups.append(_Group(start, digit, power, together, apart))
            start += digit * power
        power //= k + 1
    first = len(groups[0].together)
    return [_digits_round(n, k, groups, t, t - first) for t in range(first + 1 + len(groups[0].apart))]


def _digits_round(n: int, k: int, groups: list[_Group], t: int, since: int) -> np.ndarray:
    """Round t of Algorithm 2, `since` the first in which a group passes on its mean."""
    w = np.eye(n)
    for place, (start, digit, power, together, apart) in enumerate(groups):
        size = digit * power
        own = slice(start, start + size)
        if since < 0:
            w[own, own] = together[t % len(together)]
        elif since > place:
            w[own, own] = apart[(since - place - 1) % len(apart)]
        elif since == place:
            later, share = np.arange(start + size, n), size / (n - start)
            partners = start + np.arange(len(later)) + power * np.arange(digit)[:, None]
            w[later, partners] = w[partners, later] = share / digit
            w[later, later], w[partners, partners] = 1 - share, 1 - share / digit
            idle = np.setdiff1d(np.arange(start, start + size), partners)
            for some in np.split(idle, range(k + 1, len(idle), k + 1)):
                w[np.ix_(some, some)] = 1 / max(len(some), 1)
    return w
