"""Quantization: numbers as codes of 1 to 8 bits on a grid.

Sums of squares are float32: `qsgd` by the Euclidean norm, `lloyd_max` and what is built on it are for numbers whose
squares it can hold, from 1e-19 to 1e19.

Letters of the papers: d numbers, b bits, s levels above zero, omega of E|Q(x) - x|^2 <= omega |x|^2.
"""

import functools
import math
from statistics import NormalDist
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate
from jfed.compress import _groups
from jfed.compress._groups import Per
from jfed.compress.message import Decoder, Encoded, Source, operator

_TINY = float(jnp.finfo(jnp.float32).tiny)


def quantize(
    bits: int, *, rounding: Literal["stochastic", "nearest"] = "stochastic", per: Per = None
) -> optax.GradientTransformationExtraArgs:
    """Uniform quantization: the nearest, or at random a neighbouring, of 2^b levels between least and largest.

    Stochastic rounding takes the level above with the probability that makes the mean right (Alistarh et al. 2017,
    arXiv:1610.02132, on the grid of Suresh et al. 2017, arXiv:1611.00429). Nearest moves the grid by at most half a
    step so that 0 is one of its levels.

    Guarantees:
      * stochastic: unbiased, |Q(x) - x|^2 <= d (max - min)^2 / (4 (2^b - 1)^2) in expectation.
      * nearest: 0 stays 0, and no number moves by more than half a step or by more than itself: from 2 bits on a
        contraction, fit for `error_feedback`.
      * A group that holds a NaN or an infinity, or whose numbers lie further apart than float32 reaches, decodes to
        NaN.

    On the wire: b d bits and 64 for each group with statistics of its own.

    Args:
      bits: b, 1 to 8.
      rounding: `"stochastic"`, which draws from `key`, or `"nearest"`.
      per: what has a grid of its own: None the whole array, `"row"` each row of its last axis, or the length of blocks;
        short rows and blocks take more than they save.

    Raises:
      ValueError: if `bits`, `rounding` or `per` is none of these.

    >>> from jfed.compress import decode
    >>> nearest = quantize(2, rounding="nearest")
    >>> message, _ = nearest.update(jnp.array([-1.0, 0.0, 0.4, 2.0]), nearest.init(jnp.zeros(4)))
    >>> print(message.rest["codes"], decode(message))
    [212] [-1.  0.  0.  2.]
    """
    _bits("quantize", bits)
    _groups.check("quantize", per)
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"quantize(rounding={rounding!r}): it must be 'stochastic' or 'nearest'.")
    top = 2**bits - 1

    def statistics(y):
        low, high = jnp.min(y, -1, keepdims=True), jnp.max(y, -1, keepdims=True)
        if rounding == "stochastic":
            return {"low": low, "step": (high - low) / top}
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        step = (high - low) / top
        # The level that is 0 is sent, not the least one: step (c - zero) is 0 for it whatever the compiler fuses.
        return {"zero": jnp.round(-low / jnp.maximum(step, _TINY)), "step": step}

    def code(y, s, noise):
        per_step = 1 / jnp.maximum(s["step"], _TINY)
        if noise is None:
            level = jnp.floor(y * per_step + 0.5) + s["zero"]
        else:
            level = jnp.floor((y - s["low"]) * per_step + noise)
        return jnp.clip(level, 0, top).astype(jnp.uint8)

    def encode(x: jax.Array, source: Source) -> Encoded:
        noise = source.noise if rounding == "stochastic" else None
        contraction = bits > 1 if noise is None else _groups.size(x, per) < 2 * top**2
        coded = _groups.encode(x, per, bits, statistics, code, noise)
        settings = (x.shape, jnp.dtype(x.dtype).name, per, bits)
        return Encoded(
            {}, coded, Decoder("quantize", _affine, settings, contraction, False, _groups.packed(x, per, bits))
        )

    return operator("quantize", encode, draws=rounding == "stochastic")


