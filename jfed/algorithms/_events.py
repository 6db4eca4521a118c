"""The event queue of the asynchronous methods: who sets out, who returns, and when, in simulated time.

A place that falls free is taken at once by another client of the round's cohort, in random order. Clients leave and
return by the clock alone, whatever they learn, so the whole of a round's coming and going is known before any of
those that set out in it is trained.

Letters: M places for clients that are out at once, K returns until the server steps, C clients in a cohort.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed import _streams, tree
from jfed.availability import Duration
from jfed.core import Cohort


class Places(NamedTuple):
    """The clients that are out."""

    due: jax.Array  # [M] float32, seconds from now until the return; where nobody is out, when the place fell free
    taken: jax.Array  # [M] bool
    turn: jax.Array  # [M] int32, order of setting out; settles ties
    left: jax.Array  # [M] int32, steps of the server before setting out


class Returns(NamedTuple):
    """The clients that return before the next step of the server, in order."""

    place: jax.Array  # [K] int32
    row: jax.Array  # [K] int32, in this round's cohort; -1 for those that set out in an earlier round
    staleness: jax.Array  # [K] float32, steps of the server since they set out


class Events(NamedTuple):
    """What happens before the next step of the server."""

    places: Places  # as they are then
    returns: Returns
    awaited: jax.Array  # [] bool, whether the returns were waited for: not while places are being filled
    elapsed: jax.Array  # [] float32, seconds
    gone: jax.Array  # [] int32, clients that set out
    out: jax.Array  # [C] bool, whether a client of the cohort sets out
    place: jax.Array  # [C] int32, the place a client of the cohort is in at the end; M for none


def no_places(concurrency: int) -> Places:
    """Places with nobody out yet."""
    zeros = jnp.zeros(concurrency, jnp.int32)
    return Places(jnp.zeros(concurrency), jnp.zeros(concurrency, bool), zeros, zeros)


def events(
    places: Places,
    cohort: Cohort,
    key: jax.Array,
    duration: Duration,
    *,
    buffer: int,
    turn: jax.Array,
    steps: jax.Array,
) -> Events:
    """Lets time pass until `buffer` clients have returned.

    Args:
      places: who is out.
      cohort: those who may set out.
      key: the round's.
      duration: how long each client is away.
      buffer: K.
      turn: clients that ever set out.
      steps: of the server.
    """
    count, concurrency = cohort.ids.shape[0], places.due.shape[0]
    clock = jax.random.fold_in(key, _streams.CLOCK)
    present = (cohort.weight != 0) | (cohort.steps > 0)
    available = jnp.sum(present, dtype=jnp.int32)
    chance = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(clock, i)))(cohort.ids)
    queue = jnp.argsort(jnp.where(present, chance, 2.0)).astype(jnp.int32)  # in random order; empty slots last
    away = duration(jax.random.fold_in(clock, 2**31 - 1), cohort)
    away = jnp.where(away > 0, away, 0.0)

    def fill(loop, free):
        """The next of the cohort take the free places, from when those fell free."""
        now, row, gone = loop
        rank = gone + jnp.cumsum(free, dtype=jnp.int32) - 1
        free &= rank < available
        client = queue[jnp.minimum(rank, count - 1)]
        now = Places(
            due=jnp.where(free, now.due + away[client], now.due),
            taken=now.taken | free,
            turn=jnp.where(free, turn + rank, now.turn),
            left=jnp.where(free, steps, now.left),
        )
        return now, jnp.where(free, client, row), gone + jnp.sum(free, dtype=jnp.int32)

    def next_return(loop, _):
        def soonest(now):
            return jnp.min(jnp.where(now.taken, now.due, jnp.inf))

        # Time has passed beyond these without a step of the server, so who takes them has today's model.
        now, row, gone = fill(loop, ~loop[0].taken & (loop[0].due < soonest(loop[0])))
        first = now.taken & (now.due == soonest(now))
        place = jnp.argmin(jnp.where(first, now.turn, jnp.iinfo(jnp.int32).max)).astype(jnp.int32)
        event = Returns(place, row[place], (steps - now.left[place]).astype(jnp.float32))
        return (now._replace(taken=now.taken.at[place].set(False)), row, gone), (event, now.due[place])

    nobody = jnp.full(concurrency, -1, jnp.int32)  # [M], the row in the cohort of those who set out this round
    # A place that stayed empty for want of clients is taken now, not when it fell free.
    places = places._replace(due=jnp.where(places.taken, places.due, 0.0))
    ready = fill((places, nobody, jnp.zeros((), jnp.int32)), ~places.taken)
    awaited = jnp.all(ready[0].taken)
    loop, (returns, times) = jax.lax.scan(next_return, ready, length=buffer)
    places, row, gone = tree.select(awaited, loop, ready)
    elapsed = jnp.where(awaited, times[-1], 0.0)
    here = jnp.where(places.taken & (row >= 0), row, count)
    nowhere = jnp.full(count, concurrency, jnp.int32)
    return Events(
        places=places._replace(due=places.due - elapsed),
        returns=returns,
        awaited=awaited,
        elapsed=elapsed,
        gone=gone,
        out=jnp.zeros(count, bool).at[queue].set(jnp.arange(count) < gone),
        place=nowhere.at[here].set(jnp.arange(concurrency, dtype=jnp.int32), mode="drop"),
    )
