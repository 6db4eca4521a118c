"""Multilayer perceptrons and convolutional networks whose layers are split over an axis of devices.

Layers alternate between columns, where each device computes some of the outputs, and rows, where each takes some of the
inputs and the results are added up; so a pair of layers communicates once forward and once backward. Of a convolution
these are output and input channels. The last layer is always of rows, so that all devices hold all its outputs and
their number need not be divided.

Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3, of dense layers.

Letters: B examples, C channels, n devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jfed import _validate
from jfed.core import Tree
from jfed.parallel import conjugate, tensor
from jfed.parallel.layered import divides


class Network(NamedTuple):
    """A model, its layers split over the axis "tensor" of a mesh."""

    init: Callable  # (key) -> params
    apply: Callable  # (params, x [B, ...] floating, axis_name=None) -> predictions [B, outputs], alike on all devices
    specs: Tree  # of PartitionSpecs, as params
    check: Callable  # (sizes) -> None; raises ValueError where the axis does not divide a dimension


class _Layer(NamedTuple):
    kernel: tuple[int, ...]  # [..., inputs, outputs]; [inputs, outputs], or of the window or image before them
    split: str  # "column", "row", or "sliced": a row layer whose inputs all devices hold


def mlp(*sizes: int) -> Network:
    """A multilayer perceptron with ReLU between layers.

    Sent by a device for B examples: each pair of layers sums B numbers of its last layer's outputs forward and of its
    first's inputs backward, the inputs of the network apart. A last layer without a partner sums its outputs forward,
    and gathers the gradient of its inputs.

    Args:
      *sizes: inputs, hidden units of each layer, outputs.

    Returns:
      A `Network`; `params` is `{"layer_0": {"kernel": [in, out], "bias": [out]}, ...}`.

    Raises:
      ValueError: if there are fewer than two sizes, or one is not a whole number of at least 1; from `check`, if the
        axis does not divide the units that are split.

    >>> model = mlp(784, 200, 200, 10)
    >>> model.check({"tensor": 8})
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.ones((5, 784))).shape)
    (5, 10)
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp(sizes={sizes}): there must be inputs and outputs; write mlp(784, 200, 10).")
    for size in sizes:
        _validate.at_least_one("mlp", "sizes", size, "it is the size of an array")
    kernels = list(zip(sizes[:-1], sizes[1:], strict=True))
    names = [f"layer_{i}" for i in range(len(kernels))]
    return _network("mlp", names, kernels, sizes[:1])


