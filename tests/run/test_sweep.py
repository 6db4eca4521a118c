import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import POPULATION

from jfed import local, mesh, run, sampling
from jfed.algorithms import fedavgm
from jfed.clients import lanes, vectorised
from jfed.core import Algorithm
from jfed.run.sweep import _largest_chunk

WORK = local.sgd(problem.loss, optax.sgd(1.0), batch_size=4)
SAMPLER = sampling.uniform(5, steps=WORK.steps)
TABLE = sampling.schedule(np.array([[0, 1], [2, 3], [4, 5]]), steps=WORK.steps)
ROUNDS = 4
PULLS = {"learning_rate": [0.5], "pull": [0.0, 0.1, 0.2, 0.5, 0.9]}


def init(key):
    return {"w": 0.3 * jax.random.normal(key, (problem.FEATURES, problem.CLASSES)), "b": jnp.zeros(problem.CLASSES)}


def judge(params):
    return {name: total.mean() for name, (total, _) in problem.metrics(params, POPULATION.examples).items()}


def toy(learning_rate, pull):
    """Chases the cohort's mean size, and noise; compiled in no time."""

    def round_fn(w, cohort, key):
        target = jnp.mean(cohort.size) + jax.random.uniform(key, w.shape)
        return w - learning_rate * (w - target) - pull * w, {}

    return Algorithm(lambda params: params, round_fn, lambda w: w)


def swept(make=toy, grid=PULLS, **options):
    options = {
        "init": lambda key: jax.random.uniform(key, (1000,)),
        "sampler": TABLE,
        "judge": lambda w: {"norm": jnp.sqrt(jnp.sum(w**2))},
        "rounds": ROUNDS,
        "progress": False,
    } | options
    return run.sweep(make, grid, population=POPULATION, **options)


@pytest.mark.parametrize(
    "client_map",
    [lanes(3), pytest.param(vectorised(), marks=pytest.mark.slow)],
    ids=["lanes(3)", "vectorised()"],
)
def test_a_run_of_a_sweep_equals_the_run_alone(client_map):
    """One hyperparameter of the clients' optimizer, one of the server's."""

    def make(learning_rate, momentum):
        work = local.sgd(problem.loss, optax.sgd(learning_rate), batch_size=4)
        return fedavgm(work, momentum=momentum, client_map=client_map)

    grid = {"learning_rate": [0.05, 0.3], "momentum": [0.0, 0.5, 0.9]}
    result = swept(make, grid, init=init, judge=judge, sampler=SAMPLER, seeds=2, keep_params=True)
    assert result.settings[4] == {"learning_rate": 0.3, "momentum": 0.5}

    algorithm = make(**result.settings[4])
    init_key, run_key = jax.random.split(jax.random.key(1))
    state = algorithm.init(init(init_key))
    state, _ = run.scan_rounds(algorithm, SAMPLER, POPULATION, state, run_key, rounds=ROUNDS)
    problem.close(jax.tree.map(lambda x: x[4, 1], result.params), jax.tree.map(np.asarray, state.params))
    problem.close({name: curve[4, 1, 0] for name, curve in result.curves.items()}, judge(state.params))


def test_all_settings_and_seeds_have_the_curves_of_rounds_run_one_by_one():
    result = swept(seeds=2, every=2)
    np.testing.assert_array_equal(result.rounds, [2, 4])
    assert result.programs == 1
    for i, setting in enumerate(result.settings):
        for seed in range(2):
            init_key, run_key = jax.random.split(jax.random.key(seed))
            w, norms = jax.random.uniform(init_key, (1000,)), []
            for t in range(ROUNDS):
                sample_key, round_key = jax.random.split(jax.random.fold_in(run_key, t))
                w, _ = toy(**setting).round(w, TABLE(POPULATION, sample_key, t), round_key)
                norms.append(jnp.linalg.norm(w))
            problem.close(result.curves["norm"][i, seed], np.array(norms[1::2]))


