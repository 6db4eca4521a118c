import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION

from jfed import gossip, local, run
from jfed.algorithms import fedavg
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


def test_each_clients_own_model_is_judged_on_its_examples():
    def personal(params, i):
        return jax.tree.map(lambda p: p * (1.0 + 0.1 * i), params)

    found = run.evaluate_clients(problem.metrics, PARAMS, POPULATION, batch_size=4, personal=personal)["loss"]
    for i in (0, 3, 11):
        own = problem.loss(personal(PARAMS, i), problem.examples_of(i), None).mean()
        np.testing.assert_allclose(found[i], own, rtol=1e-5)


ADAPT = local.full_batch(problem.loss, optax.sgd(0.3), epochs=2, chunk_size=16)


@pytest.mark.parametrize("steps", [0, 1, None])
def test_a_client_adapts_to_its_training_examples_and_is_judged_on_the_others(steps):
    # Client i trains on its own rows and is judged on those of its neighbour.
    test = POPULATION._replace(start=jnp.roll(POPULATION.start, 1), size=jnp.roll(POPULATION.size, 1))
    found = run.evaluate_adapted(
        problem.metrics, ADAPT, PARAMS, POPULATION, test, jax.random.key(0), steps=steps, batch_size=4
    )["loss"]
    for i in (0, 3, 11):
        w = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
        for _ in range(2 if steps is None else steps):
            g = problem.numpy_gradient(w, *problem.examples_of(i).values())
            w = {k: w[k] - 0.3 * g[k] for k in w}
        np.testing.assert_allclose(found[i], problem.loss(w, problem.examples_of((i - 1) % 12), None).mean(), rtol=1e-5)


def test_a_client_with_nothing_to_train_on_is_judged_as_it_is():
    hollow = POPULATION._replace(size=POPULATION.size.at[3].set(0))
    found = run.evaluate_adapted(problem.metrics, ADAPT, PARAMS, hollow, POPULATION, jax.random.key(0))["loss"]
    plain = run.evaluate_clients(problem.metrics, PARAMS, POPULATION)["loss"]
    np.testing.assert_allclose(found[3], plain[3], rtol=1e-6)
    assert not np.isclose(found[5], plain[5])


def test_populations_of_different_clients_are_refused():
    few = POPULATION._replace(start=POPULATION.start[:3], size=POPULATION.size[:3])
    with pytest.raises(ValueError, match=r"evaluate_adapted\(train of 12 clients, test of 3\)"):
        run.evaluate_adapted(problem.metrics, ADAPT, PARAMS, POPULATION, few, jax.random.key(0))


def test_all_peers_models_and_their_average_are_judged_on_the_same_examples():
    algorithm = gossip.averaging(gossip.topology.ring(5))
    models = jax.tree.map(lambda p: jnp.stack([i * p for i in range(5)]), PARAMS)
    state = algorithm.init(PARAMS)._replace(params=models)
    scores = run.evaluate_peers(problem.metrics, algorithm, state, POPULATION.examples, batch_size=7)
    for name in ("loss", "accuracy"):
        each = [
            run.evaluate(problem.metrics, jax.tree.map(lambda p, i=i: i * p, PARAMS), POPULATION.examples)[name]
            for i in range(5)
        ]
        found = scores[name]
        np.testing.assert_allclose(found.each, each, rtol=1e-5)
        measures = [found.mean, found.lowest, found.highest, found.spread, found.averaged]
        expected = [np.mean(each), min(each), max(each), np.std(each), each[2]]
        np.testing.assert_allclose(measures, expected, rtol=1e-4)


def test_methods_whose_clients_have_no_models_of_their_own_are_refused():
    algorithm = fedavg(local.gradient(problem.loss))
    with pytest.raises(ValueError, match="peers are those of jfed.gossip; use run.evaluate"):
        run.evaluate_peers(problem.metrics, algorithm, algorithm.init(PARAMS), POPULATION.examples)
