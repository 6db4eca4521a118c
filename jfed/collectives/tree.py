"""A tree: sums go up to one device, and their total comes down.

The tree is binomial: in round t device i sends to i - 2^t, if i is an odd multiple of that.

Letters: n devices, k bytes of the vector.
"""

import jax.numpy as jnp

from jfed._axis import among, permute
from jfed.collectives._call import Axis, named, over_vectors
from jfed.core import Tree


def tree_all_reduce(x: Tree, axis_name: Axis) -> Tree:
    """The sum over devices: reduced along a binomial tree to the first device, and broadcast from it.

    Sent: 2 k (n - 1) bytes by all together, k ceil(log2 n) by the root, in 2 ceil(log2 n) rounds.

    Args:
      x: as in `ring_all_reduce`.
      axis_name: of the n devices.

    Returns:
      As `ring_all_reduce`.

    >>> import jax
    >>> jax.vmap(lambda x: tree_all_reduce(x, "devices"), axis_name="devices")(jnp.array([1, 2, 4]))
    Array([7, 7, 7], dtype=int32)
    """
    return named(_tree_all_reduce, axis_name)(x)


def _tree_all_reduce(x, axis_name):
    def sum_vector(v, n):
        rounds = [[(i, i - step) for i in range(step, n, 2 * step)] for step in (1 << t for t in range(n.bit_length()))]
        rounds = [pairs for pairs in rounds if pairs]
        for pairs in rounds:
            v = v + permute(v, axis_name, pairs)
        for pairs in reversed(rounds):
            came = permute(v, axis_name, [(parent, child) for child, parent in pairs])
            v = jnp.where(among([child for child, _ in pairs], axis_name), came, v)
        return v

    return over_vectors(sum_vector, x, axis_name)
