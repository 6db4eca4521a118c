"""The same program over two real processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import problem
import two_processes

from jfed import report
from jfed.clients import vectorised

HERE = Path(__file__).parent


def test_two_processes_train_the_model_that_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    together = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_processes.py"), port, str(i), str(tmp_path / "two")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].decode() for process in together]
    assert [process.returncode for process in together] == [0, 0], "\n".join(outputs)

    for name in two_processes.METHODS:
        alone = two_processes.train(name, vectorised(), lambda tree: tree, tmp_path / "one")
        problem.close(dict(np.load(tmp_path / "two" / name / "params.npz")), alone)
        for a, b in zip(report.rows(tmp_path / "two" / name), report.rows(tmp_path / "one" / name), strict=True):
            a.pop("seconds"), b.pop("seconds")
            problem.close(a, b)
