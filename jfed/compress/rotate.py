"""Random rotation, after which numbers are nearly normal and few bits lose little.

The rotation is D then H: signs drawn from shared randomness, then a Walsh-Hadamard transform (Suresh et al. 2017,
arXiv:1611.00429, section 3). An array is cut into blocks whose lengths are powers of two, so nothing is padded: with
d = 1000 and blocks of 256, three of those and one each of 128, 64, 32 and 8.

Scales of rotated numbers are made of sums of squares in float32: magnitudes from 1e-19 to 1e19.

Letters: d numbers, B of a block.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _noise, _validate
from jfed.compress.message import Decoder, Encoded, Source, operator
from jfed.compress.quantize import lloyd_max
from jfed.compress.sign import scaled_sign

_FACTOR = 64  # a transform of 4096 is two products with this matrix


def rotate(
    *, block: int | None = 4096, signs: Literal["shared", "own"] = "shared", seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Rotates each array by random signs and Hadamard matrices.

    Guarantees:
      * Orthogonal: lengths and inner products stay. With shared signs it is linear: sums of messages decode to sums.
      * As many numbers leave as came in, and an array's numbers are cut into equal blocks and powers of two.

    Later links compress what it gives. On the wire: those numbers, and 64 bits of randomness.

    Args:
      block: the longest block, a power of two; None makes blocks as long as they can be.
      signs: `"shared"`, all senders of a round rotate alike, by the extra argument `round`; or `"own"`, each by its
        `key`, so that what later links lose of one sender has nothing to do with what they lose of another.
      seed: of the signs, with `round` or `key`; give the second of two rotations another.

    Raises:
      ValueError: if `block` is not a power of two, or `signs` neither of these.

    >>> spread = rotate()
    >>> message, _ = spread.update(jnp.array([1.0, 0.0, 0.0, 0.0]), spread.init(jnp.zeros(4)), round=0)
    >>> print(abs(message.payload["4"]))
    [[0.5 0.5 0.5 0.5]]
    """
    if block is not None:
        _validate.at_least_one("rotate", "block", block, "4096 is quick and long enough")
        block = int(block)
        if block & (block - 1):
            raise ValueError(f"rotate(block={block}): it must be a power of two; try {2 ** block.bit_length() // 2}.")

    if signs not in ("shared", "own"):
        raise ValueError(f"rotate(signs={signs!r}): they must be 'shared' or 'own'.")
    shared, salt = signs == "shared", _noise.seeded(seed)

    def encode(x: jax.Array, source: Source) -> Encoded:
        words = _noise.scramble((source.shared if shared else source.own) ^ salt)
        flat = x.reshape(-1).astype(jnp.float32) * _noise.signs(words, x.size)
        payload = {}
        for first, n, b in _blocks(x.size, block):
            payload[str(b)] = _hadamard(flat[first : first + n * b].reshape(n, b))
        decoder = Decoder("rotate", _back, (x.shape, jnp.dtype(x.dtype).name, block), contraction=True, linear=shared)
        return Encoded(payload, {"seed": words}, decoder)

    return operator("rotate", encode, draws=not shared, shares=shared)


def drive(*, block: int | None = 4096) -> optax.GradientTransformationExtraArgs:
    """DRIVE: one bit a number, after a random rotation (Vargaftik et al. 2021, arXiv:2105.08339).

    `rotate` by the sender's own `key`, then `scaled_sign` with the unbiased scale |x|^2 / |Rx|_1 for each block.

    Guarantees:
      * Unbiased over rotations, nearly: its error tends to pi/2 - 1 = .571 of |x|^2 in long blocks, and that of the
        mean of n senders to an n-th of it.

    On the wire: d bits, 32 for each block, and 64 of randomness; blocks of fewer than 8 numbers, at the end, fill a
    byte.

    Args:
      block: see `rotate`; None is the paper's, the whole array.

    Raises:
      ValueError: as `rotate`.
    """
    return optax.chain(rotate(block=block, signs="own"), scaled_sign(scale="unbiased", per="row"))


def eden(bits: int, *, block: int | None = 4096) -> optax.GradientTransformationExtraArgs:
    """EDEN: b bits a number, after a random rotation (Vargaftik et al. 2022, arXiv:2108.08842).

    `rotate` by the sender's own `key`, then `lloyd_max` for each block; with one bit it is `drive`.

    On the wire: b d bits, 32 for each block, and 64 of randomness; short blocks, at the end, fill their last byte.

    Args:
      bits: b, 1 to 8.
      block: see `rotate`; None is the paper's, the whole array.

    Raises:
      ValueError: as `rotate` and `lloyd_max`.
    """
    return optax.chain(rotate(block=block, signs="own"), lloyd_max(bits, per="row"))


def _back(payload, rest, shape, dtype, block):
    d = math.prod(shape)
    parts = [_hadamard(payload[str(b)]).reshape(-1) for _, _, b in _blocks(d, block)]
    flat = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    return (flat * _noise.signs(rest["seed"], d)).reshape(shape).astype(dtype)


def _blocks(d: int, block: int | None) -> list[tuple[int, int, int]]:
    """First number, count and length of the blocks of each length, longest first."""
    b = 1 << (d.bit_length() - 1)
    b = b if block is None else min(b, block)
    found, first = [], 0
    while first < d:
        n = (d - first) // b
        if n:
            found.append((first, n, b))
            first += n * b
        b //= 2
    return found


def _hadamard(y: jax.Array) -> jax.Array:
    """The Walsh-Hadamard transform of each row [n, B], divided by sqrt(B): its own inverse."""
    n, b = y.shape
    factors = []
    while b > _FACTOR:
        factors.append(_FACTOR)
        b //= _FACTOR
    factors.append(b)
    shape = y.shape
    y = y.reshape(n, *factors)
    for axis, f in enumerate(factors, 1):
        # H of a product of lengths is the Kronecker product of their H.
        y = jnp.moveaxis(jnp.tensordot(y, _matrix(f), [[axis], [0]], precision=jax.lax.Precision.HIGHEST), -1, axis)
    return y.reshape(shape)


def _matrix(n: int) -> np.ndarray:
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(math.sqrt(n))
