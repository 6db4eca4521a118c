"""Who arrives when at a parameter server: drawn from a distribution of speeds, or as it was recorded.

It does not depend on what is learned, so it is data: `simulated` draws it, with a queue of events inside the compiled
program, `recorded` replays a `Trace`, of a simulation or of real processes (`jfed.parallel.parameter_server`).

Source: bounded staleness, Ho et al. 2013, "More effective distributed ML via a stale synchronous parallel parameter
server" (NeurIPS).

Letters: n workers, T gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _streams, _validate, tree
from jfed.availability import Duration
from jfed.core import Cohort, Tree
from jfed.parallel import _server


class Event(NamedTuple):
    """A gradient arrives."""

    worker: jax.Array  # [] int32, whose
    fetched: jax.Array  # [n] bool, who fetches the model right after
    seconds: jax.Array  # [] float32, since the event before


class Trace(NamedTuple):
    """The arrivals of a run: fields of `Event`, and of the metrics, with a leading axis."""

    worker: jax.Array  # [T] int32
    fetched: jax.Array  # [T, n] bool
    seconds: jax.Array  # [T] float32


class Arrivals(NamedTuple):
    """Who arrives when."""

    init: Callable  # (workers) -> queue
    next: Callable  # (queue, sent [n], seed, t) -> (queue, Event); sent: gradients of each worker before this event


class _Queue(NamedTuple):
    due: jax.Array  # [n] float32, seconds from now until the arrival; infinite while a worker waits
    order: jax.Array  # [n] int32, of fetching; settles ties
    waits: jax.Array  # [n] bool


def simulated(duration: Duration, bound: int | None = None) -> Arrivals:
    """Workers whose speeds are drawn at random; an event queue on a simulated clock.

    With a bound, this is stale synchronous parallel: a worker fetches when it has sent at most `bound` gradients more
    than the slowest, and waits until then. 0 is lockstep. Nobody is ever more than `bound + 1` gradients ahead.

    What a worker draws for its i-th gradient does not depend on the order of arrival: with one key, methods with
    different bounds meet the same speeds.

    Args:
      duration: seconds a worker takes from fetching to arrival, all included; it is asked for a cohort whose ids are
        the workers' numbers, with one step and one example each (`jfed.availability`). What is below 0 counts as 0, NaN
        as infinite: the worker never arrives. Once nobody does, events are infinitely many seconds apart, and what they
        train is NaN.
      bound: s; None for no bound.

    Raises:
      ValueError: if `duration` is no function, `bound` is not None or a whole number of at least 0, or a first duration
        is not finite.

    >>> from jfed import availability
    >>> slow_and_fast = availability.per_step([1.0, 0.25])
    >>> print(trace(simulated(slow_and_fast), workers=2, key=jax.random.key(0), length=6).worker)
    [1 1 1 0 1 1]
    >>> print(trace(simulated(slow_and_fast, bound=1), workers=2, key=jax.random.key(0), length=6).worker)
    [1 1 0 1 0 1]
    """
    if not callable(duration):
        raise ValueError(
            f"simulated(duration={duration!r}): give a function (key, cohort) -> seconds [C], such as "
            "jfed.availability.lognormal(1.0)."
        )
    _server.check_bound("simulated", bound)

    def durations(sent: jax.Array, seed: jax.Array) -> jax.Array:
        """Of the gradient that each worker computes when it has sent so many."""
        clock = jax.random.fold_in(jax.random.key(seed), _streams.CLOCK)

        def of_one(worker, count):
            one = jnp.ones(1, jnp.int32)
            alone = Cohort(worker[None], jnp.zeros(1, jnp.int32), one, one, jnp.ones(1))
            return duration(jax.random.fold_in(clock, count), alone)[0]

        return jax.vmap(of_one)(jnp.arange(sent.shape[0], dtype=jnp.int32), sent).astype(jnp.float32)

    def init_fn(workers: int) -> _Queue:
        first = durations(jnp.zeros(workers, jnp.int32), jnp.zeros((), jnp.uint32))
        if _validate.is_concrete(first) and not np.all(np.isfinite(first)):
            raise ValueError(
                f"simulated(duration): it says {np.asarray(first)} s for {workers} workers; give each a finite number."
            )
        nothing = jnp.zeros(workers, jnp.int32)
        return _Queue(jnp.zeros(workers), nothing, nothing.astype(bool))

    def next_fn(queue: _Queue, sent: jax.Array, seed: jax.Array, t: jax.Array) -> tuple[_Queue, Event]:
        def away(sent):
            seconds = durations(sent, seed)
            return jnp.where(jnp.isnan(seconds), jnp.inf, jnp.maximum(seconds, 0.0))

        due = jnp.where(t == 0, away(sent), queue.due)
        elapsed = jnp.min(due)
        first = (due == elapsed) & ~queue.waits
        worker = jnp.argmin(jnp.where(first, queue.order, jnp.iinfo(jnp.int32).max)).astype(jnp.int32)
        sent = sent.at[worker].add(1)
        waits = queue.waits.at[worker].set(True)
        fetched = waits if bound is None else waits & (sent - jnp.min(sent) <= bound)
        waits &= ~fetched
        never = waits | jnp.isinf(due)
        due = jnp.where(fetched, away(sent), jnp.where(never, jnp.inf, due - elapsed))
        return _Queue(due, jnp.where(fetched, t + 1, queue.order), waits), Event(worker, fetched, elapsed)

    return Arrivals(init_fn, next_fn)


def recorded(trace: Trace) -> Arrivals:
    """The arrivals of a trace once more, bit for bit.

    Beyond its end its last event is repeated, `seconds` is NaN, and so is the model.

    Args:
      trace: of a simulation (its metrics, or `trace`) or of real processes (`serve`).

    Raises:
      ValueError: if the trace is empty, its shapes do not fit each other, it names workers there are not, or one sends
        twice and does not fetch in between; from `asynchronous`, if it is of another number of workers.

    >>> from jfed import availability
    >>> happened = trace(
    ...     simulated(availability.per_step([1.0, 0.25])), workers=2, key=jax.random.key(0), length=6
    ... )
    >>> again = trace(recorded(happened), workers=2, key=jax.random.key(1), length=6)
    >>> print(again.worker, again.seconds)
    [1 1 1 0 1 1] [0.25 0.25 0.25 0.25 0.   0.25]
    """
    worker, fetched, seconds = (np.asarray(x) for x in trace)
    n = fetched.shape[-1]
    if worker.ndim != 1 or not worker.size or fetched.shape != (*worker.shape, n) or seconds.shape != worker.shape:
        raise ValueError(
            f"recorded(trace of shapes {worker.shape}, {fetched.shape}, {seconds.shape}): they must be [T], [T, n] and "
            "[T], T at least 1; take the fields of one run's metrics."
        )
    if worker.min() < 0 or worker.max() >= n:
        raise ValueError(f"recorded(trace): workers {worker.min()} to {worker.max()} must lie in [0, {n}).")
    for one in range(n):
        sends = np.flatnonzero(worker == one)
        fetches = np.cumsum(np.append(0, fetched[:, one]))[sends]  # before it sends
        again = np.flatnonzero(fetches[1:] == fetches[:-1])
        if again.size:
            raise ValueError(
                f"recorded(trace): worker {one} sends at event {sends[again[0] + 1]} and has not fetched since it sent "
                f"at {sends[again[0]]}; take all events of one run."
            )
    events = Event(worker.astype(np.int32), fetched.astype(bool), seconds.astype(np.float32))

    def init_fn(workers: int) -> Tree:
        if workers != n:
            raise ValueError(f"asynchronous(workers={workers}): the trace is of {n} workers; give that number.")
        return ()

    def next_fn(queue: Tree, sent: jax.Array, seed: jax.Array, t: jax.Array) -> tuple[Tree, Event]:
        event = Event(*tree.take(jax.tree.map(jnp.asarray, events), t))
        return queue, event._replace(seconds=jnp.where(t < worker.size, event.seconds, jnp.nan))

    return Arrivals(init_fn, next_fn)


def trace(arrivals: Arrivals, *, workers: int, key: jax.Array, length: int) -> Trace:
    """The arrivals alone, with nothing trained: those of a run (`jfed.run`) with this key.

    Args:
      arrivals: `simulated(...)` or `recorded(...)`.
      workers: n.
      key: the run's.
      length: T.

    Raises:
      ValueError: if `workers` or `length` is not a whole number of at least 1.
    """
    _validate.at_least_one("trace", "workers", workers, "a run has at least one")
    _validate.at_least_one("trace", "length", length, "it counts gradients")
    queue = arrivals.init(workers)

    @jax.jit
    def all_events(queue, key):
        seed = _server.seed_of(_server.first_key(key))

        def event_fn(now, t):
            queue, sent = now
            queue, event = arrivals.next(queue, sent, seed, t)
            return (queue, sent.at[event.worker].add(1)), event

        steps = jnp.arange(length, dtype=jnp.int32)
        return jax.lax.scan(event_fn, (queue, jnp.zeros(workers, jnp.int32)), steps)[1]

    return Trace(*all_events(queue, key))
