"""Convolutions data-parallel, dense layers model-parallel: each kind of layer is split where that costs least.

Convolutional layers hold few numbers and make many activities, so every worker has all of them and a share of the
examples, and gradients are summed. Dense layers hold many numbers and make few, so every worker has a share of each
layer's units, all examples pass all workers, and activities are sent. In between, workers exchange what the last
convolution made, in turns, by one of three schemes:

    assemble_all    all send everything at once: one turn of B examples
    in_turns        one worker after another sends to all its own: n turns of b
    in_parts        all send an n-th of theirs, n times: n turns of b

The whole gradient is that of one device. With several turns, what the next one needs is sent while this one computes,
if the compiler sees to it; and dense layers may be updated after each (`hybrid_variable_batch`).

Source: Krizhevsky 2014 (arXiv:1404.5997), section 4, whose steps (a), (b) and (c) the schemes are.

Letters: n workers, b examples of each, B = n b in a batch, F features of an example; a layer has I inputs, O units.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jfed import _axis, _validate, mesh
from jfed.core import Algorithm, Tree
from jfed.parallel import _workers
from jfed.parallel.conjugate import assembled, gathered
from jfed.parallel.layered import divides


class Dense(NamedTuple):
    """A layer; where it is split, a worker's own O / n units."""

    kernel: jax.Array  # [I, O]
    bias: jax.Array  # [O]


class HybridParams(NamedTuple):
    """A model's parameters."""

    features: Tree  # of the convolutional part
    dense: tuple[Dense, ...]  # the last one's units are the logits


class HybridModel(NamedTuple):
    """A model of two parts, neither of which draws anything at random."""

    init: Callable  # (key) -> HybridParams
    features: Callable  # (params.features, x [b, ...]) -> [b, F]
    activation: Callable = jax.nn.relu  # between dense layers, number by number


class HybridState(NamedTuple):
    """State between two steps."""

    features: Tree  # parameters, the same on all workers
    dense: tuple[Dense, ...]  # leaves [n, I, O / n] and [n, O / n], each worker's units
    features_optimizer: Tree  # its state
    dense_optimizer: Tree  # leaves [n, ...], over each worker's units
    step: jax.Array  # [] int32, steps completed


class Turns(NamedTuple):
    """A scheme for n workers."""

    collect: tuple[Callable, ...]  # one a turn: (x [b, ...], axis_name) -> what all workers then hold, [b', ...]
    divisor: int  # of b


Scheme = Callable[[int], Turns]
"""`(n) -> Turns`. All turns are of the same size, and every example is in one; reverse mode sends gradients back."""


def assemble_all(n: int) -> Turns:
    """Every worker sends its features to all others, and all compute on the batch of B: scheme (a).

    A worker sends k (n - 1) bytes of the k of its features, and nothing can be computed meanwhile.

    >>> collect = functools.partial(assemble_all(2).collect[0], axis_name="workers")
    >>> print(jax.vmap(collect, axis_name="workers")(jnp.arange(4).reshape(2, 2)))
    [[0 1 2 3]
     [0 1 2 3]]
    """
    del n
    return Turns((lambda x, axis_name: gathered(x, axis_name, 0),), 1)


def in_turns(n: int) -> Turns:
    """One worker after another sends its features to all others, who compute on them: scheme (b).

    In its turn a worker sends k (n - 1) bytes of the k of its features, and nobody else sends.

    >>> collect = functools.partial(in_turns(2).collect[1], axis_name="workers")
    >>> print(jax.vmap(collect, axis_name="workers")(jnp.arange(4).reshape(2, 2)))
    [[2 3]
     [2 3]]
    """
    return Turns(tuple(functools.partial(_from_one, worker=worker) for worker in range(n)), 1)


def in_parts(n: int) -> Turns:
    """All workers send an n-th of their features to all others, who compute on these, n times: scheme (c).

    In each turn a worker sends k (n - 1) / n bytes of the k of its features.

    >>> collect = functools.partial(in_parts(2).collect[1], axis_name="workers")
    >>> print(jax.vmap(collect, axis_name="workers")(jnp.arange(4).reshape(2, 2)))
    [[1 3]
     [1 3]]
    """
    return Turns(tuple(functools.partial(_part, part=part, parts=n) for part in range(n)), n)


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
    >>> method = hybrid(model, loss, optax.sgd(0.5), workers=2, scheme=in_turns)
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


