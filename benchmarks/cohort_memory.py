"""Memory of a round against the size of its cohort, lanes fixed.

Claim: at 16 lanes a round's memory does not grow with the cohort, beyond some bytes of bookkeeping a
client; with all clients side by side it grows by a model a client.

For each cohort: bytes of temporaries that the compiled round asks for, and the highest resident
memory of a process of its own that runs three rounds.

Command: python benchmarks/cohort_memory.py
"""

import json
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax

from jfed import algorithms, clients, data, local, models, report, sampling

COHORTS = (100, 1000, 10_000)
EXAMPLES_EACH = 4


def measure(kind: str, cohort: int) -> dict:
    """One row: a 2NN, each client with four random images."""
    key = jax.random.key(0)
    rows = 10_000 * EXAMPLES_EACH  # the same population for every cohort
    examples = {"x": jax.random.normal(key, (rows, 784)), "y": jax.random.randint(key, (rows,), 0, 10)}
    population = data.population(examples, [EXAMPLES_EACH] * 10_000)
    model = models.two_nn()
    work = local.sgd(models.cross_entropy(model), optax.sgd(0.1), batch_size=2)
    client_map = clients.lanes(16) if kind == "lanes(16)" else clients.vectorised()
    method = algorithms.fedavg(work, client_map=client_map)
    state = method.init(model.init(key))
    drawn = sampling.uniform(cohort, steps=work.steps)(population, key, jnp.int32(0))
    program = jax.jit(method.round).lower(state, drawn, key).compile()
    for _ in range(3):
        state, metrics = jax.block_until_ready(program(state, drawn, key))
    assert int(metrics["reports"]) == cohort
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"temporary": program.memory_analysis().temp_size_in_bytes, "peak": peak}


def main() -> None:
    """Measures each cohort in a process of its own and prints the table."""
    rows = []
    for kind, cohort in [("lanes(16)", c) for c in COHORTS] + [("vectorised()", c) for c in COHORTS[:2]]:
        output = subprocess.run(
            [sys.executable, __file__, kind, str(cohort)], capture_output=True, text=True, check=True
        )
        found = json.loads(output.stdout.splitlines()[-1])
        rows.append(
            {
                "client map": kind,
                "cohort": cohort,
                "temporaries": report.human_bytes(found["temporary"]),
                "peak resident": report.human_bytes(found["peak"]),
            }
        )
    print(report.table("Memory of a round, 2NN (199,210 parameters, 0.8 MB)", rows))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
