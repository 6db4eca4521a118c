"""Time of a round under each client map, cohorts of ragged clients, as ratios within one process.

Clients have log-normal sizes (mean about 100, 10 to 1000); all maps do the same local steps. "One after
another" is `lanes(1)`.

Command: python benchmarks/client_maps.py
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import algorithms, clients, data, local, models, report
from jfed.core import make_cohort

REPEATS = 5


def population_of(count: int, rng: np.random.Generator):
    """Random images of 60 numbers for `count` clients."""
    size = np.clip(rng.lognormal(np.log(100) - 0.5, 1.0, count), 10, 1000).astype(int)
    rows = int(size.sum())
    examples = {"x": rng.normal(size=(rows, 60)).astype(np.float32), "y": rng.integers(0, 10, rows).astype(np.int32)}
    return data.population(examples, size)


def small_mlp() -> models.Model:
    """60-128-10."""

    def init(key):
        first, second = jax.random.split(key)
        return {
            "first": jax.random.normal(first, (60, 128)) * 0.1,
            "second": jax.random.normal(second, (128, 10)) * 0.1,
        }

    return models.from_pair(init, lambda params, x: jax.nn.relu(x @ params["first"]) @ params["second"])


def main() -> None:
    """Times every map in turn, several times over, and prints medians."""
    rng = np.random.default_rng(0)
    model = small_mlp()
    work = local.sgd(models.cross_entropy(model), optax.sgd(0.05), batch_size=20)
    maps = {f"lanes({width})": clients.lanes(width) for width in (1, 4, 8, 16, 32)} | {
        "vectorised()": clients.vectorised()
    }
    rows = []
    for count in (50, 200, 1000):
        population = population_of(count, rng)
        cohort = make_cohort(population, jnp.arange(count), steps=work.steps)
        runs, times = {}, {name: [] for name in maps}
        for name, client_map in maps.items():
            method = algorithms.fedavg(work, client_map=client_map)
            state, program = method.init(model.init(jax.random.key(0))), jax.jit(method.round)
            runs[name] = (program, state)
            jax.block_until_ready(program(state, cohort, jax.random.key(1)))
        for _ in range(REPEATS):
            for name, (program, state) in runs.items():
                began = time.perf_counter()
                jax.block_until_ready(program(state, cohort, jax.random.key(1)))
                times[name].append(time.perf_counter() - began)
        median = {name: statistics.median(values) for name, values in times.items()}
        best = min(median, key=median.get)
        rows.append(
            {"cohort": str(count), "local steps": str(int(cohort.steps.sum()))}
            | {name: report.human_seconds(value) for name, value in median.items()}
            | {"best": best, "one after another / best": f"{median['lanes(1)'] / median[best]:.2f}"}
        )
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, median of {REPEATS}")
    print(report.table("Time of a round, MLP 60-128-10, batch 20", rows))


if __name__ == "__main__":
    main()
