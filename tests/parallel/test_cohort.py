"""Clients whose model lies in parts on the devices of a row train as on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from jax.sharding import PartitionSpec as P
from methods import METHODS, make, two_rounds
from problem import CLASSES, CLIENTS, FEATURES, POPULATION, close

from jfed import checkpoint, compress, experiment, local, mesh, report, run, sampling
from jfed.algorithms import fedadam, fedavg, federated, fedprox, scaffold
from jfed.clients import lanes, sharded, vectorised
from jfed.parallel import conjugate
from jfed.parallel.cohort import on_parts, put, split_model

HIDDEN = 32
SPECS = {"up": {"w": P(None, "model"), "b": P("model")}, "down": {"w": P("model", None), "b": P()}}
KEY = jax.random.key


def params(hidden=HIDDEN):
    rng = np.random.default_rng(0)

    def dense(n, m):
        w = rng.normal(size=(n, m)) / np.sqrt(n)
        return {"w": w.astype(np.float32), "b": 0.1 * rng.normal(size=m).astype(np.float32)}

    return {"up": dense(FEATURES, hidden), "down": dense(hidden, CLASSES)}


def two_layers(params, batch, key, axis=None):
    """A column layer, a row layer and cross-entropy, of a device's part of the hidden units."""
    del key
    h = jnp.tanh(conjugate.copied(batch["x"], axis) @ params["up"]["w"] + params["up"]["b"][None])
    z = conjugate.summed(h @ params["down"]["w"], axis) + params["down"]["b"][None]
    return jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, batch["y"][:, None], 1)[:, 0]


@functools.cache
def devices(clients=4, model=2):
    return mesh.make((clients, model), ("clients", "model"))


def in_pairs(devices):
    return on_parts(functools.partial(two_layers, axis="model"), mesh=devices, specs=SPECS)


def clipped_momentum():
    return optax.chain(optax.clip_by_global_norm(0.2), optax.sgd(0.1, momentum=0.9))


def feedback():
    return compress.error_feedback(optax.chain(compress.top_k(0.3), compress.quantize(4)))


# What each does, how its clients run, and how its loss is written.
CASES = {
    "fedavg": (optax.sgd(0.1), fedavg, lanes(1), "pairs"),
    "fedavg, whole loss": (optax.sgd(0.1), fedavg, lanes(2), "whole"),
    "fedprox, adam clients": (optax.adam(0.01), functools.partial(fedprox, mu=0.3), lanes(2), "pairs"),
    "scaffold": (optax.sgd(0.1), functools.partial(scaffold, num_clients=CLIENTS), vectorised(), "pairs"),
    "fedadam, clipped momentum": (
        clipped_momentum(),
        functools.partial(fedadam, learning_rate=0.01),
        lanes(2),
        "whole",
    ),
    "largest coordinates at 4 bits with error feedback": (
        optax.sgd(0.1),
        functools.partial(federated, uplink=feedback(), num_clients=CLIENTS),
        lanes(1),
        "pairs",
    ),
}


IN_ALL_VERSIONS = {"fedavg, whole loss", "fedprox, adam clients", "scaffold"}
"""Of JAX; the others are made of the same parts."""


def marked(names, everywhere=frozenset()):
    return [pytest.param(name, marks=() if name in everywhere else (pytest.mark.slow,)) for name in names]


def trained(method, sampler, state, place=lambda tree: tree, rounds=3, start=0):
    return run.scan_rounds(method, sampler, place(POPULATION), state, place(KEY(3)), rounds=rounds, start=start)


