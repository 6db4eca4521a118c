"""A random order that needs no memory: where index `i` of `n` stands after a shuffle.

Clients in one compiled program have sizes known only at run time, so their shuffled order cannot be
stored in an array of fixed shape without padding to the largest client. `position` computes single
entries of a permutation instead, as a cipher would: the swap-or-not shuffle of Hoang, Morris and
Rogaway (2012, arXiv:1208.1176). In each round a random pivot `K` pairs `i` with `K - i mod n`, and
one pseudorandom bit a pair decides whether the two change places.
"""

import jax
import jax.numpy as jnp

from jfed._fusion import computed_once
from jfed._noise import scramble

ROUNDS = 24  # no departure from uniform was seen from 16 on: orders of 2 to 5, places and neighbours of 50 and 600


def draw(key: jax.Array) -> jax.Array:
    """The random words of one permutation for each size: [2, ROUNDS] uint32, pivots and salts.

    They are scrambled from the key's own words, so that a client costs one kernel: draw nothing else from this
    key itself. Keys folded from it are independent.
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    count = jnp.arange(1, 2 * ROUNDS + 1, dtype=jnp.uint32).reshape(2, ROUNDS)
    return scramble(scramble(count * jnp.uint32(0x9E3779B9) + data[0]) ^ data[-1])


def position(words: jax.Array, index: jax.Array, size: jax.Array, *, epoch: jax.Array | int = 0) -> jax.Array:
    """Where a random permutation of `size` elements sends `index`.

    Args:
      words: from `draw`; with `epoch` they fix the permutation for each `size`.
      index: int32, any shape, each in [0, size).
      size: [] int32, at least 1; may be traced.
      epoch: [] int32; each epoch has a permutation of its own, without a new draw.

    Returns:
      int32 of the shape of `index`; over all indices every number in [0, size) occurs once.

    >>> print(sorted(position(draw(jax.random.key(0)), jnp.arange(5), 5).tolist()))
    [0, 1, 2, 3, 4]
    """
    size = jnp.asarray(size, jnp.uint32)
    index = jnp.asarray(index, jnp.uint32)
    pivots, salts = words ^ scramble(words * jnp.asarray(epoch, jnp.uint32))
    # Without the barrier XLA makes a kernel of every single remainder.
    pivots, salts = jax.lax.optimization_barrier((pivots % size, salts))
    for r in range(ROUNDS):
        partner = pivots[r] + size - index
        partner = jnp.where(partner >= size, partner - size, partner)
        swap = scramble(jnp.maximum(index, partner) ^ salts[r]) >> 31
        index = jnp.where(swap == 1, partner, index)
    return computed_once(index).astype(jnp.int32)
