"""What a parameter server does with a gradient, simulated or real: the same functions.

Of every version of the model that somebody computes with, the server keeps one copy, in a table of n rows: who has
just sent a gradient holds none, so n - 1 are held at most and a row is free for the latest, `row`. To fetch is to note
it. The latest is written there at the start of the next event, by `stored`, before the table is read: a program that
writes first and then only reads can write in place, while another order makes XLA copy all n models at every gradient.

Letters: n workers, K gradients to a step of the server.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate
from jfed.core import Tree
from jfed.parallel import _workers


class Server(NamedTuple):
    """A parameter server with n workers."""

    params: Tree  # the latest model
    copies: Tree  # leaves [n, ...], the models that workers compute with
    row: jax.Array  # [] int32, where in `copies` the latest belongs
    held: jax.Array  # [n] int32, the row each worker computes with; n while it waits
    fetched_at: jax.Array  # [n] int32, steps of the server before each worker fetched
    steps: jax.Array  # [] int32
    optimizer: Tree  # its state, of the params
    correction: Tree  # its state
    waiting: Tree  # (gradients, losses), sums of what waits for a step; () if K = 1
    count: jax.Array  # [] int32, how many they are


class Parts(NamedTuple):
    """How a server steps."""

    optimizer: optax.GradientTransformationExtraArgs
    correction: optax.GradientTransformationExtraArgs
    buffer: int  # K


def parts_of(
    where: str,
    optimizer: optax.GradientTransformation,
    correction: optax.GradientTransformation | None,
    buffer: int,
) -> Parts:
    """How a server steps; raises a `ValueError` if an argument is none of these."""
    _validate.at_least_one(where, "buffer", buffer, "1 steps at every gradient")
    correction = optax.identity() if correction is None else correction
    if not isinstance(correction, optax.GradientTransformation):
        raise ValueError(
            f"{where}(correction={correction!r}): give an optax transform, such as scale_by_age(), or None."
        )
    return Parts(
        _workers.optimizer_of(where, "optimizer", optimizer), optax.with_extra_args_support(correction), buffer
    )


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

    def nothing(x):
        return jnp.zeros(x.shape, _workers.wide(x.dtype))

    return Server(
        params=jax.tree.map(jnp.copy, params),
        copies=jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), params),
        row=zeros(),
        held=zeros(workers),
        fetched_at=zeros(workers),
        steps=zeros(),
        optimizer=jax.tree.map(strong, parts.optimizer.init(params)),
        correction=jax.tree.map(strong, parts.correction.init(params)),
        waiting=() if parts.buffer == 1 else (jax.tree.map(nothing, params), jnp.zeros(())),
        count=zeros(),
    )


def stored(server: Server) -> Server:
    """With the latest model in its row, where those who fetched it find it; comes before all else in a program."""

    def write(x, p):
        return jax.lax.dynamic_update_index_in_dim(x, p, server.row, 0)

    return server._replace(copies=jax.tree.map(write, server.copies, server.params))


def held_by(server: Server, worker: jax.Array) -> Tree:
    """The model that a worker computes with, once it is `stored`."""
    index = server.held[worker]
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), server.copies)


def receive(
    parts: Parts, server: Server, worker: jax.Array, gradient: Tree, value: jax.Array
) -> tuple[Server, jax.Array]:
    """A worker's gradient and loss arrive; the server steps if they are the K-th. The worker then holds nothing.

    Returns:
      `(server, age)`, the steps of the server since the worker fetched, [] int32.
    """
    now, stale, value = server.params, held_by(server, worker), jnp.asarray(value, float)
    age = server.steps - server.fetched_at[worker]
    gradient, correction = parts.correction.update(gradient, server.correction, now, stale=stale, age=age)

    def step(mean, value):
        updates, state = parts.optimizer.update(mean, server.optimizer, now, value=value)
        return optax.apply_updates(now, updates), state

    if parts.buffer == 1:
        (params, state), full = step(gradient, value), jnp.array(True)
        waiting, count = (), server.count
    else:
        waiting = jax.tree.map(jnp.add, server.waiting, (gradient, value))
        count = server.count + 1
        full = count == parts.buffer
        mean = jax.tree.map(lambda x, like: (x / parts.buffer).astype(like.dtype), waiting, (now, value))
        params, state = jax.lax.cond(full, step, lambda *_: (now, server.optimizer), *mean)
        waiting = jax.tree.map(lambda x: jnp.where(full, 0, x), waiting)
        count = jnp.where(full, 0, count)
    held = server.held.at[worker].set(server.held.shape[0])
    holders = jnp.zeros_like(held).at[held].add(1, mode="drop")
    return server._replace(
        params=params,
        row=jnp.argmin(holders).astype(jnp.int32),
        held=held,
        steps=server.steps + full.astype(jnp.int32),
        optimizer=state,
        correction=correction,
        waiting=waiting,
        count=count,
    ), age


def fetch(server: Server, who: jax.Array) -> Server:
    """The workers `who`, [n] bool, take the latest model."""
    return server._replace(
        held=jnp.where(who, server.row, server.held),
        fetched_at=jnp.where(who, server.steps, server.fetched_at),
    )


def gradient_of(where, loss, batch):
    """`(params, examples, seed, worker, iteration) -> (loss, gradient)`, the same to a bit wherever it runs alone.

    A worker's i-th batch is drawn from the run's seed, its number and i: whoever arrives first, and in whichever
    process, it is the same.
    """
    value_and_gradient = _workers.loss_and_gradient(where, loss)

    def gradient_fn(params, examples, seed, worker, iteration):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), worker), iteration)
        batch_key, loss_key = jax.random.split(key)
        return value_and_gradient(params, batch(examples, batch_key, worker), loss_key)

    return gradient_fn


def seed_of(key: jax.Array) -> jax.Array:
    """What a run draws its batches and durations from: a number out of the key of its first round, [] uint32."""
    return jax.random.bits(key, (), jnp.uint32)


def first_key(key: jax.Array) -> jax.Array:
    """The key that `jfed.run` hands the first round of a run with this key."""
    return jax.random.split(jax.random.fold_in(key, 0))[1]


def strong(x: jax.Array) -> jax.Array:
    """`x` without a weak type, which the first round's result would not have."""
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x  # typed keys have none
