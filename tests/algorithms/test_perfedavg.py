import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, cohort_of

from jfed import local, models
from jfed.algorithms import fedavg, perfedavg, perfedavg_fo, perfedavg_hf
from jfed.clients import vectorised
from jfed.core import Population, make_cohort

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY, ALPHA, BETA = jax.random.key(3), 0.3, 0.1
ONE_BATCH = local.sgd(problem.loss, optax.sgd(BETA), batch_size=12)  # all of a client: D = D' = D''


def meta_gradient(algorithm, i=3):
    """The step of one client from PARAMS, divided by its rate."""
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of([i], ONE_BATCH), KEY)
    return jax.tree.map(lambda w, new: (w - new) / BETA, PARAMS, state.params)


def meta_loss(vector, i=3):
    """f_i(w - alpha grad f_i(w)) in float64, by formula."""
    w = {"w": vector[:12].reshape(4, 3), "b": vector[12:]}
    data = problem.examples_of(i)
    g = problem.numpy_gradient(w, data["x"], data["y"])
    w = {k: w[k] - ALPHA * g[k] for k in w}
    z = data["x"] @ w["w"] + w["b"]
    z = z - z.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), data["y"]]))


def test_the_exact_gradient_equals_finite_differences_of_the_meta_loss():
    at = np.concatenate([np.asarray(PARAMS["w"], np.float64).ravel(), np.asarray(PARAMS["b"], np.float64)])
    slopes = np.array([(meta_loss(at + 1e-5 * e) - meta_loss(at - 1e-5 * e)) / 2e-5 for e in np.eye(at.size)])
    found = meta_gradient(perfedavg(ONE_BATCH, alpha=ALPHA))
    np.testing.assert_allclose(np.concatenate([found["w"].ravel(), found["b"]]), slopes, atol=2e-5)
    first_order = meta_gradient(perfedavg_fo(ONE_BATCH, alpha=ALPHA))
    assert np.abs(np.ravel(first_order["w"]) - slopes[:12]).max() > 1e-2


def test_the_hessian_free_gradient_is_near_the_exact_one():
    exact = meta_gradient(perfedavg(ONE_BATCH, alpha=ALPHA))
    near = meta_gradient(perfedavg_hf(ONE_BATCH, alpha=ALPHA, delta=0.05))
    problem.close(near, exact, tolerance=1e-3)


def test_first_order_takes_the_gradient_after_the_inner_step():
    data, w = problem.examples_of(3), {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    g = problem.numpy_gradient(w, data["x"], data["y"])
    inner = {k: w[k] - ALPHA * g[k] for k in w}
    expected = problem.numpy_gradient(inner, data["x"], data["y"])
    problem.close(meta_gradient(perfedavg_fo(ONE_BATCH, alpha=ALPHA)), expected)


@pytest.mark.parametrize("make", [perfedavg, perfedavg_fo, perfedavg_hf])
def test_without_an_inner_step_it_is_fedavg(make):
    cohort = cohort_of([3, 0, 5], ONE_BATCH)
    tiny, plain = make(ONE_BATCH, alpha=1e-7), fedavg(ONE_BATCH)
    a, _ = jax.jit(tiny.round)(tiny.init(PARAMS), cohort, KEY)
    b, _ = jax.jit(plain.round)(plain.init(PARAMS), cohort, KEY)
    problem.close(a.params, b.params)


def test_inner_and_outer_gradients_come_from_two_batches():
    # A client of two batches: the outer gradient of its first step is that of its second batch.
    seen = []

    def watched(params, batch, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["x"], ordered=True)
        return problem.loss(params, batch, key)

    work = local.sgd(watched, optax.sgd(BETA), batch_size=6)
    algorithm = perfedavg_fo(work, alpha=ALPHA)
    jax.block_until_ready(algorithm.round(algorithm.init(PARAMS), cohort_of([3], work), KEY))
    jax.effects_barrier()
    first, second, third, fourth = seen[:4]
    assert not np.array_equal(first, second) and np.array_equal(second, third) and np.array_equal(first, fourth)


def test_all_three_train_a_model_with_the_kits_convolution():
    model = models.lenet_gn()
    rng = np.random.default_rng(0)
    examples = {"x": jnp.asarray(rng.random((6, 28, 28, 1)), jnp.float32), "y": jnp.arange(6, dtype=jnp.int32)}
    population = Population(examples, jnp.zeros(1, jnp.int32), jnp.full(1, 6, jnp.int32))
    work = local.sgd(models.cross_entropy(model), optax.sgd(BETA), batch_size=6)
    cohort = make_cohort(population, jnp.arange(1), steps=work.steps)
    params = jax.eval_shape(model.init, KEY)
    for make in (perfedavg, perfedavg_hf, perfedavg_fo):
        algorithm = make(work, alpha=ALPHA, client_map=vectorised(max_steps=1))
        jax.eval_shape(algorithm.round, jax.eval_shape(algorithm.init, params), cohort, KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: perfedavg(ONE_BATCH, alpha=0.0), r"perfedavg\(alpha=0.0\)"),
        (lambda: perfedavg_hf(ONE_BATCH, alpha=0.1, delta=0.0), r"perfedavg_hf\(delta=0.0\)"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_loss_reported_is_that_before_the_inner_step():
    algorithm = perfedavg_fo(ONE_BATCH, alpha=ALPHA)
    _, metrics = algorithm.round(algorithm.init(PARAMS), cohort_of([3], ONE_BATCH), KEY)
    expected = jnp.mean(problem.loss(PARAMS, problem.examples_of(3), None))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
