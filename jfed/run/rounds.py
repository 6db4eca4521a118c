"""Running an algorithm: many rounds as one compiled program, or one after another in your own loop.

Round `t` of a run draws from `fold_in(key, t)`, so a run can be cut anywhere and continued from its
state and `t` alone, with the same result.

Letters: T rounds, C clients in a cohort, N clients in the population, E examples.
"""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jfed import _validate, mesh
from jfed.core import Algorithm, Population, Sampler, Tree
from jfed.run.evaluation import Metrics, evaluate

_AHEAD = 16
"""Programs that may be under way at once. With more than a hundred on several CPU devices XLA hangs."""


def scan_rounds(
    algorithm: Algorithm,
    sampler: Sampler,
    population: Population,
    state: Tree,
    key: jax.Array,
    *,
    rounds: int,
    start: int | jax.Array = 0,
    every: int | None = None,
    judge: Metrics | None = None,
    examples: Tree = (),
    report: Callable[[int, dict], None] | None = None,
    donate: bool = False,
) -> tuple[Tree, dict]:
    """Runs `rounds` rounds as one program, with sampling, data and judging on the device.

    It is compiled once for each algorithm, sampler, judge, report, `rounds`, `every` and shape of the
    population: make them outside the loop. Without a report it can be vmapped over keys, states or
    anything an algorithm was built from.

    Args:
      algorithm: the method.
      sampler: `(population, key, t) -> Cohort`, see `jfed.sampling`.
      population: the data of all clients.
      state: from `algorithm.init(params)`, or where an earlier run ended.
      key: the run's key, the same for all its parts.
      rounds: T, how many to run.
      start: rounds run before, on the same key.
      every: rounds between judgements and reports, a divisor of T; by default T.
      judge: `(params, batch) -> {name: (total [B], count [B])}`, see `jfed.models.metrics`; applied to
        `examples` as `evaluate` does.
      examples: leaves [E, ...], what the model is judged on.
      report: `(rounds completed, {name: number}) -> None`, called on the host every so many rounds
        with the judgement and the last round's metrics but for `"traffic"`, while the program runs on.
      donate: let the result take the place of `state` in memory; the one passed in, and the params it
        was made from, are then gone.

    Returns:
      `(state, metrics)`; each metric of the algorithm's rounds with a leading axis [T], and with a judge
      its means under `"judged"`, leaves [T / every].

    Raises:
      ValueError: if `rounds` or `every` is not a whole number of at least 1, `every` does not divide
        `rounds`, or there is a judge and nothing to judge on.
    """
    _validate.at_least_one("scan_rounds", "rounds", rounds, "a run without rounds is its own state")
    every = rounds if every is None else every
    _validate.at_least_one("scan_rounds", "every", every, "leave it out to judge and report at the end")
    if rounds % every:
        raise ValueError(f"scan_rounds(rounds={rounds}, every={every}): every must divide rounds; choose another.")
    if judge is not None and not jax.tree.leaves(examples):
        raise ValueError("scan_rounds(judge=..., examples=()): there is nothing to judge on; give examples.")
    program = _scan_in_place if donate else _scan
    return program(algorithm, sampler, judge, report, rounds, every, population, state, key, start, examples)[:2]


def _scan_rounds(algorithm, sampler, judge, report, rounds, every, population, state, key, start, examples):
    def one_round(state, t):
        sample_key, round_key = keys_of_round(key, t)
        return algorithm.round(state, sampler(population, sample_key, t), round_key)

    def stretch(state, first):
        state, metrics = jax.lax.scan(one_round, state, first + jnp.arange(every))
        judged = {} if judge is None else evaluate(judge, algorithm.params(state), examples)
        if report is not None:
            last = jax.tree.map(lambda m: m[-1], {name: m for name, m in metrics.items() if name != "traffic"})
            io_callback(lambda t, row: report(int(t), _numbers(row)), None, first + every, last | judged, ordered=True)
        return state, (metrics, judged)

    state, (metrics, judged) = jax.lax.scan(stretch, state, start + jnp.arange(0, rounds, every))
    metrics = jax.tree.map(lambda m: m.reshape(rounds, *m.shape[2:]), metrics)
    return state, metrics if judge is None else metrics | {"judged": judged}, start + rounds


def keys_of_round(key: jax.Array, t: jax.Array) -> jax.Array:
    """`(sample_key, round_key)` of round `t` of a run: for its sampler and for its algorithm."""
    return jax.random.split(jax.random.fold_in(key, t))


def _numbers(row: dict) -> dict:
    return jax.tree.map(lambda x: np.asarray(x).tolist(), row)


_STATIC = ("algorithm", "sampler", "judge", "report", "rounds", "every")
_scan = jax.jit(_scan_rounds, static_argnames=_STATIC)
_scan_in_place = jax.jit(_scan_rounds, static_argnames=_STATIC, donate_argnames=("state",))


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
    donate: bool = False,
) -> Iterator[Moment]:
    """Yields after every `every` rounds; what happens in between is yours.

    It runs ahead of the device by 16 stretches at most.

    Args:
      algorithm: the method.
      sampler: `(population, key, t) -> Cohort`.
      population: the data of all clients.
      state: from `algorithm.init(params)`, or where an earlier run ended.
      key: the run's key.
      rounds: T, the length of the whole run.
      start: rounds run before, on the same key; those are not run again.
      every: rounds in one compiled program; a last, shorter stretch is compiled separately.
      donate: let each state take the place of the one before in memory: the state passed in with the
        params it was made from, and that of an earlier moment, are then gone.

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
        # Else the first round's result, which lies on the mesh and has strong types, would call for a second program.
        program, home = _scan_in_place if donate else _scan, mesh.of((state, key, population))
        done, now, under_way = start, mesh.onto(state, home), collections.deque()
        while done < rounds:
            stretch = min(every - done % every, rounds - done)
            now, metrics, end = program(
                algorithm, sampler, None, None, stretch, stretch, population, now, key, done, ()
            )
            done += stretch
            under_way.append(end)
            if len(under_way) > _AHEAD:
                jax.block_until_ready(under_way.popleft())
            yield Moment(done, now, metrics)

    return moments()
