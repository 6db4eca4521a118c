"""How fast a topology brings peers to agree, and how far apart they are.

The consensus distance of models x is the norm of x - mean(x); rounds of gossip shrink it. Of a sequence, all is counted
from the first round of its period.

Letters: n peers, P rounds of the period, W mixing matrix, J = 11^T / n, Pi = W_(P-1) ... W_0 the whole period.
"""

import bisect
import math

import numpy as np

from jfed import _validate
from jfed.gossip.topology.graph import (
    Topology,
    check_columns,
    check_rows,
    check_static,
    check_symmetric,
    matrices,
    peers,
    period,
)

ROUNDING = 1e-12
"""What one round shrinks by a factor below this is gone: the mean is exact."""


def spectral_gap(topology: Topology) -> float:
    """How much closer a round brings the peers: 1 - |lambda_2|, of a sequence 1 - `contraction`.

    Of one W it is 1 less the second largest modulus of its eigenvalues: with many rounds, the consensus distance
    shrinks by 1 - gap in each; if W is symmetric, from the first round on. 1 if one round (one period) makes the exact
    mean, and for a single peer; 0 if peers never agree.

    Raises:
      ValueError: of a sequence of which not every row adds up to 1.

    >>> from jfed.gossip import topology
    >>> print(round(spectral_gap(topology.hypercube(8)), 6), spectral_gap(topology.one_peer_exponential(8)))
    0.5 1.0
    """
    if peers(topology) == 1:
        return 1.0
    if period(topology) > 1:
        check_rows("spectral_gap", topology)
        return 1 - contraction(topology)
    w = matrices(topology)[0]
    eigenvalues = np.linalg.eigvalsh(w) if _symmetric(w) else np.linalg.eigvals(w)
    second = np.sort(np.abs(eigenvalues))[-2]
    return float(1 - min(second, 1)) if second > ROUNDING else 1.0


def contraction(topology: Topology) -> float:
    """The factor by which a round shrinks the consensus distance, at worst: the spectral norm of W - J.

    Of a sequence, the P-th root of that of Pi - J. Where columns do not add up to 1, the mean moves, and the norm is
    that of Pi - J Pi. 0 if the mean is exact, 1 if it may be that nothing is gained.

    Raises:
      ValueError: if not every row adds up to 1.

    >>> from jfed.gossip import topology
    >>> print(round(contraction(topology.ring(3)), 6), round(contraction(topology.ring(4)), 6))
    0.0 0.333333
    """
    check_rows("contraction", topology)
    x, logarithm = np.eye(peers(topology)) - 1 / peers(topology), 0.0
    for t in range(period(topology)):
        x = _mixed(topology, t, x)
        x -= x.mean(0)
        scale = np.linalg.norm(x)
        if scale < ROUNDING:
            return 0.0
        # Rescaled, or a thousand rounds would be lost in rounding.
        x, logarithm = x / scale, logarithm + np.log(scale)
    return float(np.exp((logarithm + np.log(_norm(x))) / period(topology)))


def mixing_time(topology: Topology, epsilon: float = 1e-3) -> int | float:
    """The fewest rounds after which the consensus distance is at most epsilon times the first, whatever the models.

    Args:
      topology: of which rows and columns add up to 1.
      epsilon: in [1e-12, 1].

    Returns:
      Rounds, 0 for a single peer; `math.inf` if it never comes to that.

    Raises:
      ValueError: if `epsilon` is not in [1e-12, 1], or rows or columns do not add up to 1.

    >>> from jfed.gossip import topology
    >>> print(mixing_time(topology.ring(16)), mixing_time(topology.one_peer_exponential(16)))
    133 4
    """
    _validate.within("mixing_time", "epsilon", epsilon, 1e-12, 1, "a good start is 1e-3")
    check_rows("mixing_time", topology)
    check_columns("mixing_time", topology)
    n, rounds = peers(topology), period(topology)
    if n == 1 or epsilon == 1:
        return 0
    if rounds == 1 and _symmetric(matrices(topology)[0]):
        return _rounds_of(contraction(topology), epsilon)

    def mixed(x, until):
        for t in range(until):
            x = _mixed(topology, t, x)
        return x

    start = np.eye(n) - 1 / n
    powers = [mixed(start, rounds)]
    while _norm(powers[-1]) > epsilon:
        # What n periods have not shrunk, no number of periods will.
        if 2 ** (len(powers) - 1) >= n and _norm(powers[-1]) > 1 - 1e-9:
            return math.inf
        powers.append(powers[-1] @ powers[-1])
    whole = 0
    for doublings in reversed(range(len(powers) - 1)):
        further = powers[doublings] @ start
        if _norm(further) > epsilon:
            start, whole = further, whole + 2**doublings
    rest = bisect.bisect_left(range(rounds), True, key=lambda t: _norm(mixed(start, t + 1)) <= epsilon)
    return whole * rounds + rest + 1


