"""Every script in experiments/ runs, resumes, and says what it found."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
SCRIPTS = {
    "quickstart": [],
    "fedavg_mnist": ["--split", "shards"],
    "fedavg_shakespeare": [],
    "imbalance": [],
    "train_lm": [],
}
# These compare methods, a cell of a table at a time, and have no single curve.
COMPARISONS = [
    "adaptive_servers",
    "async_vs_sync",
    "choco",
    "compression_frontier",
    "data_parallel_costs",
    "decentralised_noniid",
    "diloco",
    "distributed_mean",
    "dropped_messages",
    "fairness_qfedavg",
    "fedprox_stragglers",
    "four_types",
    "gossip_topologies",
    "hybrid_alexnet",
    "model_parallel_costs",
    "niid_bench",
    "personalisation",
    "pipeline_schedules",
    "pruning",
    "quantization_bits",
    "ring_allreduce",
    "robust_aggregation",
    "scaffold_similarity",
    "sync_vs_async",
]


def run_script(name, *arguments):
    """Runs a script in a home of its own, where no data set lies about."""
    with tempfile.TemporaryDirectory() as home:
        places = ("HOME", "JFED_DATA", "XDG_CACHE_HOME", "KERAS_HOME", "HF_HOME", "HF_DATASETS_CACHE")
        # As users do: what is not optimized takes several times as long to train as it saves in compiling.
        flags = os.environ["XLA_FLAGS"].replace("--xla_backend_optimization_level=0", "")
        env = os.environ | dict.fromkeys(places, home) | {"PYTHONPATH": str(HOUSE), "XLA_FLAGS": flags}
        command = [sys.executable, str(HOUSE / "experiments" / f"{name}.py"), *SCRIPTS.get(name, []), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=home)


def test_every_script_is_listed_here():
    assert {path.stem for path in (HOUSE / "experiments").glob("*.py")} == {*SCRIPTS, *COMPARISONS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_smoke_run_ends_with_its_summary_and_can_be_resumed(name, tmp_path):
    out = tmp_path / "run"
    first = run_script(name, "--smoke", "--seeds", "2", "--out", str(out))
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert summary == json.loads((out / "summary.json").read_text())
    assert {"accuracy", "rounds", "bytes_up", "bytes_down", "seconds"} <= set(summary)
    assert summary["bytes_up"] > 0 or name == "train_lm"  # which has no clients
    assert 0 < summary["accuracy"] < 1 and summary["seeds"] == 2
    assert list(out.rglob("accuracy.png")) and list(out.glob("seed_1/metrics.jsonl"))

    again = run_script(name, "--smoke", "--seeds", "2", "--out", str(out))
    assert again.returncode != 0 and "continue it with --resume or choose another --out" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1

    resumed = run_script(name, "--smoke", "--seeds", "2", "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_ends_with_its_summary_and_resumes_with_the_next_cell(name, tmp_path):
    out = tmp_path / "run"
    first = run_script(name, "--smoke", "--seeds", "2", "--out", str(out))
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1]) == json.loads((out / "summary.json").read_text())
    assert list(out.rglob("*.png"))

    again = run_script(name, "--smoke", "--seeds", "2", "--out", str(out))
    assert again.returncode != 0 and "continue it with --resume or choose another --out" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1

    cells = sorted(out.glob("*/summary.json"))
    cells[-1].unlink()  # as if killed before the last was done
    held = [path.stat().st_mtime_ns for path in cells[:-1]]
    resumed = run_script(name, "--smoke", "--seeds", "2", "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    one, other = (json.loads(run.stdout.splitlines()[-1]) for run in (first, resumed))
    one.pop("seconds", None), other.pop("seconds", None)
    assert one == other
    assert [path.stat().st_mtime_ns for path in cells[:-1]] == held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cohort", "2000"], "uniform(cohort_size=2000): the population has 50 clients"),
        (["--alpha", "0"], "dirichlet(alpha=0.0)"),
        (["--batch-size", "0"], "sgd(batch_size=0)"),
        (["--seeds", "0"], "quickstart(seeds=0)"),
    ],
)
def test_bad_settings_end_in_one_line_and_leave_no_folder(arguments, message, tmp_path):
    result = run_script("quickstart", "--smoke", *arguments, "--out", str(tmp_path / "run"))
    assert result.returncode != 0 and message in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_folder_ends_in_one_line_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run_script("quickstart", "--out", str(tmp_path / "file" / "run"))
    assert result.returncode != 0 and "cannot be written" in result.stderr
    assert "rounds/s" not in result.stderr


def test_a_missing_data_set_ends_in_one_line_that_says_what_to_do():
    result = run_script("fedavg_mnist")
    assert result.returncode != 0 and result.stderr.startswith("error: ") and "JFED_DATA" in result.stderr
