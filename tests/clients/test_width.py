"""The width that is measured, remembered and explained."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, close, cohort_of

from jfed import local, tree
from jfed.algorithms import fedavg
from jfed.clients import explain, lanes, sharded, vectorised, width
from jfed.core import Shared
from jfed.mesh import make

WORK = local.full_batch(problem.loss, optax.sgd(0.2), chunk_size=4)  # compiles sooner than `sgd`
COHORT = cohort_of(range(12), WORK)
SHARED = Shared(PARAMS, COHORT.examples, jax.random.key(0), jnp.int32(0))
CLIENTS = COHORT._replace(examples=())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JFED_CACHE", str(tmp_path))
    monkeypatch.setattr(width, "_remembered", {})
    monkeypatch.setattr(width, "WIDTHS", (1, 4))
    return tmp_path / "widths.json"


def one_round(client_map, work=WORK):
    method = fedavg(work, client_map=client_map)
    return jax.jit(method.round)(method.init(PARAMS), COHORT, jax.random.key(1))[0].params


def test_lanes_of_automatic_width_train_the_same_model():
    close(one_round(lanes("auto")), one_round(vectorised()))


def test_the_choice_is_one_of_the_widths_and_is_remembered_on_disk(cache, monkeypatch):
    assert width.choose(WORK, SHARED, CLIENTS) in (1, 4)
    (chosen,) = json.loads(cache.read_text()).values()
    assert chosen in (1, 4)
    monkeypatch.setattr(width, "_remembered", {})
    monkeypatch.setattr(width, "_measure", lambda *args: pytest.fail("measured again"))
    assert width.choose(WORK, SHARED, CLIENTS) == chosen


def test_another_batch_size_is_another_choice(cache, monkeypatch):
    monkeypatch.setattr(width, "_measure", lambda *args: 4)
    for batch_size in (4, 5):
        width.choose(local.sgd(problem.loss, optax.sgd(0.2), batch_size=batch_size), SHARED, CLIENTS)
    assert len(json.loads(cache.read_text())) == 2


def test_a_small_cohort_does_not_choose_for_a_large_one(monkeypatch):
    asked = []
    monkeypatch.setattr(width, "_measure", lambda work, shared, client, widths: asked.append(widths) or widths[-1])
    few = tree.take(CLIENTS, jnp.arange(2))
    assert [width.choose(WORK, SHARED, clients) for clients in (few, CLIENTS)] == [1, 4]
    assert asked == [[1], [1, 4]]


def test_the_first_choice_written_stands(cache):
    assert width._write("a", 4) == 4 and width._write("a", 1) == 4 and width._write("b", 1) == 1
    assert json.loads(cache.read_text()) == {"a": 4, "b": 1}


def test_a_cache_that_is_not_ours_is_measured_past(cache, monkeypatch):
    monkeypatch.setattr(width, "_measure", lambda *args: 4)
    cache.write_text("not JSON")
    assert width.choose(WORK, SHARED, CLIENTS) == 4


def test_the_fastest_width_is_taken(monkeypatch):
    """A clock that says the second width is slower, or faster, per client."""
    for second, expected in ((0.39, 4), (0.41, 1)):
        ticks = iter(np.cumsum(np.ravel([[0.0, 0.1]] * 4 + [[0.0, second]] * 4)))
        monkeypatch.setattr(width, "time", types.SimpleNamespace(perf_counter=lambda ticks=ticks: next(ticks)))
        monkeypatch.setattr(width, "_remembered", {})
        assert width._measure(WORK, SHARED, tree.take(CLIENTS, 0), [1, 4]) == expected


def test_a_width_that_does_not_fit_the_memory_is_not_tried(monkeypatch):
    monkeypatch.setattr(width._machine, "free_memory", lambda: 0.0)
    assert width._measure(WORK, SHARED, tree.take(CLIENTS, 0), [1, 4]) == 1


def test_it_measures_on_the_device_that_is_the_default_where_it_is_asked(monkeypatch):
    used = []
    monkeypatch.setattr(width, "_measure", lambda *args: used.append(jnp.zeros(()).devices()) or 4)
    with jax.default_device(jax.devices()[3]):
        width.choose(WORK, SHARED, CLIENTS)
    assert used == [{jax.devices()[3]}]


@pytest.mark.slow
def test_it_measures_where_a_learning_rate_is_traced_and_where_devices_are_many():
    def trained(learning_rate, client_map):
        work = local.full_batch(problem.loss, optax.sgd(learning_rate), chunk_size=4)
        method = fedavg(work, client_map=client_map)
        return method.round(method.init(PARAMS), COHORT, jax.random.key(1))[0].params

    rates = jnp.array([0.1, 0.2])
    for client_map in (lanes("auto"), sharded(make((2,)), lanes("auto"))):
        together = jax.jit(jax.vmap(lambda r, m=client_map: trained(r, m)))(rates)
        close(jax.tree.map(lambda x: x[1], together), trained(0.2, vectorised()))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"lanes\(width='auto'\): with several processes .* give a number"):
        width.choose(WORK, SHARED, CLIENTS)


@pytest.mark.slow
def test_explain_counts_lane_steps_as_the_program_executes_them():
    """Executed lane-steps are counted by a carry that does not stop when its client does."""
    steps = COHORT.steps
    for row in explain(WORK, PARAMS, COHORT, widths=(1, 5), repeats=1).rows:
        executed = []
        work = WORK._replace(
            step=lambda shared, client, carry, t, seen=executed: (
                jax.debug.callback(lambda i: seen.append(int(i)), client.ids),
                WORK.step(shared, client, carry, t),
            )[1]
        )
        run = jax.jit(lambda s, c, w=work, n=row["width"]: lanes(n)(w, s, c))
        jax.block_until_ready(run(SHARED, CLIENTS))
        jax.effects_barrier()
        assert row["in_use"] == pytest.approx(int(steps.sum()) / len(executed))
        assert row["seconds"] > 0 and row["predicted_bytes"] > 0 and row["peak_growth_bytes"] >= 0


def test_lanes_are_in_use_19_times_in_20_for_heavy_tailed_cohorts_of_200():
    rng = np.random.default_rng(0)
    for _ in range(20):
        steps = np.ceil(np.clip(rng.lognormal(np.log(100) - 0.5, 1.0, 200), 10, 1000) / 10).astype(int)
        assert width.in_use(steps, 16) >= 0.95


def test_an_explanation_prints_a_table_that_marks_the_automatic_choice():
    found = explain(WORK, PARAMS, COHORT, widths=(1, 4), repeats=1)
    head, first, second = str(found).splitlines()
    assert "lanes in use" in head and len({len(line) for line in (head, first, second)}) == 1
    assert ("auto" in first, "auto" in second) == (found.auto == 1, found.auto == 4)


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"widths": (0,)}])
def test_numbers_that_are_no_counts_are_refused(bad):
    with pytest.raises(ValueError, match=r"explain\(.*=0\)"):
        explain(WORK, PARAMS, COHORT, **bad)
