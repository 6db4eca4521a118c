"""How often XLA:CPU computes an array, and in which order.

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
    """The same array, which a CPU does not compute before the leaves of `tree`.

    Args:
      x: [...] floats.
      tree: what to wait for; only for leaves of floats, placed on devices as `x` is.

    Returns:
      x, bit for bit; its derivative is 0.
    """

    def waiting(x: jax.Array, leaves: list[jax.Array]) -> jax.Array:
        bits = _bits(x)
        bits += sum(_nothing(leaf).astype(bits.dtype) for leaf in leaves)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    x = jax.lax.stop_gradient(x)
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size]
    leaves = [leaf for leaf in leaves if placed_alike(x, leaf)]
    return jax.lax.platform_dependent(x, leaves, cpu=waiting, default=lambda x, leaves: x)


def placed_alike(*arrays: jax.Array) -> bool:
    """Whether inside `shard_map` all or none differ from device to device, and no axis is sharded explicitly."""
    kinds = [jax.typeof(a) for a in arrays]
    varying = [getattr(kind, "manual_axis_type", getattr(kind, "vma", None)) for kind in kinds]  # vma until jax 0.9
    return all(v == varying[0] for v in varying) and not any(axis for kind in kinds for axis in kind.sharding.spec)


def _nothing(x: jax.Array) -> jax.Array:
    """The number 0, which no compiler can tell before it has computed `x`."""
    sign = jnp.right_shift(_bits(x[(0,) * x.ndim]), 8 * x.dtype.itemsize - 1)
    return jnp.right_shift(sign, 1)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
