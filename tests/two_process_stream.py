"""One of two processes that stream one population, each its own clients: see test_stream_processes.py.

python -m jfed.launch -n 2 --devices-per-process 2 two_process_stream.py FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import problem

from jfed import data, local, mesh, run, sampling
from jfed.algorithms import fedavgm
from jfed.clients import dealt, vectorised

ROUNDS = 3
WORK = local.gradient(problem.loss)
SAMPLER = sampling.uniform(7, steps=WORK.steps)
KEY = jax.random.key


def train(client_map, devices=None):
    """Three rounds: the model after them, and for each round the clients that were loaded."""
    loaded = []
    source = data.on_host(jax.tree.map(np.asarray, problem.POPULATION.examples), problem.SIZES)

    def load(i):
        loaded.append(i)
        return source.load(i)

    method = fedavgm(WORK, client_map=client_map)
    by_round = []
    # The run is cut after every round, so that a round's loads are known from those of the next.
    state = method.init(problem.PARAMS)
    for t in range(ROUNDS):
        part = {"rounds": t + 1, "start": t, "mesh": devices}
        for moment in run.stream(method, SAMPLER, source._replace(load=load), state, KEY(6), **part):
            state = moment.state
        by_round.append(sorted(loaded))
        loaded.clear()
    return method.params(state), by_round


def main(folder):
    devices = mesh.make()
    assert devices.shape["clients"] == 4
    params, by_round = train(dealt(devices, vectorised()), devices)
    (folder / f"loaded_{jax.process_index()}.json").write_text(json.dumps(by_round))
    if jax.process_index() == 0:
        np.savez(folder / "params.npz", **{k: v.addressable_data(0) for k, v in params.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
