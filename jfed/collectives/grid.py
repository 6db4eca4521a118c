"""Grids: rings within rows and rings within columns, for machines whose links are such.

    hierarchical   reduce-scatter within a group, all-reduce of a chunk across groups, all-gather within the group:
                   of the slow links between groups of g each carries a g-th. Of rows and columns of a torus, it is
                   the 2D-Torus all-reduce of Mikami et al. 2018 (arXiv:1811.05233); Jia et al. 2018
                   (arXiv:1807.11205) reduce to one leader of each group instead
    torus          the same steps for half of the vector rows first, and for the other half columns first, so that
                   both kinds of links are busy at any time

Letters: n devices, k bytes of the vector; a rows of b devices.
"""

import math

import jax.numpy as jnp
from jax import lax

from jfed._axis import cut, uncut
from jfed.collectives._call import Axis, divisor, named, over_vectors
from jfed.collectives.ring import Ring, gathered, scattered
from jfed.core import Tree


def hierarchical_all_reduce(x: Tree, axis_name: Axis, *, group: int | None = None) -> Tree:
    """The sum over devices, in groups of neighbours: most bytes stay within a group.

    Sent by a device: 2 k (n - 1) / n bytes, of which 2 k (n / g - 1) / n leave its group, in 2 (g - 1) + 2 (n / g - 1)
    rounds.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices; those of a group follow one another.
      group: g, such as the devices of a host; by default the last of several axes, or the larger factor of the most
        nearly square a x b = n.

    Returns:
      As `ring_all_reduce`.

    Raises:
      ValueError: when traced, if `group` does not divide n.

    >>> import jax
    >>> f = jax.vmap(lambda x: hierarchical_all_reduce(x, "devices", group=2), axis_name="devices")
    >>> print(f(jnp.array([1, 2, 4, 8])))
    [15 15 15 15]
    """
    return named(_hierarchical_all_reduce, axis_name, group=group)(x)


def torus_all_reduce(x: Tree, axis_name: Axis, *, rows: int | None = None) -> Tree:
    """The sum over devices of a 2-D torus: along both axes at once, each with half of the vector.

    Sent by a device: 2 k (n - 1) / n bytes, in 2 (a - 1) + 2 (b - 1) rounds.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices, row by row.
      rows: a; by default all but the last of several axes, or the smaller factor of the most nearly square a x b = n.

    Returns:
      As `ring_all_reduce`.

    Raises:
      ValueError: when traced, if `rows` does not divide n.

    >>> import jax
    >>> f = jax.vmap(lambda x: torus_all_reduce(x, "devices", rows=2), axis_name="devices")
    >>> print(f(jnp.array([1, 2, 4, 8])))
    [15 15 15 15]
    """
    return named(_torus_all_reduce, axis_name, rows=rows)(x)


def nearly_square(n: int) -> tuple[int, int]:
    """Factors a x b = n, a <= b, as near to each other as may be.

    >>> nearly_square(8), nearly_square(7)
    ((2, 4), (1, 7))
    """
    a = max(a for a in range(1, math.isqrt(n) + 1) if n % a == 0)
    return a, n // a


def _hierarchical_all_reduce(x, axis_name, group):
    _, columns = _grid(axis_name)
    group = columns if group is None else group

    def sum_vector(v, n):
        within, across = _rings(n // group, group)
        chunks = cut(v, n).reshape(group, n // group, -1)
        (part,) = scattered([chunks], axis_name, within)
        (part,) = gathered(scattered([part], axis_name, across), axis_name, across)
        (whole,) = gathered([part], axis_name, within)
        return uncut(whole.reshape(n, -1), v.size)

    divisor("hierarchical_all_reduce", "group", group, lax.axis_size(axis_name))
    return over_vectors(sum_vector, x, axis_name)


def _torus_all_reduce(x, axis_name, rows):
    a, _ = _grid(axis_name)
    rows = a if rows is None else rows

    def half(chunks, first, second):
        # Unrolled, so that the compiler sees that the halves do not wait for each other.
        parts = [chunks.reshape(first.size, second.size, -1)]
        for ring in (first, second):
            parts = scattered(parts, axis_name, ring, unroll=True)
        for ring in (second, first):
            parts = gathered(parts, axis_name, ring, unroll=True)
        return parts[0].reshape(chunks.shape)

    def sum_vector(v, n):
        along_row, along_column = _rings(rows, n // rows)
        chunks = cut(v, n)
        one, other = jnp.split(chunks, [(chunks.shape[1] + 1) // 2], axis=1)
        halves = half(one, along_row, along_column), half(other, along_column, along_row)
        return uncut(jnp.concatenate(halves, axis=1), v.size)

    divisor("torus_all_reduce", "rows", rows, lax.axis_size(axis_name))
    return over_vectors(sum_vector, x, axis_name)


def _grid(axis_name: Axis) -> tuple[int, int]:
    """Rows and columns, where nobody says."""
    if isinstance(axis_name, tuple) and len(axis_name) > 1:
        return lax.axis_size(axis_name[:-1]), lax.axis_size(axis_name[-1])
    return nearly_square(lax.axis_size(axis_name))


def _rings(rows: int, columns: int) -> tuple[Ring, Ring]:
    """The ring within a row, and that within a column."""
    return Ring(columns, 1, rows * columns), Ring(rows, columns, rows * columns)
