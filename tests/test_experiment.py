import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION

from jfed import checkpoint, data, experiment, local, report, run, sampling
from jfed.algorithms import fedavgm
from jfed.clients import lanes
from jfed.core import Algorithm, Traffic

KEY = jax.random.key(2)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
METHOD = fedavgm(WORK, client_map=lanes(3))
SAMPLER = sampling.uniform(5, steps=WORK.steps)


def recorded(folder, rounds, *, stop_after=None, key=KEY, resume=False, population=POPULATION, streaming=None):
    """Rows and final params of a recorded run, left after `stop_after` yields as a kill would leave it."""
    opened = report.open_run(folder, {"rounds": rounds}, resume=resume)
    rows = []
    for row, params in experiment.record(
        opened,
        METHOD,
        SAMPLER,
        population,
        PARAMS,
        key,
        rounds=rounds,
        every=2,
        judge=lambda params: run.evaluate(problem.metrics, params, POPULATION.examples),
        streaming=streaming,
    ):
        rows.append(row)
        if len(rows) == stop_after:
            break
    return rows, params


def test_over_devices_trains_the_model_that_one_device_does(tmp_path):
    client_map, place = experiment.over_devices(lanes(2))
    method = fedavgm(WORK, client_map=client_map)
    params, key = place(PARAMS), place(KEY)
    assert len(params["w"].devices()) == jax.device_count() == 8
    opened = report.open_run(tmp_path / "run", {})
    for _, trained in experiment.record(opened, method, SAMPLER, place(POPULATION), params, key, rounds=2):
        pass
    state, _ = run.scan_rounds(METHOD, SAMPLER, POPULATION, METHOD.init(PARAMS), KEY, rounds=2)
    problem.close(trained, state.params)


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_recorded_run_equals_the_plain_one_and_leaves_its_rows(tmp_path):
    rows, params = recorded(tmp_path / "run", 5)
    state, _ = run.scan_rounds(METHOD, SAMPLER, POPULATION, METHOD.init(PARAMS), KEY, rounds=5)
    problem.close(params, state.params)
    assert report.rows(tmp_path / "run") == rows
    assert [row["round"] for row in rows] == [2, 4, 5]
    numbers = 4 * 3 + 3
    assert [row["bytes_up"] for row in rows] == [4 * numbers * 5 * r for r in (2, 4, 5)]
    assert rows[-1]["bytes_down"] == rows[-1]["bytes_up"]


