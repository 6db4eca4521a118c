"""One of two processes of one federation, two devices each, started by `together`."""

import functools
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import problem

from jfed import experiment, local, mesh, report, run, sampling, tree
from jfed.algorithms import fedavg, federated
from jfed.clients import lanes, sharded

WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
KEY = jax.random.key


def largest(stack, state, params=None, *, weights, **extra_args):
    """An aggregator that needs the stack: the message that weighs most."""
    return tree.take(stack, jax.numpy.argmax(weights)), state


METHODS = {
    "streamed": fedavg,
    "stacked, uplink with state": functools.partial(
        federated,
        aggregator=optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), largest),
        uplink=optax.trace(0.5),
        num_clients=problem.CLIENTS,
    ),
}


def train(name, client_map, place, folder):
    """Three recorded rounds; the model after them."""
    method = METHODS[name](WORK, client_map=client_map)
    opened = report.open_run(folder / name, {}, resume=False)
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
    for name in METHODS:
        params = train(name, sharded(devices, lanes(2)), lambda tree: mesh.replicate(tree, devices), folder)
        if jax.process_index() == 0:
            np.savez(folder / name / "params.npz", **{k: v.addressable_data(0) for k, v in params.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
