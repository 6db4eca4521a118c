"""Rings: every device sends to the next one only, and all links are busy all the time.

The vector is cut into n chunks. In the reduce-scatter a chunk's sum grows on its way round, until after n - 1 hops
each device holds one chunk summed; in the all-gather the sums go round once more. Each device sends 2 (n - 1) / n of
the vector, and no all-reduce has its busiest send less (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69,
pp. 117-124).

Letters: n devices, d numbers, c numbers a chunk, k bytes of the vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jfed._axis import cut, joined, permute, uncut, vary
from jfed.collectives._call import Axis, Send, named, over_vectors
from jfed.core import Tree


class Ring(NamedTuple):
    """Devices in a circle, or several circles of equal size side by side."""

    size: int  # of one circle
    stride: int  # from a device to the next of its circle, as they are numbered along the axis
    devices: int  # in all

    def place(self, axis_name: Axis) -> jax.Array:
        """Where this device stands in its circle; [] int32."""
        return (lax.axis_index(axis_name) // self.stride) % self.size

    def neighbours(self, step: int) -> list[tuple[int, int]]:
        """Who sends to whom if everybody sends `step` places on."""

        def to(i):
            place = (i // self.stride) % self.size
            return i + ((place + step) % self.size - place) * self.stride

        return [(i, to(i)) for i in range(self.devices)]


def plainly(x: jax.Array, axis_name: Axis, pairs, hop) -> jax.Array:
    """Sends what is under way as it is."""
    del hop
    return permute(x, axis_name, pairs)


def scattered(
    parts: Sequence[jax.Array], axis_name: Axis, ring: Ring, *, send: Send = plainly, unroll: bool = False
) -> list[jax.Array]:
    """Reduce-scatter on a ring of one or two vectors of chunks, [size, ...] each, the second the other way round.

    Returns:
      Of each, the sum of the chunk with this device's place, [...].
    """
    place = ring.place(axis_name)

    def chunk(i, number):
        return lax.dynamic_index_in_dim(parts[i], (place - _ways(i) * number) % ring.size, keepdims=False)

    def hop(totals, number):
        came = [send(t, axis_name, ring.neighbours(_ways(i)), number) for i, t in enumerate(totals)]
        return [t + chunk(i, number + 2) for i, t in enumerate(came)], None

    totals = [chunk(i, 1) for i in range(len(parts))]
    return lax.scan(hop, totals, jnp.arange(ring.size - 1), unroll=unroll)[0]


def gathered(
    chunks: Sequence[Tree], axis_name: Axis, ring: Ring, *, send: Send = plainly, unroll: bool = False
) -> list[Tree]:
    """All-gather on a ring of one or two trees, leaves [...] to [size, ...], the second the other way round."""
    place = ring.place(axis_name)

    def put(whole, part, at):
        return jax.tree.map(lambda w, p: lax.dynamic_update_index_in_dim(w, p, at, 0), whole, part)

    def hop(carry, number):
        latest, wholes = carry
        came = [
            jax.tree.map(lambda x, i=i: send(x, axis_name, ring.neighbours(_ways(i)), number), part)
            for i, part in enumerate(latest)
        ]
        sender = [(place - _ways(i) * (number + 1)) % ring.size for i in range(len(came))]
        return (came, [put(w, p, at) for w, p, at in zip(wholes, came, sender, strict=True)]), None

    chunks = [vary(chunk, axis_name) for chunk in chunks]
    empty = [jax.tree.map(lambda x: jnp.zeros_like(x, shape=(ring.size, *x.shape)), chunk) for chunk in chunks]
    wholes = [put(vary(e, axis_name), chunk, place) for e, chunk in zip(empty, chunks, strict=True)]
    return lax.scan(hop, (chunks, wholes), jnp.arange(ring.size - 1), unroll=unroll)[0][1]


def ring_reduce_scatter(x: Tree, axis_name: Axis, *, send: Send = plainly) -> Tree:
    """Device i gets the sum of the i-th rows: `lax.psum_scatter`, by n - 1 hops to the next device.

    Sent by a device: (n - 1) / n of its bytes.

    Args:
      x: leaves [n, ...].
      axis_name: of the n devices.
      send: how a sum under way travels; `compressed` makes others.

    Returns:
      Leaves [...].

    Raises:
      ValueError: when traced, if leaves have not n rows.

    >>> jax.vmap(lambda x: ring_reduce_scatter(x, "devices"), axis_name="devices")(jnp.array([[1, 2], [30, 40]]))
    Array([31, 42], dtype=int32)
    """
    return named(_ring_reduce_scatter, axis_name)(x) if send is plainly else _ring_reduce_scatter(x, axis_name, send)


def ring_all_gather(x: Tree, axis_name: Axis, *, send: Send = plainly) -> Tree:
    """Everybody gets what everybody has: `lax.all_gather`, by n - 1 hops to the next device.

    Sent by a device: (n - 1) times its bytes.

    Args:
      x: leaves [...].
      axis_name: of the n devices.
      send: how a part under way travels, such as one that also records what it sends.

    Returns:
      Leaves [n, ...], the same on all devices.

    >>> jax.vmap(lambda x: ring_all_gather(x, "devices"), axis_name="devices")(jnp.array([1, 2]))
    Array([[1, 2],
           [1, 2]], dtype=int32)
    """
    return named(_ring_all_gather, axis_name)(x) if send is plainly else _ring_all_gather(x, axis_name, send)


def ring_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """The sum over devices: a reduce-scatter and an all-gather on a ring.

    Sent by a device: 2 k (n - 1) / n bytes, in 2 (n - 1) rounds.

    Args:
      x: a tree of any shapes and dtypes; leaves of one dtype travel as one vector.
      axis_name: of the n devices.

    Returns:
      The same shapes and dtypes (truth values are counted), the same bits on all devices.

    >>> jax.vmap(lambda x: ring_all_reduce(x, "devices"), axis_name="devices")(jnp.array([1, 2, 4]))
    Array([7, 7, 7], dtype=int32)
    """
    return named(_ring_all_reduce, axis_name)(x)


def bidirectional_ring_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """Half of every chunk goes round one way and half the other: on links of two ways in half the time of a ring.

    Sent by a device: 2 k (n - 1) / n bytes, half of it to either side, in 2 (n - 1) rounds.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.

    Returns:
      As `ring_all_reduce`.
    """
    return named(_bidirectional_ring_all_reduce, axis_name)(x)


def _ring_reduce_scatter(x, axis_name, send=plainly):
    n = rows_of("ring_reduce_scatter", x, axis_name)

    def one(rows):
        return scattered([rows], axis_name, whole_ring(n), send=send)[0] if n > 1 else rows[0]

    return joined(one, vary(x, axis_name), lead=1)


def _ring_all_gather(x, axis_name, send=plainly):
    n = lax.axis_size(axis_name)

    def one(part):
        return gathered([part], axis_name, whole_ring(n), send=send)[0] if n > 1 else part[None]

    return joined(one, vary(x, axis_name))


def _ring_all_reduce(x, axis_name):
    return over_vectors(lambda v, n: uncut(_around([cut(v, n)], axis_name, n)[0], v.size), x, axis_name)


def _bidirectional_ring_all_reduce(x, axis_name):
    def sum_vector(v, n):
        chunks = cut(v, n)
        halves = _around(jnp.split(chunks, [(chunks.shape[1] + 1) // 2], axis=1), axis_name, n)
        return uncut(jnp.concatenate(halves, axis=1), v.size)

    return over_vectors(sum_vector, x, axis_name)


def _around(parts, axis_name, n):
    return gathered(scattered(parts, axis_name, whole_ring(n)), axis_name, whole_ring(n))


def whole_ring(n: int) -> Ring:
    """All devices of the axis in one circle."""
    return Ring(n, 1, n)


def rows_of(where: str, x: Tree, axis_name: Axis) -> int:
    """n, which leaves must have as many rows.

    Raises:
      ValueError: if they do not.
    """
    n = lax.axis_size(axis_name)
    for leaf in jax.tree.leaves(x):
        if jnp.ndim(leaf) < 1 or leaf.shape[0] != n:
            raise ValueError(
                f"{where}(x with a leaf of shape {jnp.shape(leaf)}): the axis {axis_name!r} has {n} devices; "
                "give leaves of as many rows, one for each."
            )
    return n


def _ways(i: int) -> int:
    """The direction of the i-th part."""
    return 1 - 2 * i
