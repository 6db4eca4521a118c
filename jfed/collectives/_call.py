"""How every all-reduce is called: on a tree, leaves of one dtype as one vector, under its own name in the program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _validate
from jfed._axis import joined, vary
from jfed.core import Tree

Axis = str | tuple[str, ...]
"""An axis of devices: of a mesh or of `vmap`, or several of a mesh in its order, taken as one."""

Send = Callable[[jax.Array, Axis, Any, Any], jax.Array]
"""`(x, axis_name, pairs, hop) -> what arrived`: how a sum under way travels; `hop` numbers the encodings."""


def named(f: Callable, axis_name: Axis, **options: int | None) -> Callable[[Tree], Tree]:
    """`x -> f(x, axis_name, **options)`, a program of the name of `f`, which lints and profiles can see.

    Raises:
      ValueError: if an option is neither None nor a whole number of at least 1, or the axis no name or tuple of names.
    """
    where = f.__name__.removeprefix("_")
    for name, value in options.items():
        if value is not None:
            _validate.at_least_one(where, name, value, "it counts devices")
    if not isinstance(axis_name, str) and not isinstance(axis_name, tuple):
        raise ValueError(f"{where}(axis_name={axis_name!r}): give the name of an axis, or a tuple of names.")
    return _program(
        f, axis_name, tuple((name, value if value is None else int(value)) for name, value in options.items())
    )


@functools.cache
def _program(f, axis_name, options):
    def program(x):
        return f(x, axis_name, **dict(options))

    program.__name__ = f.__name__
    return jax.jit(program)


def over_vectors(sum_vector: Callable, x: Tree, axis_name: Axis) -> Tree:
    """The all-reduce of a tree, made of one of vectors, `(vector [d], n) -> [d]`; truth values are counted."""
    n = lax.axis_size(axis_name)
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.int32) if leaf.dtype == bool else leaf, jax.tree.map(jnp.asarray, x))

    def one(vector):
        return sum_vector(vector, n) if n > 1 and vector.size else vector

    return joined(one, vary(x, axis_name))


def divisor(where: str, name: str, value: int, n: int) -> int:
    """`value`, which must divide the n devices of the axis.

    Raises:
      ValueError: if it does not.
    """
    if n % value:
        fits = [g for g in range(1, n + 1) if n % g == 0]
        raise ValueError(f"{where}({name}={value!r}): the axis has {n} devices; {name} must be one of {fits}.")
    return value
