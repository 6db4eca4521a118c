import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
from problem import PARAMS, POPULATION, cohort_of

from jfed import local, sampling
from jfed.algorithms import centralised, local_only, pooled

KEY = jax.random.key(3)


def test_alone_every_client_goes_on_from_where_it_was():
    work = local.full_batch(problem.loss, optax.sgd(0.2), epochs=2, chunk_size=12)
    algorithm = local_only(work, num_clients=12)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for t, ids in enumerate(([3, 0], [3, 5])):
        state, metrics = advance(state, cohort_of(ids, work), jax.random.fold_in(KEY, t))
    for i, steps in ((3, 4), (0, 2), (5, 2), (7, 0)):
        w = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
        for _ in range(steps):
            g = problem.numpy_gradient(w, *problem.examples_of(i).values())
            w = {k: w[k] - 0.2 * g[k] for k in w}
        problem.close(algorithm.personal(state, i), w)
    assert int(metrics["traffic"].up.sum()) == int(metrics["traffic"].down.sum()) == 0 and int(metrics["reports"]) == 2


def test_centralised_training_is_gradient_descent_whose_momentum_lasts():
    work = local.full_batch(problem.loss, optax.sgd(0.2, momentum=0.9), chunk_size=16)
    population = pooled(POPULATION)
    sampler = sampling.full(steps=work.steps)
    algorithm = centralised(work)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    w = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    m = {k: np.zeros_like(v) for k, v in w.items()}
    x, y = (np.asarray(POPULATION.examples[name]) for name in "xy")
    for t in range(3):
        state, metrics = advance(state, sampler(population, KEY, t), jax.random.fold_in(KEY, t))
        g = problem.numpy_gradient(w, x, y)
        m = {k: 0.9 * m[k] + g[k] for k in m}
        w = {k: w[k] - 0.2 * m[k] for k in w}
    problem.close(state.params, w)
    assert metrics["traffic"].up.tolist() == metrics["traffic"].down.tolist() == [0]


def test_pooling_keeps_every_row():
    one = pooled(POPULATION)
    assert one.size.tolist() == [int(POPULATION.size.sum())] and one.start.tolist() == [0]
    assert one.size.dtype == one.start.dtype == jnp.int32


def test_pooling_leaves_out_rows_that_are_nobodys():
    gaps = problem.POPULATION._replace(start=jnp.array([0, 9], jnp.int32), size=jnp.array([2, 3], jnp.int32))
    one = pooled(gaps)
    np.testing.assert_array_equal(one.examples["x"], POPULATION.examples["x"][jnp.array([0, 1, 9, 10, 11])])
    assert one.size.tolist() == [5]
