"""Which k of d numbers are largest, as a bitmap, and the positions that a bitmap holds.

The k-th largest magnitude is found bit by bit: floats above zero lie in the order of their bits, so counting how many
reach a threshold, at most 31 times, settles it. Of many numbers a sample says first between which two the k-th lies,
and only those between are looked at so often (Floyd and Rivest 1975); where the sample misleads, or many are equal, all
are. That moves few numbers, where a sort moves all.

Letters: d numbers, k kept; word w of a bitmap holds numbers 32 w to 32 w + 31, lowest bit first.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _noise

_FEW = 2**13  # numbers that a bracket is drawn from, at least
_MANY = 2**16  # numbers from which on it pays
_LARGEST = 2**31 - 1  # more than the bits of any magnitude


def largest(x: jax.Array, k: int) -> jax.Array:
    """Bitmap of the k largest magnitudes of `x` [d]; of equal ones those that come first, and NaN above all.

    >>> print(largest(jnp.array([1.0, -3.0, 2.0, 2.0]), 2))
    [6]
    """
    b = _magnitude(x)
    return _of_threshold(b, k, _kth(b, k) if b.size < _MANY else _bracketed(b, k))


def _of_threshold(b, k, least):
    """Those above it, and of those equal to it the first until there are k."""
    above, equal = bitmap(b > least), bitmap(b == least)
    count = lax.population_count(equal).astype(jnp.int32)
    wanted = k - jnp.sum(lax.population_count(above).astype(jnp.int32))
    wanted = jnp.clip(wanted - (jnp.cumsum(count) - count), 0, count)
    return above | jnp.where(wanted == count, equal, equal & _below(_bit(equal, wanted)))


def over_sample(x: jax.Array, k: int, stride: int) -> jax.Array:
    """Bitmap of about the k largest magnitudes: all that reach the threshold found on one number of each `stride`."""
    sample = _sample(x, stride)
    least = _kth(_magnitude(sample), max(1, round(k * sample.size / x.size)))
    return _of_threshold(_magnitude(x), k, least)


def _sample(x: jax.Array, stride: int) -> jax.Array:
    """A number of each `stride`, at a place that is scrambled: rows and columns of a matrix come all alike."""
    first = jnp.arange(x.size // stride, dtype=jnp.uint32)
    return x[first * stride + _noise.scramble(first) % jnp.uint32(stride)]


def bitmap(mask: jax.Array) -> jax.Array:
    """Flags [d] as words [ceil(d / 32)] uint32."""
    short = -mask.shape[0] % 32
    if short:
        mask = jnp.concatenate([mask, jnp.zeros(short, bool)])
    bits = mask.reshape(-1, 32).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[None]
    return jnp.sum(bits, axis=1, dtype=jnp.uint32)


def positions(words: jax.Array, k: int, d: int) -> jax.Array:
    """The first k positions a bitmap holds, ascending, [k] int32; d where it holds fewer.

    >>> print(positions(jnp.array([6], jnp.uint32), 3, 4))
    [1 2 4]
    """
    count = lax.population_count(words).astype(jnp.int32)
    end = jnp.cumsum(count)
    begin = end - count
    # The word that holds entry j is the number of words that end at or before j.
    word = jnp.cumsum(jnp.zeros(k, jnp.int32).at[end].add(1, mode="drop", indices_are_sorted=True))
    found = word < words.shape[0]
    word = jnp.minimum(word, words.shape[0] - 1)
    place = _bit(words[word], jnp.arange(k) - begin[word])
    return jnp.where(found, 32 * word + place, d)


def among_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """Whether each number of `x` [d] is one of the k of largest magnitude, [d] bool; as `largest`, but k may be traced.

    >>> print(among_largest(jnp.array([1.0, -1.0, 2.0]), jnp.array(2)))
    [ True False  True]
    """
    b = _magnitude(x)
    words = _of_threshold(b, k, _kth(b, k))
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (bits == 1).reshape(-1)[: x.size]


def _magnitude(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF


def _bracketed(b: jax.Array, k: int) -> jax.Array:
    """`_kth` of many numbers."""
    d = b.size
    sample = _sample(b, d // _FEW)
    m = sample.size
    margin = 4 * math.sqrt(k / d * (1 - k / d) * m) + 1  # standard deviations of the rank among the sample
    low = _kth(sample, min(m, math.ceil(k / d * m + margin)))
    high = jnp.where(k / d * m > margin, _kth(sample, max(1, math.floor(k / d * m - margin))), _LARGEST)
    room = min(d, math.ceil(3 * margin / m * d))
    above, between = jnp.sum(b >= high, dtype=jnp.int32), bitmap((b >= low) & (b < high))
    count = jnp.sum(lax.population_count(between).astype(jnp.int32))
    found = (above < k) & (above + count >= k) & (count <= room)
    where = positions(between, room, d)
    few = jnp.where(where < d, b[jnp.minimum(where, d - 1)], 0)
    least = _kth(few, jnp.clip(k - above, 1, room))
    return _kth(b, k, known=(found, least))


def _kth(b: jax.Array, k: int | jax.Array, *, known: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """A threshold that at least k reach, and exactly k unless the k-th largest is met more than once.

    Args:
      b: bits of magnitudes.
      k: may be traced.
      known: whether the threshold is known, and what it is.
    """

    def narrow(carry):
        i, least, reach = carry
        trial = least | (1 << i)
        count = jnp.sum(b >= trial, dtype=jnp.int32)
        return i - 1, jnp.where(count >= k, trial, least), jnp.where(count >= k, count, reach)

    zero = b.reshape(-1)[0] * 0  # of the type that `shard_map` gives what differs from device to device
    begin = (zero + 30, zero, zero + b.size)
    if known is not None:
        begin = tuple(jnp.where(known[0], there, start) for there, start in zip((-1, known[1], 0), begin, strict=True))
    return lax.while_loop(lambda c: (c[0] >= 0) & (c[2] != k), narrow, begin)[1]


def _bit(word: jax.Array, r: jax.Array) -> jax.Array:
    """Where the bit lies that r set bits of a word precede; 32 if it has not that many."""
    place = jnp.zeros(word.shape, jnp.int32)
    for half in (16, 8, 4, 2, 1):
        low = (word >> place.astype(jnp.uint32)) & jnp.uint32(2**half - 1)
        count = lax.population_count(low).astype(jnp.int32)
        past = r >= count
        r = jnp.where(past, r - count, r)
        place = place + jnp.where(past, half, 0)
    last = (word >> place.astype(jnp.uint32)) & 1
    return jnp.where((r >= last.astype(jnp.int32)), 32, place)


def _below(place: jax.Array) -> jax.Array:
    """A word of the bits before `place`, 0 to 32."""
    shift = jnp.minimum(place, 31).astype(jnp.uint32)
    return jnp.where(place >= 32, jnp.uint32(2**32 - 1), (jnp.uint32(1) << shift) - 1)
