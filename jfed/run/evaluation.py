"""Judging a model: on a set of examples, and on each client's own.

Letters: N clients in the population, E examples, B examples at once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed import _validate, tree
from jfed.clients import lanes
from jfed.core import Algorithm, ClientMap, ClientWork, Population, Shared, Tree, make_cohort
from jfed.local import client_rows

Metrics = Callable[[Tree, Tree], dict[str, tuple[jax.Array, jax.Array]]]


@functools.partial(jax.jit, static_argnames=("metrics", "batch_size"))
def evaluate(metrics: Metrics, params: Tree, examples: Tree, *, batch_size: int = 256) -> dict[str, jax.Array]:
    """Means of per-example metrics over a set of examples, short last batch included exactly.

    Args:
      metrics: `(params, batch) -> {name: (total [B], count [B])}`, see `jfed.models.metrics`.
      params: the model to judge.
      examples: leaves [E, ...].
      batch_size: examples at once; it does not change the result.

    Returns:
      `{name: sum of totals / sum of counts}`.

    Raises:
      ValueError: if `batch_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("evaluate", "batch_size", batch_size, "a good start is 256")
    size = jax.tree.leaves(examples)[0].shape[0]
    everyone = Population(examples, jnp.zeros(1, jnp.int32), jnp.full(1, size, jnp.int32))
    one = evaluate_clients(metrics, params, everyone, batch_size=batch_size, client_map=lanes(1))
    return {name: value[0] for name, value in one.items()}


@functools.partial(jax.jit, static_argnames=("metrics", "batch_size", "client_map", "personal"))
def evaluate_clients(
    metrics: Metrics,
    params: Tree,
    population: Population,
    *,
    batch_size: int = 32,
    client_map: ClientMap | None = None,
    personal: Callable[[Tree, jax.Array], Tree] | None = None,
) -> dict[str, jax.Array]:
    """The metrics of one model, or of each client's own, on each client's examples.

    Args:
      metrics: `(params, batch) -> {name: (total [B], count [B])}`.
      params: the model to judge; with `personal`, what that makes the clients' models of.
      population: N clients; one without examples scores NaN.
      batch_size: examples at once; it does not change the result.
      client_map: how clients run; by default `lanes(16)`.
      personal: `(params, id) -> the model of client id`, such as `algorithm.personal`, whose `params` is the
        algorithm's state.

    Returns:
      `{name: [N]}`.

    Raises:
      ValueError: if `batch_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("evaluate_clients", "batch_size", batch_size, "a good start is 32")
    client_map = lanes(16) if client_map is None else client_map

    def of(shared, model):
        return shared.params if personal is None else model

    def start_fn(shared, client):
        model = () if personal is None else personal(shared.params, client.ids)
        return model, _nothing(metrics, of(shared, model), shared.examples)

    def step_fn(shared, client, carry, t):
        model, sums = carry
        rows = client_rows(client, t, batch_size)
        return model, _add(sums, metrics, of(shared, model), shared.examples, *rows)

    work = ClientWork(
        steps=lambda size: -(-size // batch_size),
        start=start_fn,
        step=step_fn,
        finish=lambda shared, client, carry: (carry[1], ()),
    )
    cohort = make_cohort(population, jnp.arange(population.size.shape[0]), steps=work.steps)
    shared = Shared(params, cohort.examples, key=jax.random.key(0), round=jnp.zeros((), jnp.int32))
    sums, _ = client_map(work, shared, cohort._replace(examples=()))
    return _means(sums)


class Scores(NamedTuple):
    """One metric of all peers' models on the same examples."""

    each: jax.Array  # [n], of each peer's own model
    mean: jax.Array  # [] over peers
    lowest: jax.Array  # []
    highest: jax.Array  # []
    spread: jax.Array  # [] standard deviation over peers
    averaged: jax.Array  # [] of the average of all models, which nobody has


@functools.partial(jax.jit, static_argnames=("metrics", "algorithm", "batch_size", "client_map"))
def evaluate_peers(
    metrics: Metrics,
    algorithm: Algorithm,
    state: Tree,
    examples: Tree,
    *,
    batch_size: int = 256,
    client_map: ClientMap | None = None,
) -> dict[str, Scores]:
    """The metrics of every peer's own model on one set of examples, and of the average of all models.

    Where there is no server there is no model but peers' own, so those count; what their average scores, which is
    often better, tells how much is lost to their disagreement. On examples of each peer's own, take `evaluate_clients`
    with `personal=algorithm.personal`.

    Args:
      metrics: `(params, batch) -> {name: (total [B], count [B])}`.
      algorithm: of `jfed.gossip`.
      state: its state.
      examples: leaves [E, ...].
      batch_size: examples at once; it does not change the result.
      client_map: how many models are judged at once; by default `lanes(16)`.

    Returns:
      `{name: Scores}`.

    Raises:
      ValueError: if the state is not one of peers, or `batch_size` is not a whole number of at least 1.
    """
    from jfed import gossip  # whoever has no peers need not wait for it

    if not isinstance(state, gossip.PeersState | gossip.PairsState):
        raise ValueError(
            f"evaluate_peers(state of {type(state).__name__}): peers are those of jfed.gossip; use run.evaluate, or "
            "run.evaluate_clients with personal=."
        )
    n = jax.tree.leaves(state.params)[0].shape[0]
    size = jax.tree.leaves(examples)[0].shape[0]
    everyone = Population(examples, jnp.zeros(n, jnp.int32), jnp.full(n, size, jnp.int32))
    options = {"batch_size": batch_size, "client_map": client_map}
    each = evaluate_clients(metrics, state, everyone, personal=algorithm.personal, **options)
    averaged = evaluate(metrics, algorithm.params(state), examples, batch_size=batch_size)
    return {
        name: Scores(x, jnp.mean(x), jnp.min(x), jnp.max(x), jnp.std(x), averaged[name]) for name, x in each.items()
    }


@functools.partial(jax.jit, static_argnames=("metrics", "work", "steps", "batch_size", "client_map", "personal"))
def evaluate_adapted(
    metrics: Metrics,
    work: ClientWork,
    params: Tree,
    train: Population,
    test: Population,
    key: jax.Array,
    *,
    steps: int | None = None,
    batch_size: int = 32,
    client_map: ClientMap | None = None,
    personal: Callable[[Tree, jax.Array], Tree] | None = None,
) -> dict[str, jax.Array]:
    """The metrics of a model on each client's examples, once the client has trained it on its own.

    This is how Per-FedAvg is judged, after one local step, and how a model fine-tuned by each client is. The training
    is that of round 0, whatever rounds the model has behind it: `local.scale_by_round` scales by `factor(0)`.

    Args:
      metrics: `(params, batch) -> {name: (total [B], count [B])}`.
      work: how clients train; its carry has a field `params`.
      params: the model they start from; with `personal`, what that makes the clients' models of.
      train: N clients' examples to train on; a client without any is judged as it is.
      test: the same N clients' examples to judge on; a client without any scores NaN.
      key: for the training.
      steps: local steps; by default as many as `work` does.
      batch_size: examples judged at once; it does not change the result.
      client_map: how clients run; by default `lanes(16)`.
      personal: as in `evaluate_clients`.

    Returns:
      `{name: [N]}`.

    Raises:
      ValueError: if `train` and `test` differ in their number of clients, `batch_size` is not a whole number of
        at least 1, or `steps` not one of at least 0.
    """
    _validate.at_least_one("evaluate_adapted", "batch_size", batch_size, "a good start is 32")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ValueError(f"evaluate_adapted(steps={steps!r}): steps must be a whole number of at least 0; 1 is usual.")
    client_map = lanes(16) if client_map is None else client_map
    n = train.size.shape[0]
    if test.size.shape[0] != n:
        raise ValueError(
            f"evaluate_adapted(train of {n} clients, test of {test.size.shape[0]}): they must be the same clients, in "
            "the same order."
        )

    def as_seen(shared, client):
        """The round as the work knows it: from the client's model, over the examples to train on."""
        model = shared.params if personal is None else personal(shared.params, client.ids)
        return shared._replace(params=model, examples=shared.examples["train"]), client._replace(state=())

    def finish_fn(shared, client, carry):
        held_out = client._replace(**client.state)

        def judge(batch, sums):
            rows = client_rows(held_out, batch, batch_size)
            return _add(sums, metrics, carry.params, shared.examples["test"], *rows)

        nothing = _nothing(metrics, carry.params, shared.examples["test"])
        return jax.lax.fori_loop(0, -(-held_out.size // batch_size), judge, nothing), ()

    adapting = ClientWork(
        work.steps,
        start=lambda shared, client: work.start(*as_seen(shared, client)),
        step=lambda shared, client, carry, t: work.step(*as_seen(shared, client), carry, t),
        finish=finish_fn,
    )
    cohort = make_cohort(train, jnp.arange(n), steps=work.steps)
    if steps is not None:
        cohort = cohort._replace(steps=jnp.where(cohort.size > 0, steps, 0).astype(jnp.int32))
    # Every client reports, also one that has nothing to train on.
    clients = cohort._replace(
        examples=(), weight=jnp.ones(n), state={"start": jnp.asarray(test.start), "size": jnp.asarray(test.size)}
    )
    examples = {"train": train.examples, "test": test.examples}
    sums, _ = client_map(adapting, Shared(params, examples, key, jnp.zeros((), jnp.int32)), clients)
    return _means(sums)


def _add(sums: dict, metrics: Metrics, params: Tree, examples: Tree, row: jax.Array, real: jax.Array) -> dict:
    """Totals and counts [2] of each metric, with those of a batch of rows added."""
    values = metrics(params, tree.take(examples, row))
    return {
        name: sums[name] + jnp.stack([jnp.sum(jnp.where(real, total, 0.0)), jnp.sum(jnp.where(real, count, 0.0))])
        for name, (total, count) in values.items()
    }


def _nothing(metrics: Metrics, params: Tree, examples: Tree) -> dict:
    names = jax.eval_shape(lambda: metrics(params, tree.take(examples, jnp.arange(1))))
    return {name: jnp.zeros(2) for name in names}


def _means(sums: dict) -> dict[str, jax.Array]:
    return {name: s[:, 0] / s[:, 1] for name, s in sums.items()}