@pytest.mark.parametrize("case", marked(CASES, IN_ALL_VERSIONS))
def test_a_client_on_two_devices_trains_as_on_one(case):
    optimizer, method, inner, text = CASES[case]
    grid = devices()
    work = local.sgd(two_layers, optimizer, batch_size=4)
    sampler = sampling.uniform(7, steps=work.steps)
    alone = method(work, client_map=vectorised())
    expected, expected_metrics = trained(alone, sampler, alone.init(params()))

    loss = two_layers if text == "whole" else in_pairs(grid)
    split = method(local.sgd(loss, optimizer, batch_size=4), client_map=sharded(grid, inner))
    split = split_model(split, mesh=grid, specs=SPECS)
    state, metrics = trained(split, sampler, split.init(params()), lambda tree: mesh.replicate(tree, grid))
    close((state, metrics), (expected, expected_metrics))

    # A device holds half of every leaf that is a number a parameter, between rounds.
    for path, leaf in jax.tree.leaves_with_path(state):
        halved = any(str(end) in jax.tree_util.keystr(path) for end in ("['up']", "['down']['w']"))
        assert leaf.addressable_data(0).size * (2 if halved else 1) == leaf.size, jax.tree_util.keystr(path)
    programs = run.rounds._scan._cache_size()
    trained(split, sampler, state, lambda tree: mesh.replicate(tree, grid), start=3)
    assert run.rounds._scan._cache_size() == programs


@pytest.mark.parametrize("name", marked(METHODS))
def test_every_method_trains_a_split_model_in_one_program(name):
    grid = devices()
    specs = {"w": P("model"), "b": P()}
    split = split_model(make(name, sharded(grid, lanes(2))), mesh=grid, specs=specs)
    state = split.init(problem.PARAMS)
    one_round = jax.jit(split.round)

    def place(tree):
        return tree if jax.tree.structure(tree) == jax.tree.structure(state) else mesh.replicate(tree, grid)

    result = two_rounds(one_round, name, state, place=place)
    assert one_round._cache_size() == 1
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(result[0]))
    alone = make(name, vectorised())
    close(result, two_rounds(jax.jit(alone.round), name, alone.init(problem.PARAMS)))


@pytest.mark.parametrize("text", ["pairs", "whole"])
def test_a_device_never_holds_more_than_its_part_of_a_large_model(text):
    hidden = 2**16

    def compiled(grid):
        loss = two_layers if text == "whole" else in_pairs(grid)
        work = local.sgd(loss, optax.adam(0.1), batch_size=4)
        method = federated(work, client_map=sharded(grid, lanes(1)), server=optax.adam(0.1))
        method = split_model(method, mesh=grid, specs=SPECS)
        sampler = sampling.uniform(4, steps=work.steps)

        def one_round(state, population, key):
            return method.round(state, sampler(population, key, state.round), key)

        given = (method.init(params(hidden)), *(mesh.replicate(tree, grid) for tree in (POPULATION, KEY(0))))
        return jax.jit(one_round).lower(*given).compile()

    halves, wholes = compiled(devices(2, 2)), compiled(devices(2, 1))
    full = re.compile(rf"f32\[(?:\d+,)*(?:{FEATURES},{hidden}|{hidden},{CLASSES}|{hidden})\]")
    assert full.search(wholes.as_text()) and not full.search(halves.as_text())
    used, before = (c.memory_analysis() for c in (halves, wholes))
    assert used.temp_size_in_bytes < 0.6 * before.temp_size_in_bytes
    assert used.argument_size_in_bytes < 0.6 * before.argument_size_in_bytes
    # In a row, a client's step sends the logits of its batch, and a check that all is finite a few sums.
    lines = [line for line in halves.as_text().splitlines() if " all-reduce(" in line and "/while/body" in line]
    sent = {shape for line in lines for shape in re.findall(r"f32\[[\d,]*\]", line.split(" all-reduce(")[0])}
    assert f"f32[4,{CLASSES}]" in sent and all(len(shape) < len("f32[10,10]") for shape in sent), sent
    assert "all-gather" not in halves.as_text() and "all-to-all" not in halves.as_text()


