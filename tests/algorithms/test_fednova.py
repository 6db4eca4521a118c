import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import quadratic
from problem import PARAMS, cohort_of

from jfed import local, sampling
from jfed.algorithms import fedavg, fednova
from jfed.algorithms._work import measured
from jfed.core import Shared

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)


def test_with_equal_steps_it_is_fedavg():
    work = local.sgd(problem.loss, optax.sgd(0.2, momentum=0.9), batch_size=4, epochs=2)
    cohort = cohort_of([3, 0, 5], work)._replace(steps=jnp.full(3, 4, jnp.int32))
    a, b = fednova(work), fedavg(work)
    problem.close(
        jax.jit(a.round)(a.init(PARAMS), cohort, KEY)[0].params, jax.jit(b.round)(b.init(PARAMS), cohort, KEY)[0].params
    )


def uneven(steps):
    """All clients, the last half doing eight times the steps of the others."""
    tau = np.where(np.arange(quadratic.CLIENTS) < quadratic.CLIENTS // 2, 1, 8)

    def sample(population, key, t):
        cohort = sampling.full(steps=steps)(population, key, t)
        return cohort._replace(steps=jnp.asarray(tau, jnp.int32))

    return sample


def test_it_reaches_the_true_optimum_with_unequal_steps_and_fedavg_does_not():
    population, work = quadratic.population(curvatures=False), quadratic.work(8, learning_rate=0.02)
    ends = {
        make.__name__: quadratic.distances(make(work), population, work, rounds=150, sampler=uneven(work.steps))[-1]
        for make in (fednova, fedavg)
    }
    assert ends["fednova"] < 0.05 < 0.2 < ends["fedavg"]


@pytest.mark.parametrize(
    ("optimizer", "length"),
    [
        (optax.sgd(0.1), lambda tau: 0.1 * tau),
        # Wang et al. 2020, section 3: [1 - rho^tau, ..., 1 - rho] / (1 - rho), and [(1 - eta mu)^(tau-1), ..., 1].
        (optax.sgd(0.1, momentum=0.9), lambda tau: 0.1 * sum((1 - 0.9**j) / (1 - 0.9) for j in range(1, tau + 1))),
        (optax.chain(local.proximal(2.0), optax.sgd(0.1)), lambda tau: 0.1 * sum(0.8**j for j in range(tau))),
    ],
    ids=["sgd", "momentum", "proximal"],
)
@pytest.mark.parametrize("tau", [1, 5])
def test_the_length_measured_is_the_papers_norm_of_a_i(optimizer, length, tau):
    work = measured("test", local.sgd(problem.loss, optimizer, batch_size=3, epochs=2))
    cohort = cohort_of([3], work)
    client = jax.tree.map(lambda x: x[0], cohort._replace(examples=()))
    shared = Shared(PARAMS, cohort.examples, KEY, jnp.int32(0))
    carry = work.start(shared, client)
    for t in range(tau):
        carry = work.step(shared, client, carry, jnp.int32(t))
    (_, found), _ = work.finish(shared, client, carry)
    np.testing.assert_allclose(found, length(tau), rtol=1e-5)


def test_the_mean_direction_is_followed_as_far_as_clients_went_on_average():
    eta, ids, tau = 0.1, [3, 0, 5], np.array([1, 4, 2])
    work = local.full_batch(problem.loss, optax.sgd(eta), epochs=4, chunk_size=12)
    cohort = cohort_of(ids, work)._replace(steps=jnp.asarray(tau, jnp.int32))
    p = problem.SIZES[ids] / problem.SIZES[ids].sum()
    x = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    direction = {k: np.zeros_like(v) for k, v in x.items()}
    for i, p_i, tau_i in zip(ids, p, tau, strict=True):
        data, y = problem.examples_of(i), x
        for _ in range(tau_i):
            g = problem.numpy_gradient(y, data["x"], data["y"])
            y = {k: y[k] - eta * g[k] for k in y}
        direction = {k: direction[k] + p_i * (x[k] - y[k]) / (eta * tau_i) for k in x}
    tau_eff = (p * tau).sum()
    algorithm = fednova(work)
    state, _ = jax.jit(algorithm.round)(algorithm.init(PARAMS), cohort, KEY)
    problem.close(state.params, {k: x[k] - tau_eff * eta * direction[k] for k in x})


def test_a_client_that_took_no_step_has_no_say_in_the_direction():
    work = local.sgd(problem.loss, optax.sgd(0.1), batch_size=4, epochs=2)
    cohort = cohort_of([3, 0, 5], work)
    idle = cohort._replace(steps=cohort.steps.at[1].set(0))
    algorithm, advance = fednova(work), jax.jit(fednova(work).round)
    found, _ = advance(algorithm.init(PARAMS), idle, KEY)
    without, _ = advance(algorithm.init(PARAMS), idle._replace(weight=idle.weight.at[1].set(0.0)), KEY)
    problem.close(found.params, without.params)
