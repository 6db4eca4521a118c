"""Pairs of communication, each the other's derivative, of which models split over an axis of devices are made.

The model's text is that of one device; what others must know passes one of these functions, whose backward pass says
what they must know of its gradient. A loss that all devices of the axis compute alike is then differentiated as one,
and every device gets the gradient of its own part.

    function     forward             backward            Megatron's name
    copied       nothing             sum                 f
    summed       sum                 nothing             g
    gathered     all-gather          reduce-scatter      g of sequence parallelism
    scattered    reduce-scatter      all-gather          g bar
    sliced       nothing, own part   all-gather          scatter to the region
    assembled    all-gather          nothing, own part   gather from the region
    exchanged    all-to-all          all-to-all back

They run under `jfed.mesh.shard_map` and under `vmap(axis_name=)`; with `axis_name=None` there is one device, and each
is the identity. Their derivatives are again these functions, so reverse mode may be nested.

Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3; Korthikanti et al. 2022 (arXiv:2205.05198), section 4.

Letters: n devices on the axis.
"""

import functools

import jax
from jax import lax

from jfed._axis import differing, on_devices


def size(axis_name: str | None) -> int:
    """n; 1 without an axis."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def index(axis_name: str | None) -> jax.Array | int:
    """The number of this device, [] int32; 0 without an axis."""
    return 0 if axis_name is None else lax.axis_index(axis_name)


def copied(x: jax.Array, axis_name: str | None) -> jax.Array:
    """What all devices hold alike and each uses for its own part: the same; gradients are summed.

    >>> grad = jax.grad(lambda x, w: copied(x, "tensor") * w)
    >>> print(jax.vmap(grad, (None, 0), axis_name="tensor")(jax.numpy.float32(2.0), jax.numpy.array([1.0, 3.0])))
    [4. 4.]
    """
    return x if axis_name is None else _copied(x, axis_name)


def summed(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The sum of what devices hold, which all then use alike; gradients are handed on.

    >>> print(jax.vmap(lambda x: summed(x, "tensor"), axis_name="tensor")(jax.numpy.array([1.0, 3.0])))
    [4. 4.]
    """
    return x if axis_name is None else _summed(x, axis_name)


def gathered(x: jax.Array, axis_name: str | None, axis: int) -> jax.Array:
    """The parts of all devices along `axis`, which each uses for its own part; gradients are reduce-scattered.

    Args:
      x: [..., d, ...].
      axis_name: of devices.
      axis: of `x`, not negative.

    Returns:
      [..., n d, ...].

    >>> f = jax.grad(lambda x, w: (gathered(x, "tensor", 0) * w).sum())
    >>> x, w = jax.numpy.ones((2, 1)), jax.numpy.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(jax.vmap(f, axis_name="tensor")(x, w).T)
    [[4. 6.]]
    """
    return x if axis_name is None else _gathered(x, axis_name, axis)


def scattered(x: jax.Array, axis_name: str | None, axis: int) -> jax.Array:
    """This device's part along `axis` of the sum of what devices hold; gradients are gathered.

    Args:
      x: [..., n d, ...].
      axis_name: of devices.
      axis: of `x`, not negative.

    Returns:
      [..., d, ...].

    Raises:
      ValueError: if n does not divide the dimension.

    >>> x = jax.numpy.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(jax.vmap(lambda x: scattered(x, "tensor", 0), axis_name="tensor")(x).T)
    [[4. 6.]]
    """
    return x if axis_name is None else _scattered(x, axis_name, axis)


def sliced(x: jax.Array, axis_name: str | None, axis: int) -> jax.Array:
    """This device's part along `axis` of what all hold alike; gradients are gathered.

    Args:
      x: [..., n d, ...].
      axis_name: of devices.
      axis: of `x`, not negative.

    Returns:
      [..., d, ...].

    Raises:
      ValueError: if n does not divide the dimension.

    >>> x = jax.numpy.array([[1.0, 2.0], [1.0, 2.0]])
    >>> print(jax.vmap(lambda x: sliced(x, "tensor", 0), axis_name="tensor")(x).T)
    [[1. 2.]]
    """
    return x if axis_name is None else _sliced(x, axis_name, axis)


