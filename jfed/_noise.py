"""Cheap uniform numbers: a few integer operations each, fused into whatever uses them.

Threefry, jax's generator, takes many more on a CPU than all else that a compressor does to a number. Here number i
of a stream is a hash of i and of the key's words, as `jfed.shuffle` has them for the order of examples.
"""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_GOLDEN = 0x9E3779B9


def scramble(x: jax.Array) -> jax.Array:
    """Scrambles 32 bits: the finaliser of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def words(key: jax.Array) -> jax.Array:
    """The first and last of a key's own words, [2] uint32: draw nothing else from this key itself."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return jnp.stack([data[0], data[-1]])


def bits(words: jax.Array, shape: tuple[int, ...], *, first: int = 0, stream: int = 0) -> jax.Array:
    """uint32 of the shape, all 32 bits random: those of a stream from number `first` on.

    `stream` numbers the arrays drawn from the same words.
    """
    salt = scramble(words + jnp.uint32(stream * _GOLDEN % 2**32))
    index = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + jnp.uint32(first)
    # Each stream counts in steps of its own (Steele, Lea and Flood 2014), so that no two are one, shifted.
    return scramble(index * (salt[0] | 1) + salt[1])


def uniform(words: jax.Array, shape: tuple[int, ...], *, first: int = 0, stream: int = 0) -> jax.Array:
    """float32 of the shape, uniform in [0, 1), as `bits`.

    >>> from jfed import _noise
    >>> print(_noise.uniform(_noise.words(jax.random.key(0)), (4, 10**5)).mean(1).round(2))
    [0.5 0.5 0.5 0.5]
    """
    return (bits(words, shape, first=first, stream=stream) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def signs(words: jax.Array, d: int) -> jax.Array:
    """D signs, each +1.0 or -1.0."""
    return jnp.where(bits(words, (d,)) >> 31 == 1, -1.0, 1.0)


def seeded(seed: int | jax.Array) -> np.uint32 | jax.Array:
    """A whole number of any size as 32 bits; a `TypeError` if it is none. One that is traced is taken as it is."""
    if isinstance(seed, jax.Array):
        return seed.astype(jnp.uint32)
    return np.uint32(operator.index(seed) % 2**32)
