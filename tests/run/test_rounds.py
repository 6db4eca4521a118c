import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, SIZES

from jfed import local, mesh, run, sampling, tree
from jfed.algorithms import fedavg, fedavgm
from jfed.clients import lanes, sharded, vectorised
from jfed.core import Algorithm, Population
from jfed.run import rounds

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


def test_iterate_is_never_far_ahead_of_the_device(monkeypatch):
    """Also of a method without metrics, and where what it has yielded is gone."""
    waited = []
    monkeypatch.setattr(rounds.jax, "block_until_ready", lambda end: waited.append(int(end)))
    silent = METHOD._replace(round=lambda *given: (METHOD.round(*given)[0], {}))
    state = jax.tree.map(jnp.copy, METHOD.init(PARAMS))
    steps = run.iterate(silent, SAMPLER, POPULATION, state, KEY, rounds=40, every=2, donate=True)
    for moment in steps:
        assert waited == [2 * (i + 1) for i in range(max(0, moment.round // 2 - 16))]


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


@pytest.mark.parametrize("over", ["devices", "weak types"])
def test_a_run_is_compiled_once_wherever_its_state_lies_at_first(over):
    """A round leaves strong types, all on the mesh; what `init` made of the user's params may be neither."""
    work = local.full_batch(lambda w, x, key: (w - x["x"][:, 0]) ** 2, optax.sgd(0.1))
    if over == "devices":
        devices = mesh.make((2,))
        method = fedavg(work, client_map=sharded(devices, lanes(2)))
        population, state, key = *mesh.replicate((POPULATION, jnp.zeros(())), devices), KEY
    else:
        method, population, state, key = fedavg(work), POPULATION, 0.0, KEY
    before = rounds._scan._cache_size()
    for _ in run.iterate(method, SAMPLER, population, method.init(state), key, rounds=3):
        pass
    assert rounds._scan._cache_size() == before + 1


@pytest.mark.slow
def test_learning_rates_run_side_by_side_as_they_run_alone():
    def whole_run(learning_rate):
        work = local.sgd(problem.loss, optax.sgd(learning_rate), batch_size=4)
        return scan(2, method=fedavg(work, client_map=vectorised()))[0].params

    rates = jnp.array([0.05, 0.2])
    together = jax.jit(jax.vmap(whole_run))(rates)
    for i, rate in enumerate(rates):
        problem.close(tree.take(together, i), whole_run(float(rate)))


def judged(rounds, every, **options):
    return run.scan_rounds(
        METHOD,
        SAMPLER,
        POPULATION,
        METHOD.init(PARAMS),
        KEY,
        rounds=rounds,
        every=every,
        judge=problem.metrics,
        examples=POPULATION.examples,
        **options,
    )


def test_a_run_judges_itself_on_the_way_as_evaluate_does():
    state, metrics = judged(6, 2)
    problem.close((state, metrics["loss"]), (scan(6)[0], scan(6)[1]["loss"]))
    for i, done in enumerate((2, 4, 6)):
        expected = run.evaluate(problem.metrics, scan(done)[0].params, POPULATION.examples)
        problem.close(tree.take(metrics["judged"], i), expected)


def test_a_run_reports_on_the_way_without_leaving_its_program():
    told = []
    state, metrics = judged(6, 3, report=lambda t, row: told.append((t, row)), start=2)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert [t for t, _ in told] == [5, 8]
    np.testing.assert_allclose([row["accuracy"] for _, row in told], metrics["judged"]["accuracy"], rtol=1e-6)
    assert all(isinstance(value, int | float) for _, row in told for value in row.values())
    assert [row["steps"] for _, row in told] == metrics["steps"][jnp.array([2, 5])].tolist()


@pytest.mark.slow
def test_a_donated_state_gives_the_same_run_and_is_gone():
    state = METHOD.init(jax.tree.map(jnp.array, PARAMS))
    donated, _ = run.scan_rounds(METHOD, SAMPLER, POPULATION, state, KEY, rounds=4, donate=True)
    problem.close(donated, scan(4)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    fresh = METHOD.init(jax.tree.map(jnp.array, PARAMS))
    *_, last = run.iterate(METHOD, SAMPLER, POPULATION, fresh, KEY, rounds=4, every=2, donate=True)
    problem.close(last.state, scan(4)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 4}, r"scan_rounds\(rounds=6, every=4\): every must divide rounds"),
        ({"every": 0}, r"scan_rounds\(every=0\)"),
        ({"judge": problem.metrics}, r"there is nothing to judge on; give examples"),
    ],
)
def test_a_run_that_cannot_be_judged_as_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run.scan_rounds(METHOD, SAMPLER, POPULATION, None, KEY, rounds=6, **options)


def test_growing_a_population_needs_no_new_program_of_another_algorithm():
    """Sizes and starts are data: clients may come to own other rows between two runs."""
    half = Population(POPULATION.examples, POPULATION.start, jnp.asarray(np.maximum(SIZES // 2, 1)))
    before = rounds._scan._cache_size()
    for population in (POPULATION, half):
        run.scan_rounds(METHOD, SAMPLER, population, METHOD.init(PARAMS), KEY, rounds=9)
    assert rounds._scan._cache_size() == before + 1


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
