"""The round most federated methods share, and the methods that are one line over it.

A round: every client of the cohort works from the global model and returns a pseudo-gradient; the
uplink turns it into a message; messages are averaged by weight; a server optimizer descends the
average. With plain SGD of rate 1 on the server this is FedAvg (McMahan et al. 2017,
arXiv:1602.05629, Algorithm 1); with an adaptive optimizer, FedOpt (Reddi et al. 2021,
arXiv:2003.00295, Algorithm 1).

Letters of the papers: K clients, n_k examples of client k, w global model, Delta pseudo-gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import local, tree
from jfed.clients import lanes
from jfed.core import Algorithm, ClientMap, ClientWork, Cohort, Shared, Tree


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
      * An update that is not finite is dropped whole: it weighs nothing, leaves the client's uplink
        state as it was, and is counted under `"dropped"`.
      * A round in which nobody reports (all weights 0, or all dropped) leaves the model and the
        server's state as they were.
      * The result does not depend on the client map, client order or empty slots.

    The metrics of a round: `"loss"`, the mean over the examples that reporting clients trained on
    (NaN if there were none); `"reports"`, clients averaged; `"dropped"`, clients whose update was
    not finite; `"steps"`, local steps done by all; `"downloads"` and `"uploads"`, messages sent to
    and by clients; `"download_bytes"` and `"upload_bytes"`, bytes of ONE such message (uint32).

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
    """
    server = optax.with_extra_args_support(optax.sgd(1.0) if server is None else server)
    uplink = optax.with_extra_args_support(optax.identity() if uplink is None else uplink)
    aggregator = None if aggregator is None else optax.with_extra_args_support(aggregator)
    client_map = lanes(16) if client_map is None else client_map

    def init_fn(params: Tree) -> FederatedState:
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

    def finish_fn(shared: Shared, client: Cohort, carry: Tree) -> tuple[Tree, Tree]:
        update, trained = work.finish(shared, client, carry)
        message, memory = uplink.update(update, client.state, shared.params)
        finite = tree.all_finite(update) & tree.all_finite(message)
        message = tree.select(finite, message, jax.tree.map(jnp.zeros_like, message))
        memory = tree.select(finite, memory, client.state)
        weight = jnp.where(finite, client.weight, 0.0)
        reports = weight > 0
        added = {
            "weight": weight,
            "trained": tree.select(reports, trained, jax.tree.map(jnp.zeros_like, trained)),
            "reports": reports.astype(jnp.int32),
            "dropped": (~finite & (client.weight > 0)).astype(jnp.int32),
        }
        if aggregator is None:
            added["message"] = jax.tree.map(lambda m: weight * m, message)
            return {"memory": memory}, added
        return {"memory": memory, "message": message, "weight": weight}, added

    def round_fn(state: FederatedState, cohort: Cohort, key: jax.Array) -> tuple[FederatedState, dict]:
        shared = Shared(state.params, cohort.examples, key, state.round)
        clients = cohort._replace(examples=(), state=tree.take(state.clients, cohort.ids))
        kept, added = client_map(work._replace(finish=finish_fn), shared, clients)

        if aggregator is None:
            total = jnp.where(added["weight"] > 0, added["weight"], 1.0)
            mean = jax.tree.map(lambda m, p: (m / total).astype(p.dtype), added["message"], state.params)
            memory = state.aggregator
        else:
            mean, memory = aggregator.update(kept["message"], state.aggregator, state.params, weights=kept["weight"])
        updates, server_state = server.update(mean, state.server, state.params)
        stepped = FederatedState(
            params=optax.apply_updates(state.params, updates),
            server=server_state,
            aggregator=memory,
            clients=state.clients,
            round=state.round,
        )
        stepped = tree.select(added["reports"] > 0, stepped, state)
        stepped = stepped._replace(
            # An empty slot's id is past the last row, so nothing is written for it.
            clients=tree.put(state.clients, cohort.ids, kept["memory"]),
            round=state.round + 1,
        )
        return stepped, metrics_fn(state, cohort, added)

    def metrics_fn(state: FederatedState, cohort: Cohort, added: dict) -> dict:
        examples = added["trained"]["examples"]
        one = jax.tree.map(lambda x: x[0], state.clients)
        message, _ = jax.eval_shape(uplink.update, state.params, one, state.params)
        return {
            "loss": jnp.where(examples > 0, added["trained"]["loss"] / jnp.maximum(examples, 1), jnp.nan),
            "reports": added["reports"],
            "dropped": added["dropped"],
            "steps": jnp.sum(cohort.steps),
            "downloads": jnp.sum(cohort.size > 0, dtype=jnp.int32),
            "uploads": jnp.sum(cohort.weight > 0, dtype=jnp.int32),
            "download_bytes": np.uint32(tree.nbytes(state.params)),
            "upload_bytes": np.uint32(tree.nbytes(message)),
        }

    return Algorithm(init=init_fn, round=round_fn, params=lambda state: state.params)


