"""What a round's messages weigh, and what takes the place of those that did not come.

Letters: n peers, S slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed.gossip.topology.graph import TOLERANCE, Topology, peers, period


class Weights(NamedTuple):
    """What a round's messages weigh."""

    own: jax.Array  # [n] float32, a peer's own model
    heard: jax.Array  # [S, n] float32, what a peer hears in each slot; 0 where nothing came
    came: jax.Array  # [S, n] bool, whether something did
    sent: jax.Array  # [S, n] bool, whether something was sent, that may be lost
    round: jax.Array  # [] int32
    total: jax.Array  # [n] float32, of all that a peer has or hears; 1 but for directed graphs


class Coming(NamedTuple):
    """What came in a round, and what did not."""

    source: jax.Array  # [S, n] int32, whom a peer hears in each slot; itself where nobody
    came: jax.Array  # [S, n] bool; also where nobody was to be heard
    linked: jax.Array  # [S, n] bool, whether both ends are present: what comes not then was lost on its way


Lost = Callable[[jax.Array, jax.Array, Coming], tuple[jax.Array, jax.Array]]
"""`(own [n], heard [S, n], coming) -> (own, heard)`: the weights of a round in which not everything came."""


def own_instead(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """A peer takes its own model in the place of one that did not come: rows still add up to 1."""
    return own + jnp.sum(jnp.where(coming.came, 0.0, heard), 0), jnp.where(coming.came, heard, 0.0)


def renormalised(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """The weights of what did come are scaled so that they add up to what all would have.

    A peer that has no weight of its own, and hears nobody, keeps its model.
    """
    left = jnp.where(coming.came, heard, 0.0)
    whole, rest = own + jnp.sum(heard, 0), own + jnp.sum(left, 0)
    scale = whole / jnp.where(rest > 0, rest, 1.0)
    return jnp.where(rest > 0, own * scale, whole), left * scale[None]


def nothing_instead(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """A message that was lost counts as zeros, as for peers that do not notice; who is away is noticed."""
    own, heard = own_instead(own, heard, coming._replace(came=coming.linked))
    return own, jnp.where(coming.came, heard, 0.0)


def nothing(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """What did not come counts as zeros, whether it was lost or nobody was there: for changes, rather than models."""
    return own, jnp.where(coming.came, heard, 0.0)


def mass_returned(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """For shares of what a peer has, columns: it keeps what it would send to one away; what is lost is lost."""
    kept = jnp.zeros_like(own).at[coming.source].add(jnp.where(coming.linked, 0.0, heard))
    return own + kept, jnp.where(coming.came, heard, 0.0)


def mass_replaced(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """As `mass_returned`, but in the place of what is lost on its way a peer takes its own."""
    kept, left = mass_returned(own, heard, coming)
    return kept + jnp.sum(jnp.where(coming.linked & ~coming.came, heard, 0.0), 0), left


def weights_of(
    topology: Topology,
    round: jax.Array,
    *,
    present: jax.Array,
    arrives: jax.Array | None = None,
    links: jax.Array | None = None,
    lost: Lost,
) -> Weights:
    """The weights of a round in which some peers are away, and some messages are lost.

    Args:
      topology: who is to hear whom.
      round: [] int32.
      present: [n] bool; a peer that is away neither sends nor hears, and keeps its model.
      arrives: [n, n] bool, `arrives[i, j]`: what j sends gets through to i; by default all does.
      links: [n, n] bool, `links[i, j]`: j sends to i in this round; by default all do that are to be heard.
      lost: what replaces a message.
    """
    n, t = peers(topology), round % period(topology)
    for name, flags in (("arrives", arrives), ("links", links)):
        if flags is not None and flags.shape != (n, n):
            raise ValueError(f"weights_of({name} of shape {flags.shape}): there are {n} peers; give [{n}, {n}].")
    own = jnp.asarray(topology.own, jnp.float32)[t]
    heard = jnp.asarray(topology.weight, jnp.float32)[t]
    source = jnp.asarray(topology.source)[t]
    me = jnp.arange(n)[None]
    nobody = source == me
    linked = present[None] & present[source]
    linked = nobody | (linked if links is None else linked & links[me, source])
    came = linked if arrives is None else linked & (nobody | arrives[me, source])
    own, heard = lost(own, heard, Coming(source, came, linked))
    own = jnp.where(present, own, 1.0)
    return Weights(own, heard, came & ~nobody, linked & ~nobody, round, _total(own, heard))


def only_of(topology: Topology, weights: Weights, speaks: jax.Array) -> Weights:
    """The weights where only what peers of `speaks` [n] sent counts, and nothing takes the place of the rest."""
    source = jnp.asarray(topology.source)[weights.round % period(topology)]
    heard = jnp.where(speaks[source], weights.heard, 0.0)
    return weights._replace(heard=heard, total=_total(weights.own, heard))


def heard_by_all(topology: Topology, weights: Weights) -> jax.Array:
    """Who was heard by all who were to hear it: [n] bool."""
    source = jnp.asarray(topology.source)[weights.round % period(topology)]
    missed = ~weights.came & (source != jnp.arange(peers(topology))[None])
    return ~jnp.zeros(peers(topology), bool).at[source].max(missed)


def _total(own: jax.Array, heard: jax.Array) -> jax.Array:
    whole = own + jnp.sum(heard, 0)
    return jnp.where(jnp.abs(whole - 1) < TOLERANCE, 1.0, whole)