def qsgd(levels: int, *, norm: Literal["l2", "max"] = "l2", per: Per = None) -> optax.GradientTransformationExtraArgs:
    """QSGD: norm times sign times the magnitude, rounded at random to one of s levels (arXiv:1610.02132, section 3.1).

    Guarantees:
      * Unbiased, with omega <= min(d / s^2, sqrt(d) / s) in the Euclidean norm; zeros stay zeros.
      * A group that holds a NaN or an infinity decodes to no finite number.

    On the wire: `ceil(log2(2 s + 1))` bits a number and 32 a group; `lossless.encode` shortens them further.

    Args:
      levels: s, 1 to 127; 1, 3, 7, 15 ... fill 2, 3, 4, 5 ... bits.
      norm: what magnitudes are divided by, the Euclidean norm as in the paper's analysis or, as in its experiments,
        the largest.
      per: what has a norm of its own, see `quantize`.

    Raises:
      ValueError: if `levels`, `norm` or `per` is none of these.

    >>> signs = qsgd(1)
    >>> message, _ = signs.update(jnp.array([3.0, -4.0]), signs.init(jnp.zeros(2)), key=jax.random.key(0))
    >>> print(message.rest["norm"])
    [5.]
    """
    _validate.at_least_one("qsgd", "levels", levels, "7 takes 4 bits, 127 takes 8")
    if levels > 127:
        raise ValueError(f"qsgd(levels={levels}): levels must be at most 127, which takes 8 bits; lower it.")
    if norm not in ("l2", "max"):
        raise ValueError(f"qsgd(norm={norm!r}): it must be 'l2' or 'max'.")
    _groups.check("qsgd", per)

    def statistics(y):
        if norm == "max":
            return {"norm": jnp.max(jnp.abs(y), -1, keepdims=True)}
        return {"norm": jnp.sqrt(jnp.sum(y * y, -1, keepdims=True))}

    def omega(d):
        return min(d / levels**2, math.sqrt(d) / levels) if norm == "l2" else d / (4 * levels**2)

    return _signed_levels("qsgd", levels, statistics, per, omega)


def terngrad(*, clip: float | None = None, per: Per = None) -> optax.GradientTransformationExtraArgs:
    """TernGrad: -1, 0 or 1 times the largest magnitude (Wen et al. 2017, arXiv:1705.07878, Algorithm 1).

    Guarantees:
      * Unbiased without clipping; zeros stay zeros.
      * A group that holds a NaN or an infinity decodes to no finite number.

    On the wire: 2 bits a number and 32 a group.

    Args:
      clip: standard deviations at which numbers are cut off first, 2.5 in the paper; the result is then biased. Groups
        whose numbers are all equal, which have none, are left as they are.
      per: what has a scale of its own, see `quantize`.

    Raises:
      ValueError: if `clip` is not above 0, or `per` is none of these.
    """
    if clip is not None:
        _validate.positive("terngrad", "clip", clip, "2.5 is the paper's, None leaves the numbers as they are")
    _groups.check("terngrad", per)

    def statistics(y):
        largest = jnp.max(jnp.abs(y), -1, keepdims=True)
        if clip is None:
            return {"norm": largest}
        bound = clip * jnp.std(y, -1, keepdims=True)
        return {"norm": jnp.where(bound > 0, jnp.minimum(largest, bound), largest)}

    # E|Q(x) - x|^2 = max|x| |x|_1 - |x|^2, at most (sqrt(d) - 1) / 2 of |x|^2.
    return _signed_levels(
        "terngrad", 1, statistics, per, lambda d: (math.sqrt(d) - 1) / 2 if clip is None else math.inf
    )