def whole(model: HybridModel) -> Callable:
    """The model on one device, `apply(params, x [B, ...], key=None) -> logits [B, O]`, for losses and metrics.

    >>> model = HybridModel(None, lambda p, x: p * x)
    >>> params = HybridParams(jnp.ones(()), (Dense(jnp.ones((1, 2)), jnp.zeros(2)),))
    >>> print(whole(model)(params, jnp.ones((3, 1))).shape)
    (3, 2)
    """

    def apply_fn(params: HybridParams, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        return dense_layers(params.dense, model.features(params.features, x), model.activation, None)

    return apply_fn


def dense_layers(
    layers: Sequence[Dense], h: jax.Array, activation: Callable, axis_name: str | tuple[str, ...] | None
) -> jax.Array:
    """The logits of examples that all workers hold, each layer's units split over workers.

    Activities are gathered after every layer, and their gradients reduce-scattered. The gradient of `h` is what this
    worker's units say; the sum over workers is the whole.

    Args:
      layers: this worker's part, kernels [I, O / n].
      h: [b, F], the same on all workers.
      activation: between layers.
      axis_name: of workers; None is one device.

    Returns:
      [b, O], the same on all workers, in float32 or better.
    """
    *hidden, last = layers
    for layer in hidden:
        h = gathered(activation(_affine(layer, h)).astype(h.dtype), axis_name, 1)
    return assembled(_affine(last, h), axis_name, 1)


def bytes_sent(features: int, widths: Sequence[int], *, batch_size: int, workers: int, itemsize: int = 4) -> int:
    """What a worker sends a step, by every scheme; in `in_turns` all turns together.

    Gradients of P numbers are summed, 2 P (n - 1) / n. Activities of B examples are gathered before every dense layer,
    and their gradients scattered, each B I (n - 1) / n; logits are gathered only. Labels, of 4 bytes, travel too.

    Args:
      features: P, numbers of the convolutional part.
      widths: F, and the units of every dense layer.
      batch_size: B.
      workers: n.
      itemsize: bytes of a parameter and an activity.

    >>> bytes_sent(3_207_104, [9216, 4096, 4096, 1000], batch_size=1024, workers=8)
    150817856
    """
    *inputs, logits = widths
    numbers = 2 * features + batch_size * (2 * sum(inputs) + logits)
    return -(-(itemsize * numbers + 4 * batch_size) * (workers - 1) // workers)


def alexnet(
    image_shape: tuple[int, int, int] = (224, 224, 3),
    num_classes: int = 1000,
    *,
    width: float = 1.0,
    stem: tuple[int, int] = (11, 4),
    convolution: Callable | None = None,
) -> HybridModel:
    """The AlexNet in one tower: five convolutions, three overlapping pools, three dense layers.

    64, 192, 384, 384 and 256 kernels, then 4096 and 4096 units (Krizhevsky 2014, arXiv:1404.5997, section 5), without
    response normalization and dropout. Kernels start as He's normal, biases at 0.

    Args:
      image_shape: (height, width, channels).
      num_classes: logits.
      width: factor of all numbers of kernels and units but the logits, rounded to at least 1.
      stem: (side, stride) of the first convolution; (5, 1) for images of about 30 pixels.
      convolution: `(x, kernel, *, strides, padding) -> y` in NHWC and HWIO, by default XLA's; on CPUs
        `jfed.models.conv2d` trains much faster inside compiled loops.

    Returns:
      A `HybridModel`; 61,838,248 parameters, of which 3,207,104 in convolutions.

    Raises:
      ValueError: if the image does not survive the pools, or a number is not positive.

    >>> shapes = jax.eval_shape(alexnet().init, jax.random.key(0))
    >>> print([sum(x.size for x in jax.tree.leaves(part)) for part in shapes])
    [3207104, 58631144]
    """
    where = "alexnet"
    _validate.at_least_one(where, "num_classes", num_classes, "it is the number of labels")
    _validate.positive(where, "width", width, "1 is the original, 0.0625 trains on a CPU")
    for name, value in zip(("side of stem", "stride of stem"), stem, strict=True):
        _validate.at_least_one(where, name, value, "(11, 4) is the original")
    convolve = _xla_convolution if convolution is None else convolution
    channels = [max(round(width * c), 1) for c in (64, 192, 384, 384, 256)]
    units = max(round(width * 4096), 1)
    sides, strides = (stem[0], 5, 3, 3, 3), (stem[1], 1, 1, 1, 1)
    pads, pools = (2, 2, 1, 1, 1), (True, True, False, False, True)
    left = list(image_shape[:2])
    for side, stride, pad, pool in zip(sides, strides, pads, pools, strict=True):
        left = [(size + 2 * pad - side) // stride + 1 for size in left]
        left = [(size - 3) // 2 + 1 for size in left] if pool else left
        if min(left) < 1:
            raise ValueError(
                f"{where}(image_shape={tuple(image_shape)}, stem={tuple(stem)}): nothing of the image is left after "
                "the pools; take a smaller stem such as (5, 1), or larger images."
            )

    def init_fn(key: jax.Array) -> HybridParams:
        keys = iter(jax.random.split(key, 8))

        def layer(*shape):
            scale = (2 / np.prod(shape[:-1])) ** 0.5
            return Dense(scale * jax.random.normal(next(keys), shape), jnp.zeros(shape[-1]))

        before = [image_shape[2], *channels[:-1]]
        kernels = tuple(layer(s, s, i, o) for s, i, o in zip(sides, before, channels, strict=True))
        widths = [left[0] * left[1] * channels[-1], units, units, num_classes]
        return HybridParams(kernels, tuple(layer(i, o) for i, o in zip(widths, widths[1:], strict=False)))

    def features_fn(params: Tree, x: jax.Array) -> jax.Array:
        for layer, stride, pad, pool in zip(params, strides, pads, pools, strict=True):
            x = convolve(x, layer.kernel, strides=(stride, stride), padding=((pad, pad), (pad, pad)))
            x = jax.nn.relu(x + layer.bias[None, None, None])
            x = _overlapping_pool(x) if pool else x
        return x.reshape(x.shape[0], -1)

    return HybridModel(init_fn, features_fn)


def _hybrid(where, model, loss, optimizer, dense_optimizer, workers, scheme, all_reduce, update):
    abstract = isinstance(workers, AbstractMesh)
    team = _workers.Workers(workers.size, workers.axis_names, workers) if abstract else _workers.of(where, workers)
    n, axis_name = team.count, team.axis_name
    optimizer = _workers.optimizer_of(where, "optimizer", optimizer)
    dense_optimizer = optimizer if dense_optimizer is None else dense_optimizer
    dense_optimizer = _workers.optimizer_of(where, "dense_optimizer", dense_optimizer)
    mean = _workers.mean(where, team, all_reduce, None)
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


def _affine(layer, h):
    return jnp.dot(h, layer.kernel, preferred_element_type=_workers.wide(h.dtype)) + layer.bias[None]


def _from_one(x, axis_name, worker):
    """What one worker has, on all: it sends to each by itself."""
    others = [to for to in range(lax.axis_size(axis_name)) if to != worker]
    own = jnp.where(_axis.among((worker,), axis_name), x, jnp.zeros_like(x))
    return sum((_axis.permute(x, axis_name, [(worker, to)]) for to in others), start=own)


def _part(x, axis_name, part, parts):
    length = x.shape[0] // parts
    return gathered(x[part * length : (part + 1) * length], axis_name, 0)


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


def _xla_convolution(x, kernel, *, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _overlapping_pool(x):
    """Maximum over windows of 3 x 3 at strides of 2; as slices, whose gradient needs no scatter."""
    high, wide = ((size - 3) // 2 + 1 for size in x.shape[1:3])
    slices = [x[:, i : i + 2 * high - 1 : 2, j : j + 2 * wide - 1 : 2] for i in range(3) for j in range(3)]
    return functools.reduce(jnp.maximum, slices)
