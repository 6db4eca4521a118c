"""A few numbers of many, and where they lie.

Positions are sent as indices of floor(log2 d) + 1 bits, one more than they need where d is a power of two since d
itself is an empty place, or as a bitmap, whichever is smaller; that is known when the program is traced. Either fills
whole bytes.

Letters: d numbers, k of them kept, delta of |C(x) - x|^2 <= (1 - delta) |x|^2.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jfed import _noise, _validate, shuffle
from jfed.compress import _pack, _select
from jfed.compress.message import Decoder, Encoded, Source, operator
from jfed.compress.sign import scaled_sign

Method = Literal["exact", "sampled"]
_SAMPLE = 2**15  # numbers of a sample, at least


def top_k(
    fraction: float, *, block: int | None = None, method: Method = "exact"
) -> optax.GradientTransformationExtraArgs:
    """The largest magnitudes of each array (Aji and Heafield 2017, arXiv:1704.05021); in `over_tree`, of the model.

    Guarantees:
      * `"exact"`: a contraction with delta = k / d; equal magnitudes are taken from the front, a NaN before all.
      * `"sampled"`: numbers above the threshold found on one of each 64, from the front if they are more than k; of
        fewer than two million numbers a larger part is looked at, at least 32768; below 65536 it is exact.

    On the wire: k values, and k (floor(log2 d) + 1) or d bits of positions. Later links compress the values.

    Args:
      fraction: k / d, in (0, 1]; at least one number is kept.
      block: keep that fraction in each block of so many numbers, instead of in the whole array; the last is filled up
        with zeros, and has places for as many.
      method: `"exact"`, or `"sampled"`, up to twenty times quicker for millions of numbers.

    Raises:
      ValueError: if an argument is none of these.

    >>> halves = top_k(0.5)
    >>> message, _ = halves.update(jnp.array([1.0, -3.0, 2.0, 0.0]), halves.init(jnp.zeros(4)))
    >>> print(message.payload["values"], message.rest["positions"])
    [-3.  2.] [6]
    """
    _fraction("top_k", fraction)
    if block is not None:
        _validate.at_least_one("top_k", "block", block, "1024 is a start; leave it out to rank the whole array")
    if method not in ("exact", "sampled"):
        raise ValueError(f"top_k(method={method!r}): it must be 'exact' or 'sampled'.")

    def encode(x: jax.Array, source: Source) -> Encoded:
        del source
        d = x.size
        b = d if block is None else min(block, d)
        k = max(1, math.ceil(fraction * b - 1e-9))

        def of_block(row):
            stride = min(64, b // _SAMPLE) if method == "sampled" else 1
            words = _select.over_sample(row, k, stride) if stride > 1 else _select.largest(row, k)
            return _sparse(row, words, k)

        rows = jnp.pad(x.reshape(-1), (0, -d % b)).reshape(-1, b)
        values, positions = of_block(rows[0]) if len(rows) == 1 else jax.vmap(of_block)(rows)
        settings = (x.shape, jnp.dtype(x.dtype).name, b, k)
        packed = (("positions", _pack.Places(len(rows), b, k)),)
        exact = method == "exact" or b < 2 * _SAMPLE
        decoder = Decoder("top_k", _scatter, settings, contraction=exact, linear=False, packed=packed)
        return Encoded({"values": values}, {"positions": positions}, decoder)

    return operator("top_k", encode)


def threshold(least: float, *, capacity: float) -> optax.GradientTransformationExtraArgs:
    """The magnitudes above a threshold, as many as there are room for: the largest (Strom 2015, adapted).

    With `least=0` it sends a sparse array exactly, if there is room: what does not fit is dropped without notice, so
    for a pruned model take `nonzeros`.

    On the wire: as `top_k(capacity)`, room that is not needed included; `lossless.encode` leaves it out unless a link
    that rounds at random has filled it.

    Args:
      least: numbers up to it are not sent.
      capacity: the room, as a fraction of the array, in (0, 1].

    Raises:
      ValueError: if `least` is negative or `capacity` out of range.
    """
    _validate.at_least_zero("threshold", "least", least, "0 sends whatever is not zero")
    _fraction("threshold", capacity, "capacity")

    def encode(x: jax.Array, source: Source) -> Encoded:
        del source
        d, k = x.size, max(1, math.ceil(capacity * x.size - 1e-9))
        row = x.reshape(-1)
        over = _select.bitmap(~(jnp.abs(row) <= least))  # a NaN is over it
        values, positions = _sparse(row, _select.largest(row, k) & over, k)
        settings = (x.shape, jnp.dtype(x.dtype).name, d, k)
        packed = (("positions", _pack.Places(1, d, k)),)
        decoder = Decoder("threshold", _scatter, settings, contraction=False, linear=False, packed=packed)
        return Encoded({"values": values}, {"positions": positions}, decoder)

    return operator("threshold", encode)


def random_k(
    fraction: float, *, scale: Literal["unbiased", "none"] = "unbiased", seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Random coordinates, the same for all senders of a round (Konecny et al. 2016, arXiv:1610.05492, section 3).

    Guarantees:
      * Linear: sums of messages decode to sums, so they can be added up on the way.
      * `scale="unbiased"` multiplies by d / k: omega = d / k - 1. `"none"` leaves them: a contraction in expectation,
        delta = k / d, fit for `error_feedback`.

    On the wire: k values and the number that the positions are drawn from.

    Args:
      fraction: k / d, in (0, 1]; at least one number is sent.
      scale: `"unbiased"` or `"none"`.
      seed: of the positions, with the extra argument `round`.

    Raises:
      ValueError: if an argument is none of these.
    """
    _fraction("random_k", fraction)
    if scale not in ("unbiased", "none"):
        raise ValueError(f"random_k(scale={scale!r}): it must be 'unbiased' or 'none'.")

    salt = _noise.seeded(seed)

    def encode(x: jax.Array, source: Source) -> Encoded:
        d, k = x.size, max(1, math.ceil(fraction * x.size - 1e-9))
        words = _noise.scramble(source.shared ^ salt)
        values = x.reshape(-1)[_drawn(words, k, d)] * (d / k if scale == "unbiased" else 1.0)
        settings = (x.shape, jnp.dtype(x.dtype).name)
        contraction = scale == "none" or d < 2 * k
        decoder = Decoder("random_k", _scatter_drawn, settings, contraction, linear=True)
        return Encoded({"values": values}, {"seed": words}, decoder)

    return operator("random_k", encode, shares=True)