def fedavg(work: ClientWork, **options) -> Algorithm:
    """FedAvg: the new model is the mean of the clients' models, weighted by n_k (McMahan et al. 2017).

    Args:
      work: usually `local.sgd(...)`.
      **options: `uplink`, `aggregator`, `client_map` and `num_clients` of `federated`.
    """
    return federated(work, server=optax.sgd(1.0), **options)


def fedsgd(loss: local.Loss, *, learning_rate: float, chunk_size: int = 64, **options) -> Algorithm:
    """FedSGD: one step along the mean gradient of the cohort's examples (McMahan et al. 2017, section 2).

    Args:
      loss: `(params, batch, key) -> [B]`.
      learning_rate: eta, on the server.
      chunk_size: examples at once on a client; it does not change the result.
      **options: those of `federated`, save `server`.
    """
    return federated(local.gradient(loss, chunk_size=chunk_size), server=optax.sgd(learning_rate), **options)


def fedavgm(work: ClientWork, *, learning_rate: float = 1.0, momentum: float = 0.9, **options) -> Algorithm:
    """FedAvgM: momentum on the server, `v <- beta v + Delta` (Hsu et al. 2019, arXiv:1909.06335)."""
    return federated(work, server=optax.sgd(learning_rate, momentum=momentum), **options)


def _adaptive(second_moment: Callable, learning_rate: float, b1: float, tau: float) -> optax.GradientTransformation:
    """Algorithm 2 of Reddi et al. 2021: `x <- x - eta m / (sqrt(v) + tau)`, without bias correction.

    `m <- b1 m + (1 - b1) Delta`, and `v <- second_moment(v, Delta^2)`, both from 0. (The paper's
    Delta is the client's change, ours the pseudo-gradient, its negative.)
    """

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"m": zeros, "v": zeros}

    def update_fn(delta, state, params=None):
        del params
        m = jax.tree.map(lambda m, d: b1 * m + (1 - b1) * d, state["m"], delta)
        v = jax.tree.map(lambda v, d: second_moment(v, d * d), state["v"], delta)
        updates = jax.tree.map(lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau), m, v)
        return updates, {"m": m, "v": v}

    return optax.GradientTransformation(init_fn, update_fn)


def fedadagrad(work: ClientWork, *, learning_rate: float, tau: float = 1e-3, **options) -> Algorithm:
    """FedAdagrad: `v <- v + Delta^2` (Reddi et al. 2021, Algorithm 2; beta_1 = 0 as in the paper's runs)."""
    return federated(work, server=_adaptive(lambda v, d2: v + d2, learning_rate, 0.0, tau), **options)


def fedadam(
    work: ClientWork, *, learning_rate: float, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3, **options
) -> Algorithm:
    """FedAdam: `v <- b2 v + (1 - b2) Delta^2` (Reddi et al. 2021, Algorithm 2)."""
    return federated(work, server=_adaptive(lambda v, d2: b2 * v + (1 - b2) * d2, learning_rate, b1, tau), **options)


def fedyogi(
    work: ClientWork, *, learning_rate: float, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3, **options
) -> Algorithm:
    """FedYogi: `v <- v - (1 - b2) Delta^2 sign(v - Delta^2)` (Reddi et al. 2021, Algorithm 2)."""
    return federated(
        work,
        server=_adaptive(lambda v, d2: v - (1 - b2) * d2 * jnp.sign(v - d2), learning_rate, b1, tau),
        **options,
    )
