"""AD-PSGD: peers that never wait, and average with one neighbour at a time (Lian et al. 2018, arXiv:1710.06952).

Algorithm 1. A peer whose gradient is ready averages its model with that of a random neighbour, both keeping the mean,
and only then descends the gradient, which it found at the model that it had when it began: others may have changed
that model in between.

Time is simulated. Who is ready when does not depend on what is learned; a round is so many gradients, one after another
in the order in which they become ready.

Letters: n peers, K gradients of a round, x_i a peer's model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _streams, _validate, tree
from jfed.availability import Duration
from jfed.availability.durations import exponential
from jfed.clients import vectorised
from jfed.core import Algorithm, ClientMap, ClientWork, Cohort, Shared, Traffic, Tree
from jfed.gossip.decentralised import by_peer, consensus_distance, of_peers, plus
from jfed.gossip.topology import graph


class PairsState(NamedTuple):
    """State between two rounds."""

    params: Tree  # leaves [n, ...], every peer's model
    optimizer: Tree  # leaves [n, ...], state of each peer's optimizer
    read: Tree  # leaves [n, ...], the model a peer's gradient under way is of
    due: jax.Array  # [n] float32, seconds until a peer's gradient is ready; NaN before its first round
    changed: jax.Array  # [n] int32, how often others, and the peer, have changed its model since it read it
    round: jax.Array  # [] int32


def ad_psgd(
    work: ClientWork,
    topology: graph.Topology,
    *,
    gradients: int | None = None,
    duration: Duration | None = None,
    optimizer: optax.GradientTransformation | None = None,
    client_map: ClientMap | None = None,
) -> Algorithm:
    """Peers that average with one random neighbour whenever their gradient is ready.

    Neighbours are drawn in proportion to their weights. A peer that is away is not ready, and no neighbour; one of no
    steps is a neighbour alone; where a message either way is lost there is no averaging. All runs on one device, a
    gradient at a time.

    Metrics besides those of `decentralised`: `"seconds"`, simulated, and `"staleness"`, the mean number of changes that
    a peer's model has seen since its gradient was begun.

    Args:
      work: as in `dpsgd`.
      topology: undirected and static.
      gradients: K; by default n, one a peer on the average.
      duration: how long a peer computes; by default exponential with a mean of 1.
      optimizer: of each peer; by default `optax.sgd(1.0)`.
      client_map: how one peer's work runs; by default `vectorised()`.

    Raises:
      ValueError: if the topology is none of these, or `gradients` not a whole number of at least 1.
    """
    graph.check_static("ad_psgd", topology)
    graph.check_symmetric("ad_psgd", topology)
    n = graph.peers(topology)
    gradients = n if gradients is None else gradients
    _validate.at_least_one("ad_psgd", "gradients", gradients, "leave it out for one a peer")
    duration = exponential(1.0) if duration is None else duration
    optimizer = optax.with_extra_args_support(optax.sgd(1.0) if optimizer is None else optimizer)
    client_map = vectorised() if client_map is None else client_map
    affinity = graph.matrices(topology)[0] * (1 - np.eye(n))

    def init_fn(params: Tree) -> PairsState:
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
        everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), params)
        inner = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), jax.vmap(optimizer.init)(everyone))
        zeros = jnp.zeros(n, jnp.int32)
        undrawn = jnp.full(n, jnp.nan)
        read = jax.tree.map(jnp.array, everyone)  # a copy, so that a state may be given away
        return PairsState(everyone, inner, read, undrawn, zeros, jnp.zeros((), jnp.int32))

    def round_fn(state: PairsState, cohort: Cohort, key: jax.Array) -> tuple[PairsState, dict]:
        clients, arrives = by_peer("ad_psgd", cohort, n)
        present = clients.weight != 0
        chance = jnp.asarray(affinity, jnp.float32) * (present[None] & present[:, None])
        both = None if arrives is None else arrives & arrives.T
        first = duration(jax.random.fold_in(key, _streams.CLOCK), clients)
        works = present & (clients.steps > 0)  # others are neighbours alone
        due = jnp.where(jnp.isnan(state.due) & works, first, state.due)

        def event(carry, number):
            x, inner, read, due, changed = carry
            event_key = jax.random.fold_in(key, number)
            pair_key, clock_key = jax.random.split(jax.random.fold_in(event_key, _streams.CLOCK))
            i = jnp.argmin(jnp.where(works, due, jnp.inf))
            asked = jax.random.categorical(pair_key, jnp.log(chance[i]))
            asks = works[i] & jnp.any(chance[i] > 0)
            hears = asks if both is None else asks & both[i, asked]
            j = jnp.where(hears, asked, i)

            client = jax.tree.map(lambda leaf: leaf[i][None], clients)._replace(state=tree.take(read, i[None]))
            (g, sound), added = client_map(of_peers(work), Shared((), cohort.examples, event_key, state.round), client)
            g, sound = tree.take((g, sound), 0)
            mean = jax.tree.map(lambda x: ((x[i] + x[j]) / 2).astype(x.dtype), x)
            updates, after = optimizer.update(g, tree.take(inner, i), mean, round=state.round)
            mine, after = tree.select(sound, (plus(mean, updates), after), (mean, tree.take(inner, i)))
            met = {"added": added, "pair": jnp.stack([i, asked]), "asks": asks, "hears": hears, "stale": changed[i]}
            now = due[i]
            busy = jnp.where(works[i], duration(clock_key, client)[0], 0.0)
            i, j = (jnp.where(works[i], k, n) for k in (i, j))  # where nobody works nothing is written
            x, inner, read = tree.put(tree.put(x, j, mean), i, mine), tree.put(inner, i, after), tree.put(read, i, mine)
            changed = changed.at[j].add(1, mode="drop").at[i].set(0, mode="drop")
            here = i < n
            return (x, inner, read, due.at[i].add(busy, mode="drop"), changed), met | {"now": now, "here": here}

        carry = state.params, state.optimizer, state.read, due, state.changed
        (x, inner, read, due, changed), met = jax.lax.scan(event, carry, jnp.arange(gradients))
        elapsed = jnp.max(jnp.where(met["here"], met["now"], 0.0))
        due = jnp.where(works, due - elapsed, due)  # who is away does not get on with its work
        added = jax.tree.map(lambda a: jnp.sum(a, 0), met["added"])
        count = jnp.sum(met["here"])

        def bytes_of(flags):
            one = tree.number_of_bytes(tree.nbytes(x) // n * 2 * gradients) // (2 * gradients)
            return jnp.zeros(n, one.dtype).at[met["pair"]].add(jnp.where(flags[:, None], one, 0 * one))

        metrics = {
            "loss": jnp.where(added["examples"] > 0, added["loss"] / jnp.maximum(added["examples"], 1), jnp.nan),
            "reports": jnp.sum(present, dtype=jnp.int32),
            "dropped": added["dropped"],
            "steps": jnp.sum(jnp.where(met["here"], clients.steps[met["pair"][:, 0]], 0)),
            "consensus": consensus_distance(x),
            "traffic": Traffic(clients.ids, bytes_of(met["asks"]), bytes_of(met["hears"])),
            "seconds": elapsed,
            "staleness": jnp.sum(jnp.where(met["here"], met["stale"], 0)) / jnp.maximum(count, 1),
        }
        return PairsState(x, inner, read, due, changed, state.round + 1), metrics

    return Algorithm(
        init_fn,
        round_fn,
        lambda state: jax.tree.map(lambda x, s: (s / n).astype(x.dtype), state.params, tree.total(state.params)),
        lambda state, i: tree.take(state.params, i),
    )
