"""Rounds a second and peak memory against population, cohort, lanes, model size, devices and processes.

Claims: time per client of 10,000 a round from a population of 1,000,000 is within 20 % of that from
10,000; peak memory at 16 lanes does not depend on the cohort; on more devices, and on those of two
processes, the same model is trained.

Each cell runs in a process of its own, or in two where it says so, the first of whose highest resident memory is
told; but the two populations that are compared run a round each in turn in one process. One thing is varied
at a time from the middle: 10,000 clients of about 4 examples, log-normal, cohort 1000, logistic regression of 20
features, 16 lanes, one device. "weak" gives every device 1000 clients. Virtual CPU devices beyond the number of
cores share them.

Command: python benchmarks/scaling.py
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jfed import algorithms, clients, data, local, mesh, models, report, run, sampling


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    population: int = 10_000
    cohort: int = 1000
    width: int = 16
    hidden: int = 0  # units of two hidden layers; 0 is logistic regression
    devices: int = 1  # of all processes
    processes: int = 1
    rounds: int = 5


VARIED = {
    "population": [Cell(population=n) for n in (1000, 10_000, 100_000, 1_000_000)],
    "cohort": [Cell(cohort=n) for n in (10, 100, 1000, 10_000)],
    "width": [Cell(width=n) for n in (1, 4, 16, 64, 256)],
    "hidden": [Cell(hidden=n) for n in (0, 64, 256, 1024)],
    "devices": [Cell(devices=n) for n in (1, 2, 4, 8)] + [Cell(devices=n, processes=2) for n in (2, 4)],
    "weak": [
        Cell(cohort=1000 * n, devices=n, processes=p) for n, p in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1))
    ],
}
LARGE = [Cell(population=n, cohort=10_000, rounds=7) for n in (10_000, 1_000_000)]
FEATURES = 20


def model_of(hidden: int) -> models.Model:
    """Logistic regression, or an MLP with two hidden layers."""
    if not hidden:
        return models.logistic_regression(FEATURES, 10)
    sizes = (FEATURES, hidden, hidden, 10)

    def init(key):
        keys = jax.random.split(key, 3)
        return [jax.random.normal(k, (a, b)) / np.sqrt(a) for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]

    def apply(params, x):
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ params[-1]

    return models.from_pair(init, apply)


def rounds_of(cell: Cell) -> Callable[[int], float]:
    """The cell's job: trains round `t` and returns its loss."""
    rng = np.random.default_rng(0)
    size = np.clip(rng.lognormal(np.log(4) - 0.5, 1.0, cell.population), 1, 100).astype(int)
    rows = int(size.sum())
    x = rng.standard_normal((rows, FEATURES), np.float32)
    y = np.argmax(x @ rng.standard_normal((FEATURES, 10), np.float32), 1).astype(np.int32)
    population, model = data.population({"x": x, "y": y}, size), model_of(cell.hidden)
    work = local.sgd(models.cross_entropy(model), optax.sgd(0.05), batch_size=4)
    client_map, place = clients.lanes(cell.width), lambda tree: tree
    if cell.devices > 1:
        devices = mesh.make()
        client_map, place = clients.sharded(devices, client_map), lambda tree: mesh.replicate(tree, devices)
    method = algorithms.fedavg(work, client_map=client_map)
    sampler = sampling.uniform(cell.cohort, steps=work.steps)
    population, state, key = place((population, method.init(model.init(jax.random.key(0))), jax.random.key(1)))

    def train(t: int) -> float:
        nonlocal state
        state, metrics = run.scan_rounds(method, sampler, population, state, key, rounds=1, start=jnp.int32(t))
        return float(metrics["loss"][0])

    return train


def measure(cells: list[Cell]) -> list[dict]:
    """Of cells of equal rounds and devices, in turn: seconds a round, last loss, and the process's peak memory."""
    if cells[0].processes == 1:  # else the launcher has
        mesh.use_cores(cells[0].devices)
    jobs = [rounds_of(cell) for cell in cells]
    seconds, losses = [[] for _ in cells], [0.0 for _ in cells]
    for t in range(cells[0].rounds + 1):
        for i, train in enumerate(jobs):
            began = time.perf_counter()
            losses[i] = train(t)
            seconds[i].append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [
        {"first": first, "best": min(later), "median": statistics.median(later), "peak": peak, "loss": loss}
        for (first, *later), loss in zip(seconds, losses, strict=True)
    ]


def in_a_process(*cells: Cell) -> list[dict]:
    """`measure` in a process of its own, as rows of the table."""
    processes, start = cells[0].processes, [sys.executable]
    if processes > 1:
        each = cells[0].devices // processes
        start += ["-m", "jfed.launch", "-n", str(processes), "--devices-per-process", str(each)]
    measured = json.dumps([dataclasses.asdict(cell) for cell in cells])
    output = subprocess.run([*start, __file__, "--cells", measured], capture_output=True, text=True)
    if output.returncode:
        sys.exit(output.stderr)
    return [
        {field.name: getattr(cell, field.name) for field in dataclasses.fields(cell) if field.name != "rounds"}
        | {
            "first round": report.human_seconds(found["first"]),
            "rounds/s": 1 / found["median"],
            "best us a client": 1e6 * found["best"] / cell.cohort,
            "median us a client": 1e6 * found["median"] / cell.cohort,
            "peak memory": report.human_bytes(found["peak"]),
            "last loss": f"{found['loss']:.5f}",
        }
        for cell, found in zip(cells, json.loads(output.stdout.splitlines()[-1]), strict=True)
    ]


def main(cells: str | None = None, only: str | None = None, smoke: bool = False) -> None:
    """Prints a table for each thing varied.

    Args:
      cells: measurements as JSON, for the process that makes them.
      only: the one thing to vary, or "million"; by default everything.
      smoke: a small part, to see that it works.
    """
    if cells is not None:
        print(json.dumps(measure([Cell(**cell) for cell in json.loads(cells)])))
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    if smoke:
        few = (Cell(1000, 100, 4, devices=d, processes=p, rounds=1) for d, p in ((1, 1), (2, 1), (2, 2)))
        print(report.table("devices", [row for cell in few for row in in_a_process(cell)]))
        return
    for name, cells_of in VARIED.items():
        if only not in (None, name):
            continue
        with report.progress(len(cells_of), name, unit="cells") as advance:
            rows = []
            for cell in cells_of:
                rows += in_a_process(cell)
                advance()
        print(report.table(f"Varied: {name}", rows), "\n")
    if only in (None, "million"):
        print(report.table("10,000 clients a round, in turn in one process", in_a_process(*LARGE)))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
