"""A run that is really killed, and really resumed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import killed
import numpy as np
import problem
import pytest

from jfed import checkpoint, ledger, report

HERE = Path(__file__).parent


def start(folder):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    with open(folder.with_suffix(".log"), "ab") as output:
        command = [sys.executable, str(HERE / "killed.py"), str(folder)]
        return subprocess.Popen(command, env=env, stdout=output, stderr=output)


def ended(process, folder, code):
    """Waits for a process and checks how it ended."""
    assert process.wait(timeout=300) == code, folder.with_suffix(".log").read_text()


def rows_in(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def final_state(folder):
    like = {
        "state": killed.METHOD.init(problem.PARAMS),
        "key": killed.KEY,
        "ledger": ledger.empty(problem.CLIENTS),
    }
    return checkpoint.restore(folder / "checkpoints", like)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_resumed_ends_in_the_same_bits(tmp_path):
    ended(start(tmp_path / "whole"), tmp_path / "whole", 0)

    moments, folder = random.Random(0), tmp_path / "killed"
    for _ in range(3):
        process, before = start(folder), rows_in(folder)
        while rows_in(folder) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        ended(process, folder, -signal.SIGKILL)
    ended(start(folder), folder, 0)

    (step, expected), (same_step, resumed) = final_state(tmp_path / "whole"), final_state(folder)
    assert step == same_step == killed.ROUNDS
    for a, b in zip(
        jax.tree.leaves((expected["state"], expected["ledger"])),
        jax.tree.leaves((resumed["state"], resumed["ledger"])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert (folder / "bytes_by_client.csv").read_bytes() == (tmp_path / "whole" / "bytes_by_client.csv").read_bytes()
    for a, b in zip(report.rows(tmp_path / "whole"), report.rows(folder), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    assert (folder / "summary.json").read_bytes() == (tmp_path / "whole" / "summary.json").read_bytes()
