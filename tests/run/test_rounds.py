import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, SIZES

from jfed import local, run, sampling, tree
from jfed.algorithms import fedavg, fedavgm
from jfed.clients import lanes, vectorised
from jfed.core import Algorithm, Population

KEY = jax.random.key(2)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
METHOD = fedavgm(WORK, client_map=lanes(3))
SAMPLER = sampling.uniform(5, steps=WORK.steps)


def scan(rounds, start=0, state=None, key=KEY, method=METHOD):
    state = method.init(PARAMS) if state is None else state
    return run.scan_rounds(method, SAMPLER, POPULATION, state, key, rounds=rounds, start=start)


def test_a_compiled_run_equals_round_after_round():
    state = METHOD.init(PARAMS)
    for t in range(4):
        sample_key, round_key = jax.random.split(jax.random.fold_in(KEY, t))
        state, metrics = METHOD.round(state, SAMPLER(POPULATION, sample_key, t), round_key)
    whole, all_metrics = scan(4)
    problem.close(whole, state)
    problem.close(tree.take(all_metrics, 3), metrics)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_run_cut_anywhere_continues_to_the_same_end(cut):
    first, _ = scan(cut)
    second, _ = scan(6 - cut, start=cut, state=first)
    problem.close(second, scan(6)[0])


@pytest.mark.parametrize("every", [1, 2, 4, 7])
def test_iterate_yields_the_same_run_in_stretches(every):
    state, metrics = scan(6)
    moments = list(run.iterate(METHOD, SAMPLER, POPULATION, METHOD.init(PARAMS), KEY, rounds=6, every=every))
    assert [m.round for m in moments] == [*range(every, 6, every), 6]
    problem.close(moments[-1].state, state)
    losses = jnp.concatenate([m.metrics["loss"] for m in moments])
    problem.close(losses, metrics["loss"])


def test_iterate_takes_up_a_run_at_the_same_boundaries():
    moments = list(run.iterate(METHOD, SAMPLER, POPULATION, METHOD.init(PARAMS), KEY, rounds=8, start=3, every=4))
    assert [m.round for m in moments] == [4, 8]


def test_many_rounds_are_traced_once():
    traces = []

    def round_fn(*args):
        traces.append(1)
        return METHOD.round(*args)

    counted = Algorithm(METHOD.init, round_fn, METHOD.params)
    for _ in run.iterate(counted, SAMPLER, POPULATION, counted.init(PARAMS), KEY, rounds=12, every=2):
        pass
    scan(2, start=5, method=counted, key=jax.random.key(9))
    assert len(traces) == 1


def test_learning_rates_run_side_by_side_as_they_run_alone():
    def whole_run(learning_rate):
        work = local.sgd(problem.loss, optax.sgd(learning_rate), batch_size=4)
        return scan(2, method=fedavg(work, client_map=vectorised()))[0].params

    rates = jnp.array([0.05, 0.2])
    together = jax.jit(jax.vmap(whole_run))(rates)
    for i, rate in enumerate(rates):
        problem.close(tree.take(together, i), whole_run(float(rate)))


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


def test_growing_a_population_needs_no_new_program_of_another_algorithm():
    """Sizes and starts are data: clients may come to own other rows between two runs."""
    half = Population(POPULATION.examples, POPULATION.start, jnp.asarray(np.maximum(SIZES // 2, 1)))
    before = run.scan_rounds._cache_size()
    for population in (POPULATION, half):
        run.scan_rounds(METHOD, SAMPLER, population, METHOD.init(PARAMS), KEY, rounds=9)
    assert run.scan_rounds._cache_size() == before + 1


def test_iterate_refuses_a_start_outside_its_rounds_at_once():
    for start in (-1, 9):
        with pytest.raises(ValueError, match=rf"iterate\(start={start}\): start must lie in \[0, 8\]"):
            run.iterate(METHOD, SAMPLER, POPULATION, None, KEY, rounds=8, start=start)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scan(0), r"scan_rounds\(rounds=0\)"),
        (lambda: next(run.iterate(METHOD, SAMPLER, POPULATION, None, KEY, rounds=2, every=0)), r"iterate\(every=0\)"),
        (lambda: run.evaluate(problem.metrics, PARAMS, POPULATION.examples, batch_size=0), r"evaluate\(batch_size=0\)"),
        (
            lambda: run.evaluate_clients(problem.metrics, PARAMS, POPULATION, batch_size=0),
            r"evaluate_clients\(batch_size=0\)",
        ),
    ],
)
def test_numbers_that_are_no_counts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
