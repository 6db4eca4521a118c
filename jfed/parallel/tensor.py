"""Layers split over an axis of devices: dense ones by columns or rows, the embedding and the loss by the vocabulary.

A column layer has some of its outputs on each device, a row layer some of its inputs. A row layer takes what a column
layer gives, so a pair of them communicates once forward and once backward; in attention, columns are whole heads. What
lies between such pairs is held in one of three ways, the `Layout`:

    WHOLE       by every device, alike: sums over devices before it, and in its gradient after it
    SPLIT       each some of the tokens (sequence parallelism): as many bytes, but norms and residuals are split too
    OVERLAPPED  likewise, sent in a ring of permutes, each under way while the chunk at hand is multiplied

Every function is given this device's part and the axis's name; with `axis_name=None` there is one device. Gradients are
those of a loss that all devices compute alike: of a split array, of this device's part; of others, whole.

Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3; Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.

Letters: T tokens, K inputs, N outputs, H the width, V tokens in the vocabulary, n devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jfed.core import Tree
from jfed.parallel import conjugate
from jfed.parallel.products import gather_matmul, matmul_scatter, product


class Layout(NamedTuple):
    """How devices hold what lies between a row layer and the next column layer, [..., T, H] or [..., T / n, H].

    Each function takes the axis's name last.
    """

    column: Callable  # (held, kernel [K, N / n]) -> [..., T, N / n] float32
    row: Callable  # (x [..., T, K / n], kernel [K / n, N]) -> held, of x's dtype
    total: Callable  # (x [..., T, H] to be added up over devices) -> held
    part: Callable  # (x [..., T, H], alike on all) -> held
    whole: Callable  # (held) -> [..., T, H], alike on all
    shared: Callable  # (a parameter alike on all, that acts on what is held) -> the same


def _scattered(x, axis_name):
    return conjugate.scattered(x, axis_name, x.ndim - 2)


WHOLE = Layout(
    column=lambda x, kernel, axis_name: product(conjugate.copied(x, axis_name), kernel),
    row=lambda x, kernel, axis_name: conjugate.summed(product(x, kernel).astype(x.dtype), axis_name),
    total=conjugate.summed,
    part=lambda x, axis_name: x,
    whole=lambda x, axis_name: x,
    shared=lambda parameter, axis_name: parameter,
)
"""Every device holds all tokens."""

SPLIT = Layout(
    column=lambda x, kernel, axis_name: product(conjugate.gathered(x, axis_name, x.ndim - 2), kernel),
    row=lambda x, kernel, axis_name: _scattered(product(x, kernel).astype(x.dtype), axis_name),
    total=_scattered,
    part=lambda x, axis_name: conjugate.sliced(x, axis_name, x.ndim - 2),
    whole=lambda x, axis_name: conjugate.assembled(x, axis_name, x.ndim - 2),
    shared=conjugate.copied,
)
"""Every device holds T / n tokens, gathered before column layers and scattered after row layers.

