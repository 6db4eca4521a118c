import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION

from jfed import checkpoint, compress, experiment, ledger, local, report, run, sampling, tree
from jfed.algorithms import fedavg
from jfed.core import Traffic

WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
SAMPLER = sampling.uniform(5, steps=WORK.steps)
KEY = jax.random.key(1)


def test_a_ledger_of_many_rounds_is_that_of_each_in_turn():
    algorithm = fedavg(WORK, uplink=compress.scaled_sign())
    _, metrics = run.scan_rounds(algorithm, SAMPLER, POPULATION, algorithm.init(PARAMS), KEY, rounds=4)
    traffic = metrics["traffic"]
    at_once = ledger.add(ledger.empty(problem.CLIENTS), traffic)
    in_turn = ledger.empty(problem.CLIENTS)
    for t in range(4):
        in_turn = ledger.add(in_turn, Traffic(*(x[t] for x in traffic[:3])))
    np.testing.assert_array_equal(at_once.up, in_turn.up)
    np.testing.assert_array_equal(at_once.down, in_turn.down)
    taken = np.bincount(np.asarray(traffic.ids).reshape(-1), minlength=problem.CLIENTS)
    signs = 2 + 4 + 1 + 4  # 12 numbers and 3, a bit each, and two scales
    np.testing.assert_array_equal(at_once.up, signs * taken)
    np.testing.assert_array_equal(at_once.down, tree.nbytes(PARAMS) * taken)


def test_a_client_drawn_twice_is_counted_twice_and_an_empty_slot_not_at_all():
    twice = Traffic(np.array([1, 1, 9, -1]), up=np.array([3, 3, 0, 7]), down=np.array([2, 2, 0, 7]))
    assert ledger.add(ledger.empty(2), twice).up.tolist() == [0, 6]


def test_bytes_add_up_past_32_bits():
    most = np.uint32(2**32 - 1)
    full = ledger.empty(1)
    for _ in range(3):
        full = ledger.add(full, Traffic(jnp.array([0]), up=jnp.array([most]), down=jnp.array([most])))
    assert full.up.tolist() == full.down.tolist() == [3 * (2**32 - 1)]


def test_a_run_writes_its_ledger_and_resuming_does_not_change_it(tmp_path):
    algorithm = fedavg(WORK)

    def recorded(folder, stop_after=None, **options):
        opened = report.open_run(tmp_path / folder, {}, **options)
        rows = experiment.record(opened, algorithm, SAMPLER, POPULATION, PARAMS, KEY, rounds=4, every=1)
        for count, _ in enumerate(rows, 1):
            if count == stop_after:
                return None
        with open(tmp_path / folder / "bytes_by_client.csv") as file:
            return list(csv.DictReader(file)), report.rows(tmp_path / folder)[-1]

    whole, last = recorded("whole")
    recorded("cut", stop_after=2)
    assert recorded("cut", resume=True)[0] == whole
    assert sum(int(line["up"]) for line in whole) == last["bytes_up"] == 4 * 5 * tree.nbytes(PARAMS)


def test_a_run_killed_as_it_ends_has_written_its_ledger_before_its_last_step(tmp_path, monkeypatch):
    save = checkpoint.save

    def killed(folder, step, state):
        if step == 4:
            raise KeyboardInterrupt
        save(folder, step, state)

    monkeypatch.setattr(checkpoint, "save", killed)
    opened = report.open_run(tmp_path / "run", {})
    with pytest.raises(KeyboardInterrupt):
        list(experiment.record(opened, fedavg(WORK), SAMPLER, POPULATION, PARAMS, KEY, rounds=4))
    assert (tmp_path / "run" / "bytes_by_client.csv").exists()


def test_a_ledger_of_nobody_is_refused():
    with pytest.raises(ValueError, match="empty.num_clients=0"):
        ledger.empty(0)
