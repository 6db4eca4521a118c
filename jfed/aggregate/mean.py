"""The weighted mean, as an aggregator: what a round does without one, for wrappers to hold on to."""

import jax
import optax

from jfed.aggregate._rows import combine, narrow, shares, stateless
from jfed.core import Tree


def mean() -> optax.GradientTransformationExtraArgs:
    """The mean of messages, weighted as in FedAvg (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1).

    A round without an aggregator forms the same mean as clients finish, and needs no stack for it. This
    one is for `bucketing` and `attacked` to wrap, and to compare with. A single client can make of it
    what it likes.

    >>> import jax.numpy as jnp
    >>> agg = mean()
    >>> aggregate, _ = agg.update(jnp.array([1.0, 4.0, 99.0]), agg.init(0.0), weights=jnp.array([2.0, 1.0, 0.0]))
    >>> print(aggregate)
    2.0
    """

    def rule(stack: Tree, weights: jax.Array, ids: jax.Array) -> Tree:
        del ids
        return narrow(combine(stack, shares(weights)), stack)

    return stateless(rule)