def ternary(fraction: float, *, method: Method = "exact") -> optax.GradientTransformationExtraArgs:
    """Sparse ternary compression: the largest magnitudes, each as plus or minus their mean.

    Sattler et al. 2019 (arXiv:1903.02891), Algorithm 1: `top_k`, then `scaled_sign` of the values kept; a contraction.

    A zero that is kept becomes plus the mean, and empty places of `"sampled"` count in it.

    On the wire: k bits of signs, 32 of the mean, and positions, which `lossless.encode` brings down to the paper's
    Golomb code.

    Args:
      fraction: see `top_k`.
      method: see `top_k`; `"sampled"` is no contraction.

    Raises:
      ValueError: as `top_k`.
    """
    return optax.chain(top_k(fraction, method=method), scaled_sign())


def _sparse(row: jax.Array, words: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Values [k] of one array, 0 in empty places, and packed positions."""
    d = row.shape[0]
    positions = _select.positions(words, k, d)
    values = jnp.where(positions < d, row[jnp.minimum(positions, d - 1)], 0)
    if as_bitmap(d, k):
        # A sample may reach over k; only those kept are marked.
        marks = jnp.zeros(d, bool).at[positions].set(True, mode="drop", unique_indices=True, indices_are_sorted=True)
        return values, _bytes(_select.bitmap(marks))[: -(-d // 8)]
    return values, _pack.pack(positions.astype(jnp.uint32), width(d))


def _scatter(payload, rest, shape, dtype, b, k):
    d, values = math.prod(shape), payload["values"]

    def of_block(values, packed):
        if as_bitmap(b, k):
            words = _words(jnp.pad(packed, (0, -packed.shape[0] % 4)))
            positions = _select.positions(words, k, b)
        else:
            positions = _pack.unpack(packed, width(b), k).astype(jnp.int32)
        return jnp.zeros(b, values.dtype).at[positions].set(values, mode="drop")

    one = values.ndim == 1
    flat = of_block(values, rest["positions"]) if one else jax.vmap(of_block)(values, rest["positions"])
    return flat.reshape(-1)[:d].reshape(shape).astype(dtype)


def _scatter_drawn(payload, rest, shape, dtype):
    d, values = math.prod(shape), payload["values"]
    flat = jnp.zeros(d, values.dtype).at[_drawn(rest["seed"], values.shape[0], d)].set(values, unique_indices=True)
    return flat.reshape(shape).astype(dtype)


def _drawn(words: jax.Array, k: int, d: int) -> jax.Array:
    """As many different positions below d: the first of a shuffle."""
    return shuffle.position(shuffle.draw(words), jnp.arange(k, dtype=jnp.int32), d)


def width(d: int) -> int:
    """Bits of an index that may also be d, an empty place."""
    return d.bit_length()


def as_bitmap(d: int, k: int) -> bool:
    """Whether k positions below d take fewer bytes as a bitmap."""
    return -(-d // 8) <= _pack.nbytes(k, width(d))


def _bytes(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)


def _words(data: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(data.reshape(-1, 4), jnp.uint32)


def _fraction(where: str, value: float, name: str = "fraction") -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{where}({name}={value!r}): {name} must lie in (0, 1]; 0.01 keeps a hundredth.")
