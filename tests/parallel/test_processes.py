"""Two real processes train the quickstart's model with a ring, and one of them is killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jfed import report

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def start(folder, processes=2):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1]) if processes > 1 else "0"
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    script = str(HERE / "ring_of_processes.py")
    return [
        subprocess.Popen(
            [sys.executable, script, port, str(i), str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


@contextlib.contextmanager
def started(folder):
    """Two processes, ended in any case."""
    together = start(folder)
    try:
        yield together
    finally:
        for process in together:
            process.kill()
            process.communicate()


def ended_well(together):
    outputs = [process.communicate(timeout=300)[0] for process in together]
    assert [process.returncode for process in together] == [0] * len(together), "\n".join(outputs)


def rows(folder):
    return [row | {"seconds": 0} for row in report.rows(folder)] if (folder / "metrics.jsonl").exists() else []


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The rows of one process with two devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    ended_well(start(folder, processes=1))
    return rows(folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_one_that_is_left_says_so_in_seconds_and_the_run_resumes(victim, tmp_path, alone):
    with started(tmp_path / "run") as together:
        while len(rows(tmp_path / "run")) < 3 and together[0].poll() is None:
            time.sleep(0.05)
        together[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        said = together[1 - victim].communicate(timeout=60)[0]
        assert time.monotonic() - killed < 30
        assert together[1 - victim].returncode != 0, said
        # Where JAX itself is the first to notice, at a barrier or by the end of process 0, it ends the process.
        ours = "another process of this run is gone" in said and "again with --resume" in said
        assert ours or "another task died" in said, said

    before = rows(tmp_path / "run")
    ended_well(start(tmp_path / "run"))
    after = rows(tmp_path / "run")
    assert 3 <= len(before) < len(after) == 8 and after[: len(before) - 1] == before[:-1]
    for a, b in zip(after, alone, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4) and a["round"] == b["round"]
    assert after[-1]["accuracy"] > 0.65
