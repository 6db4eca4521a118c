"""FedBuff and FedAsync: the server does not wait for the slowest client.

A fixed number of clients is out training at any moment. The server steps when a few of them have
returned, their changes, made on models that have aged meanwhile, counting less the older they are
(FedBuff: Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1; FedAsync: Xie et al. 2019,
arXiv:1903.03934, Algorithm 1).

Time is simulated, inside the compiled program: a round is one step of the server, and an event queue
tells who returns before it. A place that falls free is taken at once by another client of the round's
cohort, in random order, which leaves with the newest model. Clients leave and return by the clock alone, so
those that set out in a round can all be trained in it, from one model, by any client map, and their
messages kept until they are due.

Letters: M clients out at once (concurrency), K returns a step (buffer), C clients in a cohort.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _streams, _validate, tree
from jfed.algorithms.federated import FederatedState, federated
from jfed.core import Algorithm, ClientWork, Cohort, Tree

Duration = Callable[[jax.Array, Cohort], jax.Array]
"""`(key, cohort) -> [C] float32`, seconds between setting out and return; see `jfed.availability`. NaN counts as 0."""


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


class AsynchronousState(NamedTuple):
    """State between two steps of the server."""

    model: FederatedState  # the aggregator's state holds the messages of those who are out
    places: Places
    turn: jax.Array  # [] int32, clients that ever set out
    steps: jax.Array  # [] int32, steps of the server


def fedbuff(
    work: ClientWork,
    *,
    concurrency: int,
    buffer: int,
    duration: Duration,
    server: optax.GradientTransformation | None = None,
    staleness: Callable[[jax.Array], jax.Array] = lambda age: 1.0 / jnp.sqrt(1.0 + age),
    **options,
) -> Algorithm:
    """The server steps along the mean of every K changes returned, each scaled by its staleness.

    With `concurrency = buffer` = the cohort's size and equal durations it is FedAvg. As long as a round's
    cohort cannot fill the places, its clients set out and nobody is awaited: so begins a run. Later, a
    cohort of 2 K fills every place as it falls free; clients for whom none does do not set out, and with
    fewer clients places stay empty until a later round fills all of them. A client may be sampled while it is
    out. A round in which nobody reports does not happen, on the clock either.

    Metrics are those of `federated` over the clients that set out, and `"seconds"`, simulated, since the
    step before; `"staleness"`, the mean of the K.

    Args:
      work: usually `local.sgd(...)`.
      concurrency: M.
      buffer: K, at most M; the paper uses 10.
      duration: how long each client is away.
      server: the server optimizer; by default `optax.sgd(1.0)`.
      staleness: weight of a change whose model is so many of the server's steps old.
      **options: `uplink`, `client_map` and `num_clients` of `federated`.

    Raises:
      ValueError: if `concurrency` or `buffer` is not a whole number of at least 1, or the buffer is
        larger.
    """
    return _asynchronous("fedbuff", work, concurrency, buffer, duration, server, staleness, _sent, _sent, options)


def fedasync(
    work: ClientWork,
    *,
    concurrency: int,
    mixing: float,
    duration: Duration,
    staleness: Callable[[jax.Array], jax.Array] = lambda age: (1.0 + age) ** -0.5,
    **options,
) -> Algorithm:
    """Every model returned is mixed in at once: `x <- (1 - alpha_t) x + alpha_t x_new`, `alpha_t = alpha s(age)`.

    The paper's clients train with a proximal term: `optax.chain(local.proximal(rho), optax.sgd(...))`.
    Metrics and the meaning of a cohort are as in `fedbuff`.

    Args:
      work: usually `local.sgd(...)`.
      concurrency: clients out at once, M.
      mixing: alpha, in (0, 1].
      duration: how long each client is away.
      staleness: s; by default the paper's polynomial with a = 0.5.
      **options: `uplink`, `client_map` and `num_clients` of `federated`.

    Raises:
      ValueError: if `concurrency` is not a whole number of at least 1, or `mixing` not in (0, 1].
    """
    _validate.positive("fedasync", "mixing", mixing, "0.6 is the paper's")
    _validate.within("fedasync", "mixing", mixing, 0.0, 1.0, "0.6 is the paper's")

    def model_of(params, change):
        return jax.tree.map(jnp.subtract, params, change)

    server = optax.sgd(mixing)
    return _asynchronous("fedasync", work, concurrency, 1, duration, server, staleness, model_of, model_of, options)


def _sent(params: Tree, message: Tree) -> Tree:
    return message


def _asynchronous(where, work, concurrency, buffer, duration, server, staleness, stored, recalled, options):
    """`stored` makes of a change, and the model it was made on, what is kept; `recalled` a change of that again."""
    _validate.at_least_one(where, "concurrency", concurrency, "100 is usual")
    _validate.at_least_one(where, "buffer", buffer, "10 is usual")
    if buffer > concurrency:
        raise ValueError(f"{where}(buffer={buffer}): no more than concurrency={concurrency} can return; lower it.")

    def init_aggregator(like):
        # Within a round it also holds `returns`, and `place` [C], that of each client of the cohort; M for none.
        return {"messages": tree.zeros(like, (concurrency,)), "weights": jnp.zeros(concurrency)}

    def aggregate(stack, state, params=None, *, weights, **extra_args):
        """The mean of the messages that are due; those of the clients that set out take their places."""
        del extra_args
        new = jax.vmap(stored, (None, 0))(params, stack), weights
        held = state["messages"], state["weights"]
        returns = state["returns"]
        of_this_round = tree.take(new, jnp.maximum(returns.row, 0))
        messages, weight = tree.select(returns.row >= 0, of_this_round, tree.take(held, returns.place))
        share = weight * staleness(returns.staleness) / jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)
        changes = jax.vmap(recalled, (None, 0))(params, messages)
        mean = jax.tree.map(lambda m: jnp.tensordot(share.astype(m.dtype), m, 1), changes)
        messages, weights = tree.put(held, state["place"], new)
        return mean, state | {"messages": messages, "weights": weights}  # the rest goes with the round

    inner = federated(
        work,
        server=server,
        aggregator=optax.GradientTransformationExtraArgs(init_aggregator, aggregate),
        **options,
    )

    def init_fn(params: Tree) -> AsynchronousState:
        zeros = jnp.zeros(concurrency, jnp.int32)
        places = Places(jnp.zeros(concurrency), jnp.zeros(concurrency, bool), zeros, zeros)
        return AsynchronousState(inner.init(params), places, zeros[0], zeros[0])

    def round_fn(state: AsynchronousState, cohort: Cohort, key: jax.Array) -> tuple[AsynchronousState, dict]:
        count = cohort.ids.shape[0]
        clock = jax.random.fold_in(key, _streams.CLOCK)
        present = (cohort.weight != 0) | (cohort.steps > 0)
        available = jnp.sum(present, dtype=jnp.int32)
        chance = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(clock, i)))(cohort.ids)
        queue = jnp.argsort(jnp.where(present, chance, 2.0)).astype(jnp.int32)  # in random order; empty slots last
        away = duration(jax.random.fold_in(clock, 2**31 - 1), cohort)
        away = jnp.where(away > 0, away, 0.0)

        def fill(loop, free):
            """The next of the cohort take the free places, from when those fell free."""
            places, row, gone = loop
            rank = gone + jnp.cumsum(free, dtype=jnp.int32) - 1
            free &= rank < available
            client = queue[jnp.minimum(rank, count - 1)]
            places = Places(
                due=jnp.where(free, places.due + away[client], places.due),
                taken=places.taken | free,
                turn=jnp.where(free, state.turn + rank, places.turn),
                left=jnp.where(free, state.steps, places.left),
            )
            return places, jnp.where(free, client, row), gone + jnp.sum(free, dtype=jnp.int32)

        def next_return(loop, _):
            def soonest(places):
                return jnp.min(jnp.where(places.taken, places.due, jnp.inf))

            # Time has passed beyond these without a step of the server, so who takes them has today's model.
            places, row, gone = fill(loop, ~loop[0].taken & (loop[0].due < soonest(loop[0])))
            first = places.taken & (places.due == soonest(places))
            place = jnp.argmin(jnp.where(first, places.turn, jnp.iinfo(jnp.int32).max)).astype(jnp.int32)
            event = Returns(place, row[place], (state.steps - places.left[place]).astype(jnp.float32))
            return (places._replace(taken=places.taken.at[place].set(False)), row, gone), (event, places.due[place])

        nobody = jnp.full(concurrency, -1, jnp.int32)  # [M], the row in the cohort of those who set out this round
        # A place that stayed empty for want of clients is taken now, not when it fell free.
        places = state.places._replace(due=jnp.where(state.places.taken, state.places.due, 0.0))
        ready = fill((places, nobody, jnp.zeros((), jnp.int32)), ~places.taken)
        awaited = jnp.all(ready[0].taken)
        loop, (returns, times) = jax.lax.scan(next_return, ready, length=buffer)
        places, row, gone = tree.select(awaited, loop, ready)
        elapsed = jnp.where(awaited, times[-1], 0.0)

        out = jnp.zeros(count, bool).at[queue].set(jnp.arange(count) < gone)
        steps, size = (jnp.where(out, x, 0) for x in (cohort.steps, cohort.size))
        setting_out = cohort._replace(steps=steps, size=size, weight=jnp.where(out, cohort.weight, 0.0))
        here = jnp.where(places.taken & (row >= 0), row, count)
        place = (
            jnp.full(count, concurrency, jnp.int32).at[here].set(jnp.arange(concurrency, dtype=jnp.int32), mode="drop")
        )
        model = state.model._replace(aggregator=state.model.aggregator | {"returns": returns, "place": place})
        model, metrics = inner.round(model, setting_out, key)
        held = {name: model.aggregator[name] for name in ("messages", "weights")}
        # While places are still being filled the server does not step.
        kept = tree.select(awaited, (model.params, model.server), (state.model.params, state.model.server))
        model = model._replace(params=kept[0], server=kept[1], aggregator=held)
        places = places._replace(due=places.due - elapsed)
        after = AsynchronousState(model, places, state.turn + gone, state.steps + awaited)
        happened = metrics["reports"] > 0
        after = tree.select(happened, after, state._replace(model=model))
        return after, metrics | {
            "seconds": jnp.where(happened, elapsed, 0.0),
            "staleness": jnp.where(awaited & happened, jnp.mean(returns.staleness), 0.0),
        }

    return Algorithm(init_fn, round_fn, lambda state: inner.params(state.model))
