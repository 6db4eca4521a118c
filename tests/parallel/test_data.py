"""Data-parallel training: on n workers what one does alone, by whatever all-reduce."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reduces import ALL

from jfed import collectives, compress, core, local, mesh, parallel, run, sampling
from jfed.algorithms import fedavg
from jfed.collectives import compressed

KEY, STEPS, B = jax.random.key(0), 5, 24


def data(rows, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, 6)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(1)).astype(np.float32)}


PARAMS = {
    "w": jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), jnp.float32) / 2,
    "v": jnp.asarray(np.random.default_rng(2).normal(size=(5,)), jnp.float32) / 2,
    "b": jnp.zeros(()),
}
EXAMPLES = data(STEPS * B)


def loss(params, batch, key=None):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return (hidden @ params["v"] + params["b"] - batch["y"]) ** 2


def part(t, size=B):
    return jax.tree.map(lambda x: x[t * size : (t + 1) * size], EXAMPLES)


@functools.cache
def alone():
    """The models and losses of one worker on the whole batches."""
    optimizer, params, seen = optax.adam(0.05), PARAMS, []
    state = optimizer.init(params)
    step = jax.jit(lambda p, b: jax.value_and_grad(lambda p: jnp.mean(loss(p, b)))(p))
    for t in range(STEPS):
        value, gradient = step(params, part(t))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, value))
    return seen


def assert_trains_as_alone(method, atol=1e-6):
    round_fn, state = jax.jit(method.round), method.init(PARAMS)
    for t, (params, value) in enumerate(alone()):
        state, metrics = round_fn(state, part(t), KEY)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), method.params(state), params)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert round_fn._cache_size() == 1


def devices(n):
    return mesh.make((n,), ("data",))


@pytest.mark.parametrize("name", ALL)
def test_devices_train_as_one_does_on_the_whole_batch(name):
    method = parallel.data_parallel(loss, optax.adam(0.05), workers=devices(6), all_reduce=ALL[name])
    assert_trains_as_alone(method)


@pytest.mark.parametrize("n, accumulate", [(1, 1), (1, 4), (4, 3), (8, 1)])
def test_simulated_workers_and_microbatches_do_so_too(n, accumulate):
    assert_trains_as_alone(parallel.data_parallel(loss, optax.adam(0.05), workers=n, accumulate=accumulate))


def test_a_mesh_of_two_axes_is_one_team():
    two = mesh.make((2, 3), ("hosts", "chips"))
    reduce = collectives.hierarchical_all_reduce
    assert_trains_as_alone(parallel.data_parallel(loss, optax.adam(0.05), workers=two, all_reduce=reduce))


HALVES = {
    "lax": {},
    "ring": {"reduce_scatter": collectives.ring_reduce_scatter, "all_gather": collectives.ring_all_gather},
}


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("zero", [parallel.zero1, parallel.zero2])
@pytest.mark.parametrize("workers, accumulate", [(6, 1), (6, 2), (4, 1)])
def test_a_sharded_optimizer_trains_as_a_whole_one(zero, halves, workers, accumulate):
    workers = devices(workers) if workers == 6 else workers
    method = zero(loss, optax.adam(0.05), workers=workers, accumulate=accumulate, **HALVES[halves])
    assert_trains_as_alone(method, atol=3e-6)  # adam divides by the root of a square of nearly 0


def test_a_worker_keeps_its_share_of_the_optimizer_only():
    state = parallel.zero1(loss, optax.adam(0.05), workers=devices(6)).init(PARAMS)
    mu = state.optimizer[0].mu
    assert {name: x.shape for name, x in mu.items()} == {"w": (6, 5, 1), "v": (6, 1), "b": (6, 1)}
    assert all(shard.data.shape[0] == 1 for x in jax.tree.leaves(mu) for shard in x.addressable_shards)


def by_axes(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


OPTIMIZERS = {
    "one leaf by name": (optax.masked(optax.adam(0.05), {"w": True, "v": False, "b": False}), {}, optax.sgd(0.1)),
    "decay of matrices only": (optax.adamw(0.05, weight_decay=3.0, mask=by_axes), {}, None),
    "clipped": (optax.sgd(0.5, momentum=0.9), {"clip_norm": 0.1}, None),  # adam's first step has no length of its own
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_parts_of_the_model_and_clipped_gradients_do_not_see_shares(name):
    optimizer, options, then = OPTIMIZERS[name]
    chained = optimizer if then is None else optax.chain(optimizer, then)
    whole = optax.chain(optax.clip_by_global_norm(0.1), chained) if options else chained
    one = parallel.data_parallel(loss, whole, workers=4)
    a = one_step_each(one)
    for zero in (parallel.zero1, parallel.zero2):
        b = one_step_each(zero(loss, chained, workers=4, **options))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), a, b)
    plain = one_step_each(parallel.data_parallel(loss, chained if options else optax.adam(0.05), workers=4))
    assert abs(plain["v"] - a["v"]).max() + abs(plain["w"] - a["w"]).max() > 1e-3


SGD = optax.sgd(0.1)
METHODS = {
    "data_parallel": lambda workers: parallel.data_parallel(loss, SGD, workers=workers, accumulate=2),
    "data_parallel, uplink": lambda workers: parallel.data_parallel(
        loss, SGD, workers=workers, uplink=compress.error_feedback(compress.top_k(0.3))
    ),
    "data_parallel, compressed": lambda workers: parallel.data_parallel(
        loss, SGD, workers=workers, all_reduce=compressed.ring(compress.quantize(8, rounding="nearest"))
    ),
    "zero1": lambda workers: parallel.zero1(loss, optax.adam(0.05), workers=workers, clip_norm=1.0),
    "zero2": lambda workers: parallel.zero2(loss, optax.adam(0.05), workers=workers, accumulate=2),
    "local_sgd": lambda workers: parallel.local_sgd(loss, SGD, workers=workers, steps=2),
    "diloco": lambda workers: parallel.diloco(loss, inner=optax.adamw(0.05), workers=workers, steps=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_alike_on_devices_and_with_simulated_workers(name):
    ends = []
    for workers in (4, devices(4)):
        method = METHODS[name](workers)
        round_fn, state = jax.jit(method.round), method.init(PARAMS)
        for t in range(3):
            state, _ = round_fn(state, part(t), KEY)
        assert round_fn._cache_size() == 1
        ends.append(method.params(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), *ends)
    assert abs(ends[0]["w"] - PARAMS["w"]).max() > 1e-3


def test_every_synchronous_method_is_in_the_table():
    public = [getattr(parallel, name) for name in parallel.__all__]
    made_for_workers = {
        f.__name__ for f in public if getattr(f, "__module__", "").endswith((".data", ".zero", ".diloco"))
    }
    assert made_for_workers - {"batches"} == {name.split(",")[0] for name in METHODS}


def test_what_a_loss_and_what_a_message_draw_from_are_different_keys():
    def note(kind, keys):
        words = jax.tree.leaves(jax.tree.map(jax.random.key_data, keys))
        jax.debug.callback(
            lambda *w: found[kind].update(tuple(r) for x in w for r in np.reshape(x, (-1, 2)).tolist()), *words
        )

    found = {"loss": set(), "wire": set()}
    for make in (parallel.data_parallel, parallel.diloco):
        options = {"optimizer": SGD, "accumulate": 2} if make is parallel.data_parallel else {"inner": SGD, "steps": 2}

        def reduce(tree, axis_name, *, key, round):
            del round
            note("wire", [jax.random.fold_in(jax.random.fold_in(key, i), j) for i in range(4) for j in range(4)])
            note("wire", [jax.random.fold_in(key, i) for i in range(4)])
            return jax.lax.psum(tree, axis_name)

        def drawing(params, batch, key):
            note("loss", key)
            return loss(params, batch)

        one_step_each(make(drawing, workers=4, all_reduce=reduce, **options))
    jax.effects_barrier()
    assert len(found["loss"]) >= 8 and len(found["wire"]) >= 20 and not found["loss"] & found["wire"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_small_floats_are_added_up_in_single(dtype):
    """A thousand parts with a gradient of 1, and at the end the mean."""
    params = jnp.zeros((), dtype)
    for make in (parallel.data_parallel, parallel.zero2):
        method = make(lambda w, x, key: w.astype(jnp.float32) * x, optax.sgd(1.0), workers=1, accumulate=1000)
        state, _ = method.round(method.init(params), jnp.ones(1000), KEY)
        assert state.params.dtype == dtype and float(state.params) == -1.0


# By how much the mean of the last 20 of 300 losses may exceed that without compression.
COMPRESSED = {
    "ring, 8 bits": ({"all_reduce": compressed.ring(compress.quantize(8))}, 0.02),
    "two shots, 4 bits": ({"all_reduce": compressed.two_shot(compress.quantize(4))}, 0.1),
    "top 10 %, error feedback": ({"uplink": compress.error_feedback(compress.top_k(0.1))}, 0.1),
    "signs, error feedback": ({"uplink": compress.error_feedback(compress.scaled_sign())}, 0.1),
}


@functools.cache
def last_loss(name):
    population = core.Population(data(480), jnp.array([0]), jnp.array([480]))
    options = COMPRESSED[name][0] if name else {}
    method = parallel.data_parallel(loss, optax.sgd(0.1), workers=4, **options)
    sampler = parallel.batches(B, key=KEY)
    _, metrics = run.scan_rounds(method, sampler, population, method.init(PARAMS), KEY, rounds=300)
    return float(jnp.mean(metrics["loss"][-20:])), float(metrics["loss"][0])


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_gradients_train_nearly_as_well(name):
    whole, first = last_loss("")
    assert whole < first / 3
    reached, _ = last_loss(name)
    assert reached != whole and reached < whole * (1 + COMPRESSED[name][1])


def test_batches_are_epochs_without_replacement_and_runs_resume_in_them():
    population = core.Population(jnp.arange(50), jnp.array([0]), jnp.array([50]))
    sample = jax.jit(parallel.batches(20, key=KEY))
    drawn = np.concatenate([sample(population, KEY, t) for t in range(5)]).reshape(2, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in drawn.tolist()) and (drawn[0] != drawn[1]).any()
    other = np.concatenate([jax.jit(parallel.batches(20, key=jax.random.key(1)))(population, KEY, t) for t in range(5)])
    assert (other != drawn.reshape(-1)).any()


def one_step_each(method):
    return method.params(jax.jit(method.round)(method.init(PARAMS), part(0), KEY)[0])


def test_local_sgd_of_one_step_is_data_parallel():
    a = one_step_each(parallel.local_sgd(loss, optax.sgd(0.1), workers=devices(4), steps=1))
    b = one_step_each(parallel.data_parallel(loss, optax.sgd(0.1), workers=4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), a, b)


def test_diloco_with_rate_one_outside_is_fedavg():
    """Workers are clients that all take part; each sees its own examples at every step."""
    n, h, b = 4, 3, 6
    population = core.Population(part(0), jnp.arange(n) * b, jnp.full(n, b))
    work = local.full_batch(loss, optax.sgd(0.2, momentum=0.9), epochs=h)
    federated = fedavg(work)
    cohort = sampling.full(steps=work.steps)(population, KEY, 0)
    expected = federated.params(jax.jit(federated.round)(federated.init(PARAMS), cohort, KEY)[0])
    batch = jax.tree.map(
        lambda x: jnp.repeat(x.reshape(n, 1, b, *x.shape[1:]), h, 1).reshape(-1, *x.shape[1:]), part(0)
    )
    inner = optax.sgd(0.2, momentum=0.9)
    for workers in (n, devices(n)):
        method = parallel.diloco(loss, inner=inner, outer=optax.sgd(1.0), workers=workers, steps=h)
        found = method.params(jax.jit(method.round)(method.init(PARAMS), batch, KEY)[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, expected)


def test_diloco_is_the_papers_algorithm():
    """Against plain Python: workers keep their AdamW, the outer optimizer is Nesterov momentum."""
    n, h, b, rounds = 2, 3, 4, 2
    method = parallel.diloco(loss, inner=optax.adamw(0.01), workers=n, steps=h)
    state = method.init(PARAMS)
    inner, theta = optax.adamw(0.01), PARAMS
    states, velocity = [inner.init(theta)] * n, jax.tree.map(jnp.zeros_like, theta)
    gradient = jax.jit(jax.grad(lambda p, batch: jnp.mean(loss(p, batch))))
    for t in range(rounds):
        batch = part(t, n * h * b)
        state, _ = method.round(state, batch, KEY)
        changes = []
        for i in range(n):
            local_model = theta
            for step in range(h):
                first = (i * h + step) * b
                g = gradient(local_model, jax.tree.map(lambda x, f=first: x[f : f + b], batch))
                updates, states[i] = inner.update(g, states[i], local_model)
                local_model = optax.apply_updates(local_model, updates)
            changes.append(jax.tree.map(jnp.subtract, theta, local_model))
        delta = jax.tree.map(lambda *d: sum(d) / n, *changes)
        velocity = jax.tree.map(lambda v, d: 0.9 * v + d, velocity, delta)
        theta = jax.tree.map(lambda p, v, d: p - 0.7 * (d + 0.9 * v), theta, velocity, delta)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), method.params(state), theta)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parallel.data_parallel(loss, SGD, workers=0), r"data_parallel\(workers=0\).*or give a mesh"),
        (lambda: parallel.data_parallel(loss, SGD, workers=2, accumulate=0), "accumulate=0"),
        (lambda: parallel.data_parallel(loss, SGD, workers=2, all_reduce="ring"), "give a function"),
        (
            lambda: parallel.data_parallel(
                loss, SGD, workers=4, all_reduce=functools.partial(collectives.dedicated_servers_all_reduce, servers=2)
            ),
            "here all workers do; take sharded",
        ),
        (lambda: parallel.zero1(loss, SGD, workers=2, reduce_scatter="ring"), "give a function"),
        (lambda: parallel.zero2(loss, SGD, workers=2, clip_norm=0.0), "clip_norm=0.0"),
        (lambda: parallel.data_parallel(loss, "sgd", workers=2), "give an optax optimizer"),
        (lambda: parallel.diloco(loss, inner="adam", workers=2, steps=2), "give an optax optimizer"),
        (lambda: parallel.data_parallel(loss, SGD, workers=2, uplink=compress.top_k), "give a link of jfed.compress"),
        (
            lambda: parallel.data_parallel(loss, SGD, workers=2, all_reduce=jax.lax.psum, uplink=compress.top_k(0.1)),
            "give one of them",
        ),
        (lambda: one_step_each(parallel.data_parallel(loss, SGD, workers=5)), "batch of 24.*a multiple of 5"),
        (lambda: one_step_each(parallel.zero2(loss, SGD, workers=2, accumulate=5)), "a multiple of 10"),
        (lambda: one_step_each(parallel.local_sgd(loss, SGD, workers=4, steps=5)), "4 workers times 5 steps"),
        (lambda: parallel.diloco(loss, inner=SGD, workers=4, steps=0), "steps=0"),
        (lambda: one_step_each(parallel.data_parallel(lambda p, b, k: b["x"], SGD, workers=4)), "one value an example"),
        (lambda: parallel.batches(0, key=KEY), "batch_size=0"),
        (
            lambda: parallel.batches(9, key=KEY)(core.Population(jnp.ones(3), jnp.array([0]), jnp.array([3])), KEY, 0),
            "there are 3 examples",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_compiles(call, message):
    with pytest.raises(ValueError, match=message):
        call()