@pytest.mark.slow
def test_a_recorded_run_resumes_on_another_mesh(tmp_path):
    work = local.sgd(two_layers, optax.sgd(0.1, momentum=0.9), batch_size=4)
    sampler = sampling.uniform(7, steps=work.steps)

    def record(folder, grid, rounds, resume):
        method = fedadam(work, learning_rate=0.01, client_map=sharded(grid, lanes(1)))
        method = split_model(method, mesh=grid, specs=SPECS)
        opened = report.open_run(tmp_path / folder, {}, resume=resume)
        population, key = (mesh.replicate(tree, grid) for tree in (POPULATION, KEY(6)))
        for row, model in experiment.record(
            opened,
            method,
            sampler,
            population,
            params(),
            key,
            rounds=rounds,
            judge=lambda params: {"norm": optax.tree.norm(params)},
        ):
            pass
        return row, model

    record("moved", devices(4, 2), 2, resume=False)
    assert checkpoint.latest(tmp_path / "moved" / "checkpoints") == 2
    row, model = record("moved", devices(2, 4), 4, resume=True)
    assert model["up"]["w"].addressable_data(0).shape == (FEATURES, HIDDEN // 4)
    expected_row, expected = record("stayed", devices(4, 2), 4, resume=False)
    close(model, expected)
    close(row["train_loss"], expected_row["train_loss"])


def test_a_loss_on_parts_has_the_value_and_gradient_of_the_whole_outside_of_a_round_too():
    batch = {"x": POPULATION.examples["x"][:6], "y": POPULATION.examples["y"][:6]}

    def value_and_gradient(loss, params):
        return jax.jit(jax.value_and_grad(lambda params: jnp.sum(loss(params, batch, KEY(0)) ** 2)))(params)

    parts = put(params(), mesh=devices(), specs=SPECS)
    value, gradient = value_and_gradient(in_pairs(devices()), parts)
    close((value, gradient), value_and_gradient(two_layers, params()))
    assert gradient["up"]["w"].sharding.spec == SPECS["up"]["w"]


def test_a_loss_on_parts_runs_operation_by_operation_too():
    batch = {"x": POPULATION.examples["x"][:6], "y": POPULATION.examples["y"][:6]}
    value, gradient = jax.value_and_grad(lambda p: jnp.sum(in_pairs(devices())(p, batch, KEY(0))))(params())
    close((value, gradient), jax.value_and_grad(lambda p: jnp.sum(two_layers(p, batch, KEY(0))))(params()))


def test_a_loss_on_parts_refuses_to_be_differentiated_otherwise():
    batch = {"x": POPULATION.examples["x"][:6], "y": POPULATION.examples["y"][:6]}
    loss = in_pairs(devices())

    def total(params, x):
        return jnp.sum(loss(params, batch | {"x": x}, KEY(0)))

    refused = pytest.raises(ValueError, match="differentiated once, in reverse and by params")
    with refused:
        jax.grad(total, argnums=1)(params(), batch["x"])
    with refused:
        jax.grad(lambda p: optax.tree.norm(jax.grad(total)(p, batch["x"])))(params())


def test_what_does_not_fit_the_mesh_is_refused_before_anything_compiles():
    grid = devices()
    method = fedavg(local.sgd(two_layers, optax.sgd(0.1), batch_size=4), client_map=sharded(grid, lanes(1)))

    def init(specs, params):
        return split_model(method, mesh=grid, specs=specs).init(params)

    with pytest.raises(ValueError, match=r"split_model\(specs=...\): names axis 'tensor', the mesh has"):
        init(SPECS | {"up": {"w": P("tensor"), "b": P()}}, params())
    with pytest.raises(ValueError, match=r"split_model\(specs=...\): holds 'model'; every leaf must be"):
        init({"up": {"w": "model", "b": P()}}, params())
    with pytest.raises(ValueError, match=r"must be a tree like params"):
        init({"up": SPECS["up"]}, params())
    with pytest.raises(
        ValueError,
        match=r"params\['down'\]\['w'\] of shape \(33, 3\): the mesh's 'model' has 2 devices, which must divide "
        r"dimension 0, 33; take 34, or another mesh",
    ):
        init(SPECS, params(33))
    with pytest.raises(ValueError, match=r"its .*P.* speaks of 2 axes; leave the last out"):
        init(SPECS | {"down": {"w": P("model"), "b": P(None, None)}}, params())
    with pytest.raises(ValueError, match=r"on_parts\(specs=.*\): names no axis"):
        on_parts(two_layers, mesh=grid, specs={"w": P()})
    with pytest.raises(ValueError, match=r"the method's own model is"):
        other = method._replace(params=lambda state: state.params["up"])
        split_model(other, mesh=grid, specs=SPECS).init(params())