def lloyd_max(bits: int, *, per: Per = None) -> optax.GradientTransformationExtraArgs:
    """The best 2^b levels for normal numbers, with the scale that makes it unbiased after a random rotation.

    The quantizer of EDEN (Vargaftik et al. 2022, arXiv:2108.08842, section 3): numbers y of a group are brought to
    variance 1, each becomes the nearest centroid c of the normal distribution, and what is sent is
    S = |y|^2 / <y, c>. After `rotate` the numbers are nearly normal; see `eden`.

    Guarantees:
      * A group that holds a NaN or an infinity decodes to no finite number.

    On the wire: b bits a number and 32 a group.

    Args:
      bits: b, 1 to 8.
      per: what has a scale of its own, see `quantize`.

    Raises:
      ValueError: if `bits` is not 1 to 8, or `per` is none of `quantize`'s.
    """
    _bits("lloyd_max", bits)
    _groups.check("lloyd_max", per)
    centroids = _centroids(bits)
    bounds = [(a + b) / 2 for a, b in zip(centroids, centroids[1:], strict=False)]

    def nearest(y, norm):
        z = y * (1 / jnp.maximum(norm, _TINY))
        if bits > 4:
            return jnp.searchsorted(np.asarray(bounds, np.float32), z, method="scan_unrolled").astype(jnp.uint8)
        code = jnp.zeros(y.shape, jnp.uint8)
        for bound in bounds:
            code += (z > bound).astype(jnp.uint8)
        return code

    def statistics(y):
        norm = jnp.sqrt(jnp.mean(y * y, -1, keepdims=True))
        c = _at(centroids, nearest(y, norm))
        product = jnp.sum(y * c, -1, keepdims=True)
        return {"norm": norm, "scale": jnp.sum(y * y, -1, keepdims=True) / jnp.where(product == 0, 1, product)}

    def encode(x: jax.Array, source: Source) -> Encoded:
        coded = _groups.encode(x, per, bits, statistics, lambda y, s, noise: nearest(y, s["norm"]))
        del coded["norm"]
        settings = (x.shape, jnp.dtype(x.dtype).name, per, bits, centroids)
        return Encoded({}, coded, Decoder("lloyd_max", _centroid, settings, False, False, _groups.packed(x, per, bits)))

    return operator("lloyd_max", encode)


def _signed_levels(name, levels, statistics, per, omega):
    width = math.ceil(math.log2(2 * levels + 1))

    def code(y, s, noise):
        # Below 0 as above it: the level further from 0 is taken with the probability of what is left over.
        level = jnp.floor(y * (levels / jnp.maximum(s["norm"], _TINY)) + noise)
        return jnp.clip(level + levels, 0, 2 * levels).astype(jnp.uint8)

    def encode(x: jax.Array, source: Source) -> Encoded:
        coded = _groups.encode(x, per, width, statistics, code, source.noise)
        settings = (x.shape, jnp.dtype(x.dtype).name, per, width, levels)
        contraction = omega(_groups.size(x, per)) < 1
        return Encoded(
            {}, coded, Decoder(name, _signed, settings, contraction, False, _groups.packed(x, per, width, levels))
        )

    return operator(name, encode, draws=True)


def _affine(payload, rest, shape, dtype, per, bits):
    def value(c, s):
        c = c.astype(jnp.float32)
        return s["step"] * (c - s["zero"]) if "zero" in s else s["low"] + s["step"] * c

    return _groups.decode(rest, value, shape, dtype, per, bits)


def _signed(payload, rest, shape, dtype, per, width, levels):
    def value(c, s):
        return (c.astype(jnp.float32) - levels) * (s["norm"] / levels)

    return _groups.decode(rest, value, shape, dtype, per, width)


def _centroid(payload, rest, shape, dtype, per, bits, centroids):
    return _groups.decode(rest, lambda c, s: s["scale"] * _at(centroids, c), shape, dtype, per, bits)


def _at(centroids: tuple[float, ...], code: jax.Array) -> jax.Array:
    return jnp.asarray(centroids, jnp.float32)[code]


@functools.lru_cache(maxsize=8)
def _centroids(bits: int) -> tuple[float, ...]:
    """Lloyd's iteration on the standard normal distribution, from the levels that are best where they are many.

    Those lie as the quantiles of the cube root of the density do, a normal one of variance 3 (Panter and Dite 1951).
    """

    def density(t):
        return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    def below(t):
        return (1 + math.erf(t / math.sqrt(2))) / 2

    n = 2**bits
    c = [NormalDist(sigma=math.sqrt(3)).inv_cdf((i + 0.5) / n) for i in range(n)]
    for _ in range(1000):
        edges = [-math.inf, *((a + b) / 2 for a, b in zip(c, c[1:], strict=False)), math.inf]
        new = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in zip(edges, edges[1:], strict=False)]
        moved = max(abs(a - b) for a, b in zip(c, new, strict=True))
        c = new
        if moved < 1e-7:
            break
    return tuple(c)


def _bits(where: str, bits: int) -> None:
    _validate.at_least_one(where, "bits", bits, "1 to 8 are packed; low_precision has 16")
    if bits > 8:
        raise ValueError(f"{where}(bits={bits}): bits must be at most 8; low_precision('bfloat16') has 16.")
