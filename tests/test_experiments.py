"""Every script in experiments/ runs, resumes, and says what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
SCRIPTS = {
    "quickstart": [],
    "fedavg_mnist": ["--split", "shards"],
    "fedavg_shakespeare": [],
}


def run_script(name, *arguments):
    env = os.environ | {"PYTHONPATH": str(HOUSE), "JFED_DATA": str(HOUSE / "nowhere")}
    command = [sys.executable, str(HOUSE / "experiments" / f"{name}.py"), *SCRIPTS.get(name, []), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_every_script_is_listed_here():
    assert {path.stem for path in (HOUSE / "experiments").glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_smoke_run_ends_with_its_summary_and_can_be_resumed(name, tmp_path):
    out = tmp_path / "run"
    first = run_script(name, "--smoke", "--seeds", "2", "--out", str(out))
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert summary == json.loads((out / "summary.json").read_text())
    assert {"accuracy", "rounds", "bytes_up", "bytes_down", "seconds"} <= set(summary)
    assert summary["bytes_up"] > 0 and 0 < summary["accuracy"] < 1 and summary["seeds"] == 2
    assert list(out.rglob("accuracy.png")) and list(out.glob("seed_1/metrics.jsonl"))

    again = run_script(name, "--smoke", "--seeds", "2", "--out", str(out))
    assert again.returncode != 0 and "continue it with --resume or choose another --out" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1

    resumed = run_script(name, "--smoke", "--seeds", "2", "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quickstart", ["--cohort", "2000"], "uniform(cohort_size=2000): the population has 50 clients"),
        ("quickstart", ["--alpha", "0"], "alpha"),
        ("quickstart", ["--batch-size", "0"], "sgd(batch_size=0)"),
        ("quickstart", ["--seeds", "0"], "quickstart(seeds=0)"),
    ],
)
def test_bad_settings_end_in_one_line(name, arguments, message, tmp_path):
    # --smoke replaces some settings, so it comes without those that are given here.
    smoke = ["--num-clients", "50", "--rounds", "1", "--epochs", "1", "--centralised-epochs", "1"]
    result = run_script(name, *smoke, *arguments, "--out", str(tmp_path / "run"))
    assert result.returncode != 0 and message in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1


def test_an_unwritable_run_folder_ends_in_one_line_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run_script("quickstart", "--out", str(tmp_path / "file" / "run"))
    assert result.returncode != 0 and "cannot be written" in result.stderr


def test_a_missing_data_set_ends_in_one_line_that_says_what_to_do():
    result = run_script("fedavg_mnist")
    assert result.returncode != 0 and result.stderr.startswith("error: ") and "JFED_DATA" in result.stderr
