"""What all-reduces cost: time and bus bandwidth beside `lax.psum`, bytes beside theory, and what the TPU compiler says.

Asked, one after another:

    theory      bytes and rounds of each algorithm, counted in its program, beside theory, for 8 and for 64 devices
    time        seconds on 2, 4 and 8 virtual CPU devices, and on 2 processes of one device, 1 KB to 256 MB a device
    tpu         each algorithm compiled by the TPU compiler for slices that are not there: permutes it made
                asynchronous, the seconds it expects, and those of the alpha-beta model on a torus of such links;
                needs `pip install "jax[tpu]"`, but no TPU

Bus bandwidth is S / t times 2 (n - 1) / n, as nccl-tests has it: what a link carries if the algorithm wastes nothing.
A program repeats an all-reduce followed by a division by n, so that the numbers stay; algorithms take turns, and
seconds are medians, ratios medians of those of a turn. What would take more than 13 GB is left out: where everyone
holds what everyone sent. Virtual devices beyond the number of cores share them. The TPU compiler's expectation takes a
loop's body once (rings), has none of its own all-reduce's links (psum), and of some copies says nothing (negative,
shown as none).

Command: python benchmarks/collectives.py
Time: theory seconds, time ten minutes, tpu four on two cores at rest; `--smoke` takes a minute or two.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jfed import collectives, mesh, models, parallel, report
from jfed.collectives import cost, count, network

PARTS = ("theory", "time", "tpu")
SIZES = (2**10, 2**15, 2**20, 2**25, 2**28)  # bytes a device
SETUPS = ((2, 1), (2, 2), (4, 1), (8, 1))  # devices of all processes, processes
SECONDS = 0.15  # a turn repeats an all-reduce for about as long
TURNS = 3
MEMORY = 13e9
SLICES = {"v5e:4x4": (4, 4), "v6e:8x8": (8, 8), "v5e:8x8": (8, 8)}
# 1600 Gbit/s a chip of v5e, 3584 of v6e, over four links of two ways; a microsecond is assumed.
LINK = {"v5e": {"alpha": 1e-6, "beta": 1 / 50e9}, "v6e": {"alpha": 1e-6, "beta": 1 / 112e9}}
ALGORITHMS = {f.__name__.removesuffix("_all_reduce"): f for f in cost.THEORY if "dedicated" not in f.__name__}


def theory(devices: tuple[int, ...]) -> None:
    """A table for each number of devices: theory, counted, equal."""
    for n in devices:
        rows, d = [], 840 * n
        for name, f in {**ALGORITHMS, "dedicated_servers": collectives.dedicated_servers_all_reduce}.items():
            counted, expected = count.all_reduce(f, n, jax.ShapeDtypeStruct((d,), jnp.float32)), cost.of(f, n, d)
            found = (int(counted.sent.max()), int(counted.received.max()), count.total(counted), counted.rounds)
            rows.append(
                {"algorithm": name}
                | {
                    what: f"{value / (4 * d):.4g}"
                    for what, value in zip(("sent / k", "received / k", "total / k"), found[:3], strict=True)
                }
                | {"rounds": counted.rounds, "theory": "equal" if found == expected[:4] else f"differs: {expected}"}
            )
        print(report.table(f"{n} devices: busiest device, and all together, in vectors of k bytes", rows), "\n")


def repeated(all_reduce: Callable, devices: jax.sharding.Mesh) -> Callable:
    """`(x, times) -> x` after so many all-reduces, each divided by n."""
    spec = PartitionSpec("devices")

    @functools.partial(jax.jit, donate_argnums=0)
    def program(x, times):
        def local(x, times):
            n = lax.axis_size("devices")
            return lax.fori_loop(0, times, lambda _, y: all_reduce(y, "devices") / n, x[0])[None]

        return mesh.shard_map(mesh=devices, in_specs=(spec, PartitionSpec()), out_specs=spec)(local)(x, times)

    return program


def measure(size: int, names: list[str]) -> dict[str, list[float]]:
    """Seconds of an all-reduce of `size` bytes on all devices there are, of each turn."""
    devices = mesh.make(names=("devices",))
    n, sharding = devices.size, NamedSharding(devices, PartitionSpec("devices"))
    rows = np.random.default_rng(0).standard_normal((1, size // 4), np.float32)
    reduces = {name: lax.psum if name == "psum" else ALGORITHMS[name] for name in names}
    jobs, times, seconds = {}, {}, {name: [] for name in names}

    def run(name: str, repeats: int) -> float:
        x, program = jax.make_array_from_callback((n, size // 4), sharding, lambda i: rows), jobs[name]
        jax.block_until_ready(x)
        began = time.perf_counter()
        jax.block_until_ready(program(x, jnp.int32(repeats)))
        return (time.perf_counter() - began) / repeats

    for name, f in reduces.items():
        jobs[name] = repeated(f, devices)
        run(name, 1)
        # All processes must repeat as often.
        times[name] = max(1, min(10_000, int(SECONDS / agreed(run(name, 2)))))
    for _ in range(TURNS):
        for name in names:
            seconds[name].append(run(name, times[name]))
    return seconds


def agreed(seconds: float) -> float:
    """The same number on all processes: the first one's."""
    if jax.process_count() == 1:
        return seconds
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


def fits(name: str, n: int, size: int) -> bool:
    """Whether the devices' vectors, copies and what is under way fit in memory."""
    vectors = n + 3 if name in ("one_shot", "parameter_server", "sharded_servers") else 5
    return n * size * vectors <= MEMORY


