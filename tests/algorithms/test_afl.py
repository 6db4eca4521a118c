import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import quadratic
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import afl, fedsgd
from jfed.algorithms.afl import project
from jfed.core import make_cohort

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)


def test_the_first_round_is_a_step_along_the_clients_mean_gradient():
    work = local.gradient(problem.loss, chunk_size=4)
    cohort = cohort_of(list(range(12)), work)
    algorithm = afl(work, learning_rate=0.1, num_clients=12, server=optax.sgd(0.5))
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort, KEY)
    plain = fedsgd(work, learning_rate=0.5)
    equal, _ = plain.round(plain.init(PARAMS), cohort._replace(weight=jnp.ones(12)), KEY)
    problem.close(state.params, equal.params)


def test_the_mixture_ascends_the_losses_and_stays_in_the_simplex():
    work = local.gradient(problem.loss, chunk_size=4)
    algorithm = afl(work, learning_rate=2.0, num_clients=12)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of(list(range(12)), work), KEY)
    losses = [float(np.mean(problem.loss(PARAMS, problem.examples_of(i), None))) for i in range(12)]
    np.testing.assert_allclose(state.memory, project(1 / 12 + 2.0 * jnp.array(losses)), rtol=1e-5)
    assert state.memory.min() == 0 and np.argmax(state.memory) == np.argmax(losses)


def test_a_client_whose_share_fell_to_nothing_comes_back():
    work = local.gradient(problem.loss, chunk_size=4)
    algorithm = afl(work, learning_rate=1.0, num_clients=12)
    state = algorithm.init(PARAMS)._replace(memory=jnp.zeros(12).at[0].set(1.0))
    state, _ = algorithm.round(state, cohort_of(list(range(12)), work), KEY)
    losses = [float(np.mean(problem.loss(PARAMS, problem.examples_of(i), None))) for i in range(12)]
    assert np.argmax(losses) != 0 and state.memory[np.argmax(losses)] > 0


def test_the_worst_loss_is_brought_down():
    population, work = quadratic.population(spread=2.0), local.gradient(quadratic.loss, chunk_size=1)
    cohort = make_cohort(population, jnp.arange(quadratic.CLIENTS), steps=work.steps)

    def worst(rate):
        algorithm = afl(work, learning_rate=rate, num_clients=quadratic.CLIENTS, server=optax.sgd(0.1))
        advance, state, mean = jax.jit(algorithm.round), algorithm.init(jnp.zeros(3)), 0.0
        for t in range(400):
            state, _ = advance(state, cohort, jax.random.fold_in(KEY, t))
            mean = mean + state.params / 200 if t >= 200 else mean
        return float(jnp.max(quadratic.loss(mean, population.examples, None)))

    assert worst(0.01) < 0.8 * worst(1e-6)


def test_projection_is_the_nearest_point_of_the_simplex():
    rng = np.random.default_rng(0)
    for _ in range(20):
        v = rng.normal(size=5)
        p = np.asarray(project(jnp.asarray(v, jnp.float32)), np.float64)
        assert abs(p.sum() - 1) < 1e-6 and p.min() >= 0
        others = rng.dirichlet(np.ones(5) * rng.uniform(0.2, 2), size=500)
        assert np.all(((others - v) ** 2).sum(1) >= ((p - v) ** 2).sum() - 1e-6)


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"afl\(learning_rate=0.0\)"):
        afl(local.gradient(problem.loss), learning_rate=0.0, num_clients=3)
