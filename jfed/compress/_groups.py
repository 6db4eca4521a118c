"""Numbers coded in a few bits each, with statistics for a whole array, for its rows, or for blocks of it.

The array's numbers are laid out in pieces: as many as can be packed without padding as [g, n, B], g codes to a
group of bytes (`jfed.compress._pack`), and what is left over, by whole blocks [m, B] and as part of one [1, r].

Letters: d numbers, B of a block, b bits.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jfed import _validate
from jfed.compress import _pack

Per = int | str | None
Statistics = dict[str, jax.Array]


def check(where: str, per: Per) -> None:
    """Raises a `ValueError` unless `per` says what has statistics of its own."""
    if per not in (None, "row"):
        _validate.at_least_one(where, "per", per, "None is the whole array, 'row' a row of its last axis, 256 a block")


def size(x: Any, per: Per) -> int:
    """Numbers that share their statistics, at most."""
    d = math.prod(x.shape)
    if per is None:
        return d
    return min(d, x.shape[-1] if per == "row" and x.ndim else 1 if per == "row" else per)


def encode(
    x: jax.Array,
    per: Per,
    width: int,
    statistics: Callable[[jax.Array], Statistics],
    code: Callable[[jax.Array, Statistics, Any], jax.Array],
    noise: Callable[[tuple[int, ...]], jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """An array's packed codes under `"codes"`, [bytes] uint8, and its statistics, each [groups] float32.

    Args:
      x: any shape.
      per: what has statistics of its own.
      width: bits of a code.
      statistics: maps [..., B] to numbers [..., 1].
      code: `(numbers [..., B], statistics [..., 1], noise [..., B]) -> codes`, uint8 below 2^width.
      noise: `shape -> ` uniform numbers in [0, 1); None if the code needs none.
    """
    flat, g = x.reshape(-1).astype(jnp.float32), _pack.group(width)
    drawn = None if noise is None else noise(flat.shape)
    whole = statistics(flat[None]) if per is None else None
    codes, found = [], []
    for first, shape in _pieces(x.size, size(x, per), per, g):
        here = slice(first, first + math.prod(shape))
        y = flat[here].reshape(shape)
        s = statistics(y) if whole is None else {name: v.reshape((1,) * y.ndim) for name, v in whole.items()}
        found.append(s)
        codes.append(code(y, s, None if drawn is None else drawn[here].reshape(shape)))
    packed = []
    if codes[0].ndim == 3:
        packed.append(_pack.pack_rows(list(codes.pop(0)), width).reshape(-1))
    if codes:
        packed.append(_pack.pack(_joined(codes), width))
    stats = whole if whole is not None else {n: _joined([f[n] for f in found]) for n in found[0]}
    return {"codes": _joined(packed)} | {name: s.reshape(-1) for name, s in stats.items()}


def decode(
    coded: dict[str, jax.Array],
    value: Callable[[jax.Array, Statistics], jax.Array],
    shape: tuple[int, ...],
    dtype: str,
    per: Per,
    width: int,
) -> jax.Array:
    """The array again; `value` maps codes [..., B] and statistics [..., 1] to float32."""
    d, g = math.prod(shape), _pack.group(width)
    codes = coded["codes"]
    stats = {name: s for name, s in coded.items() if name != "codes"}
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    parts, begun = [], 0  # numbers, groups taken so far
    pieces = _pieces(d, size(like, per), per, g)

    def of(groups):
        nonlocal begun
        if per is None:
            return {name: s.reshape((1,) * (len(groups) + 1)) for name, s in stats.items()}
        first, begun = begun, begun + math.prod(groups)
        return {name: s[first:begun].reshape(*groups, 1) for name, s in stats.items()}

    if len(pieces[0][1]) == 3:
        _, (_, n, b) = pieces.pop(0)
        nbytes = _pack.nbytes(g * n * b, width)
        rows = _pack.unpack_rows(codes[:nbytes].reshape(-1, n, b), width)
        codes = codes[nbytes:]
        parts += [value(row, of((n,))).reshape(-1) for row in rows]
    if pieces:
        left = sum(math.prod(shape) for _, shape in pieces)
        flat, first = _pack.unpack(codes, width, left), 0
        for _, piece in pieces:
            here = flat[first : first + math.prod(piece)].reshape(piece)
            parts.append(value(here, of(piece[:-1])).reshape(-1))
            first += math.prod(piece)
    return _joined(parts).reshape(shape).astype(dtype)


def packed(x: Any, per: Per, width: int, levels: int = 0) -> tuple[tuple[str, _pack.Codes]]:
    """What a `Decoder` says of the codes that `encode` makes."""
    shape = _pieces(math.prod(x.shape), size(x, per), per, _pack.group(width))[0][1]
    return (("codes", _pack.Codes(width, math.prod(shape) if len(shape) == 3 else 0, math.prod(x.shape), levels)),)


def _pieces(d: int, b: int, per: Per, g: int) -> list[tuple[int, tuple[int, ...]]]:
    """First number and shape of each piece."""
    if per is None:
        main = d // g
        pieces = [(0, (g, 1, main)), (g * main, (1, d - g * main))]
    else:
        n, m = d // (g * b), d // b % g
        pieces = [(0, (g, n, b)), (g * n * b, (m, b)), ((g * n + m) * b, (1, d % b))]
    return [(first, shape) for first, shape in pieces if math.prod(shape)]


def _joined(parts: list[jax.Array]) -> jax.Array:
    parts = [p.reshape(-1) for p in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
