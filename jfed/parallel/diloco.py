"""Workers that seldom synchronise: many local steps, then one average.

    local_sgd    workers average their models every H steps (Stich 2019, arXiv:1805.09767)
    diloco       an outer optimizer descends the mean change, usually Nesterov, and each worker keeps the state of its
                 inner one, usually AdamW, from round to round (Douillard et al. 2023, arXiv:2311.08105)

Communication falls by H. With H = 1, SGD inside and rate 1 outside it is data-parallel SGD.

Letters: n workers, H local steps a round, b examples a worker and step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jfed import _validate
from jfed.core import Algorithm, Tree
from jfed.parallel import _workers


class DiLoCoState(NamedTuple):
    """State between two rounds."""

    params: Tree  # the model that all workers start a round from
    outer: Tree  # state of the outer optimizer
    inner: Tree  # leaves [n, ...], of each worker's own
    uplink: Tree  # leaves [n, ...]
    round: jax.Array  # [] int32, rounds completed


def diloco(
    loss: Callable,
    *,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    workers: Mesh | int,
    steps: int,
    all_reduce: Callable | None = None,
    uplink: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Each worker trains alone for H steps; an outer optimizer descends the mean of their changes.

    `round(state, batch, key)`: leaves of the batch are [n H b, ...], worker by worker and step by step. Metrics:
    `"loss"`, the mean over all steps.

    Args:
      loss: `(params, batch, key) -> [b]`, or their mean.
      inner: each worker's optimizer; the paper's is AdamW.
      outer: sees the mean of `params - new params`; by default the paper's, SGD of rate 0.7 with Nesterov momentum 0.9.
      workers: a mesh, or a number of workers to simulate.
      steps: H; the paper's is 500.
      all_reduce: as in `data_parallel`, of the changes.
      uplink: as in `data_parallel`, of the changes.

    Raises:
      ValueError: as `data_parallel`.

    >>> method = diloco(lambda w, x, key: (w - x) ** 2 / 2, inner=optax.sgd(0.5), workers=2, steps=2)
    >>> state, _ = method.round(method.init(jnp.array(0.0)), jnp.array([4.0, 4.0, 8.0, 8.0]), jax.random.key(0))
    >>> print(state.params.round(3))  # a change of 4.5, by the rate of 0.7 and Nesterov's 1.9
    5.985
    """
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True) if outer is None else outer
    return _seldom("diloco", loss, inner, outer, workers, steps, all_reduce, uplink)


def local_sgd(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    workers: Mesh | int,
    steps: int,
    all_reduce: Callable | None = None,
    uplink: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Each worker trains alone for H steps; then all take the mean of their models.

    Args:
      loss: as in `diloco`, as are batches and metrics.
      optimizer: each worker's own, with its own state.
      workers: a mesh, or a number of workers to simulate.
      steps: H.
      all_reduce: as in `data_parallel`, of the changes.
      uplink: as in `data_parallel`, of the changes.

    Raises:
      ValueError: as `data_parallel`.

    >>> method = local_sgd(lambda w, x, key: (w - x) ** 2 / 2, optax.sgd(0.5), workers=2, steps=2)
    >>> state, _ = method.round(method.init(jnp.array(0.0)), jnp.array([4.0, 4.0, 8.0, 8.0]), jax.random.key(0))
    >>> print(state.params)
    4.5
    """
    return _seldom("local_sgd", loss, optimizer, optax.sgd(1.0), workers, steps, all_reduce, uplink)


def _seldom(where, loss, inner, outer, workers, steps, all_reduce, uplink) -> Algorithm:
    team = _workers.of(where, workers)
    _validate.at_least_one(where, "steps", steps, "it is the number of local steps, H")
    inner, outer = _workers.optimizer_of(where, "inner", inner), _workers.optimizer_of(where, "outer", outer)
    mean = _workers.mean(where, team, all_reduce, uplink)
    gradient_of = _workers.loss_and_gradient(where, loss)

    def init_fn(params: Tree) -> DiLoCoState:
        params = _workers.placed(team, params)
        start = _workers.each(team, lambda p: (inner.init(p), mean.init(p)), own=(False,), results=(True, True))
        states, links = start(params)
        state = DiLoCoState(params, outer.init(params), states, links, jnp.zeros((), jnp.int32))
        return _workers.placed(team, state)

    def train(params, outer_state, state, link, parts, key, count):
        loss_key, wire_key = jax.random.split(key)
        own_key = jax.random.fold_in(loss_key, lax.axis_index(team.axis_name))

        def one_step(carry, part):
            number, batch = part
            local, state = carry
            value, gradient = gradient_of(local, batch, jax.random.fold_in(own_key, number))
            updates, state = inner.update(gradient, state, local, value=value)
            return (optax.apply_updates(local, updates), state), value

        (local, state), values = lax.scan(one_step, (params, state), (jnp.arange(steps), parts))
        change = jax.tree.map(jnp.subtract, params, local)
        change, value, link = mean.update(change, jnp.mean(values), link, params, wire_key, count)
        updates, outer_state = outer.update(change, outer_state, params, value=value)
        return optax.apply_updates(params, updates), outer_state, state, link, value

    own, results = (False, False, True, True, True, False, False), (False, False, True, True, False)
    spread = _workers.each(team, train, own=own, results=results)

    def round_fn(state: DiLoCoState, batch: Tree, key: jax.Array) -> tuple[DiLoCoState, dict]:
        parts = _workers.dealt(where, team, batch, steps, "steps")
        *new, value = spread(state.params, state.outer, state.inner, state.uplink, parts, key, state.round)
        return DiLoCoState(*new, state.round + 1), {"loss": value}

    return Algorithm(init_fn, round_fn, lambda state: state.params)
