"""Codes of 1 to 32 bits packed into bytes, inside the compiled program.

A group of codes fills whole bytes: 8 of 1, 3, 5 or 7 bits, 4 of 2 or 6, 2 of 4, 1 of 8. The codes of a group lie
far apart, one in each of the rows [group, n], so that a row is packed by the same few operations on whole arrays:
a byte of column j holds the codes of column j.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Codes(NamedTuple):
    """How an array of codes is packed."""

    width: int  # bits of a code
    main: int  # codes that are packed together, in rows far apart; the others follow them, packed by themselves
    count: int  # of codes
    levels: int = 0  # those above 0 of codes with a sign


class Places(NamedTuple):
    """How positions are packed."""

    blocks: int
    b: int  # numbers in a block
    k: int  # slots in a block, of which the last may be empty


def group(width: int) -> int:
    """How many codes of `width` bits fill whole bytes."""
    return 8 // math.gcd(8, width)


def nbytes(count: int, width: int) -> int:
    """Bytes of `count` packed codes: the last group is filled up.

    >>> nbytes(800, 1), nbytes(9, 3)
    (100, 6)
    """
    return -(-count // group(width)) * (group(width) * width // 8)


def pack_rows(rows: list[jax.Array], width: int) -> jax.Array:
    """One group's rows, each [...] of unsigned codes below 2^width, as [bytes of a group, ...] uint8."""
    out = []
    for byte in range(group(width) * width // 8):
        parts = []
        for i, row in enumerate(rows):
            shift = i * width - 8 * byte  # where the code's lowest bit lies in this byte
            if -width < shift < 8:
                parts.append((row << shift if shift >= 0 else row >> -shift).astype(jnp.uint8))
        out.append(_any(parts))
    return jnp.stack(out) if len(out) > 1 else out[0][None]


def unpack_rows(packed: jax.Array, width: int) -> list[jax.Array]:
    """The inverse of `pack_rows`: rows of uint8, or of uint32 above 8 bits."""
    dtype = jnp.uint8 if width <= 8 else jnp.uint32
    rows = []
    for i in range(group(width)):
        parts = []
        for byte in range(packed.shape[0]):
            shift = i * width - 8 * byte
            if -width < shift < 8:
                part = packed[byte].astype(dtype)
                parts.append(part >> shift if shift >= 0 else part << -shift)
        rows.append(_any(parts) & dtype(2**width - 1))
    return rows


def pack(codes: jax.Array, width: int) -> jax.Array:
    """Codes [n] as [nbytes(n, width)] uint8.

    >>> pack(jnp.array([1, 0, 1, 1, 0, 0, 0, 1], jnp.uint8), 1).tolist()
    [141]
    """
    g = group(width)
    short = -codes.shape[0] % g
    if short:
        codes = jnp.concatenate([codes, jnp.zeros(short, codes.dtype)])
    return pack_rows(list(codes.reshape(g, -1)), width).reshape(-1)


def unpack(packed: jax.Array, width: int, count: int) -> jax.Array:
    """The inverse of `pack`: [count] codes."""
    per = group(width) * width // 8
    return jnp.concatenate(unpack_rows(packed.reshape(per, -1), width))[:count]


def _any(parts: list[jax.Array]) -> jax.Array:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole | part
    return whole
