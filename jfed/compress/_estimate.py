"""How many bytes `lossless.encode` would write, inside a compiled program."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfed.compress import _codes, _entropy, _pack, _walk


def estimator(sizes: list[Any]) -> _walk.Coder:
    """Appends to `sizes` the bytes that the writer of `lossless` would append to its output."""

    def kept(rows, live):
        """As the writer's: which rows [n, bytes] are written, or None for all."""
        if live is None or live.size != len(rows):
            return None
        alike = jnp.all(jnp.where(live[:, None], True, rows == rows[jnp.argmin(live)][None]))
        sizes.append(jnp.where(jnp.all(live), 0, 1 + jnp.where(alike, rows.shape[1], 0)))
        return live | ~alike

    def plain(x, live):
        itemsize = np.dtype(x.dtype).itemsize
        if live is None and not _walk.by_byte(x):
            sizes.append(math.prod(x.shape) * itemsize)
        elif x.size:
            rows = lax.bitcast_convert_type(jnp.asarray(x).reshape(-1), jnp.uint8).reshape(x.size, itemsize)
            mask = kept(rows, live)
            if _walk.by_byte(x):
                sizes.extend(_shortened(column, 8, mask) for column in rows.T)
            else:
                sizes.append(itemsize * (x.size if mask is None else jnp.sum(mask)))
        return x

    def packed(x, packing, live):
        codes = _walk.unpacked(jnp.asarray(x), packing, jnp)
        sizes.append(_shortened(codes, packing.width, kept(codes[:, None], live)))
        return x

    def places(x, places):
        n, b, k = places
        slots = _walk.slots(jnp.asarray(x), places, jnp)
        if slots.dtype == bool:
            held = slots.reshape(-1)
            live = (jnp.arange(k)[None] < jnp.sum(slots, axis=1, keepdims=True)).reshape(-1)
            positions = jnp.arange(n * b)
        else:
            held = live = (slots < b).reshape(-1)
            positions = (slots + b * jnp.arange(n)[:, None]).reshape(-1)
        empty = n * k - jnp.sum(held)
        sizes.append(_varint(1 + empty) + _golomb(positions, held, n * b))
        return x, live

    return _walk.Coder(plain, packed, places)


def _shortened(codes: jax.Array, width: int, mask: jax.Array | None) -> jax.Array:
    """Bytes of `_entropy.shorten` for the codes that `mask` is true for."""
    mask = jnp.ones(codes.shape, bool) if mask is None else mask
    counts = jnp.zeros(2**width, jnp.int32).at[codes].add(mask.astype(jnp.int32))
    n, usual = jnp.sum(counts), jnp.argmax(counts)

    def either(counts):
        n = jnp.sum(counts)
        whole = jnp.ceil(n / _pack.group(width)) * (_pack.group(width) * width // 8)
        return 1 + jnp.minimum(whole, _entropy.entropy_nbytes(counts, jnp))

    others = mask & (codes != usual)
    k = jnp.sum(others)
    place = jnp.cumsum(mask) - 1
    split = 2 + _varint(k) + _golomb(place, others, n) + either(counts.at[usual].set(0))
    raw = 1 + jnp.ceil(n / _pack.group(width)) * (_pack.group(width) * width // 8)
    return jnp.where(counts[usual] > 15 / 16 * n, jnp.minimum(split, raw), either(counts))


def _golomb(positions: jax.Array, held: jax.Array, d: Any) -> jax.Array:
    """Bytes of Golomb codes of those ascending positions that `held` is true for."""
    last = lax.cummax(jnp.where(held, positions, -1))
    gaps = positions - jnp.concatenate([jnp.full(1, -1), last[:-1]]) - 1
    count = jnp.sum(held)
    b = _codes.golomb_parameter(count / jnp.maximum(d, 1), jnp).astype(jnp.int32)
    return jnp.ceil((jnp.sum(jnp.where(held, gaps >> b, 0)) + count * (b + 1.0)) / 8)


def _varint(n: jax.Array) -> jax.Array:
    return 1 + (n >= 2**7) + (n >= 2**14) + (n >= 2**21) + (n >= 2**28)
