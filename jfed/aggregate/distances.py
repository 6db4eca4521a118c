"""Means in which a message counts less the farther it is: geometric median and centred clipping.

Letters: m clients present, v the aggregate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.aggregate._rows import alike, combine, distances, narrow, shares, stateless, wide
from jfed.core import Tree


def geometric_median(*, iterations: int = 8, smoothing: float = 1e-6) -> optax.GradientTransformationExtraArgs:
    """The point with the least weighted sum of distances to all messages, nearly.

    This is the smoothed Weiszfeld algorithm of RFA (Pillutla et al. 2022, arXiv:1912.13445, Algorithm 2):

        eta_i = alpha_i / max(nu, |v - x_i|)        v <- sum_i eta_i x_i / sum_i eta_i

    with alpha_i the weights, as in the paper, and v starting from the weighted mean.

    Guarantees:
      * The aggregate is a convex combination of the messages of clients present.
      * It follows a translation of all messages.

    With a part q of the weight on messages very far away, each iteration takes what is left of their
    pull down by about q / (1 - q): messages of 1e6 times the size of honest ones, q = 1/5, are worth ten
    iterations. The paper makes three, for milder ones.

    Args:
      iterations: passes over the messages.
      smoothing: nu, below which a distance counts no less.

    Raises:
      ValueError: if `iterations` is not a whole number of at least 1, or `smoothing` not above 0.

    >>> agg = geometric_median(iterations=30)
    >>> aggregate, _ = agg.update(jnp.array([0.0, 1.0, 3.0, 9.0, 1e6]), agg.init(0.0), weights=jnp.ones(5))
    >>> print(round(float(aggregate), 3))
    3.0
    """
    _validate.at_least_one("geometric_median", "iterations", iterations, "8 is usual")
    _validate.positive("geometric_median", "smoothing", smoothing, "1e-6 is RFA's")

    def rule(stack: Tree, weights: jax.Array, ids: jax.Array) -> Tree:
        del ids
        alpha = shares(weights)

        def iteration(_, v: Tree) -> Tree:
            eta = alpha / jnp.maximum(smoothing, distances(stack, v))
            return combine(stack, shares(eta))

        return narrow(jax.lax.fori_loop(0, iterations, iteration, combine(stack, alpha)), stack)

    return stateless(rule)


class ClippingState(NamedTuple):
    """State of `centred_clipping` between rounds."""

    centre: Tree  # the last aggregate, v, in float32 or better; zero before the first


def centred_clipping(radius: float, *, iterations: int = 1) -> optax.GradientTransformationExtraArgs:
    """The last aggregate, moved by the mean of clipped differences from it (Karimireddy et al. 2021, arXiv:2012.10333).

        v <- v + 1/m sum_i (x_i - v) min(1, tau / |x_i - v|)

    Guarantees:
      * One iteration moves v by `radius` at most, and each client by `radius / m` at most.
      * With a radius beyond all distances it is the unweighted mean, whatever came before.
      * Without anybody present the state stays.

    The centre serves from round to round, which asks for messages that change slowly: the paper pairs it
    with momentum on the workers, in jfed `uplink=optax.ema(0.9, debias=False)`.

    Args:
      radius: tau, in units of the norm of a message.
      iterations: how often v moves in a round.

    Raises:
      ValueError: if `radius` is not above 0, or `iterations` not a whole number of at least 1.

    >>> agg = centred_clipping(radius=2.0)
    >>> aggregate, state = agg.update(jnp.array([1.0, 2.0, 1e6]), agg.init(0.0), weights=jnp.ones(3))
    >>> print(aggregate.round(3), state.centre.round(3))
    1.667 1.667
    """
    _validate.positive("centred_clipping", "radius", radius, "a good start is the norm of an honest message")
    _validate.at_least_one("centred_clipping", "iterations", iterations, "1 is usual, 3 where messages change fast")

    def update_fn(stack, state, params=None, *, weights, **extra_args):
        del params, extra_args
        each = alike(weights)

        def iteration(_, v: Tree) -> Tree:
            part = each * jnp.minimum(1.0, radius / distances(stack, v))
            stays = 1.0 - jnp.sum(part)
            return jax.tree.map(lambda v, moved: stays * v + moved, v, combine(stack, part))

        v = jax.lax.fori_loop(0, iterations, iteration, state.centre)
        aggregate = tree.select(jnp.any(weights > 0), v, jax.tree.map(jnp.zeros_like, v))
        return narrow(aggregate, stack), ClippingState(v)

    def init_fn(params: Tree) -> ClippingState:
        return ClippingState(jax.tree.map(jnp.zeros_like, wide(params)))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
