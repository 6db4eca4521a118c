import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import quadratic
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import fedavg, qfedavg
from jfed.core import make_cohort

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def one_round(algorithm, cohort):
    return jax.jit(algorithm.round)(algorithm.init(PARAMS), cohort, KEY)[0].params


@pytest.mark.parametrize("weights", ["sizes", "equal"])
def test_q_zero_is_fedavg_with_the_cohorts_weights(weights):
    cohort = cohort_of([3, 0, 5], WORK)
    if weights == "equal":
        cohort = cohort._replace(weight=jnp.ones(3))
    problem.close(one_round(qfedavg(WORK, q=0.0, learning_rate=0.2), cohort), one_round(fedavg(WORK), cohort))


@pytest.mark.parametrize("q", [0.5, 2.0])
def test_a_round_is_algorithm_2_of_the_paper(q):
    ids, eta = [3, 0, 5], 0.2
    cohort = cohort_of(ids, WORK)._replace(weight=jnp.ones(3))
    start = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    top, bottom = {k: np.zeros_like(v) for k, v in start.items()}, 0.0
    for i in ids:
        data = problem.examples_of(i)
        w_k = problem.numpy_sgd_client(PARAMS, i, KEY, learning_rate=0.2, batch_size=4, epochs=2)
        f = float(np.mean(problem.loss(PARAMS, data, None)))
        delta_w = {k: (start[k] - w_k[k]) / eta for k in start}
        square = sum((d**2).sum() for d in delta_w.values())
        top = {k: top[k] + f**q * delta_w[k] for k in top}
        bottom += q * f ** (q - 1) * square + f**q / eta
    problem.close(
        one_round(qfedavg(WORK, q=q, learning_rate=eta), cohort), {k: start[k] - top[k] / bottom for k in start}
    )


def test_a_rate_of_one_over_l_decreases_the_objective_in_every_round():
    population, work = quadratic.population(spread=2.0), quadratic.work(1, learning_rate=1.0)
    cohort = make_cohort(population, jnp.arange(quadratic.CLIENTS), steps=work.steps)
    for q in (1.0, 3.0):
        algorithm = qfedavg(work, q=q, learning_rate=1.0)  # curvatures are at most 1 = L
        advance, state, found = jax.jit(algorithm.round), algorithm.init(jnp.zeros(3)), []
        for t in range(12):
            losses = quadratic.loss(state.params, population.examples, None)
            found.append(float(jnp.mean(losses ** (q + 1)) / (q + 1)))
            state, _ = advance(state, cohort, jax.random.fold_in(KEY, t))
        assert np.all(np.diff(found) < 0)


def test_a_larger_q_lowers_the_worst_loss():
    population, work = quadratic.population(spread=2.0), quadratic.work(1, learning_rate=1.0)
    cohort = make_cohort(population, jnp.arange(quadratic.CLIENTS), steps=work.steps)

    def worst(q):
        algorithm = qfedavg(work, q=q, learning_rate=1.0)
        advance, state = jax.jit(algorithm.round), algorithm.init(jnp.zeros(3))
        for t in range(150):
            state, _ = advance(state, cohort, jax.random.fold_in(KEY, t))
        return float(jnp.max(quadratic.loss(state.params, population.examples, None)))

    assert worst(5.0) < 0.95 * worst(1.0) < 0.95 * worst(0.0)


def test_losses_of_nothing_move_nothing():
    work = local.sgd(lambda params, batch, key: 0.0 * problem.loss(params, batch, key), optax.sgd(0.2), batch_size=4)
    problem.close(one_round(qfedavg(work, q=5.0, learning_rate=0.2), cohort_of([3, 0], work)), PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qfedavg(WORK, q=-1.0, learning_rate=0.1), r"qfedavg\(q=-1.0\)"),
        (lambda: qfedavg(WORK, q=1.0, learning_rate=0.0), r"qfedavg\(learning_rate=0.0\)"),
        (lambda: qfedavg(WORK._replace(whole=None), q=1.0, learning_rate=0.1), r"qfedavg\(work\).*`whole`"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
