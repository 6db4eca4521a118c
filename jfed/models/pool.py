"""A max pool whose gradient is one elementwise pass.

The gradient of `jax.lax.reduce_window` is a select-and-scatter, slow on CPUs. That of `jnp.max` looks for the entries
equal to the maximum and divides by their number: where XLA computes its input twice, once fused with each use, and
rounds differently, there are none. So the place of the maximum is what the gradient goes by.
"""

import jax
import jax.numpy as jnp

from jfed import _validate


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Maximum over windows of `window` x `window` that do not overlap.

    Rows and columns left over at the end are dropped (VALID). Of equal values the first takes the
    gradient and NaN stays NaN, as in `jax.lax.reduce_window`.

    Args:
      x: [B, H, W, C].
      window: side of a window, at least 1.

    Returns:
      [B, H // window, W // window, C].

    Raises:
      ValueError: if `window` is not a whole number of at least 1.

    >>> print(max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1))[0, :, :, 0])
    [[ 6.  8.]
     [16. 18.]]
    """
    _validate.at_least_one("max_pool", "window", window, "2 is usual")
    b, h, w, c = x.shape
    h, w = h // window, w // window
    return _pool(x[:, : h * window, : w * window].reshape(b, h, window, w, window, c))


@jax.custom_jvp
def _pool(x: jax.Array) -> jax.Array:
    """[B, H', window, W', window, C] -> [B, H', W', C]."""
    return _first_largest(x)[0]


@_pool.defjvp
def _pool_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (x_dot,) = primals, tangents
    y, place = _first_largest(x)
    window = x.shape[2]
    places = jnp.arange(window**2, dtype=jnp.int32).reshape(1, 1, window, 1, window, 1)
    return y, jnp.sum(jnp.where(place[:, :, None, :, None] == places, x_dot, 0), (2, 4), dtype=x_dot.dtype)


def _first_largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of each window, or NaN, and its place in it, row by row."""
    window = x.shape[2]
    entries = [x[:, :, i, :, j] for i in range(window) for j in range(window)]
    best, place = entries[0], jnp.zeros(entries[0].shape, jnp.int32)
    for at, entry in enumerate(entries[1:], 1):
        stays = (best >= entry) | jnp.isnan(best)
        best, place = jnp.where(stays, best, entry), jnp.where(stays, place, at)
    return best, place
