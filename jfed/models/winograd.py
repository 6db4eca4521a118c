"""Convolutions with fewer multiplications: the minimal filtering of Winograd, for CPUs.

A tile of 2 x 2 outputs is `A' [(G k G') * (D' x D)] A`, `*` entry by entry, where the nested product of three
small matrices costs additions only: for a 3 x 3 kernel 16 multiplications take the place of 36, for 5 x 5
36 of 100. The entries of all tiles, images and channels are one matrix product each. The kernel's gradient is
the same read backwards, `G' [(D' x D) * (A dy A')] G` (Lavin and Gray 2015, arXiv:1509.09308; matrices after
Toom and Cook, see Barabasz et al. 2020, arXiv:1803.10986).

Rounding is that of float32 sums in another order: errors of an entry are within 1e-5 of the largest entry. What is
not finite reaches every output of its tile.

Letters: B images of H x W and I channels, H' x W' after the convolution, kernels r x r to O channels.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

OUTPUTS = 2  # a tile's side after the convolution
# The points at which polynomials are multiplied, by r, besides infinity.
POINTS = {3: (0.0, 1.0, -1.0), 5: (0.0, 1.0, -1.0, 0.5, -2.0)}
BLOCK = 40e6  # bytes of transformed tiles of the images worked on at once: more fall out of the caches


def matrices(r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(D', G, A')` for r taps, n = r + 1: [n, n], [n, r] and [2, n]. `A' [(G k) * (D' x)]` are 2 outputs.

    >>> data, kernel, output = matrices(3)
    >>> x, k = np.arange(4.0), np.array([1.0, 2.0, 3.0])
    >>> print(output @ ((kernel @ k) * (data @ x)), np.correlate(x, k))
    [ 8. 14.] [ 8. 14.]
    """
    points = np.array(POINTS[r])
    others = [np.delete(points, i) for i in range(len(points))]
    scale = np.array([np.prod(p - rest) for p, rest in zip(points, others, strict=True)])
    data = [np.append(np.poly(rest)[::-1], 0.0) for rest in others] + [np.poly(points)[::-1]]
    kernel = np.concatenate([np.vander(points, r, increasing=True) / scale[:, None], np.eye(r)[-1:]])
    output = np.concatenate([np.vander(points, OUTPUTS, increasing=True), np.eye(OUTPUTS)[-1:]])
    return np.stack(data), kernel, output.T


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution without padding, strides 1.

    Args:
      x: [B, H, W, I].
      kernel: [r, r, I, O], r a key of `POINTS`.

    Returns:
      [B, H', W', O], H' = H + 1 - r.
    """
    (r, _, inputs, outputs), (high, wide) = kernel.shape, (n + 1 - kernel.shape[0] for n in x.shape[1:3])
    data, taps, output = matrices(r)
    rows = [kernel[i] for i in range(r)]
    filters = [f for row in _combine(taps, rows) for f in _combine(taps, [row[j] for j in range(r)])]

    def of(x: jax.Array) -> jax.Array:
        tiles = _transform(data, x, high, wide)
        products = [tile.reshape(-1, inputs) @ f for tile, f in zip(tiles, filters, strict=True)]
        products = [p.reshape(*tiles[0].shape[:3], outputs) for p in products]
        y = _nested(output, products)
        y = jnp.stack([jnp.stack(row, 3) for row in y], 2)  # [B, H'/2, 2, W'/2, 2, O]
        return y.reshape(y.shape[0], 2 * y.shape[1], -1, y.shape[5])[:, :high, :wide]

    y = _in_blocks(of, _tile_bytes(r, high, wide, inputs + outputs, x.dtype), x)
    return y.reshape(-1, *y.shape[2:])[: x.shape[0]]


def weights(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of `forward` in its kernel.

    Args:
      x: [B, H, W, I].
      dy: [B, H', W', O].

    Returns:
      [r, r, I, O], r = H + 1 - H'.
    """
    high, wide = dy.shape[1:3]
    data, taps, output = matrices(x.shape[1] + 1 - high)

    def of(x: jax.Array, dy: jax.Array) -> jax.Array:
        pairs = zip(_transform(data, x, high, wide), _transform(output.T, dy, high, wide), strict=True)
        products = [jnp.tensordot(a.reshape(-1, a.shape[3]), b.reshape(-1, b.shape[3]), (0, 0)) for a, b in pairs]
        return jnp.stack([jnp.stack(row) for row in _nested(taps.T, products)])

    tile_bytes = _tile_bytes(x.shape[1] + 1 - high, high, wide, x.shape[3] + dy.shape[3], x.dtype)
    return jnp.sum(_in_blocks(of, tile_bytes, x, dy), 0)


def _tile_bytes(r: int, high: int, wide: int, channels: int, dtype: np.dtype) -> int:
    """Bytes of one image's tiles, transformed."""
    return (r + 1) ** 2 * -(-high // OUTPUTS) * -(-wide // OUTPUTS) * channels * dtype.itemsize


def _in_blocks(f: Callable, bytes_each: int, *images: jax.Array) -> jax.Array:
    """`f` of a few images after another, stacked; zeros fill up the last few."""
    count = images[0].shape[0]
    blocks = -(-count // max(int(BLOCK // bytes_each), 1))
    if blocks == 1:
        return f(*images)[None]
    pads = [jnp.pad(x, ((0, -count % blocks), (0, 0), (0, 0), (0, 0))) for x in images]
    return jax.lax.map(lambda some: f(*some), tuple(x.reshape(blocks, -1, *x.shape[1:]) for x in pads))


def _transform(matrix: np.ndarray, x: jax.Array, high: int, wide: int) -> list[jax.Array]:
    """`matrix @ tile @ matrix'` of all tiles that cover high x wide outputs: by entry, [B, H'/2, W'/2, channels]."""
    side = matrix.shape[1]
    down, across = (-(-n // OUTPUTS) for n in (high, wide))
    ends = [OUTPUTS * (n - 1) + side - have for n, have in ((down, x.shape[1]), (across, x.shape[2]))]
    x = jnp.pad(x, ((0, 0), *((0, end) for end in ends), (0, 0)))
    rows = _combine(matrix, [x[:, i : i + OUTPUTS * down - 1 : OUTPUTS] for i in range(side)])
    # Each row of entries is written once and not computed anew for every entry of it.
    rows = [jax.lax.optimization_barrier(row) for row in rows]
    return [
        jax.lax.optimization_barrier(entry)
        for row in rows
        for entry in _combine(matrix, [row[:, :, j : j + OUTPUTS * across - 1 : OUTPUTS] for j in range(side)])
    ]


def _nested(matrix: np.ndarray, entries: list[jax.Array]) -> list[list[jax.Array]]:
    """`matrix @ entries @ matrix'`, for entries row by row."""
    side = matrix.shape[1]
    by_row = [_combine(matrix, entries[i * side : (i + 1) * side]) for i in range(side)]
    by_column = [_combine(matrix, column) for column in zip(*by_row, strict=True)]
    return [list(row) for row in zip(*by_column, strict=True)]


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """`matrix @ parts`, zeros left out."""

    def scaled(factor: float, part: jax.Array) -> jax.Array:
        return part if factor == 1 else -part if factor == -1 else jnp.asarray(factor, part.dtype) * part

    def one(row: np.ndarray) -> jax.Array:
        first, *rest = (scaled(f, part) for f, part in zip(row, parts, strict=True) if f)
        return sum(rest, first)

    return [one(row) for row in matrix]
