import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import quadratic
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import fedavg, feddyn

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)


def test_as_alpha_vanishes_clients_train_as_in_fedavg_and_the_server_goes_further():
    # h / alpha is the clients' change over m: the first step is 1 + |P| / m times FedAvg's.
    work = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
    cohort = cohort_of([3, 0, 5], work)._replace(weight=jnp.ones(3))
    a, b = feddyn(work, alpha=1e-6, num_clients=12), fedavg(work)
    found = jax.jit(a.round)(a.init(PARAMS), cohort, KEY)[0].params
    plain = jax.jit(b.round)(b.init(PARAMS), cohort, KEY)[0].params
    problem.close(found, jax.tree.map(lambda w, new: w + (1 + 3 / 12) * (new - w), PARAMS, plain), tolerance=1e-4)


def test_three_rounds_follow_algorithm_1():
    eta, alpha, m, epochs = 0.1, 0.5, 12, 3
    work = local.full_batch(problem.loss, optax.sgd(eta), epochs=epochs, chunk_size=12)
    algorithm = feddyn(work, alpha=alpha, num_clients=m)
    advance, state = jax.jit(algorithm.round), algorithm.init(PARAMS)
    theta = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    zero = {k: np.zeros_like(v) for k, v in theta.items()}
    h, g_k = zero, {}
    for t, ids in enumerate(([0, 3, 5], [3, 5, 8], [0, 3, 2])):
        cohort = cohort_of(ids, work)._replace(weight=jnp.ones(3))
        state, _ = advance(state, cohort, jax.random.fold_in(KEY, t))
        models = []
        for i in ids:
            data, own, y = problem.examples_of(i), g_k.get(i, zero), theta
            for _ in range(epochs):
                g = problem.numpy_gradient(y, data["x"], data["y"])
                y = {k: y[k] - eta * (g[k] - own[k] + alpha * (y[k] - theta[k])) for k in y}
            g_k[i] = {k: own[k] - alpha * (y[k] - theta[k]) for k in y}
            models.append(y)
        h = {k: h[k] - alpha / m * sum(y[k] - theta[k] for y in models) for k in h}
        theta = {k: sum(y[k] for y in models) / len(ids) - h[k] / alpha for k in theta}
    problem.close(state.params, theta, tolerance=5e-5)


def test_it_reaches_the_true_optimum_and_fedavg_does_not():
    population, work = quadratic.population(spread=3.0), quadratic.work(30)
    ours = quadratic.distances(feddyn(work, alpha=0.5, num_clients=8), population, work, rounds=60)
    plain = quadratic.distances(fedavg(work), population, work, rounds=60)
    assert ours[-1] < 1e-2 < 0.1 < plain[-1]


def test_an_alpha_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"feddyn\(alpha=0.0\)"):
        feddyn(quadratic.work(1), alpha=0.0, num_clients=8)
