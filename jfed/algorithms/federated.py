"""The round most federated methods share.

A round: every client of the cohort works from the global model and returns a pseudo-gradient; the
uplink turns it into a message; messages are averaged by weight; a server optimizer descends the
average. With plain SGD of rate 1 on the server this is FedAvg (McMahan et al. 2017,
arXiv:1602.05629, Algorithm 1); with any other optimizer, FedOpt (Reddi et al. 2021,
arXiv:2003.00295, Algorithm 1).

Letters of the papers: K clients, n_k examples of client k, w global model, Delta pseudo-gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _streams, _validate, compress, tree
from jfed.clients import lanes
from jfed.core import Algorithm, ClientMap, ClientWork, Cohort, Shared, Traffic, Tree


class FederatedState(NamedTuple):
    """State of a federated method between rounds."""

    params: Tree  # the global model, w
    server: Tree  # state of the server optimizer
    aggregator: Tree  # state of the aggregator; () for the weighted mean
    uplink: Tree  # leaves [N, ...], each client's uplink state
    memory: Tree  # leaves [N, ...], what a method remembers of each client
    round: jax.Array  # [] int32, rounds completed
    known: Tree = ()  # the model as clients have it, where that is not `params`


def federated(
    work: ClientWork,
    *,
    server: optax.GradientTransformation | None = None,
    uplink: optax.GradientTransformation | None = None,
    aggregator: optax.GradientTransformation | None = None,
    client_map: ClientMap | None = None,
    num_clients: int | None = None,
    memory: Callable[[Tree], Tree] | None = None,
    message: Callable[[Tree], Tree] | None = None,
    broadcast: Callable[[Tree, Shared, Cohort], Tree] | None = None,
    decode: Callable[[Tree, Shared], Tree] | None = None,
) -> Algorithm:
    """Builds a federated method out of what a client does, what it sends and what the server does.

    Guarantees:
      * A client is dropped whole if its update, message, weighted message, uplink state or memory is
        not finite, its weight is not a finite number of at least 0, or its id is not below the
        `num_clients` given: it weighs nothing and is counted under `"dropped"`.
      * A client that is absent (weight 0) or dropped keeps its uplink state and memory.
      * A round in which nobody reports leaves the model and the server's state as they were.
      * The result does not depend on the client map, client order or empty slots.

    The metrics of a round: `"loss"`, the mean over the examples that reporting clients trained on
    (NaN if there were none, clients whose own loss was not finite left out); `"reports"`, clients
    averaged; `"dropped"`; `"steps"`, local steps done by all; `"traffic"`, bytes sent to and by each client, a
    `core.Traffic`: a client that holds data is sent the model, one of weight 0 sends nothing.

    Transforms may take the extra arguments `key` and `round` (rounds completed before this one); the
    uplink's key is the client's own; the server is also given `reports`, `weight`, the sum of theirs, and `extra`, what
    was broadcast; the aggregator `weights` and `ids` [C].

    Args:
      work: keeps the pseudo-gradient and adds `{"loss", "examples"}`; see `jfed.local`.
      server: sees the aggregated pseudo-gradient; by default `optax.sgd(1.0)`.
      uplink: sees each client's pseudo-gradient once a round, and as its params the global model, or what `message`
        makes of it; its state is per client and persists. Its messages, see `jfed.compress`, are decoded before they
        are averaged. By default the pseudo-gradient is sent as it is. Methods that send more than one thing hand it
        each that is as large as the model, by itself.
      aggregator: maps stacked messages [C, ...] to their aggregate, see `jfed.aggregate`. By default the
        weighted mean, formed as clients finish, without a stack.
      client_map: how clients run; by default `lanes(16)`.
      num_clients: clients in the population, N; needed when something is remembered of each.
      memory: `params -> tree`, what is remembered of a client before its first round. The work finds it in
        `client.state`, and keeps `(pseudo-gradient, new memory)`.
      message: `params -> tree`, the shapes of what a work keeps in place of a pseudo-gradient, where they are
        not those of `params`; the server makes updates of the model out of their aggregate.
      broadcast: `(state of the server, shared, clients) -> tree`, what everybody is sent besides the model;
        the work finds it in `shared.extra`.
      decode: `(message, shared) -> tree`, makes what is averaged out of a decoded message.

    Raises:
      ValueError: at `init`, if clients are remembered and `num_clients` is missing.

    >>> from jfed import core, local
    >>> work = local.full_batch(lambda w, x, key: (w - x) ** 2 / 2, optax.sgd(0.5))
    >>> fedavg = federated(work)
    >>> population = core.Population(jnp.array([1.0, 3.0, 5.0]), jnp.array([0, 1]), jnp.array([1, 2]))
    >>> cohort = core.make_cohort(population, jnp.arange(2), steps=work.steps)
    >>> state, metrics = fedavg.round(fedavg.init(jnp.array(0.0)), cohort, jax.random.key(0))
    >>> print(state.params, metrics["reports"])
    1.5 2
    """
    server = optax.with_extra_args_support(optax.sgd(1.0) if server is None else server)
    sent_as_is = uplink is None
    uplink = optax.with_extra_args_support(optax.identity() if uplink is None else uplink)
    aggregator = None if aggregator is None else optax.with_extra_args_support(aggregator)
    client_map = lanes(16) if client_map is None else client_map
    if num_clients is not None:
        _validate.at_least_one("federated", "num_clients", num_clients, "it is the number of clients in the population")
    message = _same if message is None else message
    decode = (lambda message, shared: message) if decode is None else decode

    def arrived(sent: Tree, shared: Shared) -> Tree:
        """What is averaged."""
        return decode(sent if sent_as_is else compress.decode(sent), shared)

    def init_fn(params: Tree) -> FederatedState:
        params = jax.tree.map(jnp.asarray, params)
        like = message(params)
        one = {"uplink": uplink.init(like), "memory": () if memory is None else memory(params)}
        if jax.tree.leaves(one) and num_clients is None:
            raise ValueError(
                "federated(num_clients=None): something is remembered of every client, by the method or the uplink; "
                "pass num_clients, the number of clients in the population."
            )
        # Strongly typed, as a round leaves it: its second call needs no program of its own.
        everyone = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.result_type(x)), (num_clients, *jnp.shape(x))), one
        )
        return FederatedState(
            params=params,
            server=server.init(params),
            aggregator=() if aggregator is None else aggregator.init(like),
            **everyone,
            round=jnp.zeros((), jnp.int32),
        )

    def seen(client: Cohort) -> Cohort:
        """The clients as their work sees them."""
        return client._replace(state=client.state["memory"])

    def send(shared: Shared, client: Cohort, carry: Tree) -> tuple[Tree, Tree, dict, Tree]:
        """A client's update, the message made of it, what is remembered, and what its training added."""
        update, trained = work.finish(shared, seen(client), carry)
        update, remembered = (update, client.state["memory"]) if memory is None else update
        key = jax.random.fold_in(jax.random.fold_in(shared.key, _streams.UPLINK), client.ids)
        like = message(shared.params)
        sent, state = uplink.update(update, client.state["uplink"], like, key=key, round=shared.round)
        return update, sent, {"uplink": state, "memory": remembered}, trained

    def finish_fn(shared: Shared, client: Cohort, carry: Tree) -> tuple[Tree, Tree]:
        update, sent, remembered, trained = send(shared, client, carry)
        decoded = arrived(sent, shared)
        weighted = jax.tree.map(lambda m: client.weight * m, decoded)
        # A message that is not finite is not finite weighted either; without an uplink the update is the message.
        checked = (weighted, remembered) if sent_as_is else (update, weighted, remembered)
        sound = tree.all_finite(checked) & jnp.isfinite(client.weight) & (client.weight >= 0)
        if jax.tree.leaves(client.state) and num_clients is not None:
            sound &= client.ids < num_clients
        reports = sound & (client.weight > 0)

        def if_(condition, value):
            return tree.select(condition, value, jax.tree.map(jnp.zeros_like, value))

        weight = if_(reports, client.weight)
        added = {
            "weight": weight,
            "trained": if_(reports & tree.all_finite(trained), trained),
            "reports": reports.astype(jnp.int32),
            "dropped": (~sound & (client.weight != 0)).astype(jnp.int32),
        }
        kept = {"remembered": tree.select(reports, remembered, client.state)}
        if aggregator is None:
            return kept, added | {"message": if_(reports, weighted)}
        return kept | {"message": if_(reports, decoded), "weight": weight}, added

    def round_fn(state: FederatedState, cohort: Cohort, key: jax.Array) -> tuple[FederatedState, dict]:
        known = state.known if jax.tree.leaves(state.known) else state.params
        shared = Shared(known, cohort.examples, key, state.round)
        everyone = {"uplink": state.uplink, "memory": state.memory}
        remembered = tree.take(everyone, cohort.ids)
        if memory is None:  # a method that drives this one may have brought it along
            remembered["memory"] = cohort.state
        clients = cohort._replace(examples=(), state=remembered)
        if broadcast is not None:
            shared = shared._replace(extra=broadcast(state.server, shared, seen(clients)))
        whole = ClientWork(
            work.steps,
            start=lambda shared, client: work.start(shared, seen(client)),
            step=lambda shared, client, carry, t: work.step(shared, seen(client), carry, t),
            finish=finish_fn,
        )
        kept, added = client_map(whole, shared, clients)

        given = {"key": jax.random.fold_in(key, _streams.SERVER), "round": state.round}
        one = jax.eval_shape(lambda c: tree.take(c, 0), clients)
        sent = jax.eval_shape(lambda s, c: send(s, c, work.start(s, seen(c)))[1], shared, one)
        # In the dtypes of what was to be sent, unless the uplink made something else of it.
        like = jax.eval_shape(lambda s: decode(message(s.params), s), shared)
        received = jax.eval_shape(arrived, sent, shared)
        like = like if jax.tree.structure(like) == jax.tree.structure(received) else received
        if aggregator is None:
            total = jnp.where(added["weight"] > 0, added["weight"], 1.0)
            mean = jax.tree.map(lambda m, p: (m / total).astype(p.dtype), added["message"], like)
            aggregated = state.aggregator
        else:
            mean, aggregated = aggregator.update(
                kept["message"], state.aggregator, state.params, weights=kept["weight"], ids=cohort.ids, **given
            )
        updates, server_state = server.update(
            mean,
            state.server,
            state.params,
            reports=added["reports"],
            weight=added["weight"],
            extra=shared.extra,
            **given,
        )
        before = (state.params, state.server, state.aggregator)
        after = (optax.apply_updates(state.params, updates), server_state, aggregated)
        after = tree.select(added["reports"] > 0, after, before)
        # A client that is absent keeps its memory: nothing is written past the last row.
        row = jnp.where((cohort.steps > 0) | (cohort.weight != 0), cohort.ids, jnp.iinfo(jnp.int32).max)
        if memory is None:
            everyone["memory"] = kept["remembered"]["memory"] = ()
        everyone = tree.put(everyone, row, kept["remembered"])
        examples = added["trained"]["examples"]
        metrics = {
            "loss": jnp.where(examples > 0, added["trained"]["loss"] / jnp.maximum(examples, 1), jnp.nan),
            "reports": added["reports"],
            "dropped": added["dropped"],
            "steps": jnp.sum(clients.steps),
            "traffic": Traffic(
                cohort.ids,
                up=tree.count_bytes(tree.nbytes(sent), cohort.weight != 0),
                down=tree.count_bytes(tree.nbytes((shared.params, shared.extra)), cohort.size > 0),
            ),
        }
        return FederatedState(*after, **everyone, round=state.round + 1, known=state.known), metrics

    return Algorithm(init=init_fn, round=round_fn, params=lambda state: state.params)


def _same(tree: Tree) -> Tree:
    return tree
