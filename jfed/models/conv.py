"""A convolution that trains fast inside compiled loops and under `vmap` over clients.

A convolution and its two gradients are three bilinear maps, and the gradients of each are the other two:

    forward       y  = C(x, k)      gradients X(dy, k) and K(x, dy)
    input         dx = X(dy, k)     gradients C(dx', k) and K(dx', dy)
    weights       dk = K(x, dy)     gradients X(dy, k') and C(x, k')

So three lowerings give derivatives of every order. Chosen, and compared by benchmarks/convolutions.py:

  * CPU. Square kernels of 3 or 5 between many channels, strides 1: Winograd's (`jfed.models.winograd`), with
    less than half of the multiplications. Few channels: patches and one matrix product for `C`, one for `K`. Else
    `C` is XLA's convolution, and so is `X` at stride 1, both in NHWC/HWIO, the one layout it has a fast path for
    inside `scan` and `while_loop` (those that differentiation emits run many times slower), and `K` is h matrix
    products, one a kernel row. `X` at larger strides is one matrix product and shifted sums: nothing is
    multiplied by the zeros between the strides. One kernel per client is a loop over clients.
  * GPU and TPU, not measured: XLA's own gradients; with one kernel per client, patches and one batched matrix
    product, because `vmap` would emit a grouped convolution, which cuDNN is reported to run slowly. It holds h w
    copies of its input.

Letters: B images of height H, width W and I channels, H' and W' after the convolution; kernels of h x w
from I to O channels; strides s.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jfed import _validate
from jfed.models import winograd

Padding = str | tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class _Window(NamedTuple):
    """All that shapes do not tell of a convolution; static."""

    image: tuple[int, int]  # H, W
    kernel: tuple[int, int]  # h, w
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    def each(self, f: Callable) -> tuple:
        """`f(k, s, n, m, padding)` for rows and for columns; n before the convolution, m after it."""
        return tuple(map(f, self.kernel, self.strides, self.image, self.out, self.padding))

    @property
    def out(self) -> tuple[int, int]:
        """H', W'."""
        sizes = zip(self.image, self.kernel, self.strides, self.padding, strict=True)
        return tuple(max((n + sum(pad) - k) // s + 1, 0) for n, k, s, pad in sizes)

    @property
    def taps(self) -> list[tuple[int, int]]:
        """Every (row, column) of the kernel."""
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]


def conv2d(
    x: jax.Array, kernel: jax.Array, *, strides: int | tuple[int, int] = 1, padding: Padding = "SAME"
) -> jax.Array:
    """Cross-correlation, as `jax.lax.conv_general_dilated`.

    Equal to it but for rounding, in value and in derivatives of every order by reverse mode; works under `jit`,
    `scan` and `vmap`. On a CPU, between many channels, sums are taken in Winograd's order: float32 entries are within
    1e-5 of the largest, and a value that is not finite may reach a neighbouring output. Forward mode (`jvp`,
    `jacfwd`, `hessian`) raises a TypeError: write Hessian-vector products as
    `grad(lambda w: vdot(grad(f)(w), v))`.

    Args:
      x: [B, H, W, I].
      kernel: [h, w, I, O], any size, odd or even.
      strides: step of the window down and across; one number for both.
      padding: "SAME" (`H' = ceil(H / s)`, an odd row of zeros at the end), "VALID", or
        `((top, bottom), (left, right))`.

    Returns:
      [B, H', W', O] with `H' = (H + top + bottom - h) // s + 1`.

    Raises:
      ValueError: if shapes, strides or padding do not fit.

    >>> conv2d(jnp.ones((2, 28, 28, 1)), jnp.ones((5, 5, 1, 32)), strides=2).shape
    (2, 14, 14, 32)
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"conv2d(x of shape {x.shape}, kernel of shape {kernel.shape}): must be [B, H, W, I] and [h, w, I, O]; "
            "add the channel axis with x[..., None]; grouped convolutions are lax.conv_general_dilated's."
        )
    if x.dtype != kernel.dtype:
        raise ValueError(
            f"conv2d(x of {x.dtype}, kernel of {kernel.dtype}): dtypes must be equal; write x.astype(kernel.dtype)."
        )
    steps = strides if isinstance(strides, tuple | list) and len(strides) == 2 else (strides, strides)
    for step in steps:
        _validate.at_least_one("conv2d", "strides", step, "write 2, or (2, 1) for down and across")
    image, size, steps = x.shape[1:3], kernel.shape[:2], tuple(int(step) for step in steps)
    return _forward(x, kernel, _Window(image, size, steps, _pairs(padding, image, size, steps)))


