"""What a server does about a gradient being old: optax transforms told `stale` and `age` (`asynchronous`).

A gradient is as many steps of the server old as were made since its worker fetched. Either it counts for less, or
what it would be at today's model is estimated from the path gone since.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.core import Tree


def per_age(age: jax.Array) -> jax.Array:
    """`1 / max(age, 1)`, the rate of Zhang et al. 2016 (arXiv:1511.05950): a gradient of age tau by `eta / tau`.

    >>> print(per_age(jnp.array([0, 1, 4])))
    [1.   1.   0.25]
    """
    return 1.0 / jnp.maximum(age, 1)


def scale_by_age(factor: Callable[[jax.Array], jax.Array] = per_age) -> optax.GradientTransformationExtraArgs:
    """Each gradient times a function of its age; with SGD, a learning rate that falls with it.

    Args:
      factor: of the age, [] int32; by default the staleness-aware rate of Zhang et al. 2016.

    >>> old = scale_by_age()
    >>> print(old.update(jnp.array(6.0), old.init(()), age=jnp.array(3))[0])
    2.0
    """

    def update_fn(gradient: Tree, state: Tree, params: Tree = None, *, age: jax.Array, **extra) -> tuple[Tree, Tree]:
        del params, extra
        scale = factor(age)
        return jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), gradient), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def delay_compensation(strength: float) -> optax.GradientTransformationExtraArgs:
    """`g + lambda g * g * (w - w_stale)`, coordinate by coordinate (DC-ASGD-c, Zheng et al. 2017, arXiv:1609.08326).

    A first-order step from the gradient at `w_stale` to that at today's `w`, with `lambda g * g` for the diagonal of
    the Hessian; of a complex g, `g * conj(g)` stands for `g * g`.

    Args:
      strength: lambda, at least 0.

    Raises:
      ValueError: if `strength` is not a finite number of at least 0.

    >>> correct = delay_compensation(0.5)
    >>> w, w_stale = jnp.array(3.0), jnp.array(2.0)
    >>> print(correct.update(jnp.array(4.0), correct.init(w), w, stale=w_stale)[0])
    12.0
    """
    _validate.at_least_zero("delay_compensation", "strength", strength, "0 corrects nothing")

    def update_fn(gradient: Tree, state: Tree, params: Tree, *, stale: Tree, **extra) -> tuple[Tree, Tree]:
        del extra

        def one(g, w, old):
            return g + jnp.asarray(strength, g.dtype) * g * jnp.conj(g) * (w - old)

        return jax.tree.map(one, gradient, params, stale), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def adaptive_delay_compensation(
    strength: float, *, decay: float = 0.95, eps: float = 1e-7
) -> optax.GradientTransformationExtraArgs:
    """The same with `lambda / sqrt(v + eps)` for lambda, v a moving mean of `g * g` (DC-ASGD-a of the same paper).

    `v <- decay v + (1 - decay) g * g` before it is used, from 0; one v for the gradients of all workers.

    Args:
      strength: lambda, at least 0.
      decay: in [0, 1].
      eps: above 0.

    Raises:
      ValueError: if an argument is out of its bounds.

    >>> correct = adaptive_delay_compensation(0.5, decay=0.0)
    >>> w, w_stale = jnp.array(3.0), jnp.array(2.0)
    >>> print(correct.update(jnp.array(4.0), correct.init(w), w, stale=w_stale)[0])
    6.0
    """
    _validate.at_least_zero("adaptive_delay_compensation", "strength", strength, "0 corrects nothing")
    _validate.within("adaptive_delay_compensation", "decay", decay, 0.0, 1.0, "a good start is 0.95")
    _validate.positive("adaptive_delay_compensation", "eps", eps, "a good start is 1e-7")

    def init_fn(params: Tree) -> Tree:
        return jax.tree.map(jnp.zeros_like, params)

    def update_fn(gradient: Tree, v: Tree, params: Tree, *, stale: Tree, **extra) -> tuple[Tree, Tree]:
        del extra

        def moved(v, g):
            return (decay * v + (1 - decay) * g * jnp.conj(g)).astype(v.dtype)

        def one(g, v, w, old):
            rate = jnp.asarray(strength / jnp.sqrt(v + eps), g.dtype)
            return g + rate * g * jnp.conj(g) * (w - old)

        v = jax.tree.map(moved, v, gradient)
        return jax.tree.map(one, gradient, v, params, stale), v

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
