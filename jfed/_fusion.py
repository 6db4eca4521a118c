"""What XLA:CPU computes how often, and in which order.

It fuses a cheap elementwise array into each of its readers, though these may read an entry many times, and drops
`lax.optimization_barrier` before it does so. It does not repeat an integer division, since jax 0.10.

An array that a loop carries it updates in place only if whoever reads the old one is sure to come first; else it
copies the array in every step.
"""

import jax
import jax.numpy as jnp

from jfed.core import Tree

DIVISIONS_STAY = jax.__version_info__ >= (0, 10)


def computed_once(x: jax.Array) -> jax.Array:
    """The same array, by way of a remainder that changes nothing and that a compiler makes a comparison of.

    Args:
      x: floats, or unsigned integers of which the highest bit is not the only one.

    Returns:
      x, but for -0.0, which becomes 0.0; its derivative is 0.
    """
    bits = jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
    least = jnp.array(jnp.iinfo(bits.dtype).min, bits.dtype)  # the only number with another remainder; -0.0 as a float
    return jax.lax.bitcast_convert_type(jax.lax.rem(bits, jnp.broadcast_to(least, bits.shape)), x.dtype)


def after(x: jax.Array, tree: Tree) -> jax.Array:
    """The same array, which a CPU does not compute before any leaf of `tree`; its derivative is 0.

    Args:
      x: floats.
      tree: arrays of floats.
    """

    def waiting(x: jax.Array, leaves: list[jax.Array]) -> jax.Array:
        def nothing(leaf: jax.Array) -> jax.Array:
            bits = _bits(leaf[(0,) * leaf.ndim])
            return jnp.right_shift(jnp.right_shift(bits, 8 * leaf.dtype.itemsize - 1), 1)  # 0, which no compiler tells

        bits = _bits(x)
        bits += sum(nothing(leaf).astype(bits.dtype) for leaf in leaves)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    return jax.lax.platform_dependent(x, leaves, cpu=waiting, default=lambda x, leaves: x)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
