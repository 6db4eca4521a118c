"""Weights for a graph: how much of a model is a peer's own, and how much its neighbours'.

`heard[i, j]` says that i hears j; the diagonal is ignored. `metropolis` makes rows and columns add up to 1, for which
every edge must go both ways. On directed graphs one can have rows (`uniform`), which draw all peers to one model,
though not to the mean; or columns (`push`), which keep the sum, so that push-sum finds the mean.

Letters: n peers, d_i the neighbours of peer i, W mixing matrix.
"""

from collections.abc import Sequence

import numpy as np

from jfed import _validate
from jfed.gossip.topology.graph import Topology


def metropolis(heard: np.ndarray | Sequence) -> np.ndarray:
    """Metropolis-Hastings weights: an edge between i and j has 1 / (1 + max(d_i, d_j)), a peer keeps the rest.

    Symmetric, so that rows and columns add up to 1; each peer need only know its neighbours' degrees. Source: Xiao,
    Boyd and Lall 2005 (doi:10.1109/IPSN.2005.1440896).

    Args:
      heard: [n, n] bool, symmetric.

    Returns:
      [n, n] float64.

    Raises:
      ValueError: if it is no [n, n] of 0 and 1, or one peer hears another that does not hear it.

    >>> print(metropolis([[0, 1, 0], [1, 0, 1], [0, 1, 0]]) * 3)
    [[2. 1. 0.]
     [1. 1. 1.]
     [0. 1. 2.]]
    """
    graph = adjacency("metropolis", heard)
    bad = np.argwhere(graph & ~graph.T)
    if bad.size:
        i, j = bad[0]
        raise ValueError(
            f"metropolis(heard): peer {i} hears peer {j}, which does not hear it; take an undirected graph, or weights "
            "for a directed one, topology.uniform or topology.push."
        )
    degree = graph.sum(1)
    w = graph / (1 + np.maximum(degree[:, None], degree))
    return w + np.diag(1 - w.sum(1))


def uniform(heard: np.ndarray | Sequence) -> np.ndarray:
    """A peer weighs itself and all it hears alike: 1 / (1 + how many it hears).

    Rows add up to 1. Columns do as well where all peers hear and are heard by equally many.

    Args:
      heard: [n, n] bool.

    Returns:
      [n, n] float64.

    Raises:
      ValueError: if it is no [n, n] of 0 and 1.

    >>> print(uniform([[0, 1], [0, 0]]))
    [[0.5 0.5]
     [0.  1. ]]
    """
    kept = adjacency("uniform", heard) | np.eye(len(heard), dtype=bool)
    return kept / kept.sum(1, keepdims=True)


def push(heard: np.ndarray | Sequence) -> np.ndarray:
    """A peer splits what it has over itself and all that hear it alike: 1 / (1 + how many do).

    Columns add up to 1, as push-sum needs; a peer need only know how many it sends to. Source: Nedić and Olshevsky 2013
    (arXiv:1303.2289).

    Args:
      heard: [n, n] bool.

    Returns:
      [n, n] float64.

    Raises:
      ValueError: if it is no [n, n] of 0 and 1.

    >>> print(push([[0, 1], [0, 0]]))
    [[1.  0.5]
     [0.  0.5]]
    """
    kept = adjacency("push", heard) | np.eye(len(heard), dtype=bool)
    return kept / kept.sum(0)


def lazy(topology: Topology, share: float = 0.5) -> Topology:
    """Peers that go only part of the way: (1 - share) I + share W.

    Halfway, no eigenvalue of a symmetric W is below 0; D2 needs them above -1/3.

    Args:
      topology: with W.
      share: in (0, 1]; 1 changes nothing.

    Raises:
      ValueError: if `share` is not in (0, 1].

    >>> from jfed.gossip.topology import from_matrix, matrices
    >>> print(matrices(lazy(from_matrix([[0.0, 1.0], [1.0, 0.0]])))[0])
    [[0.5 0.5]
     [0.5 0.5]]
    """
    _validate.positive("lazy", "share", share, "0.5 makes no eigenvalue negative")
    _validate.within("lazy", "share", share, 0, 1, "0.5 makes no eigenvalue negative")
    return topology._replace(
        name=f"lazy {topology.name}", own=1 - share + share * topology.own, weight=share * topology.weight
    )


def adjacency(where: str, heard: np.ndarray | Sequence) -> np.ndarray:
    """[n, n] bool, the graph without its diagonal.

    Raises:
      ValueError: if it is no [n, n] of 0 and 1.
    """
    graph = np.asarray(heard)
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1] or not graph.size or not np.isin(graph, (0, 1)).all():
        raise ValueError(f"{where}(heard of shape {graph.shape}): give [n, n] of 0 and 1; heard[i, j]: i hears j.")
    return graph.astype(bool) & ~np.eye(len(graph), dtype=bool)
