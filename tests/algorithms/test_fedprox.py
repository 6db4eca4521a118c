import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import fedavg, fedprox

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def one_round(algorithm, cohort):
    return jax.jit(algorithm.round)(algorithm.init(PARAMS), cohort, KEY)[0].params


def test_fedprox_with_mu_zero_is_fedavg():
    cohort = cohort_of([3, 0, 5], WORK)
    problem.close(one_round(fedprox(WORK, mu=0.0), cohort), one_round(fedavg(WORK), cohort), tolerance=0)


def test_fedprox_descends_the_proximal_objective():
    # One client, two full-batch steps: w <- w - eta (g(w) + mu (w - w_t)).
    work = local.full_batch(problem.loss, optax.sgd(0.2), epochs=2, chunk_size=4)
    data, w = problem.examples_of(3), {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    for _ in range(2):
        g = problem.numpy_gradient(w, data["x"], data["y"])
        w = {k: w[k] - 0.2 * (g[k] + 0.7 * (w[k] - np.asarray(PARAMS[k]))) for k in w}
    problem.close(one_round(fedprox(work, mu=0.7), cohort_of([3], work)), w)


def test_a_strong_pull_keeps_clients_at_home():
    cohort = cohort_of([3, 0, 5], WORK)

    def moved(mu):
        after = one_round(fedprox(WORK, mu=mu), cohort)
        return sum(float(jnp.sum((after[k] - PARAMS[k]) ** 2)) for k in PARAMS)

    assert moved(4.0) < 0.3 * moved(0.4) < 0.3 * moved(0.0)


def test_partial_work_counts():
    cohort = cohort_of([3, 0, 5], WORK)
    half = cohort._replace(steps=cohort.steps.at[0].set(1))
    whole, part = (one_round(fedprox(WORK, mu=0.1), c) for c in (cohort, half))
    without = one_round(fedprox(WORK, mu=0.1), cohort._replace(weight=cohort.weight.at[0].set(0.0)))
    for other in (whole, without):
        assert float(jnp.abs(part["w"] - other["w"]).max()) > 1e-3


def test_a_negative_mu_is_refused():
    with pytest.raises(ValueError, match=r"proximal\(mu=-1.0\): mu must be a finite number of at least 0"):
        fedprox(WORK, mu=-1.0)


def test_work_that_cannot_be_remade_is_refused():
    with pytest.raises(ValueError, match=r"fedprox\(work\).*give yours a `remake`"):
        fedprox(local.gradient(problem.loss), mu=0.1)
