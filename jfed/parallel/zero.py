"""ZeRO: every worker keeps the optimizer's state of its share of the model only.

Gradients are reduce-scattered, each worker descends with its share, and an all-gather puts the model together again:
the bytes of an all-reduce, and an n-th of the state (Rajbhandari et al. 2020, arXiv:1910.02054).

    zero1    optimizer states are sharded: gradients of microbatches are added up, then reduce-scattered once
    zero2    gradients too: each microbatch's is reduce-scattered at once, and a worker adds up its share only

Shares keep the tree's structure and each leaf's number of axes, so masks and labels of parts of the model work. Each
leaf is cut by itself, and its last share filled up: bytes and states below are up to that.

Letters: n workers, B examples in a batch, m microbatches, k bytes of the model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jfed import _validate
from jfed._axis import cut, joined, uncut
from jfed.core import Algorithm, Tree
from jfed.parallel import _workers
from jfed.parallel.data import accumulated


class ZeroState(NamedTuple):
    """State between two steps."""

    params: Tree
    optimizer: Tree  # leaves [n, ...], over each worker's share: of a leaf of d numbers, [ceil(d / n), 1, ...]
    step: jax.Array  # [] int32, steps completed


def zero1(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    workers: Mesh | int,
    reduce_scatter: Callable | None = None,
    all_gather: Callable | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> Algorithm:
    """Data-parallel training with an n-th of the optimizer's state on each worker.

    Guarantees:
      * It equals `data_parallel` for optimizers that act number by number, on all leaves or on some by name or number
        of axes: sgd, adam, adamw, with masks. One that looks at shapes or the whole would see a share: adafactor, lamb,
        and a clip by the global norm, for which there is `clip_norm`.

    Sent by a worker: 2 k (n - 1) / n bytes a step on a ring.

    Args:
      loss: as in `data_parallel`, as are `workers` and `accumulate`.
      optimizer: one that acts number by number.
      workers: a mesh, or a number of workers to simulate.
      reduce_scatter: `(x, axis_name)`, leaves [n, ...] to [...], such as `jfed.collectives.ring_reduce_scatter`; by
        default JAX's own.
      all_gather: `(x, axis_name)`, leaves [...] to [n, ...]; by default JAX's own.
      accumulate: m.
      clip_norm: what the gradient's length, over all of the model, is cut down to: `optax.clip_by_global_norm` before
        the optimizer, which sees a share only.

    Raises:
      ValueError: as `data_parallel`.

    >>> method = zero1(lambda w, x, key: jnp.sum((w[None] - x) ** 2, 1) / 2, optax.adam(0.5), workers=2)
    >>> state, _ = method.round(method.init(jnp.zeros(3)), jnp.ones((4, 3)), jax.random.key(0))
    >>> print(state.params.round(3), state.optimizer[0].mu.shape)
    [0.5 0.5 0.5] (2, 2)
    """
    return _zero("zero1", loss, optimizer, workers, reduce_scatter, all_gather, accumulate, clip_norm, at_once=False)


def zero2(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    workers: Mesh | int,
    reduce_scatter: Callable | None = None,
    all_gather: Callable | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> Algorithm:
    """`zero1` that keeps an n-th of the gradient, too, while microbatches are added up.

    Sent by a worker: (m + 1) k (n - 1) / n bytes a step on a ring.

    Args:
      loss: as in `zero1`, as is all else.
      optimizer: one that acts number by number.
      workers: a mesh, or a number of workers to simulate.
      reduce_scatter: as in `zero1`.
      all_gather: as in `zero1`.
      accumulate: m.
      clip_norm: as in `zero1`.

    Raises:
      ValueError: as `data_parallel`.

    >>> method = zero2(lambda w, x, key: jnp.sum((w[None] - x) ** 2, 1) / 2, optax.sgd(0.5), workers=2, accumulate=2)
    >>> state, metrics = method.round(method.init(jnp.zeros(3)), jnp.ones((4, 3)), jax.random.key(0))
    >>> print(state.params, metrics["loss"])
    [0.5 0.5 0.5] 1.5
    """
    return _zero("zero2", loss, optimizer, workers, reduce_scatter, all_gather, accumulate, clip_norm, at_once=True)


def _zero(where, loss, optimizer, workers, reduce_scatter, all_gather, accumulate, clip_norm, *, at_once):
    team = _workers.of(where, workers)
    _validate.at_least_one(where, "accumulate", accumulate, "1 takes a worker's share at once")
    optimizer = _workers.optimizer_of(where, "optimizer", optimizer)
    for name, value in (("reduce_scatter", reduce_scatter), ("all_gather", all_gather)):
        if value is not None and not callable(value):
            raise ValueError(
                f"{where}({name}={value!r}): give a function (x, axis_name), as jfed.collectives.ring_{name}."
            )
    if clip_norm is not None:
        _validate.positive(where, "clip_norm", clip_norm, "1 is usual; None clips nothing")
    reduce_scatter = _reduce_scatter if reduce_scatter is None else reduce_scatter
    all_gather = _all_gather if all_gather is None else all_gather
    one = _workers.loss_and_gradient(where, loss)

    def shares(x: jax.Array) -> jax.Array:
        """Of a leaf [...], all shares, of as many axes: [n, ceil(d / n), 1, ...]."""
        rows = cut(x.reshape(-1), team.count)
        return rows.reshape(*rows.shape, *(1,) * (x.ndim - 1))

    def own(params: Tree) -> Tree:
        """This worker's share of every leaf."""
        me = lax.axis_index(team.axis_name)
        return jax.tree.map(lambda p: lax.dynamic_index_in_dim(shares(p), me, keepdims=False), params)

    def scattered(gradient: Tree) -> Tree:
        total = reduce_scatter(jax.tree.map(shares, gradient), team.axis_name)
        return jax.tree.map(lambda t: (t / team.count).astype(t.dtype), total)

    def clipped(gradient: Tree) -> Tree:
        if clip_norm is None:
            return gradient
        squares = sum(jnp.sum(jnp.square(g.astype(_workers.wide(g.dtype)))) for g in jax.tree.leaves(gradient))
        norm = jnp.sqrt(lax.psum(squares, team.axis_name))
        return jax.tree.map(lambda g: jnp.where(norm < clip_norm, g, (g / norm).astype(g.dtype) * clip_norm), gradient)

    def share_of(params, batch, key):
        value, gradient = one(params, batch, key)
        return value, scattered(gradient)

    def init_fn(params: Tree) -> ZeroState:
        params = _workers.placed(team, params)
        start = _workers.each(team, lambda p: (optimizer.init(own(p)),), own=(False,), results=(True,))
        (states,) = start(params)
        return _workers.placed(team, ZeroState(params, states, jnp.zeros((), jnp.int32)))

    def step(params, state, parts, key):
        mine, key = own(params), jax.random.fold_in(key, lax.axis_index(team.axis_name))
        if at_once:
            value, gradient = accumulated(share_of, mine)(params, parts, key)
        else:
            value, gradient = accumulated(one, params)(params, parts, key)
            gradient = scattered(gradient)
        value = lax.pmean(value, team.axis_name)
        updates, state = optimizer.update(clipped(gradient), state, mine, value=value)
        whole = all_gather(optax.apply_updates(mine, updates), team.axis_name)
        params = jax.tree.map(lambda p, w: uncut(w.reshape(team.count, -1), p.size).reshape(p.shape), params, whole)
        return params, state, value

    spread = _workers.each(team, step, own=(False, True, True, False), results=(False, True, False))

    def round_fn(state: ZeroState, batch: Tree, key: jax.Array) -> tuple[ZeroState, dict]:
        parts = _workers.dealt(where, team, batch, accumulate, "microbatches")
        params, states, value = spread(state.params, state.optimizer, parts, key)
        return ZeroState(params, states, state.step + 1), {"loss": value}

    return Algorithm(init_fn, round_fn, lambda state: state.params)


def _reduce_scatter(x: Tree, axis_name) -> Tree:
    return joined(lambda rows: lax.psum_scatter(rows, axis_name), x, lead=1)


def _all_gather(x: Tree, axis_name) -> Tree:
    return joined(lambda part: lax.all_gather(part, axis_name), x)
