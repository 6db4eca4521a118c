"""The AlexNet, as a model of two parts.

Source: Krizhevsky 2014 (arXiv:1404.5997), section 5.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfed import _validate
from jfed.core import Tree
from jfed.parallel.hybrid.models import Dense, HybridModel, HybridParams


def alexnet(
    image_shape: tuple[int, int, int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    width: float = 1.0,
    stem: tuple[int, int] = (11, 4),
    convolution: Callable | None = None,
) -> HybridModel:
    """The AlexNet in one tower: five convolutions, three overlapping pools, three dense layers.

    64, 192, 384, 384 and 256 kernels, then 4096 and 4096 units (Krizhevsky 2014, arXiv:1404.5997, section 5), without
    response normalization and dropout. Kernels start as He's normal, biases at 0.

    Args:
      image_shape: (height, width, channels).
      num_classes: logits.
      width: factor of all numbers of kernels and units but the logits, rounded to at least 1.
      stem: (side, stride) of the first convolution; (5, 1) for images of about 30 pixels.
      convolution: `(x, kernel, *, strides, padding) -> y` in NHWC and HWIO, by default XLA's; on CPUs
        `jfed.models.conv2d` trains much faster inside compiled loops.

    Returns:
      A `HybridModel`; 61,838,248 parameters, of which 3,207,104 in convolutions.

    Raises:
      ValueError: if the image does not survive the pools, a number is not positive, or `convolution` is no function;
        when traced, if images have another shape.

    >>> shapes = jax.eval_shape(alexnet().init, jax.random.key(0))
    >>> print([sum(x.size for x in jax.tree.leaves(part)) for part in shapes])
    [3207104, 58631144]
    """
    where = "alexnet"
    if len(image_shape) != 3 or len(stem) != 2:
        raise ValueError(
            f"{where}(image_shape={image_shape}, stem={stem}): give (height, width, channels) and (side, stride)."
        )
    for name, value in zip(("height", "width", "channels"), image_shape, strict=True):
        _validate.at_least_one(where, f"{name} of image_shape", value, "(224, 224, 3) is the original")
    if convolution is not None and not callable(convolution):
        raise ValueError(f"{where}(convolution={convolution!r}): give a function such as jfed.models.conv2d.")
    _validate.at_least_one(where, "num_classes", num_classes, "it is the number of labels")
    _validate.positive(where, "width", width, "1 is the original, 0.0625 trains on a CPU")
    for name, value in zip(("side of stem", "stride of stem"), stem, strict=True):
        _validate.at_least_one(where, name, value, "(11, 4) is the original")
    convolve = _xla_convolution if convolution is None else convolution
    channels = [max(round(width * c), 1) for c in (64, 192, 384, 384, 256)]
    units = max(round(width * 4096), 1)
    sides, strides = (stem[0], 5, 3, 3, 3), (stem[1], 1, 1, 1, 1)
    pads, pools = (2, 2, 1, 1, 1), (True, True, False, False, True)
    left = list(image_shape[:2])
    for side, stride, pad, pool in zip(sides, strides, pads, pools, strict=True):
        left = [(size + 2 * pad - side) // stride + 1 for size in left]
        left = [(size - 3) // 2 + 1 for size in left] if pool else left
        if min(left) < 1:
            raise ValueError(
                f"{where}(image_shape={tuple(image_shape)}, stem={tuple(stem)}): nothing of the image is left after "
                "the pools; take a smaller stem such as (5, 1), or larger images."
            )

    def init_fn(key: jax.Array) -> HybridParams:
        keys = iter(jax.random.split(key, 8))

        def layer(*shape):
            scale = (2 / np.prod(shape[:-1])) ** 0.5
            return Dense(scale * jax.random.normal(next(keys), shape), jnp.zeros(shape[-1]))

        before = [image_shape[2], *channels[:-1]]
        kernels = tuple(layer(s, s, i, o) for s, i, o in zip(sides, before, channels, strict=True))
        widths = [left[0] * left[1] * channels[-1], units, units, num_classes]
        return HybridParams(kernels, tuple(layer(i, o) for i, o in zip(widths, widths[1:], strict=False)))

    def features_fn(params: Tree, x: jax.Array) -> jax.Array:
        if x.shape[1:] != tuple(image_shape):
            raise ValueError(f"{where}(x of shape {x.shape}): give images [b, {', '.join(map(str, image_shape))}].")
        for layer, stride, pad, pool in zip(params, strides, pads, pools, strict=True):
            x = convolve(x, layer.kernel, strides=(stride, stride), padding=((pad, pad), (pad, pad)))
            x = jax.nn.relu(x + layer.bias[None, None, None])
            x = _overlapping_pool(x) if pool else x
        return x.reshape(x.shape[0], -1)

    return HybridModel(init_fn, features_fn)


def _xla_convolution(x, kernel, *, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _overlapping_pool(x):
    """Maximum over windows of 3 x 3 at strides of 2; as slices, whose gradient needs no scatter."""
    high, wide = ((size - 3) // 2 + 1 for size in x.shape[1:3])
    slices = [x[:, i : i + 2 * high - 1 : 2, j : j + 2 * wide - 1 : 2] for i in range(3) for j in range(3)]
    return functools.reduce(jnp.maximum, slices)
