"""Random graphs, drawn anew until they are connected.

All are undirected, drawn from `numpy.random.default_rng(seed)`: the same seed gives the same graph.

Letters: n peers, d neighbours of each.
"""

from collections.abc import Callable

import numpy as np

from jfed import _validate
from jfed.gossip.topology.graph import Topology
from jfed.gossip.topology.kinds import Weights, from_graph
from jfed.gossip.topology.weights import metropolis

ATTEMPTS = 100
"""Graphs drawn before a connected one is given up."""


def erdos_renyi(n: int, probability: float, *, seed: int, weights: Weights = metropolis) -> Topology:
    """Each pair of peers is joined by chance, independently of the others (Gilbert 1959, doi:10.1214/aoms/1177706098).

    Above a probability of ln(n) / n most are connected.

    Args:
      n: peers.
      probability: of an edge, in [0, 1].
      seed: a whole number of at least 0.
      weights: of the graph.

    Raises:
      ValueError: if an argument is out of bounds, or none of 100 graphs is connected.

    >>> print(erdos_renyi(6, 0.4, seed=0).source.shape)
    (1, 4, 6)
    """
    _validate.at_least_one("erdos_renyi", "n", n, "a good start is 16")
    _validate.within("erdos_renyi", "probability", probability, 0, 1, "a good start is 2 ln(n) / n")

    def draw(rng):
        upper = np.triu(rng.random((n, n)) < probability, 1)
        return upper | upper.T

    given = f"erdos_renyi(n={n}, probability={probability})"
    heard = _connected(given, seed, draw, f"take a probability above {2 * np.log(n) / n:.2g}")
    return from_graph(heard, weights=weights, name="Erdos-Renyi")


def random_regular(n: int, degree: int, *, seed: int, weights: Weights = metropolis) -> Topology:
    """Everyone has equally many neighbours, chance says whom; with 3 or more an expander, almost surely.

    Ends of edges are paired by chance; pairs that would join a peer to itself, or two twice, are broken up and paired
    again. A graph of more than half of all edges is what one of fewer leaves out. Source: Steger and Wormald 1999,
    Generating random regular graphs quickly, Combinatorics, Probability and Computing 8.

    Args:
      n: peers.
      degree: d, at least 1 and below n; n d must be even.
      seed: a whole number of at least 0.
      weights: of the graph.

    Raises:
      ValueError: if an argument is out of bounds, or none of 100 graphs is connected, as with d = 1.

    >>> graph = random_regular(10, 3, seed=0)
    >>> print(graph.own[0, 0], (graph.weight[0] > 0).sum(0))
    0.25 [3 3 3 3 3 3 3 3 3 3]
    """
    _validate.at_least_one("random_regular", "n", n, "a good start is 16")
    _validate.at_least_one("random_regular", "degree", degree, "a good start is 4")
    if degree >= n or n * degree % 2:
        raise ValueError(
            f"random_regular(n={n}, degree={degree}): degree must be below n and n degree even; change one."
        )
    fewer = min(degree, n - 1 - degree)

    def draw(rng):
        heard = _regular(rng, n, fewer)
        return heard if fewer == degree else ~heard & ~np.eye(n, dtype=bool)

    given = f"random_regular(n={n}, degree={degree})"
    heard = _connected(given, seed, draw, "take a degree of at least 3")
    return from_graph(heard, weights=weights, name=f"random {degree}-regular")


