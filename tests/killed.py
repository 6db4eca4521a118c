"""A recorded run in a process of its own, to be killed: python killed.py FOLDER."""

import sys

import jax
import optax
import problem

from jfed import experiment, local, report, sampling
from jfed.algorithms import federated
from jfed.clients import lanes

ROUNDS = 40
WORK = local.sgd(problem.loss, optax.sgd(0.1), batch_size=4)
# State of every kind: server momentum, an uplink memory per client, the round.
METHOD = federated(
    WORK, server=optax.adam(0.01), uplink=optax.trace(0.5), num_clients=problem.CLIENTS, client_map=lanes(3)
)
KEY = jax.random.key(8)


def main(folder):
    opened = report.open_run(folder, {"rounds": ROUNDS}, resume=True)
    sampler = sampling.uniform(4, steps=WORK.steps)
    for row, _ in experiment.record(
        opened, METHOD, sampler, problem.POPULATION, problem.PARAMS, KEY, rounds=ROUNDS, description="killed"
    ):
        pass
    report.finish(opened, {"rounds": row["round"]})


if __name__ == "__main__":
    main(sys.argv[1])
