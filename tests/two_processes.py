"""One of two processes of one federation: python two_processes.py PORT PROCESS FOLDER."""

import os
import sys

import jax

if __name__ == "__main__":  # before anything makes an array
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))

import numpy as np
import optax
import problem

from jfed import experiment, local, mesh, report, run, sampling
from jfed.algorithms import fedavg
from jfed.clients import lanes, sharded

WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
KEY = jax.random.key


def train(client_map, place, folder):
    """Three recorded rounds; the model and the rows."""
    method = fedavg(WORK, client_map=client_map)
    opened = report.open_run(folder, {}, resume=False)
    for _, params in experiment.record(
        opened,
        method,
        sampling.uniform(7, steps=WORK.steps),
        place(problem.POPULATION),
        place(problem.PARAMS),
        place(KEY(6)),
        rounds=3,
        judge=lambda params: run.evaluate(problem.metrics, params, place(problem.POPULATION.examples)),
    ):
        pass
    return params


def main(folder):
    devices = mesh.make()
    assert devices.shape["clients"] == 4
    params = train(sharded(devices, lanes(2)), lambda tree: mesh.replicate(tree, devices), folder)
    if jax.process_index() == 0:
        np.savez(os.path.join(folder, "params.npz"), **{k: v.addressable_data(0) for k, v in params.items()})
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[3])
