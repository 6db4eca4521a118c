"""A dense layer's product, whose kernel gradient costs no pass over memory where a batch is small.

The gradient in a kernel of K x N of a batch of B rows is a product of K x B by B x N: with ten rows, few
multiplications for each number written. Written as a sum of B outer products it is elementwise, and XLA:CPU computes
it inside the update that uses it, which reads and writes the kernel anyway (benchmarks/dense.py). Elsewhere, not
measured, it stays a product.

Two bilinear maps, whose gradients are again these (' transposes):

    product  y = P(x, k)      for dy: P(dy, k') and O(x, dy)
    outer    dk = O(x, dy)    for g:  P(dy, g') and P(x, g)

Letters: B rows, kernels of K x N; an axis before them is clients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jfed._fusion import DIVISIONS_STAY, computed_once, placed_alike

FEW = 16  # rows; with more, registers do not hold a number of each and the product is faster


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, differentiated for small batches.

    Equal to it but for rounding, in value and in derivatives of every order and mode, `jax.experimental.jet` apart;
    checkpoint policies that save dots do not know it. With more than 16 rows, with more axes, or in half precision,
    it is `x @ kernel`. Dense layers of flax NNX compute by it (`from_nnx`).

    Args:
      x: [B, K], or [..., K].
      kernel: [K, N].

    Returns:
      [B, N], or [..., N].

    >>> print(linear(jnp.ones((2, 3)), jnp.ones((3, 1))))
    [[3.]
     [3.]]
    """
    # A sum of outer products in half precision would stall where the product's does not.
    single_or_double = jnp.result_type(x) == jnp.result_type(kernel) and jnp.result_type(x) in (
        jnp.float32,
        jnp.float64,
    )
    fits = x.ndim == kernel.ndim == 2 and x.shape[1] == kernel.shape[0] and 0 < x.shape[0] <= FEW
    if single_or_double and fits and placed_alike(x, kernel) and jax.config.jax_default_matmul_precision is None:
        return _product.bind(x, kernel)
    return x @ kernel


def _outer_product(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.einsum("...bk,...bn->...kn", x, dy)


def _outer_sum(x: jax.Array, dy: jax.Array) -> jax.Array:
    if not DIVISIONS_STAY:
        return _outer_product(x, dy)
    x, dy = computed_once(x), computed_once(dy)
    return sum(x[..., b, :, None] * dy[..., b, None, :] for b in range(x.shape[-2]))


def _bilinear(name: str, shape: Callable, plain: Callable, on_cpu: Callable) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(plain)
    primitive.def_abstract_eval(
        lambda a, b: a.update(shape=(*a.shape[:-2], *shape(a.shape, b.shape)), weak_type=a.weak_type and b.weak_type)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")

    def batch(args: tuple, axes: tuple) -> tuple[jax.Array, int]:
        a, b = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes, strict=True))
        # What all clients share makes one product of theirs: it is not copied for each. A second axis of clients is a
        # sweep's, where sums of outer products were slower than products.
        return (primitive.bind(a, b) if a.ndim == b.ndim == 3 else plain(a, b)), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


_product = _bilinear("linear", lambda x, k: (x[-2], k[-1]), jnp.matmul, jnp.matmul)
_outer = _bilinear("outer", lambda x, dy: (x[-1], dy[-1]), _outer_product, _outer_sum)
ad.defbilinear(
    _product,
    lambda dy, x, kernel: _product.bind(dy, jnp.swapaxes(kernel, -1, -2)),
    lambda dy, x, kernel: _outer.bind(x, dy),
)
ad.defbilinear(
    _outer,
    lambda dk, x, dy: _product.bind(dy, jnp.swapaxes(dk, -1, -2)),
    lambda dk, x, dy: _product.bind(x, dk),
)
