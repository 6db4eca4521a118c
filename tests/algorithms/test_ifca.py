import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, cohort_of

from jfed import local, run, sampling
from jfed.algorithms import fedavg, ifca
from jfed.core import Population

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def stacked(*models):
    return jax.tree.map(lambda *x: jnp.stack(x), *models)


def test_of_one_cluster_it_is_fedavg():
    cohort = cohort_of([3, 0, 5], WORK)
    a, b = ifca(WORK, clusters=1, num_clients=12), fedavg(WORK)
    state, _ = jax.jit(a.round)(a.init(stacked(PARAMS)), cohort, KEY)
    problem.close(a.params(state), jax.jit(b.round)(b.init(PARAMS), cohort, KEY)[0].params)


def test_each_cluster_is_the_fedavg_of_those_that_took_it():
    other = jax.tree.map(lambda p: -p, PARAMS)
    algorithm = ifca(WORK, clusters=3, num_clients=12)
    nobodys = jax.tree.map(lambda p: 30.0 * p, PARAMS)
    ids = [3, 0, 5, 7, 11, 9]
    state, metrics = jax.jit(algorithm.round)(
        algorithm.init(stacked(PARAMS, nobodys, other)), cohort_of(ids, WORK), KEY
    )
    losses = [
        [float(np.mean(problem.loss(m, problem.examples_of(i), None))) for m in (PARAMS, nobodys, other)] for i in ids
    ]
    taken = np.argmin(losses, 1)
    assert set(taken) == {0, 2}
    np.testing.assert_array_equal(state.memory[jnp.array(ids)], taken)
    problem.close(algorithm.personal(state, 1), algorithm.params(state), tolerance=0)  # it has not taken part yet
    for j, start in ((0, PARAMS), (2, other)):
        plain = fedavg(WORK)
        members = [i for i, k in zip(ids, taken, strict=True) if k == j]
        expected, _ = plain.round(plain.init(start), cohort_of(members, WORK), KEY)
        problem.close(jax.tree.map(lambda p, j=j: p[j], state.params), expected.params)
    problem.close(jax.tree.map(lambda p: p[1], state.params), nobodys, tolerance=0)
    numbers = 4 * (4 * 3 + 3)
    assert int(metrics["traffic"].down[0]) == 3 * numbers and int(metrics["traffic"].up[0]) == numbers + 4 * 3


def test_it_finds_the_clusters_there_are():
    # Two kinds of clients whose labels contradict each other.
    rng = np.random.default_rng(0)
    n, each, w = 16, 20, rng.normal(size=(4, 3))
    x = rng.normal(size=(n * each, 4))
    kind = np.arange(n) % 2
    y = np.argmax(x @ w * np.repeat(1 - 2 * kind, each)[:, None], 1)
    start = jnp.arange(n, dtype=jnp.int32) * each
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.int32)}
    population = Population(examples, start, jnp.full(n, each, jnp.int32))
    work = local.sgd(problem.loss, optax.sgd(0.5), batch_size=10, epochs=2)
    algorithm = ifca(work, clusters=2, num_clients=n)
    init = jax.vmap(lambda key: {"w": jax.random.normal(key, (4, 3)), "b": jnp.zeros(3)})(jax.random.split(KEY, 2))
    state, metrics = run.scan_rounds(
        algorithm, sampling.full(steps=work.steps), population, algorithm.init(init), KEY, rounds=20
    )
    assert len(set(zip(kind.tolist(), np.asarray(state.memory).tolist(), strict=True))) == 2
    assert metrics["loss"][-1] < 0.3
    problem.close(algorithm.personal(state, 3)["w"], state.params["w"][int(state.memory[3])])


def test_a_model_that_has_overflowed_is_nobodys_choice():
    sick = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    algorithm = ifca(WORK, clusters=2, num_clients=12)
    state, metrics = algorithm.round(algorithm.init(stacked(sick, PARAMS)), cohort_of([3, 0, 5], WORK), KEY)
    assert int(metrics["reports"]) == 3 and np.all(np.asarray(state.memory)[[3, 0, 5]] == 1)
    assert np.isfinite(algorithm.params(state)["w"]).all()


def test_no_cluster_is_refused():
    with pytest.raises(ValueError, match=r"ifca\(clusters=0\)"):
        ifca(WORK, clusters=0, num_clients=12)
