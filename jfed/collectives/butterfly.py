"""Butterflies: in each round devices pair up at another distance, so that log2 n rounds reach everybody.

    halving and doubling   halves of halves are exchanged and added, then put together again: 2 k (n - 1) / n bytes
    doubling               all of it is exchanged and added: k log2 n bytes in half the rounds

Where n is no power of two, the devices beyond the largest one below first send what they have to one that takes
part, and are sent the sum at the end (Thakur, Rabenseifner and Gropp 2005, Int. J. High Perform. Comput. Appl. 19(1),
pp. 49-66).

Letters: n devices, m the largest power of two up to n, k bytes of the vector.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jfed._axis import among, cut, joined, permute, uncut, vary
from jfed.collectives._call import Axis, Send, named, over_vectors
from jfed.collectives.ring import plainly, rows_of
from jfed.core import Tree


def halving_reduce_scatter(x: Tree, axis_name: Axis, *, send: Send = plainly) -> Tree:
    """Device i gets the sum of the i-th rows, by recursive halving; see `ring_reduce_scatter`.

    Sent by a device: (n - 1) / n of its bytes, in log2 n rounds.

    Args:
      x: leaves [n, ...].
      axis_name: of the n devices, a power of two.
      send: how a sum under way travels.

    Returns:
      Leaves [...].

    Raises:
      ValueError: when traced, if n is no power of two, or leaves have not n rows.
    """
    return (
        named(_halving_reduce_scatter, axis_name)(x) if send is plainly else _halving_reduce_scatter(x, axis_name, send)
    )


def doubling_all_gather(x: Tree, axis_name: Axis) -> Tree:
    """Everybody gets what everybody has, by recursive doubling; see `ring_all_gather`.

    Sent by a device: (n - 1) times its bytes, in log2 n rounds.

    Args:
      x: leaves [...].
      axis_name: of the n devices, a power of two.

    Returns:
      Leaves [n, ...], the same on all devices.

    Raises:
      ValueError: when traced, if n is no power of two.
    """
    return named(_doubling_all_gather, axis_name)(x)


def halving_doubling_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """The sum over devices, by recursive halving and doubling (Rabenseifner's all-reduce).

    Sent by a device: 2 k (n - 1) / n bytes in 2 log2 n rounds if n is a power of two; else 2 k (m - 1) / m, k more by
    2 (n - m) of them, in two rounds more.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.

    Returns:
      As `ring_all_reduce`.

    >>> jax.vmap(lambda x: halving_doubling_all_reduce(x, "devices"), axis_name="devices")(jnp.array([1, 2, 4]))
    Array([7, 7, 7], dtype=int32)
    """
    return named(_halving_doubling_all_reduce, axis_name)(x)


def doubling_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """The sum over devices, by recursive doubling: fewest rounds, for small vectors.

    Sent by a device: k log2 n bytes in log2 n rounds if n is a power of two; else k log2 m, k more by 2 (n - m) of
    them, in two rounds more.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.

    Returns:
      As `ring_all_reduce`.
    """
    return named(_doubling_all_reduce, axis_name)(x)


def _halving_reduce_scatter(x, axis_name, send=plainly):
    n = _power_of_two("halving_reduce_scatter", axis_name)
    rows_of("halving_reduce_scatter", x, axis_name)
    return joined(lambda rows: _halved(rows, axis_name, n, send), vary(x, axis_name), lead=1)


def _doubling_all_gather(x, axis_name):
    n = _power_of_two("doubling_all_gather", axis_name)
    return joined(lambda part: _doubled(part, axis_name, n), vary(x, axis_name))


def _halving_doubling_all_reduce(x, axis_name):
    def sum_vector(v, m):
        return uncut(_doubled(_halved(cut(v, m), axis_name, m, plainly), axis_name, m), v.size)

    return over_vectors(lambda v, n: _folded(v, n, sum_vector, axis_name), x, axis_name)


def _doubling_all_reduce(x, axis_name):
    def sum_vector(v, m):
        for distance in _distances(m):
            v = v + permute(v, axis_name, _partners(m, distance))
        return v

    return over_vectors(lambda v, n: _folded(v, n, sum_vector, axis_name), x, axis_name)


def _folded(v, n, sum_vector, axis_name):
    """`sum_vector(v, m)` on the first m devices, with what the others hold."""
    m = 1 << (n.bit_length() - 1)
    if m == n:
        return sum_vector(v, n)
    outside = [(m + i, i) for i in range(n - m)]
    total = sum_vector(v + permute(v, axis_name, outside), m)
    came = permute(total, axis_name, [(i, j) for j, i in outside])
    return jnp.where(among(range(m, n), axis_name), came, total)


def _halved(rows: jax.Array, axis_name: Axis, m: int, send: Send) -> jax.Array:
    me = lax.axis_index(axis_name)
    for number, distance in enumerate(reversed(_distances(m))):
        halves = rows.reshape(2, distance, *rows.shape[1:])
        mine = (me // distance) % 2
        other = lax.dynamic_index_in_dim(halves, 1 - mine, keepdims=False)
        rows = lax.dynamic_index_in_dim(halves, mine, keepdims=False)
        rows = rows + send(other, axis_name, _partners(m, distance), number)
    return rows[0]


def _doubled(part: jax.Array, axis_name: Axis, m: int) -> jax.Array:
    me = lax.axis_index(axis_name) % m  # of a device beyond m, any place
    whole = vary(jnp.zeros_like(part, shape=(m, *part.shape)), axis_name)
    whole = lax.dynamic_update_index_in_dim(whole, part, me, 0)
    for distance in _distances(m):
        start = me // distance * distance
        block = lax.dynamic_slice_in_dim(whole, start, distance)
        came = permute(block, axis_name, _partners(m, distance))
        whole = lax.dynamic_update_slice_in_dim(whole, came, start ^ distance, 0)
    return whole


def _distances(m: int) -> list[int]:
    return [1 << i for i in range(m.bit_length() - 1)]


def _partners(m: int, distance: int) -> list[tuple[int, int]]:
    return [(i, i ^ distance) for i in range(m)]


def _power_of_two(where: str, axis_name: Axis) -> int:
    n = lax.axis_size(axis_name)
    if n & (n - 1):
        raise ValueError(
            f"{where}(axis_name={axis_name!r}): the axis has {n} devices, which is no power of two; "
            "use the ring, or halving_doubling_all_reduce, which takes any number."
        )
    return n
