"""The run folder tells the truth, whatever interrupts the run; what is shown is plain and legible."""

import dataclasses
import enum
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jfed import plot, report

CONFIG = {"method": "fedavg", "client": {"learning_rate": 0.1, "batch": 20}, "seeds": [0, 1]}


def digest(folder):
    """Every path below a folder with its content."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in sorted(folder.rglob("*"))
    }


def refuses(folder, match, action):
    """Whether `action` raises a one-line ValueError and leaves the folder untouched."""
    before = digest(folder)
    with pytest.raises(ValueError, match=match) as info:
        action()
    assert "\n" not in str(info.value)
    assert digest(folder) == before


# The run folder.


def test_a_new_run_writes_its_config_and_environment(tmp_path):
    run = report.open_run(tmp_path / "a" / "b", CONFIG)
    written = json.loads((run.folder / "config.json").read_text())
    assert written["config"] == CONFIG
    assert {"jfed", "jax", "python", "platform", "device"} <= set(written["environment"])
    assert run.checkpoints.is_dir() and report.rows(run.folder) == [] and not run.finished


def test_a_config_may_be_a_dataclass_with_paths_enums_tuples_and_infinity(tmp_path):
    Kind = enum.Enum("Kind", ["IID", "DIRICHLET"])

    @dataclasses.dataclass(frozen=True)
    class Config:
        kind: Kind = Kind.DIRICHLET
        out: Path = Path("runs")
        widths: tuple = (1, np.int64(2))
        alpha: float = float("inf")

    run = report.open_run(tmp_path / "r", Config())
    assert run.config == {"kind": "DIRICHLET", "out": "runs", "widths": [1, 2], "alpha": "inf"}
    assert report.open_run(tmp_path / "r", Config(), resume=True).config == run.config


def test_a_config_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    refuses(
        tmp_path,
        r"config\['loss'\]=.*: a function is not JSON; give numbers",
        lambda: report.open_run(tmp_path / "r", {"loss": lambda x: x}),
    )


def test_an_existing_run_is_not_started_again(tmp_path):
    report.open_run(tmp_path, CONFIG)
    match = "holds a run already; continue it with --resume or choose another --out"
    refuses(tmp_path, match, lambda: report.open_run(tmp_path, CONFIG))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_text("sea")
    for resume in (False, True):
        refuses(
            tmp_path,
            "holds holiday.jpg but no run",
            lambda: report.open_run(tmp_path, CONFIG, resume=resume),  # noqa: B023
        )


def test_resume_starts_a_run_that_is_not_there(tmp_path):
    assert not report.open_run(tmp_path / "r", CONFIG, resume=True).finished


def test_resume_with_another_config_names_what_differs(tmp_path):
    report.open_run(tmp_path, CONFIG)
    other = {"method": "fedavg", "client": {"learning_rate": 0.2}, "seeds": [0, 1], "rounds": 5}
    match = (
        r"another config \(client.learning_rate was 0.1, is 0.2, client.batch was 20, is 'absent', "
        r"rounds was 'absent', is 5\); use the old one or choose another --out"
    )
    refuses(tmp_path, match, lambda: report.open_run(tmp_path, other, resume=True))


def test_a_damaged_config_is_refused(tmp_path):
    report.open_run(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text('{"con')
    refuses(tmp_path, "config.json is damaged", lambda: report.open_run(tmp_path, CONFIG, resume=True))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    # Below a regular file: permissions would not stop a test that runs as root.
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        refuses(tmp_path, r"cannot be written \(.*\); choose another --out", lambda: report.open_run(path, CONFIG))  # noqa: B023


def test_only_the_writer_writes(tmp_path, capsys):
    run = report.open_run(tmp_path / "r", CONFIG, writer=False)
    report.log(run, {"round": 1})
    report.rewind(run, 0)
    report.finish(run, {})
    assert not run.folder.exists() and capsys.readouterr().out == ""


# Metrics.


def test_rows_come_back_as_logged_in_strict_json(tmp_path):
    run = report.open_run(tmp_path, CONFIG)
    values = [np.float32(0.5), jnp.bfloat16(0.5), jnp.arange(2), np.bool_(True), float("nan"), jnp.inf, None]
    report.log(run, {"round": np.int64(1)} | {str(i): v for i, v in enumerate(values)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and "NaN" not in text and "Infinity" not in text
    assert list(report.rows(tmp_path)[0].values()) == [1, 0.5, 0.5, [0, 1], True, None, None, None]


def test_a_row_needs_a_round(tmp_path):
    run = report.open_run(tmp_path, CONFIG)
    for row in ({"loss": 1.0}, {"round": 1.5}, {"round": True}):
        refuses(tmp_path, "needs a whole number under 'round'", lambda: report.log(run, row))  # noqa: B023


@pytest.mark.parametrize("torn", ['{"round": 2, "lo', '{"round": 2}', "", "\x00\x00"])
def test_a_last_line_torn_by_a_kill_is_ignored_and_mended_on_resume(tmp_path, torn):
    run = report.open_run(tmp_path, CONFIG)
    report.log(run, {"round": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert report.rows(tmp_path) == [{"round": 1}]
    report.log(report.open_run(tmp_path, CONFIG, resume=True), {"round": 2})
    assert report.rows(tmp_path) == [{"round": 1}, {"round": 2}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run = report.open_run(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    refuses(tmp_path, "line 2 of metrics.jsonl is damaged", lambda: report.rows(tmp_path))
    refuses(tmp_path, "line 2 of metrics.jsonl is damaged", lambda: report.rewind(run, 1))


def test_a_folder_without_metrics_is_refused(tmp_path):
    refuses(tmp_path, "holds no metrics.jsonl; give the folder of a run", lambda: report.rows(tmp_path))


LOGGER = """
import sys
from jfed import report
run = report.open_run(sys.argv[1], {"rounds": int(sys.argv[2])}, resume=True)
first = max([row["round"] for row in report.rows(run.folder)], default=0) // 10 * 10  # a checkpoint every ten rounds
report.rewind(run, first)
print("ready", flush=True)
for r in range(first + 1, run.config["rounds"] + 1):
    report.log(run, {"round": r, "loss": 1 / r, "note": "x" * (r % 7)})
