import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import quadratic
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import fedavg, mime, mimelite

KEY = jax.random.key(3)
IDS = [3, 0, 5]


def rounds(algorithm, work, count=1):
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for t in range(count):
        state, metrics = advance(state, cohort_of(IDS, work), jax.random.fold_in(KEY, t))
    return state, metrics


def test_mimelite_with_plain_sgd_is_fedavg():
    work = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
    problem.close(rounds(mimelite(work), work, 2)[0].params, rounds(fedavg(work), work, 2)[0].params)


def centralised_gradient(x):
    weights = problem.SIZES[IDS] / problem.SIZES[IDS].sum()
    each = [problem.numpy_gradient(x, *problem.examples_of(i).values()) for i in IDS]
    return {k: sum(w * g[k] for w, g in zip(weights, each, strict=True)) for k in x}


def test_mime_of_one_step_is_a_step_of_the_centralised_optimizer():
    # At y = x the correction leaves c, whatever the batch.
    work = local.sgd(problem.loss, optax.sgd(0.2, momentum=0.9), batch_size=4)
    algorithm = mime(work)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    x = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    m = {k: np.zeros_like(v) for k, v in x.items()}
    for t in range(3):
        one = cohort_of(IDS, work)._replace(steps=jnp.ones(3, jnp.int32))
        state, _ = advance(state, one, jax.random.fold_in(KEY, t))
        c = centralised_gradient(x)
        m = {k: 0.9 * m[k] + c[k] for k in x}  # U with the old statistics, then V: the same for momentum
        x = {k: x[k] - 0.2 * m[k] for k in x}
    problem.close(state.params, x)


def test_clients_apply_the_servers_momentum_and_do_not_change_it():
    eta, epochs = 0.1, 3
    work = local.full_batch(problem.loss, optax.sgd(eta, momentum=0.9), epochs=epochs, chunk_size=12)
    state, _ = rounds(mimelite(work), work, 2)
    x = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    weights = problem.SIZES[IDS] / problem.SIZES[IDS].sum()
    s = {k: np.zeros_like(v) for k, v in x.items()}
    for _ in range(2):
        models = []
        for i in IDS:
            data, y = problem.examples_of(i), x
            for _ in range(epochs):
                g = problem.numpy_gradient(y, data["x"], data["y"])
                y = {k: y[k] - eta * (0.9 * s[k] + g[k]) for k in y}
            models.append(y)
        c = centralised_gradient(x)
        s = {k: 0.9 * s[k] + c[k] for k in s}
        x = {k: sum(w * y[k] for w, y in zip(weights, models, strict=True)) for k in x}
    problem.close(state.params, x)


def test_the_correction_removes_the_clients_drift():
    population, work = quadratic.population(spread=3.0), quadratic.work(10)
    corrected, plain = (quadratic.distances(make(work), population, work, rounds=40)[-1] for make in (mime, fedavg))
    assert corrected < 1e-2 < 0.1 < plain


def test_bytes_count_statistics_and_gradients():
    numbers = 4 * (4 * 3 + 3)
    work = local.sgd(problem.loss, optax.sgd(0.2, momentum=0.9), batch_size=4)
    _, lite = rounds(mimelite(work), work)
    _, whole = rounds(mime(work), work)
    assert (int(lite["traffic"].down[0]), int(lite["traffic"].up[0])) == (2 * numbers, 2 * numbers)
    assert (int(whole["traffic"].down[0]), int(whole["traffic"].up[0])) == (3 * numbers, 2 * numbers)


def test_a_client_whose_gradient_is_not_finite_spoils_nothing():
    work = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
    cohort = cohort_of(IDS, work)
    sick = cohort.examples | {"x": cohort.examples["x"].at[int(problem.POPULATION.start[5])].set(jnp.nan)}
    algorithm = mime(work)
    state, metrics = algorithm.round(algorithm.init(PARAMS), cohort._replace(examples=sick), KEY)
    without, _ = algorithm.round(algorithm.init(PARAMS), cohort_of([3, 0], work), KEY)
    problem.close(state.params, without.params)
    assert int(metrics["dropped"]) == 1
