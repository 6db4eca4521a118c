"""What mixers are, and what they are made of.

Letters: n peers, S slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed import compress
from jfed.core import Tree
from jfed.gossip.topology.graph import Topology
from jfed.tree import nbytes, total


def _as_it_is(tree: Tree) -> Tree:
    return tree


def _average(tree: Tree) -> Tree:
    return jax.tree.map(lambda x, s: (s / x.shape[0]).astype(x.dtype), tree, total(tree))


class Mixer(NamedTuple):
    """One topology, ready to mix."""

    topology: Topology
    combine: Callable  # (own, sent, weights, key) -> own_i own + sum_s heard_si decode(sent_j), leaves [n, ...]
    hear: Callable  # (tree, slot, round) -> what each peer hears in a slot, its own row where nobody; leaves [n, ...]
    place: Callable = _as_it_is  # tree -> the same, leaves [n, ...] where their peers are, others everywhere
    alike: Callable = _as_it_is  # small tree -> the same on all devices, in a program
    apart: Callable = _as_it_is  # leaves [n, ...] -> the same, rows with their peers, in a program
    nbytes: Callable = nbytes  # what all peers are to send, leaves [n, ...] -> bytes of it on the wire
    average: Callable = _average  # leaves [n, ...] -> their mean, leaves [...]


Mixing = Callable[[Topology], Mixer]
"""How peers are to mix, on whatever topology a method has."""


def decoded(sent: Tree) -> Tree:
    """Messages of all peers, leaves [n, ...], as the arrays that they stand for."""
    return jax.vmap(compress.decode)(sent) if compress.nodes(sent) else sent


def column(weights: jax.Array, x: jax.Array) -> jax.Array:
    """[n] as [n, 1, ...], to be multiplied with x [n, ...]."""
    return weights.reshape(weights.shape + (1,) * (jnp.ndim(x) - 1))
