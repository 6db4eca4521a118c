"""An array that XLA:CPU computes once, where it would compute it anew inside every loop that reads it.

XLA:CPU fuses a cheap elementwise array into each of its readers, though these may read an entry many times, and drops
`lax.optimization_barrier` before it does so. It does not repeat an integer division, since jax 0.10.
"""

import jax
import jax.numpy as jnp

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