def assembled(x: jax.Array, axis_name: str | None, axis: int) -> jax.Array:
    """The parts of all devices along `axis`, which all then use alike; each takes its part of the gradient.

    Args:
      x: [..., d, ...].
      axis_name: of devices.
      axis: of `x`, not negative.

    Returns:
      [..., n d, ...].

    >>> f = jax.grad(lambda x: (assembled(x, "tensor", 0) ** 2).sum() / 2)
    >>> print(jax.vmap(f, axis_name="tensor")(jax.numpy.array([[1.0], [3.0]])).T)
    [[1. 3.]]
    """
    return x if axis_name is None else _assembled(x, axis_name, axis)


def exchanged(x: jax.Array, axis_name: str | None, split: int, join: int) -> jax.Array:
    """Part j along one axis for device j, and what all devices have for this one, put together along another.

    Gradients go the way back.

    Args:
      x: [..., n d, ..., e, ...] on each of n devices.
      axis_name: of devices.
      split: the axis of n d, not negative.
      join: the axis of e, not negative; may be the same.

    Returns:
      [..., d, ..., n e, ...].

    Raises:
      ValueError: if n does not divide the dimension `split`.

    >>> x = jax.numpy.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(jax.vmap(lambda x: exchanged(x, "expert", 0, 0), axis_name="expert")(x))
    [[1. 3.]
     [2. 4.]]
    """
    return x if axis_name is None else _exchanged(x, axis_name, split, join)


def _pair(f, backward):
    """`f(x, *where)`, differentiated by `backward(gradient, *where)`, which may be made of other pairs."""
    function = jax.custom_vjp(f, nondiff_argnums=tuple(range(1, f.__code__.co_argcount)))
    function.defvjp(lambda x, *where: (function(x, *where), None), lambda *given: (backward(given[-1], *given[:-2]),))
    return functools.wraps(f)(function)


def _share(where, x, axis_name, axis):
    """One of n equal parts of a dimension."""
    n = lax.axis_size(axis_name)
    if x.shape[axis] % n:
        raise ValueError(
            f"{where}(x of shape {x.shape}): the axis {axis_name!r} has {n} devices, which must divide dimension "
            f"{axis}; take a multiple of {n}."
        )
    return x.shape[axis] // n


def _own(x, axis_name, axis):
    length = _share("sliced", x, axis_name, axis)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * length, length, axis)


def _sum_of_own(x, axis_name, axis):
    _share("scattered", x, axis_name, axis)
    return lax.psum_scatter(x, axis_name, scatter_dimension=axis, tiled=True)


def _all_to_all(x, axis_name, split, join):
    _share("exchanged", x, axis_name, split)
    x = x if on_devices(axis_name) else differing(x, axis_name)
    return lax.all_to_all(x, axis_name, split, join, tiled=True)


_copied = _pair(lambda x, axis_name: x, lambda g, axis_name: _summed(g, axis_name))
_summed = _pair(lambda x, axis_name: lax.psum(x, axis_name), lambda g, axis_name: _copied(g, axis_name))
_gathered = _pair(
    lambda x, axis_name, axis: lax.all_gather(x, axis_name, axis=axis, tiled=True),
    lambda g, axis_name, axis: _scattered(g, axis_name, axis),
)
_scattered = _pair(_sum_of_own, lambda g, axis_name, axis: _gathered(g, axis_name, axis))
_sliced = _pair(_own, lambda g, axis_name, axis: _assembled(g, axis_name, axis))
_assembled = _pair(
    lambda x, axis_name, axis: lax.all_gather(x, axis_name, axis=axis, tiled=True),
    lambda g, axis_name, axis: _sliced(g, axis_name, axis),
)
_exchanged = _pair(_all_to_all, lambda g, axis_name, split, join: _exchanged(g, axis_name, join, split))
