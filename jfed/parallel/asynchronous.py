"""Asynchronous stochastic gradient descent with a parameter server, simulated inside the compiled program.

Each of n workers fetches the latest model, computes a gradient on a batch, sends it to the server, and fetches
again; the server steps at once. Nobody waits, but a gradient is as old as the steps made while it was computed.

Who arrives when does not depend on what is learned, so it is a part of its own, `Arrivals`: `simulated` draws it
from a distribution of speeds, `recorded` replays what happened, in a simulation or among real processes
(`jfed.parallel.parameter_server`), and a `Trace` says all about it.

Batches are drawn from the run's seed, the worker and the worker's own count, never from the order of arrival. The
seed is drawn from the key of the run's first round, so that runs of different keys differ in batches and speeds.

Source: Dean et al. 2012, "Large scale distributed deep networks" (NeurIPS); bounded staleness: Ho et al. 2013, "More
effective distributed ML via a stale synchronous parallel parameter server" (NeurIPS); buffers: Dutta et al. 2018
(arXiv:1803.01113).

Letters: n workers, K gradients to a step of the server, T gradients, B examples in a batch, E examples.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _streams, _validate, tree
from jfed.availability import Duration
from jfed.core import Algorithm, Cohort, Tree
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


class State(NamedTuple):
    """Of a run with a parameter server."""

    server: _server.Server  # the latest model, and leaves [n, ...] of those that workers compute with
    queue: Tree  # of the arrivals; `simulated`: [n] each, `recorded`: ()
    sent: jax.Array  # [n] int32, gradients that arrived from each worker
    seed: jax.Array  # [] uint32, from the key of the first round
    round: jax.Array  # [] int32, gradients that arrived


def asynchronous(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    workers: int,
    arrivals: Arrivals,
    batch: Callable,
    correction: optax.GradientTransformation | None = None,
    buffer: int = 1,
) -> Algorithm:
    """Training by a parameter server, one round a gradient that arrives.

    A round's cohort is the examples that batches are cut from, whatever tree `batch` takes: with `jfed.run`, the
    sampler `lambda population, key, t: population.examples`.

    Guarantees:
      * One worker is plain descent; `simulated(..., bound=0)` with `buffer=workers` is synchronous data-parallel
        descent on the workers' batches put together, for any optimizer.
      * The model and every loss are determined by the trace, the run's key, and what is passed here.
      * Nothing is dropped: a gradient that is not finite makes the model so. An event whose `seconds` are not finite,
        since no worker ever arrives or a recorded trace is at its end, makes the model NaN.
      * Memory: n + 1 models and the states of optimizer and correction, with K > 1 one more in float32 or better,
        beside what a step of plain descent takes. In a scan, or with the state donated, an event copies a few models,
        however many n is.

    Args:
      loss: `(params, batch, key) -> [B]` or their mean, []; a gradient is that of the mean.
      optimizer: of the server; it is also given `value`, the mean of the K losses that workers found.
      workers: n.
      arrivals: `simulated(...)` or `recorded(...)`.
      batch: `(examples, key, worker) -> batch`, pure; `random_batch(B)` for one.
      correction: an optax transform that each gradient passes when it arrives, told `params`, the model then, and by
        name `stale`, the model it was computed at, and `age`, the server's steps in between: `scale_by_age`,
        `delay_compensation`, or an `optax.chain` of such. Its state is the server's.
      buffer: K, the server steps by the mean of every K gradients. Without a bound this is K-batch-async of Dutta et
        al. 2018.

    Returns:
      An `Algorithm`. Metrics: `loss` of the batch at the model it was computed at, `worker`, `staleness` (`age`),
      `seconds` since the event before, and `fetched`, [n] bool.

    Raises:
      ValueError: if `workers` or `buffer` is not a whole number of at least 1, `optimizer` or `correction` is no optax
        transform, or the arrivals are of other workers; when traced, if the loss has another shape.

    >>> from jfed import availability
    >>> arrivals = simulated(availability.lognormal(1.0, sigma=0.0))
    >>> method = asynchronous(
    ...     lambda w, x, key: w**2 / 2,
    ...     optax.sgd(0.5),
    ...     workers=2,
    ...     arrivals=arrivals,
    ...     batch=lambda x, key, worker: x,
    ... )
    >>> state = method.init(jnp.array(1.0))
    >>> for _ in range(3):
    ...     state, metrics = method.round(state, jnp.zeros(1), jax.random.key(0))
    ...     print(method.params(state), metrics["worker"], metrics["staleness"], metrics["seconds"])
    0.5 0 0 1.0
    0.0 1 1 0.0
    -0.25 0 1 1.0
    """
    _validate.at_least_one("asynchronous", "workers", workers, "one is plain descent")
    parts = _server.parts_of("asynchronous", optimizer, correction, buffer)
    gradient_of = _server.gradient_of("asynchronous", loss, batch)
    arrivals.init(workers)

    def init_fn(params: Tree) -> State:
        return State(
            server=_server.start(parts, params, workers),
            queue=arrivals.init(workers),
            sent=jnp.zeros(workers, jnp.int32),
            seed=jnp.zeros((), jnp.uint32),
            round=jnp.zeros((), jnp.int32),
        )

    def round_fn(state: State, examples: Tree, key: jax.Array) -> tuple[State, dict]:
        seed = jnp.where(state.round == 0, _server.seed_of(key), state.seed)
        queue, event = arrivals.next(state.queue, state.sent, seed, state.round)
        worker = event.worker
        server = _server.stored(state.server)
        stale = _server.held_by(server, worker)
        value, gradient = gradient_of(stale, examples, seed, worker, state.sent[worker])
        happens = jnp.where(jnp.isfinite(event.seconds), 1.0, jnp.nan)
        gradient = jax.tree.map(lambda g: g * happens.astype(g.dtype), gradient)
        # As between processes, so that rounding does not depend on how arrivals are computed.
        gradient = jax.lax.optimization_barrier(gradient)
        server, age = _server.receive(parts, server, worker, gradient, value)
        state = State(_server.fetch(server, event.fetched), queue, state.sent.at[worker].add(1), seed, state.round + 1)
        return state, {"loss": value, "staleness": age} | event._asdict()

    return Algorithm(init_fn, round_fn, lambda state: state.server.params)


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


def random_batch(size: int) -> Callable:
    """`(examples, key, worker) -> batch` of `size` examples drawn uniformly, with replacement, whichever the worker.

    Raises:
      ValueError: if `size` is not a whole number of at least 1.

    >>> batch = random_batch(4)({"x": jnp.zeros((10, 3)), "y": jnp.arange(10)}, jax.random.key(0), 0)
    >>> print(batch["x"].shape, batch["y"].shape)
    (4, 3) (4,)
    """
    _validate.at_least_one("random_batch", "size", size, "32 is usual")

    def batch_fn(examples: Tree, key: jax.Array, worker: jax.Array) -> Tree:
        del worker
        return tree.take(examples, jax.random.randint(key, (size,), 0, jax.tree.leaves(examples)[0].shape[0]))

    return batch_fn
