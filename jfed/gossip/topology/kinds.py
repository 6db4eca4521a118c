"""Graphs with a name, each as few permutations as its busiest peer has neighbours.

Where all peers look alike, as on rings and tori, a slot is one shift (or one flipped bit) of all peers; the others are
taken apart by `graph.permutations_of`. Unless said otherwise the weights are `metropolis`, which on a graph whose peers
all have d neighbours are 1 / (d + 1). Any function of `heard` [n, n] that returns weights [n, n] may take their place.

Letters: n peers, d neighbours of each, W mixing matrix.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jfed import _validate
from jfed.gossip.topology.graph import Topology, check_columns, check_rows, from_matrix, of_slots
from jfed.gossip.topology.weights import adjacency, metropolis, uniform

Weights = Callable[[np.ndarray], np.ndarray]
"""`heard` [n, n] bool -> W [n, n] float64."""

_CURE = "a good start is 16"


def ring(n: int, *, weights: Weights = metropolis) -> Topology:
    """Everyone hears the one before and the one after; two slots.

    Spectral gap 1 - (1 + 2 cos(2 pi / n)) / 3 for n of at least 3, diameter n // 2.

    Args:
      n: peers; two have one edge, one has none.
      weights: of the graph.

    Raises:
      ValueError: if n is no whole number of at least 1, or the weights do not suit.

    >>> print(ring(4).source[0])
    [[1 2 3 0]
     [3 0 1 2]]
    """
    _validate.at_least_one("ring", "n", n, _CURE)
    return _of_sources("ring", "ring", _shifts(n, [1, -1]), weights)


def directed_ring(n: int, *, weights: Weights = uniform) -> Topology:
    """Everyone hears the one after, and not the reverse; one slot, weights 1/2.

    Args:
      n: peers.
      weights: of the graph; these must suit directed graphs.

    Raises:
      ValueError: if n is no whole number of at least 1, or the weights do not suit.

    >>> print(directed_ring(4).source[0], directed_ring(4).own[0])
    [[1 2 3 0]] [0.5 0.5 0.5 0.5]
    """
    _validate.at_least_one("directed_ring", "n", n, _CURE)
    return _of_sources("directed_ring", "directed ring", _shifts(n, [1]), weights)


def chain(n: int, *, weights: Weights = metropolis) -> Topology:
    """A ring with one edge cut, or path: spectral gap (2 - 2 cos(pi / n)) / 3 for n of at least 3, diameter n - 1.

    Args:
      n: peers.
      weights: of the graph.

    Raises:
      ValueError: if n is no whole number of at least 1, or the weights do not suit.

    >>> print(chain(4).source[0])
    [[1 2 3 3]
     [0 0 1 2]]
    """
    _validate.at_least_one("chain", "n", n, _CURE)
    return _undirected("chain", n, np.arange(n - 1), np.arange(1, n), weights)


def torus(rows: int, columns: int, *, weights: Weights = metropolis) -> Topology:
    """A grid whose edges meet: everyone hears four, by four shifts; peer `r columns + c` is in row r, column c.

    Two rows (or columns) are joined once, not twice; one is a ring. Spectral gap, with both at least 3,
    (2 - 2 cos(2 pi / max(rows, columns))) / 5; diameter rows // 2 + columns // 2.

    Args:
      rows: of peers.
      columns: of peers.
      weights: of the graph.

    Raises:
      ValueError: if one is no whole number of at least 1, or the weights do not suit.

    >>> print(torus(3, 3).source[0, :, 0], torus(2, 2).source[0, :, 0])
    [3 6 1 2] [2 1]
    """
    _validate.at_least_one("torus", "rows", rows, "a good start is 4")
    _validate.at_least_one("torus", "columns", columns, "a good start is 4")
    place = np.arange(rows * columns).reshape(rows, columns)
    sources = [np.roll(place, -step, axis).ravel() for axis in (0, 1) for step in (1, -1)]
    return _of_sources("torus", f"torus {rows}x{columns}", sources, weights)


def grid(rows: int, columns: int, *, weights: Weights = metropolis) -> Topology:
    """A rectangle of peers that hear those beside, above and below; peer `r columns + c` is in row r, column c.

    Diameter rows + columns - 2.

    Args:
      rows: of peers.
      columns: of peers.
      weights: of the graph.

    Raises:
      ValueError: if one is no whole number of at least 1, or the weights do not suit.

    >>> print(np.sort(grid(3, 3).source[0, :, 4]))
    [1 3 5 7]
    """
    _validate.at_least_one("grid", "rows", rows, "a good start is 4")
    _validate.at_least_one("grid", "columns", columns, "a good start is 4")
    place = np.arange(rows * columns).reshape(rows, columns)
    one = np.concatenate([place[1:].ravel(), place[:, 1:].ravel()])
    other = np.concatenate([place[:-1].ravel(), place[:, :-1].ravel()])
    return _undirected(f"grid {rows}x{columns}", rows * columns, one, other, weights)


def hypercube(n: int, *, weights: Weights = metropolis) -> Topology:
    """Everyone hears those whose number differs in one bit; log2 n slots.

    Spectral gap 2 / (1 + log2 n), diameter log2 n.

    Args:
      n: peers, a power of 2.
      weights: of the graph.

    Raises:
      ValueError: if n is no power of 2, or the weights do not suit.

    >>> print(hypercube(4).source[0])
    [[1 0 3 2]
     [2 3 0 1]]
    """
    _validate.at_least_one("hypercube", "n", n, _CURE)
    if n & (n - 1):
        raise ValueError(
            f"hypercube(n={n}): n must be a power of 2; take {1 << n.bit_length() - 1}, or exponential({n})."
        )
    sources = [np.arange(n) ^ (1 << bit) for bit in range(n.bit_length() - 1)]
    return _of_sources("hypercube", "hypercube", sources, weights)


def complete(n: int) -> Topology:
    """Everyone hears all: W = 11^T / n, the mean in one round; n - 1 slots.

    Args:
      n: peers.

    Raises:
      ValueError: if n is no whole number of at least 1.

    >>> print(complete(3).source[0], complete(4).own[0])
    [[1 2 0]
     [2 0 1]] [0.25 0.25 0.25 0.25]
    """
    _validate.at_least_one("complete", "n", n, _CURE)
    sources = (np.arange(n) + np.arange(1, n)[:, None]) % n
    return of_slots("complete", np.full((1, n), 1 / n), [sources], [1 / n])


def star(n: int, *, weights: Weights = metropolis) -> Topology:
    """All hear peer 0, which hears all: n - 1 slots, as 0 is party to every edge.

    Spectral gap 1 / n for n of at least 3, diameter 2.

    Args:
      n: peers.
      weights: of the graph.

    Raises:
      ValueError: if n is no whole number of at least 1, or the weights do not suit.

    >>> print(star(3).source[0])
    [[2 0 2]
     [1 1 0]]
    """
    _validate.at_least_one("star", "n", n, _CURE)
    return _undirected("star", n, np.zeros(n - 1, int), np.arange(1, n), weights)


def binary_tree(n: int, *, weights: Weights = metropolis) -> Topology:
    """Peer i is the parent of 2 i + 1 and 2 i + 2, as far as there are that many.

    Args:
      n: peers; 2^depth - 1 fill all rows.
      weights: of the graph.

    Raises:
      ValueError: if n is no whole number of at least 1, or the weights do not suit.

    >>> print(binary_tree(3).source[0])
    [[2 0 2]
     [1 1 0]]
    """
    _validate.at_least_one("binary_tree", "n", n, "a good start is 15")
    child = np.arange(1, n)
    return _undirected("binary tree", n, (child - 1) // 2, child, weights)


def exponential(n: int, *, weights: Weights = uniform) -> Topology:
    """The static exponential graph: i hears i + 1, i + 2, i + 4, ... (mod n), ceil(log2 n) slots; directed.

    As everyone hears and is heard by equally many, rows and columns add up to 1. Spectral gap 2 / (1 + ceil(log2 n))
    for even n, more for odd. Source: Ying et al. 2021 (arXiv:2110.13363).

    Args:
      n: peers.
      weights: of the graph; these must suit directed graphs.

    Raises:
      ValueError: if n is no whole number of at least 1, or the weights do not suit.

    >>> print(exponential(5).source[0])
    [[1 2 3 4 0]
     [2 3 4 0 1]
     [4 0 1 2 3]]
    """
    _validate.at_least_one("exponential", "n", n, _CURE)
    return _of_sources("exponential", "exponential", _shifts(n, [1 << k for k in range((n - 1).bit_length())]), weights)


def from_graph(heard: np.ndarray | Sequence, *, weights: Weights = metropolis, name: str = "graph") -> Topology:
    """A topology of any graph.

    Args:
      heard: [n, n] of 0 and 1, `heard[i, j]`: i hears j; the diagonal is ignored.
      weights: of the graph.
      name: for reports.

    Raises:
      ValueError: if it is no [n, n] of 0 and 1, or the weights do not suit.

    >>> print(from_graph([[0, 1, 1], [1, 0, 1], [1, 1, 0]]).own)
    [[0.33333333 0.33333333 0.33333333]]
    """
    return from_matrix(weights(adjacency("from_graph", heard)), name=name)


def _shifts(n: int, steps: Sequence[int]) -> list[np.ndarray]:
    return [(np.arange(n) + step) % n for step in steps]


def _undirected(name: str, n: int, one: np.ndarray, other: np.ndarray, weights: Weights) -> Topology:
    """Of the edges between `one[e]` and `other[e]`."""
    heard = np.zeros((n, n), bool)
    heard[one, other] = heard[other, one] = True
    return from_graph(heard, weights=weights, name=name)


def _of_sources(where: str, name: str, sources: Sequence[np.ndarray], weights: Weights) -> Topology:
    """Of whole permutations, of which those that add no edge are left out."""
    n, slots = len(sources[0]) if len(sources) else 1, []
    heard = np.eye(n, dtype=bool)
    for source in sources:
        if not heard[np.arange(n), source].any():
            heard[np.arange(n), source] = True
            slots.append(source)
    heard &= ~np.eye(n, dtype=bool)
    w = np.asarray(weights(heard), np.float64)
    source = np.array(slots, np.int32).reshape(-1, n)
    topology = of_slots(name, np.diag(w)[None], [source], [w[np.arange(n), source]])
    try:
        check_columns(where, topology)
    except ValueError:
        check_rows(where, topology)
    return topology
