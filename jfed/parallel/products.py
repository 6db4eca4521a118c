"""Products of tokens and kernels, and such whose messages are under way while they multiply (collective matmul).

Source: Wang et al. 2023 (doi:10.1145/3567955.3567959), the rings.

Letters: T tokens, K inputs, N outputs, n devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _axis
from jfed.parallel.layered import divides


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, added up in float32, the kernel rounded to x's dtype.

    Its two gradients are such products too, of a gradient rounded to x's dtype, so that with x in bfloat16 all three
    run at that dtype's speed; the kernel's is not rounded, and may be added to others in full.

    Args:
      x: [..., K].
      kernel: [K, N].

    Returns:
      [..., N] float32.

    >>> print(product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1))).dtype)
    float32
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"product(x of dtype {x.dtype}): x must be floating; convert it, as x.astype(jnp.float32).")
    # As matrices, which XLA:CPU of jax 0.7 must have to multiply bfloat16.
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _kernel_gradient(x: jax.Array, g: jax.Array, kernel: jax.Array) -> jax.Array:
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.matmul(x.T, g, preferred_element_type=jnp.float32).astype(kernel.dtype)


def _product_backward(given, g):
    x, kernel = given
    g = g.astype(x.dtype)
    return product(g, kernel.T).astype(x.dtype), _kernel_gradient(x, g, kernel)


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


def gather_matmul(x: jax.Array, kernel: jax.Array, axis_name: str | None) -> jax.Array:
    """The product of all devices' tokens with this device's kernel; chunks of tokens come round a ring.

    The chunk of the next device is under way while that at hand is multiplied. Backward, `matmul_scatter` does the same
    for x's gradient; the kernel's needs no messages, as the tokens that came are kept.

    Args:
      x: [..., T / n, K].
      kernel: [K, N / n], of other columns on each device.
      axis_name: of devices.

    Returns:
      [..., T, N / n] float32.

    >>> x, kernel = jnp.arange(2.0).reshape(2, 1, 1), jnp.ones((1, 1))
    >>> y = jax.vmap(gather_matmul, (0, None, None), axis_name="tensor")(x, kernel, "tensor")
    >>> print(y[0].T, y[1].T)
    [[0. 1.]] [[0. 1.]]
    """
    return product(x, kernel) if axis_name is None else _gather_matmul(x, kernel, axis_name)


def matmul_scatter(x: jax.Array, kernel: jax.Array, axis_name: str | None) -> jax.Array:
    """This device's tokens of the products' sum over devices; partial sums go round a ring.

    A partial sum is under way while the next chunk of tokens is multiplied. Backward is `gather_matmul`.

    Args:
      x: [..., T, K / n].
      kernel: [K / n, N], of other rows on each device.
      axis_name: of devices.

    Returns:
      [..., T / n, N] of x's dtype, which partial sums travel in.

    Raises:
      ValueError: if n does not divide T.

    >>> x, kernel = jnp.arange(4.0).reshape(2, 2, 1), jnp.ones((1, 1))
    >>> y = jax.vmap(matmul_scatter, (0, None, None), axis_name="tensor")(x, kernel, "tensor")
    >>> print(y[0].T, y[1].T)
    [[2.]] [[4.]]
    """
    if axis_name is None:
        return product(x, kernel).astype(x.dtype)
    divides("matmul_scatter", {axis_name: lax.axis_size(axis_name)}, axis_name, tokens=x.shape[-2])
    return _matmul_scatter(x, kernel, axis_name)


def _ring_gather(x, kernel, axis_name):
    """All tokens, and their products."""
    n, here, length = lax.axis_size(axis_name), lax.axis_index(axis_name), x.shape[-2]
    x_all = jnp.zeros((*x.shape[:-2], n * length, x.shape[-1]), x.dtype)
    y = jnp.zeros((*x_all.shape[:-1], kernel.shape[-1]), jnp.float32)
    for i in range(n):
        coming = _axis.permute(x, axis_name, [((j + 1) % n, j) for j in range(n)]) if i < n - 1 else x
        at = (here + i) % n * length
        x_all = lax.dynamic_update_slice_in_dim(x_all, x, at, x.ndim - 2)
        y = lax.dynamic_update_slice_in_dim(y, product(x, kernel), at, x.ndim - 2)
        x = coming
    return x_all, y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather_matmul(x, kernel, axis_name):
    return _ring_gather(x, kernel, axis_name)[1]


def _gather_matmul_forward(x, kernel, axis_name):
    x_all, y = _ring_gather(x, kernel, axis_name)
    return y, (x_all, kernel)


def _gather_matmul_backward(axis_name, given, g):
    x_all, kernel = given
    g = g.astype(x_all.dtype)
    return matmul_scatter(g, kernel.T, axis_name), _kernel_gradient(x_all, g, kernel)


_gather_matmul.defvjp(_gather_matmul_forward, _gather_matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_scatter(x, kernel, axis_name):
    n, here, length = lax.axis_size(axis_name), lax.axis_index(axis_name), x.shape[-2] // lax.axis_size(axis_name)
    total = None
    for i in range(n):
        came = None if i == 0 else _axis.permute(total, axis_name, [(j, (j + 1) % n) for j in range(n)])
        at = (here + n - 1 - i) % n * length  # n - 1 - i devices away from where it ends
        y = product(lax.dynamic_slice_in_dim(x, at, length, x.ndim - 2), kernel)
        total = (y if came is None else y + came).astype(x.dtype)
    return total


def _matmul_scatter_backward(axis_name, given, g):
    x, kernel = given
    g_all, dx = _ring_gather(g, kernel.T, axis_name)
    return dx.astype(x.dtype), _kernel_gradient(x, g_all, kernel)


_matmul_scatter.defvjp(
    lambda x, kernel, axis_name: (_matmul_scatter(x, kernel, axis_name), (x, kernel)), _matmul_scatter_backward
)
