"""The kit's convolution and dense product for flax models that have their own.

`nnx.Conv` calls `lax.conv_general_dilated`, slow to train inside compiled loops and with one kernel per
client (see `jfed.models.conv`), but takes another function in its place, and so does `nnx.Linear`. A layer keeps its
class, its parameters and their names, and only computes by `conv2d` or `linear`. Dense layers lose nothing by it and
are changed unasked; convolutions lose forward mode, so that is for the user to say.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jfed.models.conv import conv2d
from jfed.models.dense import linear


def fast_convolutions(module: Any) -> Any:
    """Lets every 2-D `nnx.Conv` of a module compute by `jfed.models.conv2d`.

    The layers changed are those without groups, dilation, precision or preferred element type; with any strides,
    dtype, and padding but "SAME_LOWER". Parameters, their names and, up to rounding, outputs stay; forward-mode
    derivatives are lost. Other `nnx.Conv` are left as they are and named in a warning.

    Args:
      module: a `flax.nnx.Module`, changed in place.

    Returns:
      The same module.

    Raises:
      TypeError: if `module` is not an `nnx.Module`.

    >>> from flax import nnx
    >>> from jfed import models
    >>> model = models.from_nnx(lambda rngs: fast_convolutions(nnx.Conv(3, 8, (3, 3), rngs=rngs)))
    >>> params = model.init(jax.random.key(0))
    >>> print(params["kernel"].shape, model.apply(params, jax.numpy.ones((5, 6, 6, 3))).shape)
    (3, 3, 3, 8) (5, 6, 6, 8)
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"fast_convolutions(module={type(module).__name__} object): module must be a flax.nnx.Module; "
            "write fast_convolutions(MyModule(rngs=rngs)) inside the function handed to from_nnx."
        )
    left = []
    for name, layer in _flax_convolutions(module):
        if _replaceable(layer):
            layer.conv_general_dilated = _conv_general_dilated
        else:
            left.append(name)
    if left:
        warnings.warn(
            f"fast_convolutions: {', '.join(left)} stay as they are: not 2-D, or with groups, dilation, precision or "
            "preferred_element_type; train them with clients.lanes(1).",
            stacklevel=2,
        )
    return module


def slow_convolutions(module: Any) -> list[str]:
    """Names of the layers that `fast_convolutions` would change."""
    return [name for name, layer in _flax_convolutions(module) if _replaceable(layer)]


def use_linear(module: Any) -> None:
    """Lets every `nnx.Linear` of a `flax.nnx.Module`, changed in place, compute by `jfed.models.linear`."""
    from flax import nnx

    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, nnx.Linear) and layer.dot_general is jax.lax.dot_general:
            layer.dot_general = _dot_general


def _dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: tuple, *args: Any, **rest: Any) -> jax.Array:
    """`linear` where a plain product is asked for, and lax's where something else is."""
    asked = any(value is not None for value in (*args, *rest.values()))
    if asked or dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        return jax.lax.dot_general(x, kernel, dimension_numbers, *args, **rest)
    return linear(x, kernel)


def _conv_general_dilated(x: jax.Array, kernel: jax.Array, strides: tuple, padding: Any, **rest: Any) -> jax.Array:
    del rest  # what `_replaceable` found at its default
    return conv2d(x, kernel, strides=strides, padding=padding)


def _flax_convolutions(module: Any) -> Iterator[tuple[str, Any]]:
    """Name and layer of each `nnx.Conv` that calls lax."""
    from flax import nnx

    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Conv) and node.conv_general_dilated is jax.lax.conv_general_dilated:
            yield ".".join(str(part) for part in path) or type(node).__name__, node


def _replaceable(layer: Any) -> bool:
    return (
        len(layer.kernel_size) == 2
        and layer.feature_group_count == 1
        and all(d is None or np.all(np.equal(d, 1)) for d in (layer.input_dilation, layer.kernel_dilation))
        and layer.precision is None
        and getattr(layer, "preferred_element_type", None) is None  # flax 0.11 has no such attribute
        and layer.padding != "SAME_LOWER"
    )
