"""Models of two parts, convolutions and dense layers, the latter's units split over workers.

Letters: n workers, b examples, F features of an example; a layer has I inputs, O units.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed.core import Tree
from jfed.parallel import _workers
from jfed.parallel.conjugate import assembled, gathered


class Dense(NamedTuple):
    """A layer; where it is split, a worker's own O / n units."""

    kernel: jax.Array  # [I, O]
    bias: jax.Array  # [O]


class HybridParams(NamedTuple):
    """A model's parameters."""

    features: Tree  # of the convolutional part
    dense: tuple[Dense, ...]  # the last one's units are the logits


class HybridModel(NamedTuple):
    """A model of two parts, neither of which draws anything at random."""

    init: Callable  # (key) -> HybridParams
    features: Callable  # (params.features, x [b, ...]) -> [b, F]
    activation: Callable = jax.nn.relu  # between dense layers, number by number


def whole(model: HybridModel) -> Callable:
    """The model on one device, `apply(params, x [B, ...], key=None) -> logits [B, O]`, for losses and metrics.

    >>> model = HybridModel(None, lambda p, x: p * x)
    >>> params = HybridParams(jnp.ones(()), (Dense(jnp.ones((1, 2)), jnp.zeros(2)),))
    >>> print(whole(model)(params, jnp.ones((3, 1))).shape)
    (3, 2)
    """

    def apply_fn(params: HybridParams, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        return dense_layers(params.dense, model.features(params.features, x), model.activation, None)

    return apply_fn


def dense_layers(
    layers: Sequence[Dense], h: jax.Array, activation: Callable, axis_name: str | tuple[str, ...] | None
) -> jax.Array:
    """The logits of examples that all workers hold, each layer's units split over workers.

    Activities are gathered after every layer, and their gradients reduce-scattered. The gradient of `h` is what this
    worker's units say; the sum over workers is the whole.

    Args:
      layers: this worker's part, kernels [I, O / n].
      h: [b, F], the same on all workers.
      activation: between layers.
      axis_name: of workers; None is one device.

    Returns:
      [b, O], the same on all workers, in float32 or better.
    """
    *hidden, last = layers
    for layer in hidden:
        h = gathered(activation(_affine(layer, h)).astype(h.dtype), axis_name, 1)
    return assembled(_affine(last, h), axis_name, 1)


def _affine(layer, h):
    return jnp.dot(h, layer.kernel, preferred_element_type=_workers.wide(h.dtype)) + layer.bias[None]
