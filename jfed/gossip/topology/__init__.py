"""Topologies: who hears whom, round by round, with which weights.

    graph            the type, any matrix taken apart into permutations, edge lists, checks of rows and columns
    weights          Metropolis-Hastings; uniform and push, for directed graphs; lazy
    kinds            graphs with a name, and any graph
    random_graphs    drawn until connected
    sequences        changing from round to round: exact means by one neighbour at a time, matchings, one after another
    measures         spectral gap, contraction, mixing time, diameter

    topology              slots          diameter                    spectral gap (n of at least 3)
    ring                  2              n // 2                      1 - (1 + 2 cos(2 pi / n)) / 3
    chain                 2              n - 1                       (2 - 2 cos(pi / n)) / 3
    star                  n - 1          2                           1 / n
    torus, r x c          4              r // 2 + c // 2             (2 - 2 cos(2 pi / max(r, c))) / 5
    hypercube             log2 n         log2 n                      2 / (1 + log2 n)
    exponential           ceil(log2 n)   at most ceil(log2 n)        2 / (1 + ceil(log2 n)), n even
    complete              n - 1          1                           1
    one_peer_exponential  1              at most ceil(log2 n)        1, n a power of 2
    base_graph            k              at most 2 log_(k+1) n + 2   1

All is numpy in float64, made once before anything compiles.
"""

from jfed.gossip.topology.graph import Topology, edges, from_matrix, matrices, pairs, peers, period
from jfed.gossip.topology.kinds import (
    binary_tree,
    chain,
    complete,
    directed_ring,
    exponential,
    from_graph,
    grid,
    hypercube,
    ring,
    star,
    torus,
)
from jfed.gossip.topology.measures import (
    contraction,
    diameter,
    is_connected,
    mixing_time,
    smallest_eigenvalue,
    spectral_gap,
)
from jfed.gossip.topology.random_graphs import (
    erdos_renyi,
    geometric,
    geometric_positions,
    random_regular,
    small_world,
)
from jfed.gossip.topology.sequences import base_graph, one_peer_exponential, random_matchings, sequence
from jfed.gossip.topology.weights import lazy, metropolis, push, uniform

__all__ = [
    "Topology",
    "base_graph",
    "binary_tree",
    "chain",
    "complete",
    "contraction",
    "diameter",
    "directed_ring",
    "edges",
    "erdos_renyi",
    "exponential",
    "from_graph",
    "from_matrix",
    "geometric",
    "geometric_positions",
    "grid",
    "hypercube",
    "is_connected",
    "lazy",
    "matrices",
    "metropolis",
    "mixing_time",
    "one_peer_exponential",
    "pairs",
    "peers",
    "period",
    "push",
    "random_matchings",
    "random_regular",
    "ring",
    "sequence",
    "small_world",
    "smallest_eigenvalue",
    "spectral_gap",
    "star",
    "torus",
    "uniform",
]