def _pairs(padding: Padding, image: tuple, kernel: tuple, strides: tuple) -> tuple[tuple[int, int], tuple[int, int]]:
    if padding == "VALID":
        return ((0, 0), (0, 0))
    if padding == "SAME":
        needed = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(image, kernel, strides, strict=True)]
        return tuple((pad // 2, pad - pad // 2) for pad in needed)
    try:
        (top, bottom), (left, right) = padding
        return (int(top), int(bottom)), (int(left), int(right))
    except (TypeError, ValueError):
        raise ValueError(
            f"conv2d(padding={padding!r}): must be 'SAME', 'VALID' or ((top, bottom), (left, right)); "
            "for p on every side write ((p, p), (p, p))."
        ) from None


# The three maps for one client, by convolution.


def _convolve(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, window.strides, window.padding, dimension_numbers=_LAYOUT)


def _input_convolution(dy: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    return jax.lax.conv_general_dilated(
        dy, _turned(kernel), (1, 1), window.each(_around), lhs_dilation=window.strides, dimension_numbers=_LAYOUT
    )


def _around(k: int, s: int, n: int, m: int, pad: tuple[int, int]) -> tuple[int, int]:
    """How `dy` is padded."""
    return k - 1 - pad[0], n + pad[0] - 1 - (m - 1) * s


def _turned(kernel: jax.Array) -> jax.Array:
    return jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))


def _weights_convolution(x: jax.Array, dy: jax.Array, window: _Window) -> jax.Array:
    def around(k: int, s: int, n: int, m: int, pad: tuple[int, int]) -> tuple[int, int]:
        return pad[0], k + (m - 1) * s - n - pad[0]

    # Channels I play the batch, B the channels, dy the kernel.
    layout = ("CHWN", "IHWO", "HWNC")
    return jax.lax.conv_general_dilated(
        x, dy, (1, 1), window.each(around), rhs_dilation=window.strides, dimension_numbers=layout
    )


def _cpu_forward(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    if _winograd_pays(x, *kernel.shape[2:], window):
        return winograd.forward(_padded(x, window.padding), kernel)
    return (_matmul_forward if _narrow(x.shape[3], window) else _convolve)(x, kernel, window)


def _cpu_input(dy: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    if _winograd_pays(dy, *kernel.shape[2:], window):
        return winograd.forward(_padded(dy, window.each(_around)), _turned(kernel))
    return (_input_convolution if window.strides == (1, 1) else _matmul_input)(dy, kernel, window)


def _winograd_pays(images: jax.Array, inputs: int, outputs: int, window: _Window) -> bool:
    """Whether it applies, and its transforms, which cost by the channel, save more in products, by pairs of them."""
    h, w = window.kernel
    applies = h == w and h in winograd.POINTS and window.strides == (1, 1) and min(images.shape[0], *window.out) > 0
    accurate = images.dtype in (jnp.float32, jnp.float64)  # half precision would lose too much
    return applies and accurate and min(inputs, outputs) >= 16 and inputs * outputs >= 1024


def _narrow(inputs: int, window: _Window) -> bool:
    """Whether patches are so short that their product is fastest, as in the first layer on images."""
    return inputs * window.kernel[0] * window.kernel[1] <= 32


def _cpu_weights(x: jax.Array, dy: jax.Array, window: _Window) -> jax.Array:
    if _winograd_pays(x, x.shape[3], dy.shape[3], window):
        return winograd.weights(_padded(x, window.padding), dy)
    if _narrow(x.shape[3], window):
        return _matmul_weights(x, dy, window)
    # Channels first and rows next, so that the shifts copy whole rows and the products run along them.
    x = jnp.transpose(_padded(x, window.padding), (3, 1, 0, 2))  # [I, H + top + bottom, B, W + left + right]
    (down, across), (high, wide) = window.strides, window.out
    columns = [x[..., j : j + (wide - 1) * across + 1 : across] for j in range(window.kernel[1])]
    columns = jnp.concatenate(columns)  # [w I, ..., B, W']
    dy = jnp.transpose(dy, (1, 0, 2, 3)).reshape(-1, dy.shape[3])
    rows = [columns[:, i : i + (high - 1) * down + 1 : down] for i in range(window.kernel[0])]
    rows = [row.reshape(columns.shape[0], -1) @ dy for row in rows]
    return jnp.stack(rows).reshape(*window.kernel, x.shape[0], -1)


# The same by matrix products, which `vmap` turns into batched ones.


def _padded(x: jax.Array, padding: tuple) -> jax.Array:
    (top, bottom), (left, right) = padding
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))


def _patches(x: jax.Array, window: _Window) -> jax.Array:
    """[B, H, W, I] -> [B, H', W', h w I]."""
    x, (down, across), (high, wide) = _padded(x, window.padding), window.strides, window.out
    seen = [
        x[:, i : i + (high - 1) * down + 1 : down, j : j + (wide - 1) * across + 1 : across] for i, j in window.taps
    ]
    return jnp.concatenate(seen, axis=3)


def _matmul_forward(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    return _patches(x, window) @ kernel.reshape(-1, kernel.shape[3])


def _matmul_input(dy: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    b, high, wide, _ = dy.shape
    shares = (dy @ kernel.reshape(-1, kernel.shape[3]).T).reshape(b, high, wide, *kernel.shape[:3])

    def placed(*tap: int) -> jax.Array:
        sizes = zip(tap, window.strides, window.image, window.out, window.padding, strict=True)
        edges = [(t - low, n - (t - low) - (m - 1) * s - 1, s - 1) for t, s, n, m, (low, _) in sizes]
        share = shares[:, :, :, tap[0], tap[1]]
        return jax.lax.pad(share, jnp.zeros((), dy.dtype), ((0, 0, 0), *edges, (0, 0, 0)))

    return sum(placed(i, j) for i, j in window.taps)


def _matmul_weights(x: jax.Array, dy: jax.Array, window: _Window) -> jax.Array:
    patches = _patches(x, window)
    dk = jnp.tensordot(patches, dy, ((0, 1, 2), (0, 1, 2)))
    return dk.reshape(*window.kernel, x.shape[3], -1)


# The three maps with their rules for `vmap`, then for `grad`.


def _lowered(cpu: Callable, elsewhere: Callable, many: Callable, shared: bool) -> Callable:
    """A bilinear map `(a, b, window)`; `shared`: with one `b` for all clients, theirs are just more images."""

    @functools.cache  # one function a window, so that jit caches hit
    def at(window: _Window) -> Callable:
        @custom_vmap
        def one(a: jax.Array, b: jax.Array) -> jax.Array:
            def lowering(f: Callable) -> Callable:
                return lambda a, b: f(a, b, window)

            return jax.lax.platform_dependent(a, b, cpu=lowering(cpu), default=lowering(elsewhere))

        @one.def_vmap
        def rule(clients: int, batched: list[bool], a: jax.Array, b: jax.Array) -> tuple[jax.Array, bool]:
            if shared and not batched[1]:
                y = one(a.reshape(-1, *a.shape[2:]), b)
                return y.reshape(clients, -1, *y.shape[1:]), True
            axes = tuple(0 if b else None for b in batched)
            if clients == 1:
                return one(*(arg if axis is None else arg[0] for arg, axis in zip((a, b), axes, strict=True)))[
                    None
                ], True

            def one_by_one(a: jax.Array, b: jax.Array) -> jax.Array:
                if all(batched):
                    return jax.lax.map(lambda pair: one(*pair), (a, b))
                return jax.lax.map(lambda a: one(a, b), a) if batched[0] else jax.lax.map(lambda b: one(a, b), b)

            def at_once(a: jax.Array, b: jax.Array) -> jax.Array:
                return jax.vmap(lambda a, b: many(a, b, window), axes)(a, b)

            return jax.lax.platform_dependent(a, b, cpu=one_by_one, default=at_once), True

        return one

    return lambda a, b, window: at(window)(a, b)


def _bilinear(lowered: Callable) -> jax.custom_vjp:
    f = jax.custom_vjp(lowered, nondiff_argnums=(2,))
    f.__name__ = lowered.__name__
    return f


_forward = _bilinear(_lowered(_cpu_forward, _convolve, _matmul_forward, shared=True))
_input = _bilinear(_lowered(_cpu_input, _input_convolution, _matmul_input, shared=True))
_weights = _bilinear(_lowered(_cpu_weights, _weights_convolution, _matmul_weights, shared=False))


def _differentiate(f: jax.custom_vjp, by_first: Callable, by_second: Callable) -> None:
    """Sets the gradients `by_first(a, b, cotangent)` and `by_second` of a bilinear map `f(a, b)`."""
    f.defvjp(
        lambda a, b, window: (f(a, b, window), (a, b)),
        lambda window, ab, out: (by_first(*ab, out, window), by_second(*ab, out, window)),
    )


_differentiate(_forward, lambda x, k, dy, w: _input(dy, k, w), lambda x, k, dy, w: _weights(x, dy, w))
_differentiate(_input, lambda dy, k, dx, w: _forward(dx, k, w), lambda dy, k, dx, w: _weights(dx, dy, w))
_differentiate(_weights, lambda x, dy, dk, w: _input(dy, dk, w), lambda x, dy, dk, w: _forward(x, dk, w))
