"""Running an algorithm: many rounds as one compiled program, or one after another in your own loop.

Round `t` of a run draws from `fold_in(key, t)`, so a run can be cut anywhere and continued from its
state and `t` alone, with the same result.

Letters: T rounds, C clients in a cohort, N clients in the population, E examples.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed import _validate, tree
from jfed.clients import lanes
from jfed.core import Algorithm, ClientMap, ClientWork, Population, Shared, Tree, make_cohort
from jfed.local import client_rows
from jfed.sampling import Sampler

Metrics = Callable[[Tree, Tree], dict[str, tuple[jax.Array, jax.Array]]]


@functools.partial(jax.jit, static_argnames=("algorithm", "sampler", "rounds"))
def scan_rounds(
    algorithm: Algorithm,
    sampler: Sampler,
    population: Population,
    state: Tree,
    key: jax.Array,
    *,
    rounds: int,
    start: int | jax.Array = 0,
) -> tuple[Tree, dict]:
    """Runs `rounds` rounds as one program, with sampling and data on the device.

    It is compiled once for each algorithm, sampler, number of rounds and shape of the population,
    and can be vmapped over keys, states or anything an algorithm was built from.

    Args:
      algorithm: the method.
      sampler: `(population, key, t) -> Cohort`, see `jfed.sampling`.
      population: the data of all clients.
      state: from `algorithm.init(params)`, or where an earlier run ended.
      key: the run's key, the same for all its parts.
      rounds: T, how many to run.
      start: rounds run before, on the same key.

    Returns:
      `(state, metrics)`; each metric of the algorithm's rounds with a leading axis [T].

    Raises:
      ValueError: if `rounds` is not a whole number of at least 1.
    """
    _validate.at_least_one("scan_rounds", "rounds", rounds, "a run without rounds is its own state")

    def one_round(state, t):
        sample_key, round_key = jax.random.split(jax.random.fold_in(key, t))
        return algorithm.round(state, sampler(population, sample_key, t), round_key)

    return jax.lax.scan(one_round, state, start + jnp.arange(rounds))


class Moment(NamedTuple):
    """Where a run is, between two rounds."""

    round: int  # rounds completed
    state: Tree  # the algorithm's state after them
    metrics: dict  # the metrics of the rounds since the moment before, leaves [every]


def iterate(
    algorithm: Algorithm,
    sampler: Sampler,
    population: Population,
    state: Tree,
    key: jax.Array,
    *,
    rounds: int,
    start: int = 0,
    every: int = 1,
) -> Iterator[Moment]:
    """Yields after every `every` rounds; what happens in between is yours.

    Args:
      algorithm: the method.
      sampler: `(population, key, t) -> Cohort`.
      population: the data of all clients.
      state: from `algorithm.init(params)`, or where an earlier run ended.
      key: the run's key.
      rounds: T, the length of the whole run.
      start: rounds run before, on the same key; those are not run again.
      every: rounds in one compiled program; a last, shorter stretch is compiled separately.

    Returns:
      An iterator of a `Moment` after each stretch.

    Raises:
      ValueError: if `rounds` or `every` is not a whole number of at least 1, or `start` is beyond them.
    """
    _validate.at_least_one("iterate", "rounds", rounds, "it is the length of the whole run")
    _validate.at_least_one("iterate", "every", every, "1 yields after each round")
    start = int(start)
    if not 0 <= start <= rounds:
        raise ValueError(f"iterate(start={start}): start must lie in [0, {rounds}], the rounds of the whole run.")

    def moments():
        done, now = start, state
        while done < rounds:
            stretch = min(every - done % every, rounds - done)
            now, metrics = scan_rounds(algorithm, sampler, population, now, key, rounds=stretch, start=done)
            done += stretch
            yield Moment(done, now, metrics)

    return moments()


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
