"""FedBuff: the server does not wait for the slowest client (Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1).

A fixed number of clients is out training at any moment. The server steps when a few of them have
returned, their changes, made on models that have aged meanwhile, counting less the older they are.

Time is simulated, inside the compiled program: a round is one step of the server, and an event queue
tells who returns before it (`_events`). Those that set out in a round are all trained in it, from one model, by any
client map, and their messages kept until they are due.

Letters: M clients out at once (concurrency), K returns a step (buffer), C clients in a cohort.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.algorithms import _events
from jfed.algorithms._work import specialised
from jfed.algorithms.federated import FederatedState
from jfed.availability import Duration
from jfed.core import Algorithm, ClientWork, Cohort, Tree


class AsynchronousState(NamedTuple):
    """State between two steps of the server."""

    model: FederatedState  # the aggregator's state holds the messages of those who are out
    places: _events.Places
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

    The mean is by the cohort's weights; the paper weighs clients alike: `sampling.equally_weighted`.

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
    return asynchronous("fedbuff", work, concurrency, buffer, duration, server, staleness, options)


def asynchronous(
    where: str,
    work: ClientWork,
    concurrency: int,
    buffer: int,
    duration: Duration,
    server: optax.GradientTransformation | None,
    staleness: Callable[[jax.Array], jax.Array],
    options: dict[str, Any],
    kept: Callable[[Tree, Tree], Tree] = lambda params, change: change,
    recalled: Callable[[Tree, Tree], Tree] = lambda params, kept: kept,
) -> Algorithm:
    """A server that steps when `buffer` messages are in.

    `kept` makes of the model a change was made on, and of that change, what is kept of it; `recalled`, of the
    model of today and of what was kept, a change again.
    """
    _validate.at_least_one(where, "concurrency", concurrency, "100 is usual")
    _validate.at_least_one(where, "buffer", buffer, "10 is usual")
    if buffer > concurrency:
        raise ValueError(f"{where}(buffer={buffer}): no more than concurrency={concurrency} can return; lower it.")

    def init_aggregator(like):
        # Of each place, what is kept of the client in it. Within a round it also holds the `returns` and, of each
        # client of the cohort, what is `new`.
        return {"messages": tree.zeros(like, (concurrency,)), "weights": jnp.zeros(concurrency)}

    def aggregate(stack, state, params=None, *, weights, **extra_args):
        """The mean of the messages that are due, some of them of clients that set out only now."""
        del extra_args
        new = {"messages": jax.vmap(kept, (None, 0))(params, stack), "weights": weights}
        held = {name: state[name] for name in new}
        returns = state["returns"]
        of_this_round = tree.take(new, jnp.maximum(returns.row, 0))
        due = tree.select(returns.row >= 0, of_this_round, tree.take(held, returns.place))
        total = jnp.maximum(jnp.sum(due["weights"]), jnp.finfo(jnp.float32).tiny)
        share = due["weights"] * staleness(returns.staleness) / total
        changes = jax.vmap(recalled, (None, 0))(params, due["messages"])
        mean = jax.tree.map(lambda m: jnp.tensordot(share.astype(m.dtype), m, 1), changes)
        return mean, state | {"new": new}

    inner = specialised(
        where,
        work,
        options,
        server=server,
        aggregator=optax.GradientTransformationExtraArgs(init_aggregator, aggregate),
    )

    def init_fn(params: Tree) -> AsynchronousState:
        zero = jnp.zeros((), jnp.int32)
        return AsynchronousState(inner.init(params), _events.no_places(concurrency), zero, zero)

    def round_fn(state: AsynchronousState, cohort: Cohort, key: jax.Array) -> tuple[AsynchronousState, dict]:
        now = _events.events(state.places, cohort, key, duration, buffer=buffer, turn=state.turn, steps=state.steps)
        steps, size = (jnp.where(now.out, x, 0) for x in (cohort.steps, cohort.size))
        setting_out = cohort._replace(steps=steps, size=size, weight=jnp.where(now.out, cohort.weight, 0.0))
        held = state.model.aggregator
        new = jax.tree.map(lambda x: jnp.zeros((cohort.ids.shape[0], *x.shape[1:]), x.dtype), held)
        before = state.model._replace(aggregator=held | {"returns": now.returns, "new": new})
        model, metrics = inner.round(before, setting_out, key)
        happened = metrics["reports"] > 0
        # Put here and not by the aggregator, whose state is copied whole in case nobody reports.
        held = tree.put(held, jnp.where(happened, now.place, concurrency), model.aggregator["new"])
        # While places are still being filled the server does not step.
        params, server_state = tree.select(
            now.awaited, (model.params, model.server), (state.model.params, state.model.server)
        )
        model = model._replace(params=params, server=server_state, aggregator=held)
        after = AsynchronousState(model, now.places, state.turn + now.gone, state.steps + now.awaited)
        after = tree.select(happened, after, state._replace(model=model))
        return after, metrics | {
            "seconds": jnp.where(happened, now.elapsed, 0.0),
            "staleness": jnp.where(now.awaited & happened, jnp.mean(now.returns.staleness), 0.0),
        }

    return Algorithm(init_fn, round_fn, lambda state: inner.params(state.model))
