"""Benchmarks that start other processes still run; what they measure is in benchmarks/RESULTS.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def smoke(script, *arguments, **env):
    env |= {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS", *env)}
    command = [sys.executable, FOLDER / script, "--smoke", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_peers_of_a_round_agree(tmp_path):
    shown = smoke("simulation.py", "--tasks", "logreg", "--sizes", "heavy", "--out", tmp_path / "found.json")
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert {"jfed", "jfed, 1 device", "JAX scan", "JAX vmap"} <= found.keys() and "JAX vmap" in shown
    assert [name for name, row in found.items() if "error" in row or row["differs"]] == []
    assert found["jfed"]["compiled_later"] == 0


@pytest.mark.slow
def test_devices_and_processes_end_at_one_loss():
    *_, one, two, two_processes = smoke("scaling.py").splitlines()
    assert one.split()[-1] == two.split()[-1] == two_processes.split()[-1]
    assert float(one.split()[-1]) > 0


@pytest.mark.slow
def test_compressors_are_measured():
    shown = smoke("compressors.py", "--parts", "top_k", "operators")
    assert "exact / lax.top_k" in shown and "error_feedback(scaled_sign)" in shown and "copy / both" in shown


@pytest.mark.slow
def test_collectives_are_counted_and_timed_on_devices_and_processes():
    shown = smoke("collectives.py", "--parts", "theory", "time")
    assert shown.count(" equal") == 12 and "differs" not in shown
    assert "2 virtual devices" in shown and "2 processes of one device" in shown


def test_the_tpu_compiler_accepts_all_collectives_and_sends_asynchronously():
    pytest.importorskip("libtpu")
    shown = smoke("collectives.py", "--parts", "tpu", JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    found = {row[0]: (int(row[1]), int(row[2])) for row in rows if len(row) > 4 and row[1].isdigit()}
    assert found.pop("psum") == found.pop("data_parallel step, psum") == (0, 0)
    assert len(found) == 11 + 2 and all(0 < sent == apart for sent, apart in found.values()), found


@pytest.mark.slow
def test_peers_without_a_server_are_measured():
    shown = smoke("gossip.py")
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    found = {row[0]: row for row in rows if len(row) > 5 and row[1] == "8"}
    assert float(found["ring"][6]) == 1.59 and float(found["complete"][6]) == 5.58