def test_settings_dealt_to_devices_end_as_on_one():
    """Five settings on two devices: one device has a setting twice, which nobody sees."""
    together, dealt = swept(seeds=2, keep_params=True), swept(seeds=2, keep_params=True, mesh=mesh.make((2,)))
    assert dealt.programs == 1 and dealt.params.shape == (5, 2, 1000)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), dealt, together)


def test_settings_that_do_not_fit_are_dealt_to_equal_programs_with_the_same_result(monkeypatch):
    """Five settings in two programs of three: the last place of the second is filled up, and dropped."""
    module, needed = sys.modules["jfed.run.sweep"], {}
    bytes_of = module._bytes

    def record(program, size):
        needed[size] = bytes_of(program, size)
        return needed[size]

    monkeypatch.setattr(module, "_bytes", record)
    together = swept()
    apart = swept(memory=needed[5] - 1)
    assert needed[1] < needed[3] < needed[5]
    assert (together.programs, apart.programs) == (1, 2)
    assert apart.curves["norm"].shape == (5, 1, 1)
    problem.close(apart.curves, together.curves)


@pytest.mark.parametrize("fixed", [0, 1000])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 31])
def test_the_chunk_found_is_the_largest_equal_one_that_fits_in_at_most_three_trials(count, fixed):
    for fitting in range(1, count + 1):
        trials = []

        def bytes_of(size):
            trials.append(size)  # noqa: B023
            return fixed + 10 * size

        size = _largest_chunk(bytes_of, count, budget=fixed + 10 * fitting + 5)
        assert size <= fitting
        assert math.ceil(count / size) == math.ceil(count / fitting)
        assert len(trials) <= 3


def test_a_chunk_is_found_where_the_compiler_itself_refuses_large_ones():
    assert _largest_chunk(lambda size: 10.0 * size if size <= 6 else math.inf, 16, budget=50.0) == 4


def test_seeds_side_by_side_end_as_one_after_another():
    problem.close(swept(seeds=3, seeds_at_once=2).curves, swept(seeds=3).curves)


def test_a_run_that_diverges_harms_no_other_and_is_never_best():
    result = swept(grid={"learning_rate": [1e30, 0.5], "pull": [0.1]})
    assert not np.isfinite(result.curves["norm"][0]).any()
    assert run.best_setting(result, "norm") == run.best_setting(result, "norm", order=min) == result.settings[1]
    problem.close(result.curves["norm"][1], swept().curves["norm"][1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swept(grid={}), r"sweep\(grid=\{\}\): there is nothing to sweep; name"),
        (lambda: swept(grid={"pull": []}), r"sweep\(grid\['pull'\]=\[\]\): give a list"),
        (lambda: swept(grid={"pull": [0.1, math.nan]}), r"grid\['pull'\]=\[0.1, nan\]\): give a list"),
        (lambda: swept(grid={"pull": ["a"]}), r"grid\['pull'\]=\['a'\]\): give a list"),
        (
            lambda: swept(lambda momentum: fedavgm(WORK, momentum=momentum), {"momentum": [0.5, 2.0]}),
            r"fedavgm\(momentum=2.0\)",
        ),
        (lambda: swept(rounds=0), r"sweep\(rounds=0\)"),
        (lambda: swept(seeds=0), r"sweep\(seeds=0\)"),
        (lambda: swept(mesh=mesh.make((2,)), axis="rows"), r"sweep\(axis='rows'\): the mesh has axes \('clients',\)"),
        (lambda: swept(seeds_at_once=0), r"sweep\(seeds_at_once=0\)"),
        (lambda: swept(every=0), r"sweep\(every=0\)"),
        (lambda: swept(every=3), r"sweep\(every=3\): every must divide rounds=4; choose"),
        (lambda: swept(memory=-1), r"sweep\(memory=-1\)"),
        (lambda: swept(memory=1), r"sweep\(memory=1\): one setting alone needs .*; raise memory, or use"),
        (lambda: swept(judge=lambda w: {"w": w}), r"sweep\(judge\): metric 'w' has shape \(1000,\)"),
    ],
)
def test_bad_input_is_an_error_of_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
