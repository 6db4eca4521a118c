"""The round most federated methods share, and the methods that are one line over it.

A round: every client of the cohort works from the global model and returns a pseudo-gradient; the
uplink turns it into a message; messages are averaged by weight; a server optimizer descends the
average. With plain SGD of rate 1 on the server this is FedAvg (McMahan et al. 2017,
arXiv:1602.05629, Algorithm 1); with any other optimizer, FedOpt (Reddi et al. 2021,
arXiv:2003.00295, Algorithm 1).

Letters of the papers: K clients, n_k examples of client k, w global model, Delta pseudo-gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate, tree
from jfed.clients import lanes
from jfed.core import Algorithm, ClientMap, ClientWork, Cohort, Shared, Tree

# Streams of the round's key besides the clients' own, which are numbered from 0: far past any id.
_SERVER, _UPLINK = 2**31 - 1, 2**31 - 2


class FederatedState(NamedTuple):
    """State of a federated method between rounds."""

    params: Tree  # the global model, w
    server: Tree  # state of the server optimizer
    aggregator: Tree  # state of the aggregator; () for the weighted mean
    clients: Tree  # leaves [N, ...], each client's uplink state
    round: jax.Array  # [] int32, rounds completed


def federated(
    work: ClientWork,
    *,
    server: optax.GradientTransformation | None = None,
    uplink: optax.GradientTransformation | None = None,
    aggregator: optax.GradientTransformation | None = None,
    client_map: ClientMap | None = None,
    num_clients: int | None = None,
) -> Algorithm:
    """Builds a federated method out of what a client does, what it sends and what the server does.

    Guarantees:
      * A client is dropped whole if its update, message, weighted message or uplink state is not
        finite, its weight is not a finite number of at least 0, or its id is not below the
        `num_clients` given: it weighs nothing and is counted under `"dropped"`.
      * A client that is absent (weight 0) or dropped keeps its uplink state.
      * A round in which nobody reports leaves the model and the server's state as they were.
      * The result does not depend on the client map, client order or empty slots.

    The metrics of a round: `"loss"`, the mean over the examples that reporting clients trained on
    (NaN if there were none, clients whose own loss was not finite left out); `"reports"`, clients
    averaged; `"dropped"`; `"steps"`, local steps done by all; `"downloads"` and `"uploads"`, messages
    sent to and by clients; `"download_bytes"` and `"upload_bytes"`, bytes of ONE such message (uint32;
    from 4 GiB on float32).

    Transforms may take the extra arguments `key` and `round` (rounds completed before this one);
    the uplink's key is the client's own.

    Args:
      work: keeps the pseudo-gradient and adds `{"loss", "examples"}`; see `jfed.local`.
      server: sees the aggregated pseudo-gradient; by default `optax.sgd(1.0)`.
      uplink: sees each client's pseudo-gradient once a round; its state is per client and persists.
        By default the pseudo-gradient is sent as it is.
      aggregator: maps stacked messages [C, ...], given `weights=` [C], to their aggregate. By
        default the weighted mean, formed as clients finish, without a stack.
      client_map: how clients run; by default `lanes(16)`.
      num_clients: clients in the population, N; needed when the uplink has state.

    Raises:
      ValueError: at `init`, if the uplink has state and `num_clients` is missing.

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

    def init_fn(params: Tree) -> FederatedState:
        params = jax.tree.map(jnp.asarray, params)
        one = uplink.init(params)
        if jax.tree.leaves(one) and num_clients is None:
            raise ValueError(
                "federated(num_clients=None): this uplink keeps state for every client; "
                "pass num_clients, the number of clients in the population."
            )
        return FederatedState(
            params=params,
            server=server.init(params),
            aggregator=() if aggregator is None else aggregator.init(params),
            clients=jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *jnp.shape(x))), one),
            round=jnp.zeros((), jnp.int32),
        )

    def send(shared: Shared, client: Cohort, carry: Tree) -> tuple[Tree, Tree, Tree, Tree]:
        """A client's update, the message made of it, its uplink state after that, and what its training added."""
        update, trained = work.finish(shared, client, carry)
        key = jax.random.fold_in(jax.random.fold_in(shared.key, _UPLINK), client.ids)
        message, memory = uplink.update(update, client.state, shared.params, key=key, round=shared.round)
        return update, message, memory, trained

    def finish_fn(shared: Shared, client: Cohort, carry: Tree) -> tuple[Tree, Tree]:
        update, message, memory, trained = send(shared, client, carry)
        weighted = jax.tree.map(lambda m: client.weight * m, message)
        # A message that is not finite is not finite weighted either; without an uplink the update is the message.
        checked = (weighted, memory) if sent_as_is else (update, weighted, memory)
        sound = tree.all_finite(checked) & jnp.isfinite(client.weight) & (client.weight >= 0)
        if jax.tree.leaves(client.state):
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
        kept = {"memory": tree.select(reports, memory, client.state)}
        if aggregator is None:
            return kept, added | {"message": if_(reports, weighted)}
        return kept | {"message": if_(reports, message), "weight": weight}, added

    def round_fn(state: FederatedState, cohort: Cohort, key: jax.Array) -> tuple[FederatedState, dict]:
        shared = Shared(state.params, cohort.examples, key, state.round)
        clients = cohort._replace(examples=(), state=tree.take(state.clients, cohort.ids))
        kept, added = client_map(work._replace(finish=finish_fn), shared, clients)

        extra = {"key": jax.random.fold_in(key, _SERVER), "round": state.round}
        if aggregator is None:
            total = jnp.where(added["weight"] > 0, added["weight"], 1.0)
            mean = jax.tree.map(lambda m, p: (m / total).astype(p.dtype), added["message"], state.params)
            memory = state.aggregator
        else:
            mean, memory = aggregator.update(
                kept["message"], state.aggregator, state.params, weights=kept["weight"], **extra
            )
        updates, server_state = server.update(mean, state.server, state.params, **extra)
        before = (state.params, state.server, state.aggregator)
        after = (optax.apply_updates(state.params, updates), server_state, memory)
        after = tree.select(added["reports"] > 0, after, before)
        # A client that is absent keeps its memory: nothing is written past the last row.
        row = jnp.where((cohort.steps > 0) | (cohort.weight != 0), cohort.ids, jnp.iinfo(jnp.int32).max)
        memories = tree.put(state.clients, row, kept["memory"])
        return FederatedState(*after, memories, state.round + 1), metrics_fn(shared, clients, added)

    def metrics_fn(shared: Shared, clients: Cohort, added: dict) -> dict:
        def message_of(shared, client):
            return send(shared, client, work.start(shared, client))[1]

        message = jax.eval_shape(message_of, shared, jax.eval_shape(lambda c: tree.take(c, 0), clients))
        examples = added["trained"]["examples"]
        return {
            "loss": jnp.where(examples > 0, added["trained"]["loss"] / jnp.maximum(examples, 1), jnp.nan),
            "reports": added["reports"],
            "dropped": added["dropped"],
            "steps": jnp.sum(clients.steps),
            "downloads": jnp.sum(clients.size > 0, dtype=jnp.int32),
            "uploads": jnp.sum(clients.weight != 0, dtype=jnp.int32),
            "download_bytes": _count(tree.nbytes(shared.params)),
            "upload_bytes": _count(tree.nbytes(message)),
        }

    return Algorithm(init=init_fn, round=round_fn, params=lambda state: state.params)


