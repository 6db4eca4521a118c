"""Time of a sweep against that of the same runs one after another, as ratios within one process.

Claim: sixteen settings of the logistic task in one program take at most a quarter of the time of
sixteen runs.

Task: softmax regression, 60 features, 10 classes; 1000 clients of log-normal sizes (mean about 20, 2 to
2000); 30 rounds of FedAvg, cohorts of 100, batches of 10. There is a CPU device a core. A run alone is
`run.scan_rounds` with the client map that is fastest for one run, on one device or dealt to all; its learning rate is
traced, so one program serves all sixteen. A sweep deals its settings to the devices, if there are enough.
"program / runs" leaves compilation out on both sides. The time of
a call of `run.sweep`, compilation included, stands against sixteen runs compiled each (as by a script
that builds each method anew), and against sixteen runs that share one program.

Command: python benchmarks/sweep.py
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jfed import algorithms, clients, data, local, mesh, models, report, run, sampling

REPEATS, ROUNDS, RUNS = 5, 30, 16
LANES = {f"lanes({width})": clients.lanes(width) for width in (4, 16)}
TOGETHER = [(16, 1, "lanes(4)"), (16, 1, "lanes(16)"), (4, 4, "lanes(16)"), (1, 16, "lanes(16)")]


def make_population():
    """Random rows of 60 numbers for 1000 clients."""
    rng = np.random.default_rng(0)
    size = np.clip(rng.lognormal(np.log(20) - 0.72, 1.2, 1000), 2, 2000).astype(int)
    rows = int(size.sum())
    examples = {"x": rng.normal(size=(rows, 60)).astype(np.float32), "y": rng.integers(0, 10, rows).astype(np.int32)}
    return data.population(examples, size)


def logistic() -> models.Model:
    """60-10, from zero."""
    return models.from_pair(
        lambda key: {"w": jnp.zeros((60, 10)), "b": jnp.zeros(10)}, lambda p, x: models.linear(x, p["w"]) + p["b"][None]
    )


def norm(params):
    """The judge: nearly free, so that what is timed is training."""
    return {"norm": optax.tree.norm(params)}


def seconds(function) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Compiles each program once, runs all in turn several times over, and prints medians."""
    mesh.use_cores()
    devices = mesh.make()
    alone_maps = LANES | {f"{name} on each device": clients.sharded(devices, lanes) for name, lanes in LANES.items()}
    model, population = logistic(), make_population()
    loss = models.cross_entropy(model)
    sampler = sampling.uniform(100, steps=local.sgd(loss, optax.sgd(0.1), batch_size=10).steps)

    def method(client_map, learning_rate):
        return algorithms.fedavg(local.sgd(loss, optax.sgd(learning_rate), batch_size=10), client_map=client_map)

    def one_run(client_map):
        def final(learning_rate, key, population):
            algorithm = method(client_map, learning_rate)
            state = algorithm.init(model.init(key))
            return algorithm.params(run.scan_rounds(algorithm, sampler, population, state, key, rounds=ROUNDS)[0])

        return final

    def together(final):
        """The program inside `run.sweep`, to be timed without its compilation."""

        def all_runs(rates, keys, population):
            over_settings = jax.vmap(final, (0, None, None))
            return jax.lax.map(lambda key: over_settings(rates, key, population), keys)

        return mesh.shard_map(mesh=devices, in_specs=(P("clients"), P(), P()), out_specs=P(None, "clients"))(all_runs)

    def compiled(function, *args):
        program = jax.jit(function).lower(*args).compile()
        return lambda: jax.block_until_ready(program(*args))

    programs, compiling, whole = {}, {}, {}
    for name, client_map in alone_maps.items():
        args = jnp.float32(0.1), jax.random.key(0), population
        began = time.perf_counter()
        programs[name] = compiled(one_run(client_map), *args)
        compiling[name] = time.perf_counter() - began
    for settings, seeds, name in TOGETHER:
        rates, keys = np.geomspace(0.01, 0.3, settings), jax.random.split(jax.random.key(0), seeds)
        rates = np.resize(rates, -(-settings // devices.size) * devices.size)  # one setting runs on every device
        programs[settings, seeds, name] = compiled(together(one_run(LANES[name])), jnp.asarray(rates), keys, population)
        make, rates = functools.partial(method, LANES[name]), rates[:settings]
        options = {"init": model.init, "sampler": sampler, "population": population, "rounds": ROUNDS, "seeds": seeds}
        options |= {"mesh": devices}
        whole[settings, seeds, name] = seconds(
            lambda: run.sweep(make, {"learning_rate": rates}, judge=norm, progress=False, **options)  # noqa: B023
        )
    times = {name: [] for name in programs}
    for repeat in range(REPEATS + 1):
        for name, program in programs.items():
            took = seconds(program)
            if repeat:  # the first warms up
                times[name].append(took)

    median = {name: statistics.median(values) for name, values in times.items()}
    alone = min(alone_maps, key=median.get)
    rows = []
    for settings, seeds, name in TOGETHER:
        steady, call = median[settings, seeds, name], whole[settings, seeds, name]
        rows.append(
            {
                "settings x seeds": f"{settings} x {seeds}",
                "client map": name,
                "program": report.human_seconds(steady),
                "program / runs": f"{steady / (RUNS * median[alone]):.2f}",
                "run.sweep": report.human_seconds(call),
                "run.sweep / runs compiled each": f"{call / (RUNS * (median[alone] + compiling[alone])):.3f}",
                "run.sweep / runs compiled once": f"{call / (RUNS * median[alone] + compiling[alone]):.2f}",
            }
        )
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}, median of {REPEATS}")
    print(f"fastest alone: {alone}, {report.human_seconds(median[alone])}, compiled in {compiling[alone]:.1f} s")
    print(report.table(f"Logistic task, {ROUNDS} rounds", rows))


if __name__ == "__main__":
    main()