def test_a_recorded_run_of_clients_on_the_host_has_the_rows_of_one_on_the_device(tmp_path):
    rows, params = recorded(tmp_path / "device", 5)
    examples = jax.tree.map(np.asarray, POPULATION.examples)
    source = data.on_host(examples, np.asarray(POPULATION.size))
    host = {"population": source, "streaming": {"capacity": int(source.size.sum())}}
    streamed, same = recorded(tmp_path / "host", 5, **host)
    problem.close(same, params)
    recorded(tmp_path / "cut", 5, stop_after=1, **host)
    problem.close(recorded(tmp_path / "cut", 5, resume=True, **host)[1], same, tolerance=0)
    with pytest.raises(ValueError, match=r"record\(streaming=.*: the population is on the device; leave it out"):
        recorded(tmp_path / "wrong", 5, streaming={"capacity": 9})
    assert [row["round"] for row in streamed] == [2, 4, 5]
    for ours, theirs in zip(streamed, rows, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        assert ours["steps"] == theirs["steps"]


def test_a_recorded_run_resumed_ends_in_the_same_bits_and_rows(tmp_path):
    rows, params = recorded(tmp_path / "whole", 8)
    recorded(tmp_path / "cut", 8, stop_after=2)
    report.log(
        report.open_run(tmp_path / "cut", {"rounds": 8}, resume=True), {"round": 6, "note": "past the checkpoint"}
    )
    _, resumed = recorded(tmp_path / "cut", 8, resume=True)
    problem.close(resumed, params, tolerance=0)
    assert without_seconds(report.rows(tmp_path / "cut")) == without_seconds(rows)


def test_a_run_killed_after_its_last_round_only_repeats_its_last_row(tmp_path):
    rows, params = recorded(tmp_path / "run", 4)
    again, same = recorded(tmp_path / "run", 4, resume=True)
    assert again == rows[-1:]
    problem.close(same, params, tolerance=0)


def test_a_checkpoint_made_with_another_key_is_refused(tmp_path):
    recorded(tmp_path / "run", 4, stop_after=1)
    with pytest.raises(ValueError, match="made with another key"):
        recorded(tmp_path / "run", 4, key=jax.random.key(3), resume=True)


def test_bytes_past_32_bits_are_counted(tmp_path):
    huge = Algorithm(
        init=lambda params: jnp.zeros(()),
        round=lambda state, cohort, key: (
            state,
            {"traffic": Traffic(cohort.ids, up=jnp.full(cohort.ids.shape, 3_000_000_000, jnp.uint32),
                                down=jnp.zeros(cohort.ids.shape, jnp.uint32))},
        ),
        params=lambda state: state,
    )  # fmt: skip
    opened = report.open_run(tmp_path / "run", {})
    rows = [row for row, _ in experiment.record(opened, huge, SAMPLER, POPULATION, PARAMS, KEY, rounds=3, every=3)]
    assert (rows[-1]["bytes_up"], rows[-1]["bytes_down"]) == (45_000_000_000, 0)
    assert checkpoint.latest(opened.checkpoints) == 3


def options(**given):
    return experiment.Options(**given)


def counted(calls):
    def one_seed(run, key):
        calls.append(int(jax.random.key_data(key)[-1]))
        return {"accuracy": float(len(calls)), "rounds": 5, "reached": None if len(calls) == 1 else 3.0, "word": "x"}

    return one_seed


def test_over_seeds_reports_means_and_sample_deviations(tmp_path):
    _, summary = experiment.over_seeds("test", options(out=tmp_path / "run", seeds=2), counted([]))
    assert summary == {
        "seeds": 2,
        "accuracy": 1.5,
        "accuracy_std": pytest.approx(0.5**0.5),
        "rounds": 5.0,
        "rounds_std": 0.0,
        "reached": None,
        "word": "x",
    }


def test_over_seeds_does_not_repeat_a_finished_seed(tmp_path):
    calls = []
    experiment.over_seeds("test", options(out=tmp_path / "run", seeds=2), counted(calls))
    (tmp_path / "run" / "seed_1" / "summary.json").unlink()
    experiment.over_seeds("test", options(out=tmp_path / "run", seeds=2, resume=True), counted(calls))
    assert calls == [0, 1, 1]


def test_seeds_may_be_added_to_a_finished_experiment(tmp_path):
    calls = []
    for seeds, resume in ((1, False), (3, True)):
        _, summary = experiment.over_seeds(
            "test", options(out=tmp_path / "run", seeds=seeds, resume=resume), counted(calls)
        )
    assert calls == [0, 1, 2] and summary["seeds"] == 3


def test_a_start_that_fails_leaves_no_folder_in_the_way(tmp_path):
    def broken(run, key):
        raise ValueError("cohort too large")

    with pytest.raises(ValueError, match="cohort too large"):
        experiment.over_seeds("test", options(out=tmp_path / "run"), broken)
    assert not (tmp_path / "run").exists()


def test_a_failure_after_something_was_recorded_leaves_it(tmp_path):
    def broken(run, key):
        report.log(run, {"round": 1})
        raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        experiment.over_seeds("test", options(out=tmp_path / "run"), broken)
    assert report.rows(tmp_path / "run" / "seed_0") == [{"round": 1}]


def test_resuming_needs_the_folder_to_resume():
    with pytest.raises(ValueError, match="give the run's folder as --out"):
        experiment.over_seeds("test", options(resume=True), counted([]))


@dataclasses.dataclass(frozen=True)
class Settings(experiment.Options):
    rounds: int = 100
    epochs: int = 5


def test_smoke_replaces_only_settings_that_were_not_given(monkeypatch):
    chosen = []
    monkeypatch.setattr("sys.argv", ["script", "--smoke", "--rounds", "7"])
    experiment.cli(chosen.append, Settings, smoke={"rounds": 2, "epochs": 1})
    assert (chosen[0].rounds, chosen[0].epochs) == (7, 1)


def test_a_run_without_a_folder_gets_a_new_one_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, _ = experiment.over_seeds("test", options(), counted([]))
    assert whole.folder.parent == tmp_path / "runs" and whole.folder.name.startswith("test-")


def test_an_experiment_tells_how_evenly_its_model_serves_the_clients(tmp_path, capsys):
    opened = report.open_run(tmp_path / "run", {}, resume=False)
    accuracies = np.append(np.linspace(0.5, 0.9, 20), np.nan)
    found = experiment.fairness(opened, accuracies, judged_on="the client's test images")
    assert (opened.folder / "clients.png").exists()
    assert found["clients_mean"] == pytest.approx(70.0)
    assert found["clients_worst_tenth"] == pytest.approx(100 * (0.5 + 0.9 - 0.4 * 18 / 19) / 2)
    experiment.conclude(opened, "A model", {}, found | {"bytes_up": 0, "bytes_down": 0, "seconds": 0.0})
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("mean of clients", "70.0 %", "worst 10 % of clients", "51.1 %"))
    assert "best 10 % of clients" in shown and f"{np.nanvar(100 * accuracies):.1f}" in shown


def test_a_lost_process_is_named_with_what_resumes_the_run(tmp_path, monkeypatch):
    broken = "INTERNAL: Gloo collective permute failed: Read error [127.0.0.1]:29877: Connection reset by peer"

    def fails(state, cohort, key):
        raise RuntimeError(broken)

    def run_it(folder):
        opened = report.open_run(folder, {})
        for _ in experiment.record(opened, METHOD._replace(round=fails), SAMPLER, POPULATION, PARAMS, KEY, rounds=2):
            pass

    with pytest.raises(RuntimeError, match="Gloo"):  # alone, it is what it is
        run_it(tmp_path / "alone")
    monkeypatch.setattr(experiment.jax, "process_count", lambda: 2)
    with pytest.raises(
        ConnectionError, match="another process of this run is gone.*reset by peer.*--resume, from round 0"
    ):
        run_it(tmp_path / "two")


@pytest.mark.parametrize("told", ["told", None])
def test_programs_are_kept_where_jax_is_told_and_else_in_the_cache_folder(told, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # put back what `cli` adds
    monkeypatch.setenv("JFED_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    before, kept = jax.config.jax_compilation_cache_dir, []
    jax.config.update("jax_compilation_cache_dir", told)
    try:
        experiment.cli(lambda _: kept.append(jax.config.jax_compilation_cache_dir), experiment.Options, smoke={})
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert kept == [told or str(tmp_path / "compiled")]