def diameter(topology: Topology) -> int | float:
    """The most edges that news must pass to go from one peer to another, over the edges of all rounds.

    Returns:
      Edges, 0 for a single peer; `math.inf` if there is somewhere that news never comes.

    >>> from jfed.gossip import topology
    >>> print(diameter(topology.ring(9)), diameter(topology.star(9)), diameter(topology.directed_ring(9)))
    4 2 8
    """
    n = peers(topology)
    sources = topology.source.reshape(-1, n)
    sources = np.unique(sources, axis=0) if len(sources) else sources
    heard_of = np.packbits(np.eye(n, dtype=bool), axis=1)
    everyone = np.packbits(np.ones(n, bool))
    edges = 0
    while (heard_of != everyone).any():
        further = heard_of.copy()
        for source in sources:
            further |= heard_of[source]
        if (further == heard_of).all():
            return math.inf
        heard_of, edges = further, edges + 1
    return edges


def is_connected(topology: Topology) -> bool:
    """Whether news from every peer comes to every other, over the edges of all rounds.

    >>> from jfed.gossip import topology
    >>> print(is_connected(topology.ring(4)), is_connected(topology.from_matrix([[1.0, 0.0], [0.0, 1.0]])))
    True False
    """
    return math.isfinite(diameter(topology))


def smallest_eigenvalue(topology: Topology) -> float:
    """The smallest eigenvalue of a symmetric W; D2 needs one above -1/3, which `lazy` sees to.

    Raises:
      ValueError: if the topology changes, or is not symmetric.

    >>> from jfed.gossip import topology
    >>> graph = topology.from_matrix([[0.0, 1.0], [1.0, 0.0]])
    >>> print(smallest_eigenvalue(graph), smallest_eigenvalue(topology.lazy(graph, 0.25)))
    -1.0 0.5
    """
    check_static("smallest_eigenvalue", topology)
    check_symmetric("smallest_eigenvalue", topology)
    return float(np.linalg.eigvalsh(matrices(topology)[0])[0])


def _mixed(topology: Topology, t: int, x: np.ndarray) -> np.ndarray:
    """W_t x, for x [n, n]; by slots where they are few, as a slot takes n^2 and a product n^3."""
    one = Topology(topology.name, *(rounds[t : t + 1] for rounds in topology[1:]))
    if one.source.shape[1] > 8:
        return matrices(one)[0] @ x
    slots = zip(one.source[0], one.weight[0, :, :, None], strict=True)
    return sum((weight * x[source] for source, weight in slots), one.own[0, :, None] * x)


def _rounds_of(factor: float, epsilon: float) -> int | float:
    """Until `factor ** rounds` is at most epsilon; a factor as near to 1 as rounding allows is taken for 1."""
    if factor <= epsilon:
        return 1
    return math.ceil(math.log(epsilon) / math.log(factor) - 1e-9) if factor < 1 - ROUNDING else math.inf


def _norm(x: np.ndarray) -> float:
    """The spectral norm, by eigenvalues, which takes a third of the time of `np.linalg.norm`."""
    return float(np.sqrt(max(np.linalg.eigvalsh(x.T @ x)[-1], 0)))


def _symmetric(w: np.ndarray) -> bool:
    return bool(np.abs(w - w.T).max() < ROUNDING)
