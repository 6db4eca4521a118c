"""Running an algorithm: many rounds as one compiled program, or one after another in your own loop.

Round `t` of a run draws from `fold_in(key, t)`, so a run can be cut anywhere and continued from its
state and `t` alone, with the same result.

Letters: T rounds, C clients in a cohort, N clients in the population, E examples.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed import _validate
from jfed.core import Algorithm, Population, Tree
from jfed.sampling import Sampler


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
