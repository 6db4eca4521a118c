"""Judging a model: on a set of examples, and on each client's own.

Letters: N clients in the population, E examples, B examples at once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jfed import _validate, tree
from jfed.clients import lanes
from jfed.core import ClientMap, ClientWork, Population, Shared, Tree, make_cohort
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


@functools.partial(jax.jit, static_argnames=("metrics", "batch_size", "client_map"))
def evaluate_clients(
    metrics: Metrics, params: Tree, population: Population, *, batch_size: int = 32, client_map: ClientMap | None = None
) -> dict[str, jax.Array]:
    """The metrics of one model on each client's examples.

    Args:
      metrics: `(params, batch) -> {name: (total [B], count [B])}`.
      params: the model to judge.
      population: N clients; one without examples scores NaN.
      batch_size: examples at once; it does not change the result.
      client_map: how clients run; by default `lanes(16)`.

    Returns:
      `{name: [N]}`.

    Raises:
      ValueError: if `batch_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("evaluate_clients", "batch_size", batch_size, "a good start is 32")
    client_map = lanes(16) if client_map is None else client_map

    def batch_sums(shared, client, batch):
        row, real = client_rows(client, batch, batch_size)
        values = metrics(shared.params, tree.take(shared.examples, row))
        return {
            name: jnp.stack([jnp.sum(jnp.where(real, total, 0.0)), jnp.sum(jnp.where(real, count, 0.0))])
            for name, (total, count) in values.items()
        }

    work = ClientWork(
        steps=lambda size: -(-size // batch_size),
        start=lambda shared, client: tree.zeros(jax.eval_shape(batch_sums, shared, client, jnp.int32(0))),
        step=lambda shared, client, sums, t: jax.tree.map(jnp.add, sums, batch_sums(shared, client, t)),
        finish=lambda shared, client, sums: (sums, ()),
    )
    cohort = make_cohort(population, jnp.arange(population.size.shape[0]), steps=work.steps)
    shared = Shared(params, cohort.examples, key=jax.random.key(0), round=jnp.zeros((), jnp.int32))
    sums, _ = client_map(work, shared, cohort._replace(examples=()))
    return {name: s[:, 0] / s[:, 1] for name, s in sums.items()}