def small_world(n: int, neighbours: int, rewire: float, *, seed: int, weights: Weights = metropolis) -> Topology:
    """A ring on which everyone hears the nearest, with some edges led elsewhere (Watts and Strogatz 1998).

    Each edge to one further round the ring keeps that end with probability 1 - `rewire`; otherwise it goes to any other
    peer that is no neighbour yet, if there is one. Source: doi:10.1038/30918.

    Args:
      n: peers.
      neighbours: of each before rewiring, half on either side: even, at least 2 and below n.
      rewire: probability, in [0, 1].
      seed: a whole number of at least 0.
      weights: of the graph.

    Raises:
      ValueError: if an argument is out of bounds, or none of 100 graphs is connected.

    >>> print(len(small_world(12, 4, 0.0, seed=0).source[0]))
    4
    """
    _validate.at_least_one("small_world", "n", n, "a good start is 16")
    _validate.at_least_one("small_world", "neighbours", neighbours, "a good start is 4")
    _validate.within("small_world", "rewire", rewire, 0, 1, "a good start is 0.1")
    if neighbours >= n or neighbours % 2:
        raise ValueError(f"small_world(n={n}, neighbours={neighbours}): neighbours must be even and below n; try 4.")

    def draw(rng):
        heard = np.zeros((n, n), bool)
        steps = np.arange(1, neighbours // 2 + 1)
        here, there = np.repeat(np.arange(n), len(steps)), (np.arange(n)[:, None] + steps).ravel() % n
        heard[here, there] = heard[there, here] = True
        for e in np.flatnonzero(rng.random(len(here)) < rewire):
            i, j = here[e], there[e]
            free = np.flatnonzero(~heard[i] & (np.arange(n) != i))
            if free.size:
                heard[i, j] = heard[j, i] = False
                j = rng.choice(free)
                heard[i, j] = heard[j, i] = True
        return heard

    given = f"small_world(n={n}, neighbours={neighbours}, rewire={rewire})"
    heard = _connected(given, seed, draw, "take more neighbours, or rewire less")
    return from_graph(heard, weights=weights, name="small world")


def geometric(n: int, radius: float, *, seed: int, weights: Weights = metropolis) -> Topology:
    """Peers scattered over a square hear all within a radius, as radios do (Gilbert 1961, doi:10.1137/0109045).

    Above a radius of sqrt(ln(n) / (pi n)) most are connected. `geometric_positions` tells where the peers are.

    Args:
      n: peers.
      radius: above 0; the square's side is 1.
      seed: a whole number of at least 0.
      weights: of the graph.

    Raises:
      ValueError: if an argument is out of bounds, or none of 100 graphs is connected.

    >>> print(geometric(6, 0.6, seed=0).source.shape)
    (1, 4, 6)
    """
    heard = _near(geometric_positions(n, radius, seed=seed), radius)
    return from_graph(heard, weights=weights, name="geometric")


def geometric_positions(n: int, radius: float, *, seed: int) -> np.ndarray:
    """[n, 2] float64, where the peers of `geometric`, given the same, are in the square from 0 to 1.

    Args:
      n: peers.
      radius: above 0.
      seed: a whole number of at least 0.

    Raises:
      ValueError: if an argument is out of bounds, or none of 100 graphs is connected.

    >>> print(geometric_positions(2, 1.5, seed=0).round(2))
    [[0.64 0.27]
     [0.04 0.02]]
    """
    _validate.at_least_one("geometric", "n", n, "a good start is 16")
    _validate.positive("geometric", "radius", radius, "a good start is 0.3")
    given, enough = f"geometric(n={n}, radius={radius})", np.sqrt(2 * np.log(n) / (np.pi * n))
    return _connected(
        given, seed, lambda rng: rng.random((n, 2)), f"try {enough:.2g}", lambda drawn: _near(drawn, radius)
    )


def _near(positions: np.ndarray, radius: float) -> np.ndarray:
    distance = np.linalg.norm(positions[:, None] - positions, axis=2)
    return (distance <= radius) & ~np.eye(len(positions), dtype=bool)


def _regular(rng: np.random.Generator, n: int, degree: int) -> np.ndarray:
    """[n, n] bool; starts over where the ends that are left can no longer be paired."""
    while True:
        heard, ends = np.zeros((n, n), bool), np.repeat(np.arange(n), degree)
        while ends.size:
            here, there = np.sort(rng.permutation(ends).reshape(-1, 2), axis=1).T
            _, first = np.unique(here * n + there, return_index=True)
            fit = np.isin(np.arange(len(here)), first) & (here != there) & ~heard[here, there]
            heard[here[fit], there[fit]] = heard[there[fit], here[fit]] = True
            ends = np.concatenate([here[~fit], there[~fit]])
            left = np.unique(ends)
            if heard[np.ix_(left, left)].sum() == len(left) * (len(left) - 1):
                break
        if not ends.size:
            return heard


def generator(given: str, seed: int) -> np.random.Generator:
    """Of numbers drawn at `seed`.

    Raises:
      ValueError: if it is no whole number of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"{given[:-1]}, seed={seed!r}): seed must be a whole number of at least 0; a good start is 0.")
    return np.random.default_rng(seed)


def _connected(
    given: str, seed: int, draw: Callable, cure: str, graph_of: Callable = lambda drawn: drawn
) -> np.ndarray:
    """The first thing drawn whose graph is connected."""
    rng = generator(given, seed)
    for _ in range(ATTEMPTS):
        drawn = draw(rng)
        heard = graph_of(drawn)
        reached = np.arange(len(heard)) == 0
        while (further := reached | heard[reached].any(0)).sum() > reached.sum():
            reached = further
        if reached.all():
            return drawn
    raise ValueError(f"{given}: none of {ATTEMPTS} graphs drawn is connected; {cure}.")
