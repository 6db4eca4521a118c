"""A convolution that trains fast inside compiled loops, and a max pool to go with it.

Inside `scan` and `while_loop`, XLA:CPU has a fast path for convolutions in NHWC/HWIO layout only, and
the two that differentiation emits have other layouts: training then runs some 40 times slower. Here
both gradients are written as explicit transposes around NHWC/HWIO convolutions. One kernel per client
(`vmap` over kernels) would be a grouped convolution, slow again on CPU; there it becomes a loop over clients.

Letters: B images of height H, width W and I channels; kernels of h x w from I to O channels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jfed import _validate

Padding = str | tuple[tuple[int, int], tuple[int, int]]


def conv2d(x: jax.Array, kernel: jax.Array, *, padding: Padding = "SAME") -> jax.Array:
    """Cross-correlation with stride 1, as `jax.lax.conv_general_dilated`.

    Equal to it in value and in derivatives of every order by reverse mode; works under `jit`, `scan`
    and `vmap`. Forward mode (`jvp`, `jacfwd`, `hessian`) raises a TypeError: write Hessian-vector products as
    `grad(lambda w: vdot(grad(f)(w), v))`.

    Args:
      x: [B, H, W, I].
      kernel: [h, w, I, O], any size, odd or even.
      padding: "SAME" (for even kernels the extra row is at the end), "VALID", or
        `((top, bottom), (left, right))`.

    Returns:
      [B, H', W', O] with `H' = H + top + bottom - h + 1`.

    Raises:
      ValueError: if shapes or padding do not fit.

    >>> conv2d(jnp.ones((2, 28, 28, 1)), jnp.ones((5, 5, 1, 32))).shape
    (2, 28, 28, 32)
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"conv2d(x of shape {x.shape}, kernel of shape {kernel.shape}): must be [B, H, W, I] and [h, w, I, O]; "
            "add the channel axis with x[..., None]."
        )
    return _conv(x, kernel, _pairs(padding, kernel.shape[:2]))


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Maximum over windows of `window` x `window` that do not overlap.

    Rows and columns left over at the end are dropped (VALID). Of equal values the first takes the
    gradient and NaN stays NaN, as in `jax.lax.reduce_window`, whose gradient, a select-and-scatter, is slow.

    Args:
      x: [B, H, W, C].
      window: side of a window, at least 1.

    Returns:
      [B, H // window, W // window, C].

    Raises:
      ValueError: if `window` is not a whole number of at least 1.

    >>> print(max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1))[0, :, :, 0])
    [[ 6.  8.]
     [16. 18.]]
    """
    _validate.at_least_one("max_pool", "window", window, "2 is usual")
    # Not jnp.max: its gradient looks for the entries equal to the maximum and divides by their number. Where XLA
    # computes x twice, once fused with each use, and rounds differently, there are none, and the gradient is 0/0.
    b, h, w, c = x.shape
    h, w = h // window, w // window
    x = x[:, : h * window, : w * window].reshape(b, h * window, w, window, c)
    x = functools.reduce(_larger, [x[:, :, :, i] for i in range(window)]).reshape(b, h, window, w, c)
    return functools.reduce(_larger, [x[:, :, i] for i in range(window)])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def _pairs(padding: Padding, kernel_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    if padding == "VALID":
        return ((0, 0), (0, 0))
    if padding == "SAME":
        return tuple(((k - 1) // 2, k // 2) for k in kernel_size)
    try:
        (top, bottom), (left, right) = padding
        return (int(top), int(bottom)), (int(left), int(right))
    except (TypeError, ValueError):
        raise ValueError(
            f"conv2d(padding={padding!r}): must be 'SAME', 'VALID' or ((top, bottom), (left, right)); "
            "for p on every side write ((p, p), (p, p))."
        ) from None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, padding: tuple) -> jax.Array:
    return _primitive(padding)(x, kernel)


def _conv_fwd(x: jax.Array, kernel: jax.Array, padding: tuple) -> tuple[jax.Array, tuple]:
    return _conv(x, kernel, padding), (x, kernel)


def _conv_bwd(padding: tuple, residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Both gradients call `_conv` again, so that they have fast gradients themselves.
    x, kernel = residuals
    full = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape[:2], padding, strict=True))
    dx = _conv(dy, jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2)), full)
    # Contract over images: channels I play the batch, B the channels, dy [H', W', B, O] the kernel.
    dk = _conv(jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(dy, (1, 2, 0, 3)), padding)
    return dx, jnp.transpose(dk, (1, 2, 0, 3))


_conv.defvjp(_conv_fwd, _conv_bwd)


@functools.cache
def _primitive(padding: tuple) -> Callable:
    """The forward convolution with its own rule for `vmap`; one function a padding, so that jit caches hit."""

    def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    conv = custom_vmap(direct)

    @conv.def_vmap
    def rule(axis_size: int, in_batched: list[bool], x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, bool]:
        x_batched, kernel_batched = in_batched
        if not kernel_batched:  # clients are just more images
            y = conv(x.reshape(-1, *x.shape[2:]), kernel)
            return y.reshape(axis_size, -1, *y.shape[1:]), True
        x_axis = 0 if x_batched else None
        if axis_size == 1:
            return conv(x[0] if x_batched else x, kernel[0])[None], True

        def one_by_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
            if x_batched:
                return jax.lax.map(lambda pair: conv(*pair), (x, kernel))
            return jax.lax.map(lambda k: conv(x, k), kernel)

        def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.vmap(direct, (x_axis, 0))(x, kernel)

        return jax.lax.platform_dependent(x, kernel, cpu=one_by_one, default=grouped), True

    return conv