def timed(sizes: tuple[int, ...], setups: tuple[tuple[int, int], ...]) -> None:
    """A table for each set-up."""
    names = ["psum", *ALGORITHMS]
    for n, processes in setups:
        rows = []
        with report.progress(len(sizes), f"{n} devices, {processes} processes", unit="sizes") as advance:
            for size in sizes:
                chosen = [name for name in names if fits(name, n, size)]
                seconds = in_a_process(n, processes, size, chosen)
                for name in chosen:
                    median = statistics.median(seconds[name])
                    ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["psum"], strict=True))
                    rows.append(
                        {
                            "bytes": report.human_bytes(size),
                            "algorithm": name,
                            "time": f"{1e6 * median:.3g} us" if median < 1e-3 else report.human_seconds(median),
                            "busbw, GB/s": f"{size / median * 2 * (n - 1) / n / 1e9:.3g}",
                            "time / psum": f"{ratio:.2f}",
                        }
                    )
                advance()
        where = f"{n} virtual devices" if processes == 1 else f"{processes} processes of one device"
        print(report.table(where, pivoted(rows)), "\n")


def pivoted(rows: list[dict]) -> list[dict]:
    """A row for each algorithm, with time, bandwidth and ratio for each size."""
    sizes = list(dict.fromkeys(row["bytes"] for row in rows))
    table = []
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        of = {row["bytes"]: row for row in rows if row["algorithm"] == name}
        cells = {
            size: f"{of[size]['time']}, {of[size]['busbw, GB/s']}, x{of[size]['time / psum']}" if size in of else ""
            for size in sizes
        }
        table.append({"time, GB/s, x psum": name} | cells)
    return table


def in_a_process(n: int, processes: int, size: int, names: list[str]) -> dict[str, list[float]]:
    """`measure` where there are so many devices."""
    start, env = [sys.executable], {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if processes > 1:
        start += ["-m", "jfed.launch", "-n", str(processes), "--devices-per-process", str(n // processes)]
    else:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n}"
    command = [*start, __file__, "--child", str(size), *names]
    output = subprocess.run(command, capture_output=True, text=True, env=env | {"JAX_PLATFORMS": "cpu"})
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def tpu(slices: tuple[str, ...]) -> None:
    """A table for each slice, by the TPU compiler; the last rows are steps of data-parallel training."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine of Google's to ask
    from jax.experimental import topologies

    for name in slices:
        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        except Exception as error:  # whatever the plugin raises where it is not installed
            print(f'no TPU compiler here ({str(error).splitlines()[0]}); pip install "jax[tpu]"')
            return
        row_by_row = sorted(topology.devices, key=lambda chip: (chip.coords[1], chip.coords[0]))
        chips = jax.sharding.Mesh(np.array(row_by_row), ("devices",))
        torus, rows = network.torus(*SLICES[name], **LINK[name.split(":")[0]]), []
        for label, program, shapes in programs(chips):
            built = jax.jit(program).lower(*shapes).compile()
            sent, expected = count.compiled(built.as_text()), built.cost_analysis()["optimal_seconds"]
            counted = count.traced(program, *shapes)
            rows.append(
                {
                    "program": label,
                    "permutes": sent.permutes,
                    "asynchronous": sent.asynchronous,
                    "sent by a chip": report.human_bytes(int(sent.sent.max())),
                    "compiler's time": f"{1e6 * expected:.0f} us" if expected > 0 else "none",
                    "alpha-beta": "" if counted.opaque else f"{1e6 * network.seconds(counted, torus):.0f} us",
                    "temporary memory": report.human_bytes(built.memory_analysis().temp_size_in_bytes),
                }
            )
        print(report.table(f"{name}: {chips.size} chips, 16 MiB of float32 each", rows), "\n")


def programs(chips: jax.sharding.Mesh):
    """`(name, program, shapes)` of everything that the TPU compiler must accept."""
    n, d, axis = chips.size, 2**22, PartitionSpec("devices")
    spec, every = NamedSharding(chips, axis), NamedSharding(chips, PartitionSpec())
    vectors = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=spec)
    for name, f in {"psum": lax.psum, **ALGORITHMS}.items():
        local = mesh.shard_map(mesh=chips, in_specs=axis, out_specs=axis)
        yield name, local(lambda x, f=f: f(x[0], "devices")[None]), (vectors,)

    def shapes(tree, sharding):
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)

    model = models.two_nn()
    params, key = jax.eval_shape(model.init, jax.random.key(0)), jax.eval_shape(jax.random.key, 0)
    images = {"x": jnp.zeros((0, 28, 28, 1)), "y": jnp.zeros(0, jnp.int32)}
    batch = shapes({k: jax.ShapeDtypeStruct((32 * n, *v.shape[1:]), v.dtype) for k, v in images.items()}, spec)
    for name in ("psum", "ring", "torus"):
        reduce = lax.psum if name == "psum" else ALGORITHMS[name]
        method = parallel.data_parallel(models.cross_entropy(model), optax.adam(1e-3), workers=chips, all_reduce=reduce)
        state = shapes(jax.eval_shape(method.init, params), every)
        yield f"data_parallel step, {name}", method.round, (state, batch, shapes(key, every))


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--smoke", action="store_true", help="a small part, to see that it works")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.child:
        size, *names = chosen.child
        found = measure(int(size), names)
        if jax.process_index() == 0:
            print(json.dumps(found))
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    if "theory" in chosen.parts:
        theory((8,) if chosen.smoke else (8, 64))
    if "time" in chosen.parts:
        timed(*(((2**14,), ((2, 1), (2, 2))) if chosen.smoke else (SIZES, SETUPS)))
    if "tpu" in chosen.parts:
        tpu(tuple(SLICES)[:1] if chosen.smoke else tuple(SLICES))


if __name__ == "__main__":
    main(sys.argv[1:])
