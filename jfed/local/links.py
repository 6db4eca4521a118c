"""Links for the chain of a client optimizer.

A client optimizer may take the extra arguments `anchor` (the round's global params), `round` (rounds
completed before this one), `epoch` (passes over the client's examples completed in this round), `value`
(the batch loss), `extra` (what the method sends to everyone) and `memory` (what it remembers of the
client).
"""

from collections.abc import Callable

import jax
import optax

from jfed import _validate
from jfed.core import Tree


def scale_by_round(factor: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Multiplies a client's steps by `factor(round)`: a learning rate that decays over rounds.

    >>> import jax.numpy as jnp
    >>> halve = optax.chain(optax.sgd(1.0), scale_by_round(lambda r: 0.5**r))
    >>> print(halve.update(jnp.array(8.0), halve.init(jnp.array(0.0)), round=2)[0])
    -2.0
    """

    def update_fn(updates, state, params=None, *, round, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: (u * factor(round)).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def proximal(mu: float) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `mu / 2 |w - w_t|^2`, the pull back to the round's global model (FedProx, arXiv:1812.06127).

    Put it before the optimizer: `optax.chain(proximal(0.1), optax.sgd(0.01))`.

    Raises:
      ValueError: if `mu` is negative or not finite.

    >>> import jax.numpy as jnp
    >>> pull = proximal(0.5)
    >>> print(pull.update(jnp.array(1.0), pull.init(jnp.array(0.0)), jnp.array(3.0), anchor=jnp.array(1.0))[0])
    2.0
    """
    _validate.at_least_zero("proximal", "mu", mu, "0 is FedAvg, 0.01 to 1 are usual")
    return add(lambda params, anchor, **_: jax.tree.map(lambda w, w_t: mu * (w - w_t), params, anchor))


def add(term: Callable[..., Tree]) -> optax.GradientTransformationExtraArgs:
    """Adds `term(params, anchor=..., extra=..., memory=..., ...)` to the gradient, in its dtypes."""

    def update_fn(updates, state, params=None, **extra_args):
        return jax.tree.map(lambda u, a: (u + a).astype(u.dtype), updates, term(params, **extra_args)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