report.finish(run, {"rounds": r})
"""


@pytest.mark.slow
def test_metrics_of_a_killed_and_resumed_run_equal_those_of_one_that_was_not(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(report.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", LOGGER]
    arguments = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    for rounds in (40, 130, 700):
        process = subprocess.Popen([*command, str(tmp_path / "killed"), "2000"], **arguments)
        process.stdout.readline()
        while process.poll() is None and len(report.rows(tmp_path / "killed")) < rounds:
            time.sleep(0.001)
        process.kill()  # SIGKILL
        process.communicate()
        assert process.returncode == -9
    killed = subprocess.run([*command, str(tmp_path / "killed"), "2000"], check=True, **arguments)
    whole = subprocess.run([*command, str(tmp_path / "whole"), "2000"], check=True, **arguments)
    for name in ("metrics.jsonl", "config.json", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert killed.stdout == whole.stdout == 'ready\n{"rounds": 2000}\n'


def test_rewind_drops_later_rows_and_nothing_else(tmp_path):
    run = report.open_run(tmp_path, CONFIG)
    for r in range(1, 6):
        report.log(run, {"round": r, "loss": 0.1 * r})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    report.rewind(run, 3)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:3]
    assert not list(tmp_path.glob("*.tmp"))


# The summary.


def test_finish_prints_the_summary_as_the_last_line_of_stdout(tmp_path, capsys):
    run = report.open_run(tmp_path, CONFIG)
    report.finish(run, {"accuracy": np.float64(0.5), "loss": float("nan"), "per_seed": jnp.array([1.0, 2.0])})
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "summary.json").read_text()
    assert json.loads(printed) == {"accuracy": 0.5, "loss": None, "per_seed": [1.0, 2.0]} == run.summary


def test_a_finished_run_resumes_to_finished_and_prints_the_same_line_again(tmp_path, capsys):
    report.finish(report.open_run(tmp_path, CONFIG), {"accuracy": 0.1})
    first = capsys.readouterr().out
    run = report.open_run(tmp_path, CONFIG, resume=True)
    assert run.finished
    report.finish(run, run.summary)
    assert capsys.readouterr().out == first


# The terminal.


def test_progress_off_a_terminal_is_plain_lines_on_stderr(capsys):
    with report.progress(30, "FedAvg", seconds=0.0) as advance:
        for r in range(3):
            advance(10, loss=jnp.float32(0.5 / (r + 1)))
    captured = capsys.readouterr()
    assert captured.out == "" and "\x1b" not in captured.err and "\r" not in captured.err
    lines = captured.err.splitlines()
    assert [line.split(" rounds")[0] for line in lines] == ["FedAvg 10/30", "FedAvg 20/30", "FedAvg 30/30"]
    assert re.fullmatch(r"FedAvg 10/30 rounds · \S+ rounds/s · .* left · loss 0.5", lines[0])


def test_progress_off_a_terminal_keeps_to_the_first_and_last_line_of_a_short_loop(capsys):
    with report.progress(1000, "FedAvg") as advance:
        for _ in range(1000):
            advance()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_progress_on_a_terminal_is_a_bar_with_the_latest_metrics(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    with report.progress(20, "FedAvg", start=10) as advance:
        advance(10, loss=0.25)
    written = sys.stderr.getvalue()
    assert "\x1b[" in written and "20/20" in written and "loss 0.25" in written


def test_progress_fetches_metrics_only_when_it_shows_them():
    fetched = []

    class Metric:
        def __float__(self):
            fetched.append(1)
            return 0.0

    with report.progress(1000, "FedAvg") as advance:
        for _ in range(999):
            advance(loss=Metric())
    assert len(fetched) == 1


def test_progress_of_nothing_is_refused():
    with (
        pytest.raises(ValueError, match=r"progress\(total=0\): total must be .* above 0; give the number of rounds"),
        report.progress(0, "FedAvg"),
    ):
        pass


def test_a_table_shows_every_row_whole_however_wide():
    text = report.table("t", [{"name": "x" * 300, "mean [0, 1]": 0.123456, "n": 3, "none": None}])
    assert "x" * 300 in text and "0.1235" in text and "mean [0, 1]" in text and "–" in text
    assert "\x1b" not in text


# Pictures.


def size_of_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize(
    "curves",
    [
        {"many points": (range(100), np.linspace(0, 1, 100)), "with a gap": ([1, 2, 3], [0.1, None, 0.3])},
        {"one point": ([1], [0.5])},
        {"nothing finite": ([1, 2], [np.nan, np.nan])},
        {str(i): ([0, 1], [0.5, 0.5]) for i in range(12)},
    ],
)
def test_curves_are_drawn_for_what_runs_produce(tmp_path, curves):
    path = tmp_path / "new" / "curves.png"
    plot.plot_curves(path, curves, xlabel="round", ylabel="accuracy", title="t", reference={"centralised": 0.8})
    assert size_of_png(path) == (1152, 688)


@pytest.mark.parametrize("values", [np.linspace(0, 1, 50) ** 2, [0.5], [1.0] * 9 + [np.nan], jnp.ones(3)])
def test_distributions_are_drawn_for_what_clients_produce(tmp_path, values):
    plot.plot_distribution(tmp_path / "d.png", values, xlabel="accuracy", title="t")
    assert size_of_png(tmp_path / "d.png") == (1152, 688)


@pytest.mark.parametrize("log_x", [False, True])
def test_points_are_drawn_group_by_group_and_an_empty_one_left_out(tmp_path, log_x):
    groups = {"plain": {f"a{i}": (1.0 + i / 50, 50.0) for i in range(12)}, "none": {}, "other": {"b": (3.0, 60.0)}}
    path = tmp_path / "points.png"
    plot.plot_points(path, groups, xlabel="kB", ylabel="accuracy, %", title="t", log_x=log_x)
    assert size_of_png(path) == (1152, 688)


@pytest.mark.parametrize(("steps", "across", "down"), [(2, 2, 1), (5, 4, 2)])
def test_chunks_are_drawn_step_by_step_at_most_four_in_a_line(tmp_path, steps, across, down):
    held = plot.Chunks([[1, 3, 0], [1, 1, 2]], [["0", "012", ""], ["1", "1", "12"]], [(0, 1, 2), (1, 0, 1)])
    phases = {"reduce-scatter": {f"hop {i}": held for i in range(steps)}, "all-gather": {"start": held}}
    plot.plot_chunks(tmp_path / "new" / "chunks.png", phases, title="t")
    high, wide = size_of_png(tmp_path / "new" / "chunks.png")[::-1]
    assert (high, wide) == (int(160 * ((down + 1) * (0.56 * 2 + 0.8) + 1.1)), int(160 * (across * 2.18 + 0.4)))


def test_what_cannot_be_drawn_is_refused(tmp_path):
    labels = {"xlabel": "", "ylabel": "", "title": ""}
    with pytest.raises(ValueError, match=r"curves=\{\}\): needs at least one curve"):
        plot.plot_curves(tmp_path / "c.png", {}, **labels)
    with pytest.raises(ValueError, match="at least one point"):
        plot.plot_points(tmp_path / "c.png", {"plain": {}}, **labels)
    with pytest.raises(ValueError, match=r"curves\['a'\]\): x has shape \(2,\), y \(3,\); give equal lengths"):
        plot.plot_curves(tmp_path / "c.png", {"a": ([1, 2], [1, 2, 3])}, **labels)
    with pytest.raises(ValueError, match="needs at least one finite value"):
        plot.plot_distribution(tmp_path / "d.png", [np.nan], xlabel="", title="")
    with pytest.raises(ValueError, match=r"phases=\{\}\): needs at least one step"):
        plot.plot_chunks(tmp_path / "e.png", {}, title="")
    with pytest.raises(ValueError, match=r"'ring: hop 1'\): counts and words have shapes \(1, 2\) and \(1, 1\)"):
        plot.plot_chunks(tmp_path / "e.png", {"ring": {"hop 1": plot.Chunks([[1, 1]], [["0"]], [])}}, title="")


def test_pictures_leave_the_global_state_of_matplotlib_alone(tmp_path):
    program = (
        "import sys; from jfed import plot, report; assert not {'matplotlib', 'rich'} & set(sys.modules);"
        f"plot.plot_curves({str(tmp_path / 'c.png')!r}, {{'a': ([1], [2])}}, xlabel='', ylabel='', title='');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(report.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([0.9, 0.95, 1.0], 10.0),  # above the target from the first point on
        ([math.nan, 0.5, 0.9], 25.0),
        ([0.5, math.nan, 0.9], 25.0),  # from the last that was a number
        ([0.6, 0.4, 0.8], 25.0),  # from the best so far
        ([0.1, 0.2, math.nan], None),
        ([], None),
    ],
)
def test_a_target_is_reached_between_the_best_so_far_and_the_first_above(values, place):
    found = report.reached([10.0, 20.0, 30.0][: len(values)], values, 0.7)
    assert found == (place if place is None else pytest.approx(place))
    rows = [{"round": 10 * i + 10, "a": None if v != v else v} for i, v in enumerate(values)]
    assert report.rounds_to(rows, "a", 0.7) == found


def test_a_spread_has_no_deviation_of_one_value():
    assert report.spread("loss", [2.0]) == {"loss": 2.0}
    assert math.isnan(report.spread("loss", [2.0, math.nan])["loss"])


def test_fairness_of_one_value_for_all_has_no_variance():
    spread = report.fairness(np.full(37, 80.0))
    assert spread == {"mean": 80.0, "worst_tenth": 80.0, "best_tenth": 80.0, "variance": 0.0}


def test_fairness_takes_the_tenths_at_both_ends():
    values = np.random.default_rng(0).permutation(np.arange(100.0))
    spread = report.fairness(values)
    assert (spread["worst_tenth"], spread["best_tenth"]) == (np.arange(10).mean(), np.arange(90, 100).mean())
    assert spread["variance"] == pytest.approx((100**2 - 1) / 12)


@pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (7, 6, 2)])
def test_graphs_are_drawn_a_panel_each_at_most_six_in_a_line(tmp_path, count, across, down):
    graph = plot.Graph([[(0, 1), (1, 0), (1, 2)], [(0, 2)]], [[0, 0], [1, 0], [2, 0]], "gap 0.5")
    plot.plot_graphs(tmp_path / "new" / "graphs.png", {f"g{i}": graph for i in range(count)}, title="t")
    wide, high = size_of_png(tmp_path / "new" / "graphs.png")
    assert (wide, high) == pytest.approx((160 * (1.9 * across + 0.2), 160 * (2.3 * down + 0.8)), abs=1)


def test_curves_may_be_held_against_what_is_expected_on_logarithmic_axes(tmp_path):
    curves = {"a": ([1, 10, 100], [1.0, 0.1, 0.0]), "b": ([1, 10], [0.5, None])}
    words = {"xlabel": "kB", "ylabel": "error", "title": "t"}
    plot.plot_curves(tmp_path / "c.png", curves, expected={"a": ([1, 100], [1, 0.01])}, log_x=True, log_y=True, **words)
    assert size_of_png(tmp_path / "c.png") == (1152, 688)
    with pytest.raises(ValueError, match=r"expected=\['c'\]\): there are no curves of these names"):
        plot.plot_curves(tmp_path / "c.png", curves, expected={"c": ([1], [1])}, **words)
    with pytest.raises(ValueError, match=r"expected\['a'\]\): x has shape \(1,\), y \(2,\)"):
        plot.plot_curves(tmp_path / "c.png", curves, expected={"a": ([1], [1, 2])}, **words)


def test_a_graph_without_places_for_its_peers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"graphs=\{\}\): needs at least one graph"):
        plot.plot_graphs(tmp_path / "g.png", {}, title="t")
    with pytest.raises(ValueError, match=r"'ring'\): positions have shape \(2, 2\), and edges go to peer 2"):
        plot.plot_graphs(tmp_path / "g.png", {"ring": plot.Graph([[(0, 2)]], plot.circle(2))}, title="t")