def cnn(
    image_shape: Sequence[int], channels: Sequence[int], hidden: int, num_classes: int, *, kernel_size: int = 3
) -> Network:
    """Convolutions of stride 1, each with ReLU and 2 x 2 max pooling, then two dense layers.

    Args:
      image_shape: height, width, channels of `x` [B, height, width, channels].
      channels: output channels of each convolution.
      hidden: units of the first dense layer.
      num_classes: outputs.
      kernel_size: of the convolutions, whose borders are padded with 0.

    Returns:
      A `Network`; `params` is `{"conv_0": {"kernel": [size, size, in, out], "bias": [out]}, ..., "dense": {"kernel":
      [height, width, channels, hidden], ...}, "out": {"kernel": [hidden, num_classes], ...}}`.

    Raises:
      ValueError: if a size is not a whole number of at least 1, or so many poolings leave no image; from `check`, if
        the axis does not divide the channels or units that are split.

    >>> model = cnn((28, 28, 1), (32, 64), 512, 10)
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.ones((5, 28, 28, 1))).shape)
    (5, 10)
    """
    image_shape, channels = tuple(image_shape), tuple(channels)
    if len(image_shape) != 3:
        raise ValueError(f"cnn(image_shape={image_shape}): give height, width and channels, such as (28, 28, 1).")
    for name, values in {
        "image_shape": image_shape,
        "channels": channels,
        "hidden": (hidden,),
        "num_classes": (num_classes,),
        "kernel_size": (kernel_size,),
    }.items():
        for value in values:
            _validate.at_least_one("cnn", name, value, "it is the size of an array")
    *image, first = image_shape
    left = [size // 2 ** len(channels) for size in image]
    if not all(left):
        raise ValueError(
            f"cnn(channels={channels}): {len(channels)} poolings of a {image[0]} x {image[1]} image leave none of it; "
            f"take at most {int(math.log2(min(image)))} convolutions."
        )
    through = (first, *channels)
    kernels = [(kernel_size, kernel_size, *pair) for pair in zip(through[:-1], through[1:], strict=True)]
    names = [f"conv_{i}" for i in range(len(channels))] + ["dense", "out"]
    return _network("cnn", names, [*kernels, (*left, through[-1], hidden), (hidden, num_classes)], image_shape)


def _network(where: str, names: list[str], kernels: list[tuple[int, ...]], input_shape: tuple[int, ...]) -> Network:
    splits = ["column" if i % 2 == 0 else "row" for i in range(len(names))]
    if splits[-1] == "column":
        splits[-1] = "sliced"
    layers = {name: _Layer(kernel, split) for name, kernel, split in zip(names, kernels, splits, strict=True)}

    def init_fn(key: jax.Array) -> Tree:
        keys = jax.random.split(key, len(layers))
        return {name: _init(one, layer.kernel) for one, (name, layer) in zip(keys, layers.items(), strict=True)}

    def apply_fn(params: Tree, x: jax.Array, axis_name: str | None = None) -> jax.Array:
        flat = len(input_shape) == 1 and math.prod(x.shape[1:]) == input_shape[0]
        if x.ndim < 2 or not (flat or x.shape[1:] == input_shape) or not jnp.issubdtype(x.dtype, jnp.floating):
            wanted = ", ".join(map(str, input_shape))
            raise ValueError(f"{where}(x of shape {x.shape} and dtype {x.dtype}): convert it to floats [B, {wanted}].")
        for name, layer in layers.items():
            if name.startswith("conv"):
                x = _pool(jax.nn.relu(_conv(params[name], x, layer.split, axis_name)))
            else:
                x = _dense(params[name], x, layer.split, axis_name)
                x = x if name == names[-1] else jax.nn.relu(x)
        return x

    def check_fn(sizes: dict[str, int]) -> None:
        for name, layer in layers.items():
            length = layer.kernel[-1] if layer.split == "column" else layer.kernel[-2]
            divides(
                where, sizes, "tensor", **{f"{'outputs' if layer.split == 'column' else 'inputs'}_of_{name}": length}
            )

    return Network(init_fn, apply_fn, {name: _specs(layer) for name, layer in layers.items()}, check_fn)


def _init(key: jax.Array, shape: tuple[int, ...]) -> Tree:
    """LeCun normal: variance 1 / the numbers that an output is a sum of."""
    kernel = jax.nn.initializers.lecun_normal()(key, (math.prod(shape[:-1]), shape[-1]), jnp.float32).reshape(shape)
    return {"kernel": kernel, "bias": jnp.zeros(shape[-1], jnp.float32)}


def _specs(layer: _Layer) -> Tree:
    before = (None,) * (len(layer.kernel) - 2)
    if layer.split == "column":
        return {"kernel": PartitionSpec(*before, None, "tensor"), "bias": PartitionSpec("tensor")}
    return {"kernel": PartitionSpec(*before, "tensor", None), "bias": PartitionSpec()}


def _conv(params: Tree, x: jax.Array, split: str, axis_name: str | None) -> jax.Array:
    if split == "column":
        x = conjugate.copied(x, axis_name)
    y = lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if split == "row":
        y = conjugate.summed(y, axis_name)
    return y + params["bias"].reshape(1, 1, 1, -1)


def _pool(x: jax.Array) -> jax.Array:
    """The maximum of 2 x 2 windows; a last row or column without a partner is left out."""
    b, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(b, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _dense(params: Tree, x: jax.Array, split: str, axis_name: str | None) -> jax.Array:
    """Of [B, ..., inputs], over all axes but the first."""
    kernel, bias = params["kernel"], params["bias"]
    if split == "sliced":
        x = conjugate.sliced(x, axis_name, x.ndim - 1)
    x, kernel = x.reshape(x.shape[0], -1), kernel.reshape(-1, kernel.shape[-1])
    return (tensor.column_dense if split == "column" else tensor.row_dense)(x, kernel, bias, axis_name)
