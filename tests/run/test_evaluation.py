import jax.numpy as jnp
import numpy as np
import problem
import pytest
from problem import PARAMS, POPULATION

from jfed import run
from jfed.clients import lanes, vectorised


@pytest.mark.parametrize("batch_size", [1, 7, 64, 256])
def test_evaluate_is_the_exact_mean_whatever_the_batches(batch_size):
    result = run.evaluate(problem.metrics, PARAMS, POPULATION.examples, batch_size=batch_size)
    loss = problem.loss(PARAMS, POPULATION.examples, None)
    np.testing.assert_allclose(result["loss"], loss.mean(), rtol=1e-5)


def test_evaluate_weighs_examples_by_what_they_count():
    def metrics(params, batch):
        return {"score": (batch["x"][:, 0] * batch["y"], batch["y"].astype(jnp.float32))}

    x, y = POPULATION.examples["x"][:, 0], POPULATION.examples["y"]
    result = run.evaluate(metrics, PARAMS, POPULATION.examples, batch_size=7)
    np.testing.assert_allclose(result["score"], (x * y).sum() / y.sum(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("client_map", [lanes(1), lanes(5), vectorised()], ids=["lanes(1)", "lanes(5)", "vectorised"])
def test_evaluate_clients_judges_each_on_its_own_examples(client_map):
    result = run.evaluate_clients(problem.metrics, PARAMS, POPULATION, batch_size=4, client_map=client_map)
    for i in range(12):
        data = {k: jnp.asarray(v) for k, v in problem.examples_of(i).items()}
        np.testing.assert_allclose(result["loss"][i], problem.loss(PARAMS, data, None).mean(), rtol=1e-5)


def test_a_client_without_examples_scores_nan_and_harms_nobody():
    hollow = POPULATION._replace(size=POPULATION.size.at[3].set(0))
    result = run.evaluate_clients(problem.metrics, PARAMS, hollow)["accuracy"]
    whole = run.evaluate_clients(problem.metrics, PARAMS, POPULATION)["accuracy"]
    assert np.isnan(result[3])
    np.testing.assert_array_equal(np.delete(result, 3), np.delete(whole, 3))
