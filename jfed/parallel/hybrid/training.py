"""Training by the three schemes, on the gradient of the whole batch or with an update of dense layers every turn.

Letters: n workers, b examples of each, B = n b in a batch; a layer has I inputs, O units.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jfed import _validate, mesh
from jfed.core import Algorithm, Tree
from jfed.parallel import _workers
from jfed.parallel.hybrid.models import Dense, HybridModel, HybridParams, dense_layers
from jfed.parallel.hybrid.schemes import Scheme, Turns, in_parts
from jfed.parallel.layered import divides


class HybridState(NamedTuple):
    """State between two steps."""

    features: Tree  # parameters, the same on all workers
    dense: tuple[Dense, ...]  # leaves [n, I, O / n] and [n, O / n], each worker's units
    features_optimizer: Tree  # its state
    dense_optimizer: Tree  # leaves [n, ...], over each worker's units
    step: jax.Array  # [] int32, steps completed


def hybrid(
    model: HybridModel,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    workers: Mesh | AbstractMesh | int,
    scheme: Scheme = in_parts,
    dense_optimizer: optax.GradientTransformation | None = None,
    all_reduce: Callable | None = None,
) -> Algorithm:
    """Trains convolutional layers data-parallel and dense layers model-parallel, on the gradient of the whole batch.

    `round(state, batch, key)`: a batch is `{"x", "y"}` of leaves [B, ...], worker 0's examples first; the key is for
    compressed all-reduces. Metrics: `"loss"`, the mean over the batch.

    Guarantees:
      * By every scheme it equals one worker on the whole batch, up to the order of additions, with optimizers that act
        number by number; one that looks at the whole would see one part of the model, and a worker's units of that.
      * A worker holds an n-th of the dense layers, and of their optimizer's state.

    Sent by a worker: `bytes_sent`.

    Args:
      model: of two parts.
      loss: `(logits [b', O], y [b', ...]) -> [b']`.
      optimizer: any such optax optimizer; it is also given `value`, the loss.
      workers: a mesh, all of whose devices take part, or a number of workers to simulate on one device; of an
        `AbstractMesh`, whose devices need not exist, a round can be traced and counted.
      scheme: how features reach all workers; the program is as long as it has turns.
      dense_optimizer: of the dense layers, by default as `optimizer`.
      all_reduce: of gradients of convolutional layers, as in `data_parallel`.

    Raises:
      ValueError: if an argument is none of these; from `init`, if workers do not divide the units of a dense layer;
        when traced, if they do not divide the batch, or the features or losses have another shape.

    >>> model = HybridModel(None, lambda p, x: p * x)
    >>> loss = lambda logits, y: (logits.sum(1) - y) ** 2 / 2
    >>> method = hybrid(model, loss, optax.sgd(0.5), workers=2)
    >>> state = method.init(HybridParams(jnp.ones(()), (Dense(jnp.ones((1, 2)), jnp.zeros(2)),)))
    >>> state, metrics = method.round(state, {"x": jnp.ones((4, 1)), "y": jnp.ones(4)}, jax.random.key(0))
    >>> print(metrics["loss"], method.params(state).dense[0].kernel)
    0.5 [[0.5 0.5]]
    """
    return _hybrid("hybrid", model, loss, optimizer, dense_optimizer, workers, scheme, all_reduce, _update_once)


def hybrid_variable_batch(
    model: HybridModel,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    workers: Mesh | AbstractMesh | int,
    scheme: Scheme = in_parts,
    dense_optimizer: optax.GradientTransformation,
    all_reduce: Callable | None = None,
) -> Algorithm:
    """`hybrid` whose dense layers are updated after every turn: their batch is b, that of convolutions B.

    It is no longer the gradient of one model: convolutions descend the mean of what the dense layers of all turns say.
    It sends as much as `hybrid`.

    Args:
      model: as in `hybrid`, as is all else.
      loss: as in `hybrid`.
      optimizer: of the convolutional part, one update a step.
      workers: as in `hybrid`.
      scheme: one of several turns.
      dense_optimizer: of the dense layers, one update a turn; smaller batches usually want smaller rates.
      all_reduce: as in `hybrid`.

    Raises:
      ValueError: as `hybrid`, or if the scheme has a single turn for several workers.

    >>> model = HybridModel(None, lambda p, x: p * x)
    >>> loss = lambda logits, y: (logits.sum(1) - y) ** 2 / 2
    >>> method = hybrid_variable_batch(model, loss, optax.sgd(0.0), workers=2, dense_optimizer=optax.sgd(0.25))
    >>> state = method.init(HybridParams(jnp.ones(()), (Dense(jnp.ones((1, 2)), jnp.zeros(2)),)))
    >>> state, _ = method.round(state, {"x": jnp.ones((4, 1)), "y": jnp.ones(4)}, jax.random.key(0))
    >>> print(method.params(state).dense[0].kernel, "after two updates, of .25 and of 0")
    [[0.75 0.75]] after two updates, of .25 and of 0
    """
    where = "hybrid_variable_batch"
    if dense_optimizer is None:
        raise ValueError(f"{where}(dense_optimizer=None): dense layers take n updates a step; give their optimizer.")
    return _hybrid(where, model, loss, optimizer, dense_optimizer, workers, scheme, all_reduce, _update_each_turn)


def _hybrid(where, model, loss, optimizer, dense_optimizer, workers, scheme, all_reduce, update):
    abstract = isinstance(workers, AbstractMesh)
    team = _workers.Workers(workers.size, workers.axis_names, workers) if abstract else _workers.of(where, workers)
    n, axis_name = team.count, team.axis_name
    optimizer = _workers.optimizer_of(where, "optimizer", optimizer)
    dense_optimizer = optimizer if dense_optimizer is None else dense_optimizer
    dense_optimizer = _workers.optimizer_of(where, "dense_optimizer", dense_optimizer)
    mean = _workers.mean(where, team, all_reduce, None)
    _is_model(where, model, loss)
    turns = scheme(n) if callable(scheme) else None
    if not isinstance(turns, Turns):
        raise ValueError(f"{where}(scheme={scheme!r}): give assemble_all, in_turns, in_parts, or a function like them.")
    if update is _update_each_turn and n > 1 and len(turns.collect) == 1:
        raise ValueError(f"{where}(scheme={scheme!r}): all examples come in one turn; take in_turns or in_parts.")

    def dense_loss(dense, h, y):
        values = loss(dense_layers(dense, h, model.activation, axis_name), y)
        if values.shape != h.shape[:1]:
            raise ValueError(f"{where}: the loss returned shape {values.shape} for {h.shape[0]} examples; give [b'].")
        return jnp.mean(values.astype(_workers.wide(values.dtype)))

    one = jax.value_and_grad(dense_loss, argnums=(0, 1))

    def init_fn(params: HybridParams) -> HybridState:
        _check(where, params, axis_name, n)
        features, dense = _workers.placed(team, params.features), _dealt(team, params.dense)
        start = _workers.each(team, lambda own: (dense_optimizer.init(own),), own=(True,), results=(True,))
        state = HybridState(features, dense, optimizer.init(features), *start(dense), jnp.zeros((), jnp.int32))
        state = _workers.placed(team, state)
        # Of one device a compiled round says that it has the whole, and would be compiled anew for a part.
        return mesh.replicate(state, team.mesh) if n == 1 and _on_devices(team, state) else state

    def step(features, dense, state, dense_state, x, y, key, count):
        h, back = jax.vjp(lambda features: model.features(features, x), features)
        if h.shape != (x.shape[0], dense[0].kernel.shape[0]):
            raise ValueError(
                f"{where}: features of {x.shape[0]} examples have shape {h.shape}, and the first dense layer "
                f"{dense[0].kernel.shape[0]} inputs; flatten them to [b, F]."
            )
        collected, sent_back = jax.vjp(lambda h: tuple(collect(h, axis_name) for collect in turns.collect), h)
        answers = [jax.tree.map(lambda v, c=collect: c(v, axis_name), y) for collect in turns.collect]
        dense, dense_state, value, signals = update(one, dense_optimizer, dense, dense_state, collected, answers)
        (signal,) = sent_back(signals)
        (gradient,) = back(signal * (n / len(collected)))  # of the mean over this worker's examples
        gradient, _, _ = mean.update(gradient, (), (), features, key, count)
        updates, state = optimizer.update(gradient, state, features, value=value)
        return optax.apply_updates(features, updates), state, dense, dense_state, value

    spread = _workers.each(
        team,
        step,
        own=(False, True, False, True, True, True, False, False),
        results=(False, False, True, True, False),
    )

    def round_fn(state: HybridState, batch: Tree, key: jax.Array) -> tuple[HybridState, dict]:
        length = jnp.shape(batch["x"])[0]
        if length % (n * turns.divisor) or not length:
            cut = f", and each worker's share is taken in {turns.divisor} parts" if turns.divisor > 1 else ""
            raise ValueError(
                f"{where}(batch of {length}): the axis {axis_name!r} has {n} workers, which must divide it{cut}; "
                f"take a multiple of {n * turns.divisor}."
            )
        parts = jax.tree.map(lambda x: x[:, 0], _workers.dealt(where, team, batch, 1, "part"))
        features, inner, dense, dense_inner, value = spread(
            state.features,
            state.dense,
            state.features_optimizer,
            state.dense_optimizer,
            parts["x"],
            parts["y"],
            key,
            state.step,
        )
        return HybridState(features, dense, inner, dense_inner, state.step + 1), {"loss": value}

    return Algorithm(init_fn, round_fn, _together)


def _update_once(one, optimizer, dense, state, collected, answers):
    """One update by the mean gradient of all turns; also their mean loss, and a gradient of each turn's features."""
    values, gradients, signals = [], [], []
    for h, y in zip(collected, answers, strict=True):
        value, (gradient, signal) = one(dense, h, y)
        values.append(value)
        gradients.append(gradient)
        signals.append(signal)
    gradient = jax.tree.map(lambda *g: sum(x.astype(_workers.wide(x.dtype)) for x in g) / len(g), *gradients)
    gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, dense)
    value = sum(values) / len(values)
    updates, state = optimizer.update(gradient, state, dense, value=value)
    return optax.apply_updates(dense, updates), state, value, tuple(signals)