What is gathered is kept for the kernel's gradient, unless the block is computed again for it.
"""

OVERLAPPED = SPLIT._replace(column=gather_matmul, row=matmul_scatter)
"""As SPLIT, the messages of dense layers overlapping their products."""


def column_dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    axis_name: str | None = None,
    *,
    layout: Layout = WHOLE,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """A dense layer with some of its outputs on each device.

    Args:
      x: as the layout holds it: [..., T, K] or [..., T / n, K].
      kernel: [K, N / n].
      bias: [N / n].
      axis_name: of devices.
      layout: how devices hold x.
      dtype: of the result, by default x's; the bias is added before it is rounded.

    Returns:
      [..., T, N / n].

    >>> print(column_dense(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones(1)))
    [[4.]
     [4.]]
    """
    y = layout.column(x, kernel, axis_name)
    return (y if bias is None else y + _last(bias, y)).astype(x.dtype if dtype is None else dtype)


def row_dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    axis_name: str | None = None,
    *,
    layout: Layout = WHOLE,
) -> jax.Array:
    """A dense layer with some of its inputs on each device.

    Args:
      x: [..., T, K / n].
      kernel: [K / n, N].
      bias: [N], alike on all devices.
      axis_name: of devices.
      layout: how devices are to hold the result.

    Returns:
      As the layout holds it, [..., T, N] or [..., T / n, N], of x's dtype, in which devices' shares are added.

    >>> print(row_dense(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones(1)))
    [[4.]
     [4.]]
    """
    y = layout.row(x, kernel, axis_name)
    return y if bias is None else (y + _last(layout.shared(bias, axis_name), y)).astype(x.dtype)


def layer_norm(x: jax.Array, params: Tree, axis_name: str | None = None, *, layout: Layout = WHOLE) -> jax.Array:
    """Each token's numbers with mean 0 and variance 1, times `scale` plus `bias` (Ba et al. 2016, arXiv:1607.06450).

    To the variance 1e-6 is added, as flax does.

    Args:
      x: as the layout holds it, [..., H].
      params: `scale` and `bias`, [H], alike on all devices.
      axis_name: of devices.
      layout: how devices hold x.

    Returns:
      The shape and dtype of x; in between it is float32.

    >>> print(layer_norm(jnp.array([1.0, 3.0]), {"scale": jnp.ones(2), "bias": jnp.zeros(2)}).round(3))
    [-1.  1.]
    """
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    scale, bias = (_last(layout.shared(params[name], axis_name), x) for name in ("scale", "bias"))
    return (wide * scale + bias).astype(x.dtype)


def embedding(
    tokens: jax.Array,
    table: jax.Array,
    axis_name: str | None = None,
    *,
    layout: Layout = WHOLE,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Rows of a table that is split by the vocabulary.

    Args:
      tokens: [..., T] int, alike on all devices; one outside [0, V) has a row of NaN.
      table: [V / n, H].
      axis_name: of devices.
      layout: how devices are to hold the result.
      dtype: of the result, and of the messages; by default the table's. The table's gradient is added up in its own.

    Returns:
      As the layout holds it: [..., T, H] or [..., T / n, H].

    >>> print(embedding(jnp.array([1, 0, 2]), jnp.array([[5.0], [7.0]])).T)
    [[ 7.  5. nan]]
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"embedding(tokens of dtype {tokens.dtype}): tokens must be integers; convert them first.")
    tokens = tokens.astype(jnp.int32)  # in which any vocabulary's size can be said
    rows, n = table.shape[0], conjugate.size(axis_name)
    here = tokens - conjugate.index(axis_name) * rows
    # What other devices have is past the end, where lookups give 0 and gradients are dropped; below 0 is from the end.
    found = table.at[jnp.where(here < 0, rows, here)].get(mode="fill", fill_value=0)
    known = (tokens >= 0) & (tokens < n * rows)
    found = jnp.where(known[..., None], found, jnp.nan)
    return layout.total(found.astype(table.dtype if dtype is None else dtype), axis_name)


def cross_entropy(logits: jax.Array, labels: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Softmax cross-entropy of logits that are split by the vocabulary and stay so, in nats.

    Three numbers a position are added up over devices: its greatest logit, the sum of exponentials, the label's logit.

    Args:
      logits: [..., V / n].
      labels: [...] int, alike on all devices; -1 is padding, of loss 0. One outside [-1, V) has the loss NaN, and so
        has every gradient through it.
      axis_name: of devices.

    Returns:
      [...] float32, alike on all devices.

    >>> print(cross_entropy(jnp.zeros((3, 4)), jnp.array([2, -1, 4])).round(3))
    [1.386 0.      nan]
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy(labels of shape {labels.shape} and dtype {labels.dtype}): give one integer for each of the "
            f"logits' {logits.shape[:-1]}, and -1 where there is none."
        )
    columns, n = logits.shape[-1], conjugate.size(axis_name)
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.int32)
    greatest = lax.stop_gradient(jnp.max(logits, axis=-1))
    greatest = greatest if axis_name is None else lax.pmax(greatest, axis_name)
    logits = logits - greatest[..., None]
    here = labels - conjugate.index(axis_name) * columns
    classes = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    # A comparison and a sum, not a gather, whose gradient is a scatter: slow on CPU, and of no fixed order on GPU.
    at_label = jnp.sum(jnp.where(classes == here[..., None], logits, 0.0), axis=-1)
    exponentials = conjugate.summed(jnp.sum(jnp.exp(logits), axis=-1), axis_name)
    nll = jnp.log(exponentials) - conjugate.summed(at_label, axis_name)
    # A factor, so that NaN reaches the gradient too.
    loud = jnp.where((labels < -1) | (labels >= n * columns), jnp.nan, 1.0)
    return jnp.where(labels != -1, nll * loud, 0.0)


def _last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector along the last axis of an array like x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
