"""Everybody sends to everybody, with nobody in between: few rounds, for small vectors or links from each to each.

    one shot    all of it to all, and each adds up for itself: k n (n - 1) bytes in all
    two shots   each adds up one chunk for all, and sends them the sum: 2 k (n - 1) bytes in all

Letters: n devices, k bytes of the vector.
"""

import functools

import jax.numpy as jnp
from jax import lax

from jfed._axis import cut, joined, permute, uncut, vary
from jfed.collectives._call import Axis, Send, named, over_vectors
from jfed.collectives.ring import plainly, rows_of, whole_ring
from jfed.core import Tree


def direct_reduce_scatter(x: Tree, axis_name: Axis, *, send: Send = plainly) -> Tree:
    """Device i gets the sum of the i-th rows, each sent to it by whoever has it; see `ring_reduce_scatter`.

    Sent by a device: (n - 1) / n of its bytes, in one round.

    Args:
      x: leaves [n, ...].
      axis_name: of the n devices.
      send: how a row travels.

    Returns:
      Leaves [...].

    Raises:
      ValueError: when traced, if leaves have not n rows.
    """
    return (
        named(_direct_reduce_scatter, axis_name)(x) if send is plainly else _direct_reduce_scatter(x, axis_name, send)
    )


def direct_all_gather(x: Tree, axis_name: Axis) -> Tree:
    """Everybody gets what everybody has, from whoever has it; see `ring_all_gather`.

    Sent by a device: (n - 1) times its bytes, in one round.

    Args:
      x: leaves [...].
      axis_name: of the n devices.

    Returns:
      Leaves [n, ...], the same on all devices.
    """
    return named(_direct_all_gather, axis_name)(x)


def one_shot_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """The sum over devices, everyone to everyone: each sends all it has to all others, who add up for themselves.

    Sent by a device: k (n - 1) bytes, in 1 round; n vectors in memory.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.

    Returns:
      As `ring_all_reduce`.

    >>> import jax
    >>> jax.vmap(lambda x: one_shot_all_reduce(x, "devices"), axis_name="devices")(jnp.array([1, 2, 4]))
    Array([7, 7, 7], dtype=int32)
    """
    return named(_one_shot_all_reduce, axis_name)(x)


def two_shot_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """The sum over devices, of which each adds up a chunk for all: as many servers as there are workers.

    Sent by a device: 2 k (n - 1) / n bytes, in 2 rounds.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.

    Returns:
      As `ring_all_reduce`.
    """
    return named(_two_shot_all_reduce, axis_name)(x)


def _direct_reduce_scatter(x, axis_name, send=plainly):
    n = rows_of("direct_reduce_scatter", x, axis_name)
    me = lax.axis_index(axis_name)

    def one(rows):
        def row(distance):
            return lax.dynamic_index_in_dim(rows, (me + distance) % n, keepdims=False)

        came = [send(row(d), axis_name, whole_ring(n).neighbours(d), d) for d in range(1, n)]
        return sum(came, row(0))

    return joined(one, vary(x, axis_name), lead=1)


def _direct_all_gather(x, axis_name):
    n, me = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def one(part):
        whole = vary(jnp.zeros_like(part, shape=(n, *part.shape)), axis_name)
        for d in range(n):
            came = permute(part, axis_name, whole_ring(n).neighbours(d)) if d else part
            whole = lax.dynamic_update_index_in_dim(whole, came, (me - d) % n, 0)
        return whole

    return joined(one, vary(x, axis_name))


def _one_shot_all_reduce(x, axis_name):
    def sum_vector(v, n):
        whole = direct_all_gather(v, axis_name)
        # In the same order on all, for the same bits, and row by row: XLA:CPU takes many times as long to sum an axis.
        return functools.reduce(jnp.add, (whole[i] for i in range(n)))

    return over_vectors(sum_vector, x, axis_name)


def _two_shot_all_reduce(x, axis_name):
    def sum_vector(v, n):
        return uncut(direct_all_gather(direct_reduce_scatter(cut(v, n), axis_name), axis_name), v.size)

    return over_vectors(sum_vector, x, axis_name)
