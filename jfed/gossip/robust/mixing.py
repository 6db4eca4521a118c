"""Rules and attacks as a mixing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jfed.core import Tree
from jfed.gossip import mix
from jfed.gossip.robust.attacks import Attack
from jfed.gossip.robust.received import Received
from jfed.gossip.robust.rules import Rule
from jfed.gossip.topology import graph


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
    >>> from jfed.gossip import averaging, robust, topology
    >>> liar = robust.robust(mix.sparse(), robust.clipped(1.0), byzantine=[0], attack=robust.dissensus(9.0))
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


def _id(i: int) -> int:
    """A peer's id as a number.

    Raises:
      ValueError: if it is not a whole number of at least 0.
    """
    if isinstance(i, bool) or not isinstance(i, int | np.integer) or i < 0:
        raise ValueError(f"robust(byzantine=[{i!r}]): ids are whole numbers of at least 0; name peers so.")
    return int(i)


def _of_each(key: jax.Array, n: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def _hears_nothing(sent: Tree, slot: int, round: jax.Array) -> Tree:
    raise ValueError("robust: this method looks at messages one by one, and leaves none to the rule; take another.")
