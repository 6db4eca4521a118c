"""Two real processes stream one population, and each loads its own clients only."""

import json

import numpy as np
import problem
import together
import two_process_stream

from jfed.clients import vectorised


def test_each_process_loads_its_own_clients_and_the_model_is_that_of_one(tmp_path):
    together.two_processes(two_process_stream.__file__, tmp_path, devices_per_process=2)
    alone, cohorts = two_process_stream.train(vectorised())
    problem.close(dict(np.load(tmp_path / "params.npz")), alone)
    first, second = (json.loads((tmp_path / f"loaded_{i}.json").read_text()) for i in range(2))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == cohorts
    assert all(len(cohort) == len(set(cohort)) == 7 for cohort in cohorts)
    assert all(first) and all(second)
