"""Mixing on one device: as a product of matrices, or by gathering rows.

Letters: n peers, S slots, P rounds until the topology repeats.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jfed.core import Tree
from jfed.gossip.mix.mixer import Mixer, Mixing, column, decoded
from jfed.gossip.mix.weights import Weights
from jfed.gossip.topology.graph import Topology, peers, period


def dense() -> Mixing:
    """A product with the mixing matrix: for graphs in which most peers hear each other. On one device.

    A number that is not finite, of a peer that anybody hears, reaches everybody, as 0 times it is not 0.
    """

    def mixing(topology: Topology) -> Mixer:
        n = peers(topology)

        def combine(own: Tree, sent: Tree, weights: Weights, key: jax.Array) -> Tree:
            del key
            source = _of_round(topology, weights.round)
            me = jnp.broadcast_to(jnp.arange(n)[None], source.shape)
            matrix = jnp.zeros((n, n)).at[me, source].add(weights.heard)
            spoken = jnp.any(matrix != 0, axis=0)  # who is heard by anybody
            hears = jnp.any(matrix != 0, axis=1)

            def product(x):
                rows = jnp.matmul(matrix, x.reshape(n, -1), precision=lax.Precision.HIGHEST)
                return rows.reshape(x.shape)

            def one(x, y):
                if sent is own:  # of differences to somebody's who is heard, which are 0 where all agree
                    z = x - jnp.take(x, jnp.argmax(spoken), axis=0)[None]
                    y = jnp.where(column(spoken, x), z, 0)
                    mixed = (
                        column(weights.total, x) * x
                        - jnp.where(column(hears, x), column(jnp.sum(weights.heard, 0), x) * z, 0)
                        + product(y)
                    )
                else:
                    mixed = column(weights.own, x) * x + product(jnp.where(column(spoken, y), y, 0))
                return mixed.astype(x.dtype)

            return jax.tree.map(one, own, own if sent is own else decoded(sent))

        return Mixer(topology, combine, _by_rows(topology))

    return mixing


def sparse() -> Mixing:
    """Slot by slot, by gathering the rows that are heard: for graphs of few neighbours. On one device."""

    def mixing(topology: Topology) -> Mixer:
        def combine(own: Tree, sent: Tree, weights: Weights, key: jax.Array) -> Tree:
            del key
            source = _of_round(topology, weights.round)
            what = own if sent is own else decoded(sent)

            def one(x, y):
                mixed = column(weights.total, x) * x

                def add(s, mixed):
                    heard = column(weights.heard[s], y)
                    return mixed + jnp.where(heard != 0, heard * (jnp.take(y, source[s], axis=0) - x), 0)

                slots = source.shape[0]
                if slots > _UNROLLED:
                    return lax.fori_loop(0, slots, add, mixed).astype(x.dtype)
                for s in range(slots):
                    mixed = add(s, mixed)
                return mixed.astype(x.dtype)

            return jax.tree.map(one, own, what)

        return Mixer(topology, combine, _by_rows(topology))

    return mixing


def automatic() -> Mixing:
    """`dense` where peers hear more than an eighth of all, `sparse` where they hear fewer. On one device."""

    def mixing(topology: Topology) -> Mixer:
        return (dense() if topology.source.shape[1] * 8 > peers(topology) else sparse())(topology)

    return mixing


_UNROLLED = 16  # slots; more are a loop, so that programs stay small


def _of_round(topology: Topology, round: jax.Array) -> jax.Array:
    """[S, n], whom peers hear."""
    if period(topology) == 1:
        return jnp.asarray(topology.source[0])
    return jnp.asarray(topology.source)[round % period(topology)]


def _by_rows(topology: Topology) -> Callable:
    def hear(tree: Tree, slot: int, round: jax.Array) -> Tree:
        return jax.tree.map(lambda x: jnp.take(x, _of_round(topology, round)[slot], axis=0), tree)

    return hear
