import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION

from jfed import compress, local, run, sampling
from jfed.algorithms import compressed_downlink, federated

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

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


def two_layers(params, batch, key):
    return problem.loss({"w": params["u"] @ params["w"], "b": params["b"]}, batch, key)


def test_federated_training_sends_the_weights_that_are_left_and_nothing_is_lost():
    """Of layers that are pruned more and less, both ways."""
    spread = np.random.default_rng(1).normal(size=(problem.FEATURES, problem.FEATURES))
    deep = {"u": jnp.asarray(0.6 * spread, jnp.float32), "w": PARAMS["w"], "b": PARAMS["b"]}
    optimizer = optax.chain(compress.frozen_zeros(), optax.sgd(0.02))
    work = local.sgd(two_layers, optimizer, batch_size=4)
    server = optax.chain(optax.sgd(1.0), compress.prune(0.5, every=100))
    sampler = sampling.full(steps=work.steps)

    plain = federated(work, server=server)
    pruned, _ = run.scan_rounds(plain, sampler, POPULATION, plain.init(deep), KEY, rounds=1)
    left = {name: int(jnp.count_nonzero(x)) for name, x in pruned.params.items()}
    assert left["u"] + left["w"] == 14 and left["u"] not in (2, 8, 14)
    expected, _ = run.scan_rounds(plain, sampler, POPULATION, pruned, KEY, rounds=3, start=1)

    link = compress.nonzeros(pruned.params)
    sparse = compressed_downlink(
        federated(work, server=server, uplink=link), link, num_clients=12, whole=link, refuse=False
    )
    state = sparse.init(pruned.params)
    state = state._replace(model=state.model._replace(server=pruned.server, round=pruned.round))
    state, metrics = run.scan_rounds(sparse, sampler, POPULATION, state, KEY, rounds=3, start=1)
    problem.close(state.model.params, expected.params, tolerance=1e-6)
    assert {name: int(jnp.count_nonzero(x)) for name, x in state.model.params.items()} == left
    room = 4 * (left["u"] + left["w"]) + 2 + 2 + 3 * 4  # values, two bitmaps, biases
    assert int(metrics["traffic"].up.max()) == int(metrics["traffic"].down.max()) == room


def test_nonzeros_of_another_tree_are_refused():
    link = compress.nonzeros(MODEL)
    with pytest.raises(ValueError, match="make it of the model that is sent"):
        link.update({"w": KERNEL}, link.init(MODEL))


@pytest.mark.parametrize(
    ("w", "sparsity", "left"),
    [
        (np.ones((10, 10)), 0.9, 10),
        (np.random.default_rng(3).integers(-2, 3, (9, 11)), 0.5, 49),
        (np.arange(1.0, 5.0).reshape(2, 2), 0.9, 1),
    ],
    ids=["all equal", "many equal", "few"],
)
def test_equal_weights_are_told_apart_and_one_stays(w, sparsity, left):
    link, w = compress.prune(sparsity), jnp.asarray(w, jnp.float32)
    update, state = link.update(jnp.zeros_like(w), link.init(w), w)
    assert int(state.kept.sum()) == left
    gone = np.abs(np.asarray(w))[~np.asarray(state.kept)]
    assert gone.max() <= np.abs(np.asarray(w + update))[np.asarray(state.kept)].min()


@pytest.mark.parametrize("link", [compress.prune(0.5), compress.frozen_zeros()])
def test_params_that_are_missing_are_asked_for(link):
    with pytest.raises(ValueError, match="pass params"):
        link.update(KERNEL, link.init(KERNEL))


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
