"""Pipeline schedules: their pictures, their idle time predicted and measured, and their memory as microbatches grow.

Claim: devices of a pipeline wait for as long as the schedule's table says, and keep what it says: of more microbatches
GPipe keeps more, 1F1B, interleaved and ZB-H1 do not.

Idle time is measured twice, as a share of a step's time:

    steady        stages sleep for exactly `seconds` in each forward pass, gradient of the input and gradient of the
                  weights, as devices of one speed would compute; the share of a step in which they do not sleep
    transformer   blocks dealt to `devices`, one thread each; the share by which a step is longer than that of as many
                  copies of one stage, with an entrance and an exit each, trained by the same executor and order, which
                  send each other the loss only. Steps of both, and of all numbers of microbatches, alternate, and of
                  each the fastest counts

"free" lets each device go on as soon as it can, "lockstep" lets each tick last as long as its longest, as devices that
exchange messages after every tick do; with fused gradients these differ. Both take the three to last equally long. Of
the transformer they nearly do (at the default width 3.1, 2.9 and 2.7 ms; at a width of 128 they do not), and cores that
others use as well differ by more.

Source: Huang et al. 2018 (arXiv:1811.06965), Narayanan et al. 2021 (arXiv:2104.04473), Qi et al. 2023
(arXiv:2401.10241).

Command: python experiments/pipeline_schedules.py
Time: 17 minutes on two cores with nothing else to do; sleeps take a millisecond longer than said, so that longer ones
(`--seconds 0.4`) come nearer the table.
Expected: a table of idle shares and memory; schedules.png, idle.png and memory.png in the run's folder. Seconds, and so
what is measured, mean something only where `devices` cores have nothing else to do.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jfed import experiment, mesh, plot, report
from jfed.parallel import schedules
from jfed.parallel.layered import Functions, Layered, Parts
from jfed.parallel.schedules import Schedule
from jfed.parallel.sharded import on_mesh
from jfed.parallel.transformer import transformer

WAYS: dict[str, Callable[[int, int], Schedule]] = {
    "naive": schedules.naive,
    "gpipe": schedules.gpipe,
    "gpipe_fused": lambda p, m: schedules.fused(schedules.gpipe(p, m)),
    "1f1b": schedules.one_f_one_b,
    "1f1b_fused": lambda p, m: schedules.fused(schedules.one_f_one_b(p, m)),
    "1f1b_lockstep": schedules.one_f_one_b_lockstep,
    "interleaved": functools.partial(schedules.interleaved, chunks=2),
    "zb_h1": schedules.zb_h1,
}
PICTURED = (4, 8)  # devices and microbatches of the picture, which nobody needs to have


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    devices: int = 2  # p
    microbatches: tuple[int, ...] = (2, 4, 8, 16)  # m
    ways: tuple[str, ...] = tuple(WAYS)
    layers: int = 2  # of a device
    width: int = 384
    context: int = 16
    examples: int = 4  # in a microbatch
    steps: int = 40  # timed, of each program and seed
    seconds: float = 0.05  # of each sleep
    sleepy_steps: int = 3


SMOKE = {"microbatches": (2,), "ways": ("1f1b", "gpipe_fused"), "width": 16, "context": 8, "steps": 3, "seconds": 0.002}


def main(config: Config) -> None:
    """Measures every schedule with every number of microbatches, then shows pictures and a table."""
    if odd := [way for way in config.ways if way not in WAYS]:
        raise ValueError(f"pipeline_schedules(ways={odd}): choose from {', '.join(WAYS)}.")
    if not config.ways or not config.microbatches or min(config.steps, config.sleepy_steps, config.seeds) < 1:
        raise ValueError("pipeline_schedules(): of ways, microbatches, steps and seeds there must be one at least.")
    # A device that waits shall not lend its core to one that does not; and the schedule for concurrency begins messages
    # where others still compute, so that devices work in turn.
    flags = "--xla_cpu_multi_thread_eigen=false --xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    cells = {way: functools.partial(measured, config, way) for way in config.ways}
    whole, results = experiment.over_cells("pipeline_schedules", config, cells)
    tables = {way: WAYS[way](*PICTURED) for way in config.ways}
    plot.plot_schedule(
        whole.folder / "schedules.png",
        {f"{way}: {said(table)}": table[:3] for way, table in tables.items()},
        title=f"{PICTURED[0]} devices, {PICTURED[1]} microbatches",
        lasts=(0, 1, 2, 1, 1),
    )
    chosen = {way: [results[way][str(m)] for m in config.microbatches] for way in config.ways}
    plot.plot_curves(
        whole.folder / "memory.png",
        {way: (config.microbatches, [r["memory"] / 2**20 for r in found]) for way, found in chosen.items()},
        xlabel="microbatches",
        ylabel="temporary MiB a device",
        title=f"Memory of a step, {config.devices} devices",
    )
    plot.plot_points(
        whole.folder / "idle.png",
        {
            way: {
                f"m = {m}": (100 * r["lockstep"], 100 * r["steady"])
                for m, r in zip(config.microbatches, f, strict=True)
            }
            for way, f in chosen.items()
        },
        xlabel="idle share in lockstep, %",
        ylabel="measured of steady devices, %",
        title=f"Idle share of a step, {config.devices} devices",
    )
    rows = [
        {
            "schedule": way.replace("_", " "),
            "microbatches": m,
            "idle, free": f"{result['free']:.3f}",
            "in lockstep": f"{result['lockstep']:.3f}",
            "steady": f"{result['steady']:.3f}",
            "transformer": f"{result['idle']:.3f}",
            "a step": f"{1e3 * result['step']:.1f} ms",
            "kept": ", ".join(map(str, result["kept"])),
            "temporary memory": report.human_bytes(result["memory"]),
        }
        for way, found in chosen.items()
        for m, result in zip(config.microbatches, found, strict=True)
    ]
    print(report.table(f"A step of a pipeline of {config.devices} devices", rows), "\n")
    print(f"pictures and metrics: {whole.folder}\n")
    all_found = {f"{way}_{m}": result for way in config.ways for m, result in results[way].items()}
    timed = ("idle", "steady", "step", "alone")
    summary = {name: {k: v for k, v in result.items() if k not in timed} for name, result in all_found.items()}
    seconds = {name: {k: result[k] for k in timed} for name, result in all_found.items()}
    report.finish(whole, summary | {"seeds": config.seeds, "seconds": seconds})


def measured(config: Config, way: str) -> dict[str, dict[str, Any]]:
    """What a schedule should cost, and what it does, for each number of microbatches."""
    p, sizes = config.devices, config.microbatches
    programs = {(m, shape): program(config, way, m, shape) for m in sizes for shape in ((1, p), (p, 1))}
    seconds = dict.fromkeys(programs, float("inf"))
    for seed in config.steps * list(range(config.seeds)):
        for which, (run, given) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(*given[seed]))
            seconds[which] = min(seconds[which], time.perf_counter() - begin)
    found = {}
    for m in sizes:
        cost, step, alone = schedules.predict(WAYS[way](p, m)), seconds[m, (1, p)], seconds[m, (p, 1)]
        found[str(m)] = {
            "free": cost.bubble,
            "lockstep": cost.lockstep_bubble,
            "idle": 1 - alone / step,
            "steady": steady(config, way, m),
            "kept": cost.activations.tolist(),
            "memory": programs[m, (1, p)][0].memory_analysis().temp_size_in_bytes,
            "step": step,
            "alone": alone,
        }
    return found


def program(config: Config, way: str, m: int, shape: tuple[int, int]) -> tuple[Callable, list[tuple]]:
    """A compiled step on a mesh of data and pipe, which has run once, and what each seed gives it."""
    data, pipe = shape
    model = transformer(32, width=config.width, layers=config.layers * pipe, heads=4, context=config.context)
    method = on_mesh(
        model,
        optax.sgd(0.01),
        mesh=mesh.make(shape, ("data", "pipe")),
        microbatches=m,
        schedule=WAYS[way](pipe, m),
        recompute=False,
        all_reduce=lax.psum if pipe > 1 else lambda x, axis_name: x,
    )

    def given(seed):
        params, tokens, step = jax.random.split(jax.random.key(seed), 3)
        drawn = jax.random.randint(tokens, (data * m * config.examples, config.context + 1), 0, 32)
        return method.init(model.init(params)), {"x": drawn[:, :-1], "y": drawn[:, 1:]}, step

    all_given = [given(seed) for seed in range(config.seeds)]
    compiled = jax.jit(method.round).lower(*all_given[0]).compile()
    jax.block_until_ready(compiled(*all_given[0]))
    return compiled, all_given


def steady(config: Config, way: str, m: int) -> float:
    """The measured idle share of devices that sleep in place of computing."""
    p, sleep = config.devices, functools.partial(sleeping, seconds=config.seconds)

    @jax.custom_vjp
    def block(w, h):
        return sleep(h) + w[None]

    block.defvjp(lambda w, h: (block(w, h), None), lambda _, g: (sleep(2 * g).sum(0), sleep(g)))
    schedule = WAYS[way](p, m)
    stages = p * schedule.chunks
    model = Layered(
        init=lambda key: jax.random.normal(key, (stages, 1)),
        split=lambda params: Parts((), params, ()),
        join=lambda parts: parts.blocks,
        specs=Parts((), PartitionSpec(), ()),
        functions=lambda axes: Functions(lambda params, batch: batch, block, lambda params, h, batch: h[:, 0]),
        check=lambda sizes: None,
        layers=stages,
    )
    method = on_mesh(
        model,
        optax.sgd(0.01),
        mesh=mesh.make((p,), ("pipe",)),
        microbatches=m,
        schedule=schedule,
        recompute=False,
    )
    given = method.init(model.init(jax.random.key(0))), jax.numpy.ones((m, 1)), jax.random.key(1)
    step, seconds = jax.jit(method.round).lower(*given).compile(), []
    jax.block_until_ready(step(*given))
    for _ in range(config.sleepy_steps):
        begin = time.perf_counter()
        jax.block_until_ready(step(*given))
        seconds.append(time.perf_counter() - begin)
    asleep = 3 * m * schedule.chunks * config.seconds
    return 1 - asleep / statistics.median(seconds)


def sleeping(x: jax.Array, seconds: float) -> jax.Array:
    """The same array, so many seconds later."""

    def later(x):
        time.sleep(seconds)
        return np.asarray(x)

    return jax.pure_callback(later, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def said(schedule: Schedule) -> str:
    """A line for the picture."""
    cost = schedules.predict(schedule)
    kept = ", ".join(map(str, cost.activations))
    return f"idle {100 * cost.bubble:.1f} %, in lockstep {100 * cost.lockstep_bubble:.1f} %, kept {kept}"


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