def _count(nbytes: int) -> np.uint32 | np.float32:
    """A count that fits a metric: exact below 4 GiB."""
    return np.uint32(nbytes) if nbytes < 2**32 else np.float32(nbytes)


def fedavg(work: ClientWork, **options) -> Algorithm:
    """FedAvg: the new model is the mean of the clients' models, weighted by n_k (McMahan et al. 2017).

    Args:
      work: usually `local.sgd(...)`.
      **options: `uplink`, `aggregator`, `client_map` and `num_clients` of `federated`.
    """
    return federated(work, server=optax.sgd(1.0), **options)


def fedsgd(work: ClientWork, *, learning_rate: float, **options) -> Algorithm:
    """FedSGD: one step along the mean gradient of the cohort's examples (McMahan et al. 2017, section 2).

    Args:
      work: `local.gradient(loss)`.
      learning_rate: eta, on the server.
      **options: those of `fedavg`.

    Raises:
      ValueError: if `learning_rate` is not above 0.
    """
    _validate.positive("fedsgd", "learning_rate", learning_rate, "a good start is 0.1")
    return federated(work, server=optax.sgd(learning_rate), **options)


def fedavgm(work: ClientWork, *, learning_rate: float = 1.0, momentum: float = 0.9, **options) -> Algorithm:
    """FedAvgM: momentum on the server, `v <- beta v + Delta`, `w <- w - eta v` (Hsu et al. 2019, arXiv:1909.06335).

    Args:
      work: usually `local.sgd(...)`.
      learning_rate: eta, on the server.
      momentum: beta, in [0, 1].
      **options: those of `fedavg`.

    Raises:
      ValueError: if `learning_rate` is not above 0, or `momentum` not in [0, 1].
    """
    _validate.positive("fedavgm", "learning_rate", learning_rate, "1.0 is FedAvg's")
    _validate.within("fedavgm", "momentum", momentum, 0.0, 1.0, "0.9 is usual")
    return federated(work, server=optax.sgd(learning_rate, momentum=momentum), **options)
