"""Data-parallel training: every worker has the whole model and a share of the batch; gradients are averaged.

A step of n workers equals a step of one on the whole batch. Only the average is communicated, by any all-reduce of
`jfed.collectives`, or by compressed messages.

It is an `Algorithm` whose round is a step, with a batch in the cohort's place, so `jfed.run` drives it: `batches`
makes the sampler.

Letters: n workers, B examples in a batch, m microbatches.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jfed import _validate, shuffle, tree
from jfed.core import Algorithm, Population, Tree
from jfed.parallel import _workers


class DataParallelState(NamedTuple):
    """State between two steps."""

    params: Tree
    optimizer: Tree  # its state
    uplink: Tree  # leaves [n, ...], each worker's state of its uplink
    step: jax.Array  # [] int32, steps completed


def data_parallel(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    workers: Mesh | int,
    all_reduce: Callable | None = None,
    uplink: optax.GradientTransformation | None = None,
    accumulate: int = 1,
) -> Algorithm:
    """A model on every worker, each with its share of the batch, that descend the mean gradient.

    `round(state, batch, key)`: leaves of the batch are [B, ...], worker 0's examples first. Metrics: `"loss"`, the
    mean over the batch.

    Guarantees:
      * With an exact all-reduce it equals one worker on the whole batch, up to the order of additions.
      * Nothing but gradients, and with them the loss, is ever sent: an all-reduce must give all workers the same bits,
        as those of `jax.lax` and `jfed.collectives` do.

    Args:
      loss: `(params, batch, key) -> [B]`, or their mean; each worker and microbatch has a key of its own, and the
        all-reduce or uplink others.
      optimizer: any optax optimizer; it is also given `value`, the loss.
      workers: a mesh, all of whose devices take part, or a number of workers to simulate on one device.
      all_reduce: `(x, axis_name) -> sum over workers`, by default `jax.lax.psum`; any of `jfed.collectives`, also
        compressed, which are given `key` and `round`.
      uplink: what every worker makes of its gradient, such as `compress.error_feedback(compress.top_k(0.01))`, given
        the params, and `key`, the worker's own, and `round`; all gather the messages, so bytes grow with n.
      accumulate: m; each worker's share is taken in so many parts, whose gradients are averaged before they are sent.

    Raises:
      ValueError: if an argument is none of these, or both `all_reduce` and `uplink` are given; when traced, if the
        workers' parts do not divide the batch, or the loss has another shape.

    >>> sgd = data_parallel(lambda w, x, key: (w - x) ** 2 / 2, optax.sgd(0.5), workers=2)
    >>> state, metrics = sgd.round(sgd.init(jnp.array(0.0)), jnp.array([1.0, 3.0, 5.0, 7.0]), jax.random.key(0))
    >>> print(state.params, metrics["loss"])
    2.0 10.5
    """
    where = "data_parallel"
    team = _workers.of(where, workers)
    _validate.at_least_one(where, "accumulate", accumulate, "1 takes a worker's share at once")
    optimizer = _workers.optimizer_of(where, "optimizer", optimizer)
    mean = _workers.mean(where, team, all_reduce, uplink)
    one = _workers.loss_and_gradient(where, loss)

    def init_fn(params: Tree) -> DataParallelState:
        params = _workers.placed(team, params)
        (links,) = _workers.each(team, lambda p: (mean.init(p),), own=(False,), results=(True,))(params)
        state = DataParallelState(params, optimizer.init(params), links, jnp.zeros((), jnp.int32))
        return _workers.placed(team, state)

    def step(params, state, link, parts, key, count):
        loss_key, wire_key = jax.random.split(key)
        own_key = jax.random.fold_in(loss_key, lax.axis_index(team.axis_name))
        value, gradient = accumulated(one, params)(params, parts, own_key)
        gradient, value, link = mean.update(gradient, value, link, params, wire_key, count)
        updates, state = optimizer.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state, link, value

    spread = _workers.each(
        team, step, own=(False, False, True, True, False, False), results=(False, False, True, False)
    )

    def round_fn(state: DataParallelState, batch: Tree, key: jax.Array) -> tuple[DataParallelState, dict]:
        parts = _workers.dealt(where, team, batch, accumulate, "microbatches")
        params, inner, links, value = spread(state.params, state.optimizer, state.uplink, parts, key, state.step)
        return DataParallelState(params, inner, links, state.step + 1), {"loss": value}

    return Algorithm(init_fn, round_fn, lambda state: state.params)


def accumulated(loss_and_gradient: Callable, like: Tree) -> Callable:
    """`(params, parts, key) -> (loss, gradient)`, means over parts [m, b, ...], one of which is in memory at a time.

    Gradients are added up in float32 or better.

    Args:
      loss_and_gradient: of one part.
      like: the shapes and dtypes of its gradient.
    """

    def gradient_fn(params: Tree, parts: Tree, key: jax.Array) -> tuple[jax.Array, Tree]:
        (m,) = {x.shape[0] for x in jax.tree.leaves(parts)}
        if m == 1:
            return loss_and_gradient(params, jax.tree.map(lambda x: x[0], parts), jax.random.fold_in(key, 0))

        def add(so_far, part):
            number, batch = part
            value, gradient = loss_and_gradient(params, batch, jax.random.fold_in(key, number))
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), so_far, (value, gradient)), None

        first = jax.tree.map(lambda x: x[0], parts)
        value = jax.eval_shape(loss_and_gradient, params, first, key)[0]
        nothing = jax.tree.map(lambda p: jnp.zeros(p.shape, _workers.wide(p.dtype)), (value, like))
        (value, gradient), _ = lax.scan(add, nothing, (jnp.arange(m), parts))
        return value / m, jax.tree.map(lambda g, p: (g / m).astype(p.dtype), gradient, like)

    return gradient_fn


def batches(batch_size: int, *, key: jax.Array) -> Callable:
    """A sampler of batches, for `jfed.run`: epochs without replacement over all examples of a population.

    Where B does not divide the examples, a batch ends one epoch and begins the next.

    Args:
      batch_size: B.
      key: of the order; the run's own key does not matter to it.

    Returns:
      `(population, key, t) -> batch`, leaves [B, ...].

    Raises:
      ValueError: if `batch_size` is not a whole number of at least 1; when traced, if there are fewer examples.

    >>> sampler = batches(3, key=jax.random.key(0))
    >>> population = Population(jnp.arange(4), jnp.array([0]), jnp.array([4]))
    >>> drawn = jnp.concatenate([sampler(population, None, t) for t in range(4)])
    >>> print(jnp.sort(drawn.reshape(3, 4)))
    [[0 1 2 3]
     [0 1 2 3]
     [0 1 2 3]]
    """
    _validate.at_least_one("batches", "batch_size", batch_size, "128 is usual")
    words = shuffle.draw(key)

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Tree:
        del key
        size = jax.tree.leaves(population.examples)[0].shape[0]
        if size < batch_size:
            raise ValueError(f"batches(batch_size={batch_size}): there are {size} examples; take at most as many.")
        first = jnp.asarray(t, jnp.uint32) * batch_size  # wraps after 2^32 examples
        epoch = first // size
        place = (first - epoch * size).astype(jnp.int32) + jnp.arange(batch_size)
        now, later = (shuffle.position(words, place % size, size, epoch=epoch + i) for i in range(2))
        return tree.take(population.examples, jnp.where(place < size, now, later))

    return sample
