"""The same program over two real processes."""

import numpy as np
import problem
import together
import two_processes

from jfed import report
from jfed.clients import vectorised


def test_two_processes_train_the_model_that_one_does(tmp_path):
    together.two_processes(two_processes.__file__, tmp_path / "two", devices_per_process=2)

    for name in two_processes.METHODS:
        alone = two_processes.train(name, vectorised(), lambda tree: tree, tmp_path / "one")
        problem.close(dict(np.load(tmp_path / "two" / name / "params.npz")), alone)
        for a, b in zip(report.rows(tmp_path / "two" / name), report.rows(tmp_path / "one" / name), strict=True):
            a.pop("seconds"), b.pop("seconds")
            problem.close(a, b)