def _update_each_turn(one, optimizer, dense, state, collected, answers):
    """`_update_once` with an update after every turn."""
    values, signals = [], []
    for h, y in zip(collected, answers, strict=True):
        dense, state, value, (signal,) = _update_once(one, optimizer, dense, state, (h,), (y,))
        values.append(value)
        signals.append(signal)
    return dense, state, sum(values) / len(values), tuple(signals)


def _is_model(where, model, loss):
    if not isinstance(model, HybridModel) or not callable(model.features) or not callable(loss):
        raise ValueError(
            f"{where}(model={model!r}, loss={loss!r}): give a HybridModel such as alexnet(), and a function."
        )


def _check(where, params, axis_name, n):
    if not params.dense:
        raise ValueError(f"{where}(params with no dense layer): give one at least, which makes the logits.")
    inputs = params.dense[0].kernel.shape[0]
    for i, (kernel, bias) in enumerate(params.dense):
        if jnp.shape(kernel) != (inputs, *jnp.shape(bias)):
            raise ValueError(
                f"{where}(dense[{i}] with kernel {jnp.shape(kernel)} and bias {jnp.shape(bias)}): it has {inputs} "
                "inputs; give [I, O] and [O]."
            )
        inputs = kernel.shape[1]
        divides(f"{where}: dense[{i}]", {axis_name: n}, axis_name, units=inputs)


def _dealt(team, dense):
    """Whole layers as each worker's, [n, I, O / n] and [n, O / n], on the mesh."""

    def one(x):
        x = jnp.asarray(x, jnp.result_type(x))
        rows = jnp.moveaxis(x.reshape(*x.shape[:-1], team.count, -1), -2, 0)
        if team.mesh is None:
            return rows
        sharding = NamedSharding(team.mesh, PartitionSpec(team.axis_name))
        if not _on_devices(team, rows):
            return lax.with_sharding_constraint(rows, sharding)
        rows = np.asarray(rows)
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return jax.tree.map(one, dense)


def _on_devices(team, tree):
    return isinstance(team.mesh, Mesh) and _validate.is_concrete(tree)


def _together(state: HybridState) -> HybridParams:
    def one(rows):
        columns = jnp.moveaxis(rows, 0, -2)
        return columns.reshape(*columns.shape[:-2], -1)

    return HybridParams(state.features, jax.tree.map(one, state.dense))
