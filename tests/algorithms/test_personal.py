"""Methods in which each client has a model of its own beside the global one: Ditto, APFL, pFedMe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import apfl, ditto, fedavg, local_only, pfedme

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
IDS = [3, 0, 5]
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def rounds(algorithm, work=WORK, count=2):
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for t in range(count):
        state, _ = advance(state, cohort_of(IDS, work), jax.random.fold_in(KEY, t))
    return state


PLAIN = fedavg(WORK)
ALONE = local_only(WORK, num_clients=12)


@pytest.mark.parametrize(
    "algorithm",
    [ditto(WORK, strength=0.5, num_clients=12), apfl(WORK, alpha=0.5, num_clients=12)],
    ids=["ditto", "apfl"],
)
def test_the_global_model_is_fedavgs(algorithm):
    problem.close(rounds(algorithm).params, rounds(PLAIN).params)


@pytest.mark.parametrize(
    "algorithm",
    [ditto(WORK, strength=0.0, num_clients=12), apfl(WORK, alpha=1.0, num_clients=12)],
    ids=["ditto without a pull", "apfl of its own part alone"],
)
def test_at_one_end_every_client_trains_alone(algorithm):
    ours, alone = rounds(algorithm), rounds(ALONE)
    for i in IDS:
        problem.close(algorithm.personal(ours, i), ALONE.personal(alone, i))


def test_apfl_without_an_own_part_is_fedavg():
    algorithm = apfl(WORK, alpha=0.0, num_clients=12)
    state = rounds(algorithm)
    for i in (*IDS, 11):
        problem.close(algorithm.personal(state, i), rounds(PLAIN).params)


def test_dittos_own_model_descends_its_regularised_loss():
    eta, strength, i = 0.1, 0.7, 3
    work = local.full_batch(problem.loss, optax.sgd(eta), epochs=2, chunk_size=12)
    algorithm = ditto(work, strength=strength, num_clients=12)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    v = {k: np.asarray(p, np.float64) for k, p in PARAMS.items()}
    for t in range(2):
        anchor = {k: np.asarray(p, np.float64) for k, p in state.params.items()}
        state, _ = advance(state, cohort_of(IDS, work), jax.random.fold_in(KEY, t))
        for _ in range(2):
            g = problem.numpy_gradient(v, *problem.examples_of(i).values())
            v = {k: v[k] - eta * (g[k] + strength * (v[k] - anchor[k])) for k in v}
    problem.close(algorithm.personal(state, i), v)


def test_a_strong_pull_holds_dittos_models_near_the_global_one():
    def distance(strength):
        algorithm = ditto(WORK, strength=strength, num_clients=12)
        state = rounds(algorithm, count=3)
        return float(jnp.linalg.norm(algorithm.personal(state, 0)["w"] - state.params["w"]))

    assert distance(4.0) < 0.6 * distance(0.5) < 0.6 * distance(0.0)


@pytest.mark.parametrize("rate", [0.05, 40.0], ids=["within bounds", "at the bounds"])
def test_apfl_follows_algorithm_1_and_learns_alpha(rate):
    eta, i = 0.1, 3
    work = local.full_batch(problem.loss, optax.sgd(eta), epochs=3, chunk_size=12)
    algorithm = apfl(work, alpha=0.4, alpha_learning_rate=rate, num_clients=12)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    v, alpha = {k: np.asarray(p, np.float64) for k, p in PARAMS.items()}, 0.4
    for t in range(2):
        w = {k: np.asarray(p, np.float64) for k, p in state.params.items()}
        state, _ = advance(state, cohort_of(IDS, work), jax.random.fold_in(KEY, t))
        for _ in range(3):
            mixed = {k: alpha * v[k] + (1 - alpha) * w[k] for k in w}
            g_w = problem.numpy_gradient(w, *problem.examples_of(i).values())
            g = problem.numpy_gradient(mixed, *problem.examples_of(i).values())
            slope = sum(((v[k] - w[k]) * g[k]).sum() for k in w)
            v = {k: v[k] - eta * alpha * g[k] for k in v}
            w = {k: w[k] - eta * g_w[k] for k in w}
            alpha = np.clip(alpha - rate * slope, 0, 1)
    memory = jax.tree.map(lambda m: m[i], state.memory)
    problem.close(memory, {"v": v, "alpha": alpha})
    assert abs(alpha - 0.4) > 1e-3


def test_pfedme_of_one_step_each_way_is_fedavg_at_another_rate():
    # theta = w - delta grad f(w), so w moves by eta lambda delta grad f(w).
    work = local.full_batch(problem.loss, optax.sgd(0.1), chunk_size=12)
    algorithm = pfedme(work, strength=5.0, personal_learning_rate=0.2, inner_steps=1, num_clients=12)
    plain = fedavg(local.full_batch(problem.loss, optax.sgd(0.1 * 5.0 * 0.2), chunk_size=12))
    problem.close(rounds(algorithm, work).params, rounds(plain, work).params)


def test_pfedme_follows_algorithm_1():
    eta, lam, delta, k_steps, beta, i = 0.05, 3.0, 0.1, 4, 0.5, 3
    work = local.full_batch(problem.loss, optax.sgd(eta), epochs=3, chunk_size=12)
    algorithm = pfedme(work, strength=lam, personal_learning_rate=delta, inner_steps=k_steps, beta=beta, num_clients=12)
    state = rounds(algorithm, work, count=1)
    start = {k: np.asarray(p, np.float64) for k, p in PARAMS.items()}
    weights, mean, thetas = problem.SIZES[IDS] / problem.SIZES[IDS].sum(), dict.fromkeys(start, 0.0), {}
    for j, weight in zip(IDS, weights, strict=True):
        w, theta = start, start
        for _ in range(3):
            for _ in range(k_steps):
                g = problem.numpy_gradient(theta, *problem.examples_of(j).values())
                theta = {k: theta[k] - delta * (g[k] + lam * (theta[k] - w[k])) for k in w}
            w = {k: w[k] - eta * lam * (w[k] - theta[k]) for k in w}
        mean = {k: mean[k] + weight * w[k] for k in w}
        thetas[j] = theta
    problem.close(state.params, {k: (1 - beta) * start[k] + beta * mean[k] for k in start})
    problem.close(algorithm.personal(state, i), thetas[i])


def test_pfedmes_personal_model_nears_the_global_one_as_lambda_grows():
    def distance(lam):
        algorithm = pfedme(WORK, strength=lam, personal_learning_rate=0.02, inner_steps=20, num_clients=12)
        state = rounds(algorithm, count=1)
        return float(jnp.linalg.norm(algorithm.personal(state, 3)["w"] - PARAMS["w"]))

    assert distance(15.0) < distance(3.0) < distance(0.3)


def test_clients_that_stay_away_keep_their_models():
    for algorithm in (
        ditto(WORK, strength=0.5, num_clients=12),
        apfl(WORK, alpha=1.0, num_clients=12),
        pfedme(WORK, strength=5.0, personal_learning_rate=0.1, num_clients=12),
    ):
        state = rounds(algorithm, count=1)
        cohort = cohort_of(IDS, WORK)
        away = cohort._replace(weight=cohort.weight.at[0].set(0.0))
        after, _ = jax.jit(algorithm.round)(state, away, jax.random.fold_in(KEY, 9))
        for i, moves in ((3, False), (0, True)):
            a, b = (algorithm.personal(s, i)["w"] for s in (state, after))
            assert bool(jnp.any(a != b)) == moves


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ditto(WORK, strength=-1.0, num_clients=3), r"ditto\(strength=-1.0\)"),
        (lambda: apfl(WORK, alpha=1.5, num_clients=3), r"apfl\(alpha=1.5\)"),
        (lambda: apfl(WORK, alpha=0.5, alpha_learning_rate=-0.1, num_clients=3), r"apfl\(alpha_learning_rate=-0.1\)"),
        (lambda: pfedme(WORK, strength=0.0, personal_learning_rate=0.1, num_clients=3), r"pfedme\(strength=0.0\)"),
        (
            lambda: pfedme(WORK, strength=1.0, personal_learning_rate=0.1, inner_steps=0, num_clients=3),
            r"pfedme\(inner_steps=0\)",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
