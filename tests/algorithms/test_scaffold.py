import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import quadratic
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import fedavg, scaffold

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def test_the_first_round_with_zero_variates_is_fedavg():
    cohort = cohort_of([3, 0, 5], WORK)
    a, b = scaffold(WORK, num_clients=12), fedavg(WORK)
    state, _ = jax.jit(a.round)(a.init(PARAMS), cohort, KEY)
    alike = cohort._replace(weight=jnp.ones(3))
    problem.close(state.params, jax.jit(b.round)(b.init(PARAMS), alike, KEY)[0].params)
    assert float(jnp.abs(state.server["c"]["w"]).max()) > 1e-3


def test_three_rounds_follow_algorithm_1_option_ii():
    eta, steps, n = 0.1, [3, 2, 4, 3], 12
    work = local.full_batch(problem.loss, optax.sgd(eta), epochs=4, chunk_size=12)
    algorithm = scaffold(work, num_clients=n)
    advance, state = jax.jit(algorithm.round), algorithm.init(PARAMS)
    x = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    zero = {k: np.zeros_like(v) for k, v in x.items()}
    c, c_i = zero, {}
    for t, ids in enumerate(([0, 3, 5, 7], [3, 5, 8, 0], [7, 0, 2, 3])):
        cohort = cohort_of(ids, work)._replace(weight=jnp.ones(4), steps=jnp.array(steps, jnp.int32))
        state, _ = advance(state, cohort, jax.random.fold_in(KEY, t))
        change, control = zero, zero
        for i, k in zip(ids, steps, strict=True):
            data, own, y = problem.examples_of(i), c_i.get(i, zero), x
            for _ in range(k):
                g = problem.numpy_gradient(y, data["x"], data["y"])
                y = {n: y[n] - eta * (g[n] - own[n] + c[n]) for n in y}
            new = {n: own[n] - c[n] + (x[n] - y[n]) / (k * eta) for n in y}
            change = {n: change[n] + (y[n] - x[n]) / len(ids) for n in y}
            control = {n: control[n] + (new[n] - own[n]) / len(ids) for n in y}
            c_i[i] = new
        x = {k: x[k] + change[k] for k in x}
        c = {k: c[k] + len(ids) / n * control[k] for k in c}
    problem.close((state.params, state.server["c"]), (x, c))
    for i, own in c_i.items():
        problem.close(jax.tree.map(lambda m, i=i: m[i], state.memory), own)


def test_its_rate_does_not_depend_on_the_gradients_dissimilarity_while_fedavgs_does():
    work = quadratic.work(10)

    def rounds(make, spread):
        found = quadratic.distances(make(work), quadratic.population(spread), work, rounds=60)
        return quadratic.rounds_to(found, 1e-2)

    def ours(work):
        return scaffold(work, num_clients=quadratic.CLIENTS)

    alike, unlike, far = (rounds(ours, spread) for spread in (0.1, 1.0, 3.0))
    assert max(alike, unlike, far) <= 25 and far - alike <= 10
    assert rounds(fedavg, 0.1) < 25 and np.isinf(rounds(fedavg, 3.0))


def test_c_stays_the_mean_of_all_variates_whoever_takes_part_and_whatever_it_weighs():
    algorithm = scaffold(WORK, num_clients=12)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for t, ids in enumerate(([3, 0], [3, 7], [1, 3], [0, 11])):
        state, metrics = advance(state, cohort_of(ids, WORK), jax.random.fold_in(KEY, t))
    problem.close(state.server["c"], jax.tree.map(lambda m: m.mean(0), state.memory))
    numbers = 4 * 3 + 3
    assert int(metrics["traffic"].up[0]) == int(metrics["traffic"].down[0]) == 2 * 4 * numbers


def test_links_that_look_at_the_whole_gradient_do_not_see_the_measuring():
    clipped = optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.2))
    work = local.sgd(problem.loss, clipped, batch_size=4, epochs=2)
    cohort = cohort_of([3, 0, 5], work)._replace(weight=jnp.ones(3))
    a, b = scaffold(work, num_clients=12), fedavg(work)
    found, plain = (jax.jit(m.round)(m.init(PARAMS), cohort, KEY)[0].params for m in (a, b))
    problem.close(found, plain)


def test_a_client_that_does_no_step_keeps_its_variate():
    algorithm = scaffold(WORK, num_clients=12)
    cohort = cohort_of([3, 0], WORK)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort, KEY)
    idle = cohort._replace(steps=cohort.steps.at[0].set(0))
    after, _ = algorithm.round(state, idle, jax.random.fold_in(KEY, 1))
    problem.close(jax.tree.map(lambda m: m[3], after.memory), jax.tree.map(lambda m: m[3], state.memory), tolerance=0)


def test_the_number_of_clients_is_needed():
    with pytest.raises(TypeError, match="num_clients"):
        scaffold(WORK)
