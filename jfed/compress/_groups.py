"""Numbers coded in a few bits each, with statistics for a whole array, for its rows, or for blocks of it.

The array's numbers are laid out in pieces: as many as can be packed without padding as [g, ..., B], g codes to a
group of bytes (`jfed.compress._pack`), and what is left over, by whole blocks [m, B] and as part of one [1, r]. Where
nothing is left over, axes are kept: what runs over rows and columns is vectorised, what divides a number's place to
find them is not.

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
    noise: Callable[..., jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """An array's packed codes under `"codes"`, uint8, and its statistics, each [groups] float32.

    Args:
      x: any shape.
      per: what has statistics of its own.
      width: bits of a code.
      statistics: maps [..., B] to numbers [..., 1].
      code: `(numbers [..., B], statistics [..., 1], noise [..., B]) -> codes`, uint8 below 2^width.
      noise: `(shape, first) -> ` uniform numbers in [0, 1), from number `first` on; None if the code needs none.
    """
    flat, g = x.reshape(-1).astype(jnp.float32), _pack.group(width)
    whole = statistics(flat[None]) if per is None else None
    codes, found = [], []
    for first, shape in _pieces(x.shape, per, g):
        y = flat[first : first + math.prod(shape)].reshape(shape)
        s = statistics(y) if whole is None else {name: v.reshape((1,) * y.ndim) for name, v in whole.items()}
        found.append(s)
        codes.append(code(y, s, None if noise is None else noise(shape, first=first)))
    packed = []
    if codes[0].ndim > 2:
        packed.append(_pack.pack_rows(list(codes.pop(0)), width))
    if codes:
        packed.append(_pack.pack(_joined(codes), width))
    stats = whole if whole is not None else {n: _joined([f[n] for f in found]) for n in found[0]}
    # As one vector, the bytes of several rows would be computed number by number.
    together = packed[0] if len(packed) == 1 and math.prod(packed[0].shape[:-1]) > 1 else _joined(packed)
    return {"codes": together} | {name: s.reshape(-1) for name, s in stats.items()}


def decode(
    coded: dict[str, jax.Array],
    value: Callable[[jax.Array, Statistics], jax.Array],
    shape: tuple[int, ...],
    dtype: str,
    per: Per,
    width: int,
) -> jax.Array:
    """The array again; `value` maps codes [..., B] and statistics [..., 1] to float32."""
    g, codes = _pack.group(width), coded["codes"].reshape(-1)
    stats = {name: s for name, s in coded.items() if name != "codes"}
    parts, begun = [], 0  # numbers, groups taken so far
    pieces = _pieces(shape, per, g)

    def of(groups):
        nonlocal begun
        if per is None:
            return {name: s.reshape((1,) * (len(groups) + 1)) for name, s in stats.items()}
        first, begun = begun, begun + math.prod(groups)
        return {name: s[first:begun].reshape(*groups, 1) for name, s in stats.items()}

    if len(pieces[0][1]) > 2:
        _, main = pieces.pop(0)
        axes = (g * width // 8, *main[1:])
        nbytes = math.prod(axes)
        here = coded["codes"].reshape(axes) if not pieces else codes[:nbytes].reshape(axes)
        rows = [value(row, of(main[1:-1])) for row in _pack.unpack_rows(here, width)]
        if not pieces and g <= 2:
            return jnp.stack(rows).reshape(shape).astype(dtype)
        # Of bytes that hold more, XLA would compute each anew for every number in it, where it has just encoded them.
        codes, parts = codes[nbytes:], [row.reshape(-1) for row in rows]
    if pieces:
        left = sum(math.prod(piece) for _, piece in pieces)
        flat, first = _pack.unpack(codes, width, left), 0
        for _, piece in pieces:
            here = flat[first : first + math.prod(piece)].reshape(piece)
            parts.append(value(here, of(piece[:-1])).reshape(-1))
            first += math.prod(piece)
    return _joined(parts).reshape(shape).astype(dtype)


def packed(x: Any, per: Per, width: int, levels: int = 0) -> tuple[tuple[str, _pack.Codes]]:
    """What a `Decoder` says of the codes that `encode` makes."""
    shape = _pieces(x.shape, per, _pack.group(width))[0][1]
    return (("codes", _pack.Codes(width, math.prod(shape) if len(shape) > 2 else 0, math.prod(x.shape), levels)),)


def _pieces(shape: tuple[int, ...], per: Per, g: int) -> list[tuple[int, tuple[int, ...]]]:
    """First number and shape of each piece; those of more than two axes are packed without padding."""
    d, rows, length = math.prod(shape), math.prod(shape[:-1]), shape[-1] if shape else 1
    b = size(jax.ShapeDtypeStruct(shape, jnp.float32), per)
    if rows % g == 0 and (per is None or length == b):
        pieces = [(0, (g, rows // g, length))]
    elif rows % g == 0 and length % b == 0:
        pieces = [(0, (g, rows // g, length // b, b))]
    elif per is None:
        main = d // g
        pieces = [(0, (g, 1, main)), (g * main, (1, d - g * main))]
    else:
        n, m = d // (g * b), d // b % g
        pieces = [(0, (g, n, b)), (g * n * b, (m, b)), ((g * n + m) * b, (1, d % b))]
    return [(first, piece) for first, piece in pieces if math.prod(piece)]


def _joined(parts: list[jax.Array]) -> jax.Array:
    parts = [p.reshape(-1) for p in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
