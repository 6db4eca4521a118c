"""One of two processes that train the quickstart's model with a ring: python ring_of_processes.py PORT PROCESS FOLDER.

PORT 0 trains in one process with two devices.
"""

import os
import sys
from pathlib import Path

import jax

if __name__ == "__main__":  # before anything makes an array
    alone = sys.argv[1] == "0"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 if alone else 1}"
    jax.config.update("jax_platforms", "cpu")
    if not alone:
        # One that is gone is also missed where nothing is computed, such as at a barrier of checkpoints.
        jax.distributed.initialize(
            f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]), heartbeat_timeout_seconds=10
        )

import optax

from jfed import collectives, core, data, experiment, mesh, models, parallel, report, run

ROUNDS = 40


def train(options):
    devices = mesh.make(names=("data",))
    train, test = data.fashion_small()
    rows = train["y"].shape[0]
    population = mesh.replicate(core.Population(train, jax.numpy.array([0]), jax.numpy.array([rows])), devices)
    test, key = mesh.replicate(test, devices), mesh.replicate(jax.random.key(6), devices)
    model = models.two_nn()
    method = parallel.data_parallel(
        models.cross_entropy(model),
        optax.sgd(0.05, momentum=0.9),
        workers=devices,
        all_reduce=collectives.ring_all_reduce,
    )
    opened = report.open_run(options.out, {"rounds": ROUNDS}, resume=True)
    for row, params in experiment.record(
        opened,
        method,
        parallel.batches(100, key=jax.random.key(1)),
        population,
        model.init(jax.random.key(2)),
        key,
        rounds=ROUNDS,
        every=5,
        judge=lambda params: run.evaluate(models.metrics(model), params, test),
    ):
        pass
    report.finish(opened, {"accuracy": row["accuracy"]})
    if jax.process_count() > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    sys.argv = [sys.argv[0], "--out", str(Path(sys.argv[3]))]
    experiment.cli(train, experiment.Options, smoke={})
