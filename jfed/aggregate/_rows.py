"""What aggregators do to the rows of a stack: leaves [C, ...], one message a slot.

Letters: C slots, m clients present.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate
from jfed.core import Tree


def stateless(rule: Callable[..., Tree]) -> optax.GradientTransformationExtraArgs:
    """The aggregator without a memory that `rule(stack, weights, ids) -> aggregate` describes."""

    def update_fn(stack, state, params=None, *, weights, ids=None, **extra_args):
        del params, extra_args
        return rule(stack, weights, slots(weights) if ids is None else ids), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def slots(weights: jax.Array) -> jax.Array:
    """Names for clients that came without: their slots, [C] int32."""
    return jnp.arange(weights.shape[0], dtype=jnp.int32)


def shares(amounts: jax.Array) -> jax.Array:
    """Amounts [C], none negative, as parts of their sum; all 0 if that is 0.

    >>> print(shares(jnp.array([1.0, 3.0])), shares(jnp.array([0.0, 0.0])))
    [0.25 0.75] [0. 0.]
    """
    total = jnp.sum(amounts)
    return jnp.where(total > 0, amounts / jnp.where(total > 0, total, 1.0), 0.0)


def alike(weights: jax.Array) -> jax.Array:
    """The same share for everybody present, [C] float32.

    >>> print(alike(jnp.array([7.0, 0.0, 1.0])))
    [0.5 0.  0.5]
    """
    return shares((weights > 0).astype(jnp.float32))


def wide(tree: Tree) -> Tree:
    """Leaves in float32, or better where they are."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), tree)


def narrow(tree: Tree, like: Tree) -> Tree:
    """Leaves in the dtypes of `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def combine(stack: Tree, factors: jax.Array) -> Tree:
    """Sums of the rows times `factors` [C], wide."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.tensordot(factors.astype(x.dtype), x, axes=1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(one, wide(stack))


def distances(stack: Tree, centre: Tree) -> jax.Array:
    """Euclidean distance of each row, over the whole tree, from one wide message: [C]."""

    def one(x: jax.Array, c: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(x - c[None]), axis=tuple(range(1, x.ndim)))

    return jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(one, wide(stack), centre))))


def check_liars(where: str, value: int) -> None:
    """Raises a `ValueError` unless `byzantine` is a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(
            f"{where}(byzantine={value!r}): byzantine must be a whole number of at least 0; it is how many clients of "
            "a round may lie."
        )


def check_number(where: str, name: str, value: float, cure: str) -> None:
    """Raises a `ValueError` unless `value` is traced or a finite number."""
    if _validate.is_concrete(value) and not (np.ndim(value) == 0 and np.isfinite(value)):
        raise ValueError(f"{where}({name}={value!r}): {name} must be a finite number; {cure}.")
