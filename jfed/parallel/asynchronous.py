"""Asynchronous stochastic gradient descent with a parameter server, simulated inside the compiled program.

Each of n workers fetches the latest model, computes a gradient on a batch, sends it to the server, and fetches
again; the server steps at once. Nobody waits, but a gradient is as old as the steps made while it was computed.

Who arrives when does not depend on what is learned, so it is a part of its own: `jfed.parallel.arrivals`.

Batches are drawn from the run's seed, the worker and the worker's own count, never from the order of arrival. The
seed is drawn from the key of the run's first round, so that runs of different keys differ in batches and speeds.

Source: Dean et al. 2012, "Large scale distributed deep networks" (NeurIPS); buffers: Dutta et al. 2018
(arXiv:1803.01113).

Letters: n workers, K gradients to a step of the server, B examples in a batch, E examples.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.core import Algorithm, Tree
from jfed.parallel import _server
from jfed.parallel.arrivals import Arrivals


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
    >>> from jfed.parallel.arrivals import simulated
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
