"""What an honest peer makes of what it hears."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate, tree
from jfed.core import Tree
from jfed.gossip import mix
from jfed.gossip.robust.received import Received, only
from jfed.gossip.topology import graph

Rule = Callable[[Received, jax.Array], Tree]
"""`(received, key) -> x_i`: what ONE peer makes of it."""


def clipped(radius: float) -> Rule:
    """ClippedGossip with a fixed radius: `x_i + sum_j W_ij (x_j - x_i) min(1, tau / |x_j - x_i|)`.

    The norm is over the whole model. A message that is not finite counts as no difference.

    Guarantees:
      * A peer moves by no more than the radius times the weight of all it hears, whatever they send.
      * An infinite radius is plain gossip, a radius of 0 no communication.

    Args:
      radius: tau, in units of the norm of a model's difference from another; may be infinite.

    Raises:
      ValueError: if `radius` is below 0.
    """
    _validate.within("clipped", "radius", radius, 0, np.inf, "a good start is the distance of honest models")
    return _clipping(lambda received, distance, sound: radius)


def clipped_adaptive(byzantine_weight: float) -> Rule:
    """ClippedGossip whose radius follows the distances of the nearest messages.

        tau_i^2 = 1 / delta_max sum_{j in S_i} W_ij |x_j - x_i|^2

    S_i are the peer itself and the nearest of those heard, as many as have weights that add up to 1 - delta_max at
    most; if not even the nearest is of them, the radius is 0. If liars have no more than delta_max, then no liar
    farther away than all honest ones has a say in it.

    Args:
      byzantine_weight: delta_max, in (0, 1]: the largest weight that all liars together have with any peer.

    Raises:
      ValueError: if `byzantine_weight` is not in (0, 1].
    """
    tiny = float(np.finfo(np.float32).tiny)
    cure = "the weights of all liars that one peer hears add up to it"
    _validate.within("clipped_adaptive", "byzantine_weight", byzantine_weight, tiny, 1, cure)

    def radius(received: Received, distance: jax.Array, sound: jax.Array) -> jax.Array:
        order = jnp.argsort(jnp.where(sound, distance, jnp.inf))
        weight, distance, sound = received.weight[order], distance[order], sound[order]
        trusted = sound & (received.own_weight + jnp.cumsum(weight) <= 1 - byzantine_weight + graph.TOLERANCE)
        # Scaled by the largest, so that its square is a number.
        unit = jnp.max(jnp.where(trusted, distance, 0.0))
        parts = jnp.where(trusted, weight * jnp.square(distance / jnp.where(unit > 0, unit, 1.0)), 0.0)
        return unit * jnp.sqrt(jnp.sum(parts) / byzantine_weight)

    return _clipping(radius)


def by(aggregator: optax.GradientTransformation) -> Rule:
    """Any aggregator of `jfed.aggregate` over a peer's own model and all it hears: `by(aggregate.median())`.

    Weights are those of the mixing; rules that count everybody alike count a peer itself once. A message that is not
    finite is left out. Without weight for its own model, a peer's own is left out too.

    Args:
      aggregator: without a memory: each round is judged by itself.

    Raises:
      ValueError: if the aggregator remembers something, as `centred_clipping` does.
    """
    aggregator = optax.with_extra_args_support(aggregator)
    if jax.tree.leaves(aggregator.init(jnp.zeros(()))):
        raise ValueError("by(aggregator): it remembers from round to round, which a rule cannot; take clipped(radius).")

    def rule(received: Received, key: jax.Array) -> Tree:
        sound = received.came & jax.vmap(tree.all_finite)(received.heard)
        heard = tree.select(sound, received.heard, tree.zeros(received.heard))
        stack = jax.tree.map(lambda x, h: jnp.concatenate([x[None], h]), received.own, heard)
        weights = jnp.concatenate([received.own_weight[None], jnp.where(sound, received.weight, 0.0)])
        update, _ = aggregator.update(stack, aggregator.init(received.own), received.own, weights=weights, key=key)
        return tree.select(jnp.any(weights > 0), update, received.own)

    return rule


def _clipping(radius: Callable) -> Rule:
    """The rule whose radius is `radius(received, distance [S], sound [S])`."""

    def rule(received: Received, key: jax.Array) -> Tree:
        del key
        own, heard = (
            jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), one)
            for one in (received.own, received.heard)
        )
        difference = jax.tree.map(lambda x, h: h - x[None], own, heard)
        squares = [jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(difference)]
        distance = jnp.sqrt(sum(squares))
        sound = received.came & jnp.isfinite(distance)
        tau = radius(received, distance, sound)
        part = jnp.where(distance > tau, tau / jnp.where(distance > tau, distance, 1.0), 1.0)
        factor = jnp.where(sound, received.weight * part, 0.0)

        def one(x, d):
            return x + jnp.sum(mix.column(factor, d) * d, axis=0)

        return jax.tree.map(one, own, only(sound, difference))

    return rule
