import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION

from jfed import compress, local, run, sampling
from jfed.algorithms import federated

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
KEY = jax.random.key(2)
MODEL = {"w": KERNEL, "b": jnp.array([0.0, 0.001, 5.0])}


def zeros(params):
    return float(jnp.mean(params["w"] == 0))


def test_the_smallest_weights_go_and_biases_stay():
    half = compress.prune(0.5)
    update, state = half.update(jax.tree.map(jnp.zeros_like, MODEL), half.init(MODEL), MODEL)
    after = optax.apply_updates(MODEL, update)
    order = np.argsort(np.abs(np.asarray(KERNEL)).ravel())
    np.testing.assert_array_equal(np.asarray(after["w"]).ravel()[order[:20]], 0)
    np.testing.assert_array_equal(np.asarray(after["w"]).ravel()[order[20:]], np.asarray(KERNEL).ravel()[order[20:]])
    np.testing.assert_array_equal(after["b"], MODEL["b"])
    assert bool(jnp.all(state.kept["b"]))


def test_a_pruned_weight_stays_zero_however_it_is_pushed():
    half = compress.prune(0.5, every=100)
    params, state = MODEL, half.init(MODEL)
    for step in range(3):
        push = jax.tree.map(jnp.ones_like, params)
        update, state = half.update(push, state, params)
        params = optax.apply_updates(params, update)
        gone = ~state.kept["w"]
        assert bool(jnp.all(params["w"][gone] == 0))
        assert int(gone.sum()) == 20, step


def test_sparsity_follows_its_schedule_and_is_never_given_back():
    rising = compress.prune(compress.cubic(0.8, begin=2, end=8), every=2)
    params, state, seen = MODEL, rising.init(MODEL), []
    rng = np.random.default_rng(1)
    for _ in range(12):
        push = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        update, state = jax.jit(rising.update)(push, state, params)
        params = optax.apply_updates(params, update)
        seen.append(zeros(params))
    share = [0.8 - 0.8 * (1 - min(max(t - 2, 0), 6) / 6) ** 3 for t in range(0, 12, 2)]
    np.testing.assert_allclose(seen[::2], np.round(np.array(share) * 40) / 40, atol=1e-6)
    assert seen[1::2] == seen[::2]


def test_zeros_are_frozen_where_they_are_pruned():
    frozen = compress.frozen_zeros()
    params = {"w": jnp.array([[0.0, 1.0]]), "b": jnp.array([0.0])}
    update, _ = frozen.update(jax.tree.map(jnp.ones_like, params), frozen.init(params), params)
    assert update["w"].tolist() == [[0.0, 1.0]] and update["b"].tolist() == [1.0]


def test_federated_training_sends_the_weights_that_are_left_and_nothing_is_lost():
    def algorithm(uplink):
        optimizer = optax.chain(compress.frozen_zeros(), optax.sgd(0.2))
        server = optax.chain(optax.sgd(1.0), compress.prune(0.5, every=100))
        return federated(local.sgd(problem.loss, optimizer, batch_size=4), server=server, uplink=uplink)

    left_out = optax.masked(compress.threshold(0.0, capacity=0.5), compress.kernels)
    found = []
    for uplink in (None, left_out):
        method = algorithm(uplink)
        sampler = sampling.full(steps=lambda size: size)
        pruned, _ = run.scan_rounds(algorithm(None), sampler, POPULATION, method.init(PARAMS), KEY, rounds=1)
        state, metrics = run.scan_rounds(method, sampler, POPULATION, pruned, KEY, rounds=3, start=1)
        assert zeros(state.params) == 0.5
        found.append((state.params, int(metrics["traffic"].up.max())))
    problem.close(found[1][0], found[0][0], tolerance=1e-6)
    assert (found[0][1], found[1][1]) == (60, 6 * 4 + 2 + 3 * 4)  # values, bitmap, biases


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress.prune(1.0), r"prune\(sparsity=1.0\)"),
        (lambda: compress.prune(0.5, every=0), r"prune\(every=0\)"),
        (lambda: compress.cubic(0.5, begin=3, end=3), r"cubic\(begin=3, end=3\)"),
        (lambda: compress.prune(0.5).init({"b": jnp.zeros(3)}), "names no leaf"),
    ],
)
def test_what_cannot_be_pruned_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
