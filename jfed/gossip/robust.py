"""Peers that lie, and rules by which honest ones bear it: instead of the weighted mean, any function of what one hears.

A rule looks at what one peer received and gives its new model; an attack looks at the same, and writes what liars sent
instead. `robust` puts both into a mixing, under any method. ClippedGossip (He, Karimireddy and Jaggi 2022,
arXiv:2202.01545) trusts itself: a peer moves towards what it hears, by no more than a radius for each message.

Liars train, mix and are counted like all others, and only what they send to honest peers is replaced; what they hold
means nothing. Judge the rows of honest peers alone, `state.params[honest]`: the method's own average and consensus
distance are of everybody.

Letters of the paper: i a peer, x_i its model, W_ij the weight of what it hears from j, tau_i its radius, S slots.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate, tree
from jfed.aggregate import Attack as ClientAttack
from jfed.core import Tree
from jfed.gossip import mix
from jfed.gossip.topology import graph


class Received(NamedTuple):
    """What ONE peer has before it in a round."""

    own: Tree  # leaves [...], its own model, x_i
    own_weight: jax.Array  # [] float32, W_ii
    heard: Tree  # leaves [S, ...], what came in each slot; anything where nothing came
    weight: jax.Array  # [S] float32, W_ij; 0 where nothing came
    came: jax.Array  # [S] bool


Rule = Callable[[Received, jax.Array], Tree]
"""`(received, key) -> x_i`: what ONE peer makes of it."""

Attack = Callable[[Received, jax.Array, jax.Array], Tree]
"""`(received, evil [S] bool, key) -> heard`: what ONE peer hears after all, changed where a liar speaks."""


def robust(
    mixing: mix.Mixing, rule: Rule, *, byzantine: Sequence[int] = (), attack: Attack | None = None
) -> mix.Mixing:
    """A mixing in which each peer takes a rule for the weighted mean, and some peers may attack.

    Guarantees:
      * What honest peers send arrives as it is; between liars nothing is changed.
      * What did not come is no part of the rule; a peer's own weight is what the method's `lost` makes of it.
      * On a mesh only what `mixing` itself would permute travels.

    All that a peer hears in a round is held at once: S times the models of all peers.

    Args:
      mixing: brings the messages: `mix.sparse()`, `mix.on_mesh(...)`.
      rule: `clipped(radius)`, `clipped_adaptive(...)`, `by(aggregator)` or one's own.
      byzantine: ids of the liars.
      attack: what they do.

    Raises:
      ValueError: if ids are not whole numbers of at least 0 without repetition, or there are liars without an attack,
        or the reverse; with a topology, if a liar is no peer of it or a row does not add up to 1; when traced, by a
        method that mixes changes instead of models, as `choco` does, or looks at messages itself, as `relay` does.

    >>> from jfed import core
    >>> from jfed.gossip import averaging, topology
    >>> liar = robust(mix.sparse(), clipped(1.0), byzantine=[0], attack=dissensus(9.0))
    >>> algorithm = averaging(topology.complete(4), mixing=liar)
    >>> population = core.Population((), jnp.arange(4), jnp.ones(4, int))
    >>> everyone = core.make_cohort(population, jnp.arange(4), steps=lambda size: size)
    >>> state = algorithm.init(jnp.array(0.0))._replace(params=jnp.array([0.0, 2.0, 3.0, 4.0]))
    >>> print(algorithm.round(state, everyone, jax.random.key(0))[0].params[1:])
    [2.25 3.   3.75]
    """
    ids = [_id(i) for i in byzantine]
    if len(set(ids)) < len(ids):
        raise ValueError(f"robust(byzantine={byzantine!r}): a peer is named twice; name each once.")
    if bool(ids) != (attack is not None):
        raise ValueError(
            f"robust(byzantine={byzantine!r}, attack={attack!r}): liars need an attack, and it needs them; give both."
        )

    def mixing_fn(topology: graph.Topology) -> mix.Mixer:
        n = graph.peers(topology)
        graph.check_rows("robust", topology)
        if ids and max(ids) >= n:
            raise ValueError(f"robust(byzantine={byzantine!r}): there are peers 0 to {n - 1} alone; name those.")
        mixer = mixing(topology)
        lies = np.isin(np.arange(n), ids)
        evil = lies[topology.source] & ~lies  # [P, S, n]

        def combine(own: Tree, sent: Tree, weights: mix.Weights, key: jax.Array) -> Tree:
            if sent is not own:
                raise ValueError("robust: this method mixes changes, and rules are for models; take another method.")
            slots = topology.source.shape[1]
            if not slots:
                return own
            messages = [mixer.hear(sent, s, weights.round) for s in range(slots)]
            heard = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *messages)
            received = Received(own, weights.own, heard, weights.heard.T, weights.came.T)
            attack_key, rule_key = jax.random.split(key)
            if attack is not None:
                now = jnp.asarray(evil)[weights.round % graph.period(topology)].T & received.came
                received = received._replace(heard=jax.vmap(attack)(received, now, _of_each(attack_key, n)))
            new = jax.vmap(rule)(received, _of_each(rule_key, n))
            return jax.tree.map(lambda x, y: y.astype(x.dtype), own, new)

        return mixer._replace(combine=combine, hear=_hears_nothing)

    return mixing_fn


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


def dissensus(epsilon: float) -> Attack:
    """Liars pull a peer away from those that it hears (He, Karimireddy and Jaggi 2022, arXiv:2202.01545).

    Each sends `x_i - epsilon sum_k W_ik (x_k - x_i) / sum_j W_ij`, k the honest ones that i hears and j the liars.
    With epsilon 1 plain gossip moves nobody that hears a liar, above 1 it moves them apart.

    Args:
      epsilon: 1.5 in the authors' experiments.

    Raises:
      ValueError: if `epsilon` is not a finite number above 0.
    """
    _validate.positive("dissensus", "epsilon", epsilon, "1.5 pushes peers apart")

    def attack(received: Received, evil: jax.Array, key: jax.Array) -> Tree:
        del key
        honest = jnp.where(evil, 0.0, received.weight)
        liars = jnp.sum(jnp.where(evil, received.weight, 0.0))
        scale = epsilon / jnp.where(liars > 0, liars, 1.0)

        def one(x, h):
            pull = jnp.tensordot(honest, h - x[None], axes=1, precision=jax.lax.Precision.HIGHEST)
            return jnp.broadcast_to((x - scale * pull)[None], h.shape).astype(h.dtype)

        heard = _only(received.weight > 0, received.heard)
        return tree.select(evil, jax.tree.map(one, received.own, heard), received.heard)

    return attack


def gaussian(scale: float) -> Attack:
    """Liars add noise to their models, drawn anew for each peer, message and number.

    Args:
      scale: its standard deviation.

    Raises:
      ValueError: if `scale` is not a finite number above 0.
    """
    _validate.positive("gaussian", "scale", scale, "several times the norm of a number in the model")

    def attack(received: Received, evil: jax.Array, key: jax.Array) -> Tree:
        leaves, structure = jax.tree.flatten(received.heard)
        keys = jax.random.split(key, len(leaves))
        noisy = [(x + scale * jax.random.normal(k, x.shape, x.dtype)).astype(x.dtype)
                 for x, k in zip(leaves, keys, strict=True)]  # fmt: skip
        return tree.select(evil, jax.tree.unflatten(structure, noisy), received.heard)

    return attack


def sending(attack: ClientAttack) -> Attack:
    """Any attack of `jfed.aggregate`, such as `sign_flip()`, `alie(z)` or `ipm(epsilon)`, upon each peer by itself.

    The honest messages that it knows are the peer's own model and those that it hears, all alike; ids are 0 for the
    peer, and 1 plus the slot.

    Args:
      attack: `(stack, malicious, honest, ids, key) -> stack`.
    """

    def attack_fn(received: Received, evil: jax.Array, key: jax.Array) -> Tree:
        there = _only(received.came, received.heard)
        stack = jax.tree.map(lambda x, h: jnp.concatenate([x[None], h]), received.own, there)
        malicious = jnp.concatenate([jnp.zeros(1, bool), evil])
        honest = jnp.concatenate([jnp.ones(1, bool), received.came & ~evil])
        stack = attack(stack, malicious, honest, jnp.arange(malicious.shape[0], dtype=jnp.int32), key)
        return tree.select(evil, jax.tree.map(lambda x: x[1:], stack), received.heard)

    return attack_fn


def _id(i: int) -> int:
    """A peer's id as a number.

    Raises:
      ValueError: if it is not a whole number of at least 0.
    """
    if isinstance(i, bool) or not isinstance(i, int | np.integer) or i < 0:
        raise ValueError(f"robust(byzantine=[{i!r}]): ids are whole numbers of at least 0; name peers so.")
    return int(i)


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

        return jax.tree.map(one, own, _only(sound, difference))

    return rule


def _of_each(key: jax.Array, n: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def _only(flags: jax.Array, messages: Tree) -> Tree:
    """Messages [S, ...], zeros where not wanted."""
    return tree.select(flags, messages, tree.zeros(messages))


def _hears_nothing(sent: Tree, slot: int, round: jax.Array) -> Tree:
    raise ValueError("robust: this method looks at messages one by one, and leaves none to the rule; take another.")
