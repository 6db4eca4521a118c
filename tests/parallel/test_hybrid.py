"""Convolutions data-parallel, dense layers model-parallel: what one device does, and the bytes that theory says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType

from jfed import mesh
from jfed.collectives import compressed, count, ring_all_reduce
from jfed.compress import quantize
from jfed.parallel.hybrid import (
    Dense,
    HybridModel,
    HybridParams,
    alexnet,
    assemble_all,
    bytes_sent,
    dense_layers,
    hybrid,
    hybrid_variable_batch,
    in_parts,
    in_turns,
    whole,
)

B, SIDE, F, STEPS, KEY = 32, 6, 10, 3, jax.random.key(0)
SCHEMES = {"assemble_all": assemble_all, "in_turns": in_turns, "in_parts": in_parts}
RATES = optax.sgd(0.5, momentum=0.9)


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch(t, size=B):
    return {"x": numbers(t, size, SIDE), "y": np.random.default_rng(t).integers(0, 8, size).astype(np.int32)}


MODEL = HybridModel(lambda key: PARAMS, lambda w, x: jnp.tanh(x @ w["w"]), jnp.tanh)
PARAMS = HybridParams(
    {"w": numbers(1, SIDE, F) / 2},
    (
        Dense(numbers(2, F, 12) / 2, numbers(3, 12)),
        Dense(numbers(4, 12, 4) / 2, numbers(5, 4)),
        Dense(numbers(6, 4, 8), numbers(7, 8)),
    ),
)


def loss(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]


def of_batch(params, batch):
    return jnp.mean(loss(whole(MODEL)(params, batch["x"]), batch["y"]))


def devices(*shape):
    return mesh.make(shape, ("rows", "columns")[: len(shape)])


@functools.cache
def alone():
    """Models and losses of one device that descends the mean over whole batches."""
    params, state, seen = PARAMS, RATES.init(PARAMS), []
    step = jax.jit(jax.value_and_grad(of_batch))
    for t in range(STEPS):
        value, gradient = step(params, batch(t))
        updates, state = RATES.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, value))
    return seen


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), a, b)


WORKERS = {
    "1": lambda: 1,
    "2": lambda: 2,
    "4": lambda: 4,
    "1 device": lambda: devices(1),
    "2 devices": lambda: devices(2),
    "4 devices": lambda: devices(4),
    "2 x 2 devices": lambda: devices(2, 2),
}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_as_one_device_does_and_compiles_once(scheme, workers):
    method = hybrid(MODEL, loss, RATES, workers=WORKERS[workers](), scheme=SCHEMES[scheme])
    round_fn, state = jax.jit(method.round), method.init(PARAMS)
    assert_close(method.params(state), PARAMS, atol=0)
    for t, (params, value) in enumerate(alone()):
        state, metrics = round_fn(state, batch(t), KEY)
        assert_close(method.params(state), params)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert round_fn._cache_size() == 1


def own_examples(scheme, n, b):
    """Rows of the batch in each turn, in the order in which workers hold them."""
    rows = np.arange(n * b).reshape(n, b)
    return {
        "assemble_all": [rows.ravel()],
        "in_turns": list(rows),
        "in_parts": [part.ravel() for part in rows.reshape(n, n, -1).transpose(1, 0, 2)],
    }[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_brings_every_example_to_all_workers_once_in_the_order_of_its_turns(scheme):
    n, b = 4, 8
    turns = SCHEMES[scheme](n)
    rows = jnp.arange(n * b).reshape(n, b)
    found = [jax.vmap(lambda x, c=c: c(x, "workers"), axis_name="workers")(rows) for c in turns.collect]
    for on_workers, expected in zip(found, own_examples(scheme, n, b), strict=True):
        np.testing.assert_array_equal(on_workers, np.broadcast_to(expected, (n, expected.size)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def variable_batch_by_hand(scheme, n, rate, dense_rate):
    """The paper's section 4.2 on one device, turn by turn."""
    features, dense, data = PARAMS.features, PARAMS.dense, batch(0)
    h, back = jax.vjp(lambda w: MODEL.features(w, data["x"]), features)
    signals, values, turns = jnp.zeros_like(h), [], own_examples(scheme, n, B // n)

    def turn_loss(dense, h, y):
        return jnp.mean(loss(dense_layers(dense, h, MODEL.activation, None), y))

    for rows in turns:
        value, (gradient, signal) = jax.value_and_grad(turn_loss, (0, 1))(dense, h[rows], data["y"][rows])
        dense = jax.tree.map(lambda p, g: p - dense_rate * g, dense, gradient)
        signals, values = signals.at[rows].set(signal / len(turns)), [*values, value]
    (gradient,) = back(signals)
    features = jax.tree.map(lambda p, g: p - rate * g, features, gradient)
    return HybridParams(features, dense), sum(values) / len(values)


@pytest.mark.parametrize("workers", ["4", "4 devices"])
@pytest.mark.parametrize("scheme", ["in_turns", "in_parts"])
def test_with_a_variable_batch_dense_layers_step_after_each_turn_and_convolutions_once(scheme, workers):
    method = hybrid_variable_batch(
        MODEL,
        loss,
        optax.sgd(0.5),
        workers=WORKERS[workers](),
        scheme=SCHEMES[scheme],
        dense_optimizer=optax.sgd(0.2),
    )
    state, metrics = jax.jit(method.round)(method.init(PARAMS), batch(0), KEY)
    params, value = variable_batch_by_hand(scheme, 4, 0.5, 0.2)
    assert_close(method.params(state), params, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    once = jax.tree.map(lambda p, g: p - 0.2 * g, PARAMS.dense, jax.grad(of_batch)(PARAMS, batch(0)).dense)
    assert abs(once[2].kernel - params.dense[2].kernel).max() > 0.01


def test_a_device_holds_its_units_of_dense_layers_and_of_their_optimizers_state_only():
    method = hybrid(MODEL, loss, optax.adam(0.1), workers=devices(4))
    state, _ = jax.jit(method.round)(method.init(PARAMS), batch(0), KEY)
    for layers in (state.dense, state.dense_optimizer[0].mu):
        shapes = [[shard.data.shape for shard in layer.kernel.addressable_shards] for layer in layers]
        assert shapes == [[(1, F, 3)] * 4, [(1, 12, 1)] * 4, [(1, 4, 2)] * 4]


def test_dense_layers_may_have_an_optimizer_of_their_own():
    method = hybrid(MODEL, loss, optax.sgd(0.5), workers=2, dense_optimizer=optax.set_to_zero())
    state, _ = jax.jit(method.round)(method.init(PARAMS), batch(0), KEY)
    assert_close(method.params(state).dense, PARAMS.dense, atol=0)
    assert abs(method.params(state).features["w"] - PARAMS.features["w"]).max() > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_optimizers_are_given_the_loss_of_the_whole_batch(scheme):
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: -value * g, updates), state

    by_loss = optax.GradientTransformationExtraArgs(lambda params: (), update)
    method = hybrid(MODEL, loss, by_loss, workers=4, scheme=SCHEMES[scheme])
    state, _ = jax.jit(method.round)(method.init(PARAMS), batch(0), KEY)
    value, gradient = jax.value_and_grad(of_batch)(PARAMS, batch(0))
    assert_close(method.params(state), jax.tree.map(lambda p, g: p - value * g, PARAMS, gradient))


def test_gradients_of_convolutions_pass_any_all_reduce():
    exact, ring, coarse = (
        hybrid(MODEL, loss, RATES, workers=devices(4), all_reduce=all_reduce)
        for all_reduce in (None, ring_all_reduce, compressed.ring(quantize(2, rounding="nearest")))
    )
    a, b, c = (
        method.params(jax.jit(method.round)(method.init(PARAMS), batch(0), KEY)[0]) for method in (exact, ring, coarse)
    )
    assert_close(a, b, atol=1e-6)
    assert_close(a.dense, c.dense, atol=1e-6)
    assert 1e-3 < abs(a.features["w"] - c.features["w"]).max() < 0.2


def test_activities_of_small_floats_travel_as_such_and_are_added_up_in_float32():
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    data = batch(0) | {"x": batch(0)["x"].astype(jnp.bfloat16)}
    method = hybrid(MODEL, loss, optax.sgd(0.0), workers=devices(4))
    _, metrics = jax.jit(method.round)(method.init(low), data, KEY)
    assert metrics["loss"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["loss"], of_batch(rounded, batch(0)), rtol=0.02)
    sent = count.traced(method.round, method.init(low), data, KEY).sent
    expected = bytes_sent(SIDE * F, [F, 12, 4, 8], batch_size=B, workers=4, itemsize=2)
    assert sent.max() == expected + 2 * B * 8 * 3 // 4  # logits are float32


def abstract(n):
    return AbstractMesh((n,), ("workers",), axis_types=(AxisType.Auto,))


def counted(make, model, n, size, shape):
    method = make(workers=abstract(n))
    state = jax.eval_shape(method.init, jax.eval_shape(model.init, KEY))
    shapes = {"x": jax.ShapeDtypeStruct((size, *shape), jnp.float32), "y": jax.ShapeDtypeStruct((size,), jnp.int32)}
    return count.traced(method.round, state, shapes, KEY)


@pytest.mark.parametrize("n", [2, 4, 8, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_sent_are_what_theory_says(scheme, n):
    model = HybridModel(
        lambda key: HybridParams(
            jnp.zeros((SIDE, F)), tuple(Dense(jnp.zeros(s), jnp.zeros(s[1])) for s in ((F, 192), (192, 64)))
        ),
        lambda w, x: x @ w,
    )
    size = n * n
    if scheme == "in_turns" and n == 64:
        n = size = 16  # its program has a message for every pair of workers
    make = functools.partial(hybrid, model, loss, RATES, scheme=SCHEMES[scheme])
    sends = counted(make, model, n, size, (SIDE,))
    expected = bytes_sent(SIDE * F, [F, 192, 64], batch_size=size, workers=n)
    assert set(sends.sent) == set(sends.received) == {expected}


@pytest.mark.parametrize("scheme", ["in_turns", "in_parts"])
def test_a_variable_batch_sends_no_more(scheme):
    make = functools.partial(hybrid_variable_batch, MODEL, loss, RATES, dense_optimizer=RATES)
    sends = counted(functools.partial(make, scheme=SCHEMES[scheme]), MODEL, 4, B, (SIDE,))
    assert set(sends.sent) == {bytes_sent(SIDE * F, [F, 12, 4, 8], batch_size=B, workers=4)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_alexnet_of_the_paper_sends_a_third_of_data_parallel_training(scheme):
    model, n, size = alexnet(), 8, 1024
    shapes = jax.eval_shape(model.init, KEY)
    convolutions, dense = (sum(x.size for x in jax.tree.leaves(part)) for part in shapes)
    assert (convolutions, dense) == (3_207_104, 58_631_144)
    make = functools.partial(hybrid, model, loss, RATES, scheme=SCHEMES[scheme])
    sends = counted(make, model, n, size, (224, 224, 3))
    expected = bytes_sent(convolutions, [9216, 4096, 4096, 1000], batch_size=size, workers=n)
    assert set(sends.sent) == {expected}
    averaged = count.all_reduce(jax.lax.psum, n, shapes).sent.max()
    assert 2.8 < averaged / expected < 2.9


def test_a_small_alexnet_trains_all_of_its_layers():
    model = alexnet((20, 16, 1), 4, width=1 / 32, stem=(5, 1))
    params = model.init(KEY)
    data = {"x": numbers(0, 8, 20, 16, 1), "y": np.arange(8, dtype=np.int32) % 4}
    method = hybrid(model, loss, optax.sgd(0.1), workers=2)
    state, metrics = jax.jit(method.round)(method.init(params), data, KEY)
    expected = jnp.mean(loss(whole(model)(params, data["x"]), data["y"]))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    change = jax.tree.map(lambda before, after: abs(after - before).max(), params, method.params(state))
    assert min(jax.tree.leaves(change)) > 1e-5


def test_the_alexnet_is_that_of_flax():
    """Layer by layer from the paper's list, with strides, pads and pools written once more."""
    model, channels, units = alexnet((67, 71, 3), 5, width=1 / 32), (2, 6, 12, 12, 8), 128
    params = model.init(KEY)
    params = jax.tree.map(lambda p: p + 0.05 * numbers(p.size, *p.shape), params)

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            side, stride, pad = (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)
            for i, c in enumerate(channels):
                x = nn.relu(nn.Conv(c, (side[i],) * 2, (stride[i],) * 2, padding=pad[i], name=f"conv_{i}")(x))
                x = nn.max_pool(x, (3, 3), (2, 2)) if i in (0, 1, 4) else x
            x = x.reshape(len(x), -1)
            for i in range(2):
                x = nn.relu(nn.Dense(units, name=f"dense_{i}")(x))
            return nn.Dense(5, name="dense_2")(x)

    layers = [(f"conv_{i}", layer) for i, layer in enumerate(params.features)]
    layers += [(f"dense_{i}", layer) for i, layer in enumerate(params.dense)]
    theirs = {name: {"kernel": layer.kernel, "bias": layer.bias} for name, layer in layers}
    x = numbers(0, 3, 67, 71, 3)
    want = Flax().apply({"params": theirs}, x)
    assert_close(whole(model)(params, x), want, atol=1e-4 * abs(want).max())


def first_round(size=B, params=PARAMS, workers=4, model=MODEL, loss=loss, **options):
    method = hybrid(model, loss, RATES, workers=workers, **options)
    return method.round(method.init(params), batch(0, size), KEY)


UNEVEN = PARAMS._replace(dense=(*PARAMS.dense[:2], Dense(numbers(0, 4, 10), numbers(0, 10))))
WRONG = {
    "batch": (lambda: first_round(30), r"batch of 30\): the axis 'workers' has 4 workers.*multiple of 16"),
    "parts": (lambda: first_round(36), r"batch of 36\).*4 workers.*taken in 4 parts; take a multiple of 16"),
    "nothing": (lambda: first_round(0), r"batch of 0\)"),
    "whole batch": (lambda: first_round(30, scheme=in_turns), r"which must divide it; take a multiple of 4"),
    "units": (lambda: first_round(params=UNEVEN), r"dense\[2\]\(units=10\).*'workers' has 4 devices.*units=12"),
    "on a mesh": (lambda: first_round(params=UNEVEN, workers=devices(4)), r"units=10\).*'rows' has 4 devices"),
    "no layer": (lambda: first_round(params=PARAMS._replace(dense=())), r"no dense layer"),
    "not a chain": (
        lambda: first_round(params=PARAMS._replace(dense=PARAMS.dense[::2])),
        r"dense\[1\] with kernel \(4, 8\).*12 inputs",
    ),
    "scheme": (lambda: first_round(scheme="a"), r"scheme='a'\): give assemble_all"),
    "features": (lambda: first_round(model=MODEL._replace(features=lambda w, x: x)), r"have shape \(8, 6\).*10 inputs"),
    "loss": (lambda: first_round(loss=lambda z, y: z), r"loss returned shape \(8, 8\) for 8 examples"),
    "workers": (lambda: first_round(workers=0), r"workers=0"),
    "optimizer": (lambda: first_round(dense_optimizer=0.1), r"dense_optimizer=0.1\): give an optax optimizer"),
    "one turn": (
        lambda: hybrid_variable_batch(MODEL, loss, RATES, workers=2, scheme=assemble_all, dense_optimizer=RATES),
        r"one turn; take in_turns or in_parts",
    ),
    "no optimizer": (
        lambda: hybrid_variable_batch(MODEL, loss, RATES, workers=2, dense_optimizer=None),
        r"dense_optimizer=None",
    ),
    "image": (lambda: alexnet((32, 32, 3)), r"image_shape=\(32, 32, 3\), stem=\(11, 4\)\).*\(5, 1\)"),
    "width": (lambda: alexnet(width=0), r"width=0\)"),
    "classes": (lambda: alexnet(num_classes=0), r"num_classes=0\)"),
    "not an image": (lambda: alexnet((224, 224)), r"image_shape=\(224, 224\)"),
    "no channels": (lambda: alexnet((224, 224, 0)), r"channels of image_shape=0\)"),
    "convolution": (lambda: alexnet(convolution="fast"), r"convolution='fast'\): give a function"),
    "another image": (lambda: alexnet().features(None, jnp.ones((2, 32, 32, 3))), r"x of shape \(2, 32, 32, 3\)"),
    "model": (lambda: first_round(model=lambda w, x: x), r"give a HybridModel such as alexnet"),
    "stride": (lambda: alexnet(stem=(5, 0)), r"stride of stem=0\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_split_is_an_error_of_one_line(name):
    call, said = WRONG[name]
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
