"""What a parameter server does with a gradient, simulated or real: the same two functions.

Of every version of the model that somebody still computes with, the server keeps one copy, in a table of n rows:
the n - 1 other workers hold n - 1 of them at most, so one is free for the next. To fetch is to note a row.

Letters: n workers, K gradients to a step of the server.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed.core import Tree


class Server(NamedTuple):
    """A parameter server with n workers."""

    copies: Tree  # leaves [n, ...], versions of the model; rows that nobody holds are free
    latest: jax.Array  # [] int32, the row of the newest
    held: jax.Array  # [n] int32, the row each worker computes with; of no meaning while it waits
    fetched_at: jax.Array  # [n] int32, steps of the server before each worker fetched
    steps: jax.Array  # [] int32
    optimizer: Tree
    correction: Tree
    waiting: Tree  # sum of the gradients that wait for a step, () if K = 1
    count: jax.Array  # [] int32, how many they are


class Parts(NamedTuple):
    """How a server steps."""

    optimizer: optax.GradientTransformation
    correction: optax.GradientTransformation
    buffer: int  # K


def check_bound(where: str, bound: int | None) -> None:
    """Raises a `ValueError` unless `bound` is None or a whole number of at least 0."""
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | np.integer) or bound < 0):
        raise ValueError(
            f"{where}(bound={bound!r}): bound must be None or a whole number of at least 0; 0 is lockstep."
        )


def start(parts: Parts, params: Tree, workers: int) -> Server:
    """A server whose workers all hold `params`."""
    params = jax.tree.map(strong, params)

    def zeros(*shape):
        return jnp.zeros(shape, jnp.int32)  # each of its own, so that a state can be donated

    return Server(
        copies=jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), params),
        latest=zeros(),
        held=zeros(workers),
        fetched_at=zeros(workers),
        steps=zeros(),
        optimizer=jax.tree.map(strong, parts.optimizer.init(params)),
        correction=jax.tree.map(strong, parts.correction.init(params)),
        waiting=() if parts.buffer == 1 else jax.tree.map(jnp.zeros_like, params),
        count=zeros(),
    )


def params_of(server: Server) -> Tree:
    """The latest model."""
    return row(server.copies, server.latest)


def held_by(server: Server, worker: jax.Array) -> Tree:
    """The model that a worker computes with."""
    return row(server.copies, server.held[worker])


def receive(parts: Parts, server: Server, worker: jax.Array, gradient: Tree) -> tuple[Server, jax.Array]:
    """A worker's gradient arrives; the server steps if it is the K-th. The worker then holds nothing.

    Returns:
      `(server, age)`, the steps of the server since the worker fetched, [] int32.
    """
    now, age = params_of(server), server.steps - server.fetched_at[worker]
    correct = optax.with_extra_args_support(parts.correction).update
    gradient, correction = correct(gradient, server.correction, now, stale=held_by(server, worker), age=age)

    def step(mean):
        updates, state = parts.optimizer.update(mean, server.optimizer, now)
        return optax.apply_updates(now, updates), state

    if parts.buffer == 1:
        (params, state), full = step(gradient), jnp.array(True)
        waiting, count = (), server.count
    else:
        waiting, count = jax.tree.map(jnp.add, server.waiting, gradient), server.count + 1
        full = count == parts.buffer
        mean = jax.tree.map(lambda g: g / parts.buffer, waiting)
        params, state = jax.lax.cond(full, step, lambda _: (now, server.optimizer), mean)
        waiting = jax.tree.map(lambda g: jnp.where(full, 0, g), waiting)
        count = jnp.where(full, 0, count)
    others = jnp.arange(server.held.shape[0]) != worker
    free = jnp.argmin(jnp.zeros_like(server.held).at[server.held].add(others.astype(jnp.int32))).astype(jnp.int32)
    latest = jnp.where(full, free, server.latest)
    copies = jax.tree.map(lambda x, p: jax.lax.dynamic_update_index_in_dim(x, p, latest, 0), server.copies, params)
    return server._replace(
        copies=copies,
        latest=latest,
        steps=server.steps + full.astype(jnp.int32),
        optimizer=state,
        correction=correction,
        waiting=waiting,
        count=count,
    ), age


def fetch(server: Server, who: jax.Array) -> Server:
    """The workers `who`, [n] bool, take the latest model."""
    return server._replace(
        held=jnp.where(who, server.latest, server.held),
        fetched_at=jnp.where(who, server.steps, server.fetched_at),
    )


def gradient_of(loss, batch):
    """`(params, examples, seed, worker, iteration) -> (loss, gradient)`, the same to a bit wherever it runs alone.

    A worker's i-th batch is drawn from the run's seed, its number and i: whoever arrives first, and in whichever
    process, it is the same.
    """

    def gradient_fn(params, examples, seed, worker, iteration):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), worker), iteration)
        batch_key, loss_key = jax.random.split(key)
        rows = batch(examples, batch_key, worker)
        return jax.value_and_grad(lambda p: jnp.mean(loss(p, rows, loss_key)))(params)

    return gradient_fn


def seed_of(key: jax.Array) -> jax.Array:
    """What a run draws its batches and durations from: a number out of the key of its first round, [] uint32."""
    return jax.random.bits(key, (), jnp.uint32)


def first_key(key: jax.Array) -> jax.Array:
    """The key that `jfed.run` hands the first round of a run with this key."""
    return jax.random.split(jax.random.fold_in(key, 0))[1]


def row(tree: Tree, index: jax.Array) -> Tree:
    """Row `index` of every leaf."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def strong(x: jax.Array) -> jax.Array:
    """`x` without a weak type, which the first round's result would not have."""
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if x.weak_type else x
