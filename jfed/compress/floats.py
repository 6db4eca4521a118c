"""Floating-point numbers with fewer bits.

Letters: omega of E|C(x) - x|^2 <= omega |x|^2.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jfed.compress import _groups
from jfed.compress._groups import Per
from jfed.compress.message import Decoder, Encoded, Source, operator

_EIGHT = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # their largest finite numbers


def low_precision(
    dtype: Literal["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"], *, per: Per = None
) -> optax.GradientTransformationExtraArgs:
    """Rounds to the nearest number of a smaller format, sent as its bits.

    The eight-bit formats and float16 have a small range, so each group is first scaled to fill it, and a scale is
    sent (Micikevicius et al. 2022, arXiv:2209.05433); bfloat16 has float32's range and needs none.

    Guarantees:
      * Sent as unsigned integers of its width, since collectives may widen small floats on the way.
      * 0 stays 0, and no number moves by more than a 16th of it (float8_e5m2: an 8th), or by the smallest of the
        format times the scale.
      * A NaN stays one: of eight bits and float16, in its whole group.

    On the wire: 16 or 8 bits a number, and 32 a group that is scaled.

    Args:
      dtype: the format.
      per: what has a scale of its own, see `quantize`.

    Raises:
      ValueError: if `dtype` or `per` is none of these.
    """
    _groups.check("low_precision", per)
    largest = _EIGHT | {"float16": 65504.0, "bfloat16": None}
    if dtype not in largest:
        raise ValueError(f"low_precision(dtype={dtype!r}): it must be one of {', '.join(largest)}.")
    top, unsigned = largest[dtype], jnp.uint8 if dtype in _EIGHT else jnp.uint16

    def encode(x: jax.Array, source: Source) -> Encoded:
        del source
        flat, rest = x.reshape(-1).astype(jnp.float32), {}
        if top is not None:
            rest["scale"] = _scale(flat, x, per, top)
            flat = flat / _spread(rest["scale"], x, per)
        rest["codes"] = lax.bitcast_convert_type(flat.astype(dtype), unsigned)
        settings = (x.shape, jnp.dtype(x.dtype).name, per, dtype)
        return Encoded({}, rest, Decoder("low_precision", _float, settings, contraction=True, linear=False))

    return operator("low_precision", encode)


def natural() -> optax.GradientTransformationExtraArgs:
    """Natural compression: the power of two above or below, at random (Horvath et al. 2022, arXiv:1905.10988).

    Guarantees:
      * Unbiased, with omega = 1/8; zeros and powers of two stay as they are.
      * A NaN, an infinity and, at random, a number above 2^127 decode to an infinity.

    On the wire: 9 bits a number, its sign and exponent.
    """

    def encode(x: jax.Array, source: Source) -> Encoded:
        flat = x.reshape(-1).astype(jnp.float32)
        bits = lax.bitcast_convert_type(flat, jnp.uint32)
        # Adding a random mantissa carries into the exponent with the probability of rounding up.
        draw = (source.noise(flat.shape) * 2**23).astype(jnp.uint32)
        exponent = jnp.minimum(((bits & 0x7FFFFFFF) + draw) >> 23, 255)
        signs = _groups.encode(flat, None, 1, lambda y: {}, lambda y, s, noise: (y < 0).astype(jnp.uint8))
        rest = {"signs": signs["codes"], "exponents": exponent.astype(jnp.uint8)}
        settings = (x.shape, jnp.dtype(x.dtype).name)
        packed = (("signs", _groups.packed(flat, None, 1)[0][1]),)
        return Encoded({}, rest, Decoder("natural", _power, settings, True, False, packed))

    return operator("natural", encode, draws=True)


def _scale(flat: jax.Array, x: jax.Array, per: Per, top: float) -> jax.Array:
    b = _groups.size(x, per)
    short = -flat.size % b
    padded = jnp.pad(jnp.abs(flat), (0, short)) if short else jnp.abs(flat)
    largest = jnp.max(padded.reshape(-1, b), axis=1)
    # Not less than a normal number: a scale that becomes 0 would leave nothing finite.
    return jnp.where(largest == 0, 1, jnp.maximum(largest / top, jnp.finfo(jnp.float32).tiny))


def _spread(scale: jax.Array, x, per: Per) -> jax.Array:
    """Each number's scale."""
    b, d = _groups.size(x, per), x.size
    return scale[0] if per is None else jnp.repeat(scale, b, total_repeat_length=scale.size * b)[:d]


def _float(payload, rest, shape, dtype, per, kind):
    flat = lax.bitcast_convert_type(rest["codes"], jnp.dtype(kind)).astype(jnp.float32)
    if "scale" in rest:
        flat = flat * _spread(rest["scale"], jax.ShapeDtypeStruct(shape, jnp.float32), per)
    return flat.reshape(shape).astype(dtype)


def _power(payload, rest, shape, dtype):
    flat = lax.bitcast_convert_type(rest["exponents"].astype(jnp.uint32) << 23, jnp.float32)
    like = jax.ShapeDtypeStruct(flat.shape, jnp.float32)
    signs = _groups.decode(
        {"codes": rest["signs"]}, lambda c, s: 1 - 2 * c.astype(jnp.float32), like.shape, "float32", None, 1
    )
    return (flat * signs).reshape(shape).astype(dtype)
