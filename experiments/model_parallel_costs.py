"""What every way of splitting a transformer over devices costs, and what the TPU compiler makes of all of them at once.

Claim: all ways train the same model and differ in memory and bytes alone, and their programs send what theory says, to
the byte; and a model of 1.3 billion parameters, too large for one chip, fits 16 of them with room to spare.

| 8 devices, of each             | held, MB | temporary, MB | sent, MB | theory | loss off one device |
|--------------------------------|----------|---------------|----------|--------|---------------------|
| one device                     |     5.25 |          95.2 |     0    | equal  |                     |
| data                           |     5.25 |          10.2 |     3.06 | equal  |               2e-06 |
| data, fully sharded            |     0.66 |          11.7 |     4.44 | equal  |               2e-06 |
| tensor                         |     0.73 |          24.2 |    15.62 | equal  |               2e-06 |
| tensor, sequence parallel      |     0.73 |          16.1 |    15.66 | equal  |               3e-06 |
| the same, collective matmul    |     0.73 |          16.0 |    15.66 | equal  |               2e-06 |
| sequence, ring attention       |     5.25 |           5.8 |    12.96 | equal  |               2e-06 |
| sequence, zigzag attention     |     5.25 |           6.1 |    15.05 | equal  |               5e-07 |
| sequence, all to all           |     5.25 |           6.4 |     4.90 | equal  |               3e-06 |
| pipeline, GPipe                |     1.05 |          13.9 |     2.75 | equal  |               2e-06 |
| pipeline, 1F1B                 |     1.05 |          13.7 |     2.75 | equal  |               2e-06 |
| pipeline, ZB-H1                |     1.05 |          16.4 |     2.29 | equal  |               2e-06 |
| data 2, pipe 2, tensor 2       |     1.46 |           5.8 |     3.74 | equal  |               1e-06 |
| the same, fully sharded        |     0.74 |           6.0 |     7.81 | equal  |               3e-06 |
| experts, on one device         |    27.28 |         147.7 |     0    | equal  |                     |
| experts                        |     5.26 |          17.7 |     3.53 | equal  |                   0 |

Held are parameters and Adam's moments, temporary what the compiled step needs besides; nothing is computed twice.
Counted is the traced program, of pipelines on several axes the compiled one. Losses are of the fourth step.

| TPU v5e, 1.345 B parameters        | memory a chip, GB | busy | waits | idle | a step | of peak | sends hidden |
|------------------------------------|-------------------|------|-------|------|--------|---------|--------------|
| 16 chips, 2 x 4 x 2, 1F1B lockstep |  1.32 +  3.53     |  502 |   298 | 16 % | 951 ms |    36 % | 1376 of 3769 |
| 16 chips, 2 x 4 x 2, ZB-H1         |  1.32 + 13.23     |  502 |   330 | 34 % |   1261 |    27 % | 1216 of 3795 |
| 16 chips, 4 x 2 x 2, GPipe, fused  |  1.12 +  5.82     |  938 |   660 |  6 % |   1698 |    40 % | 2816 of 7313 |
| 64 chips, 4 x 4 x 4, 1F1B lockstep |  0.33 +  1.71     |  251 |   354 | 16 % |    718 |    24 % | 1376 of 3769 |
| 64 chips, 8 x 4 x 2, ZB-H1         |  0.33 + 12.93     |  502 |   411 | 34 % |   1385 |    25 % | 1136 of 3698 |

Meshes are data x pipe x tensor, fully sharded, with sequence parallelism, AdamW, products in bfloat16, stages computed
again for their gradients; a batch is 64 sequences of 1,024 tokens for each device along data. Memory of state and
temporary is the compiler's: a chip has 16 GB, and one alone would need 21.5 for parameters, gradients and moments. All
else is an estimate, since the compiler's own takes a loop's body once and is negative here: busy are products at 197
TFLOP/s; waits, messages with no product between their start and their end, each in a ring of links of 50 GB/s and a
microsecond; idle is the table's in lockstep, as devices of a pipeline meet every tick; of peak leaves out what is
computed twice. The compiler hides the gathering of a block's kernels behind products, having rounded them first; what
waits is mostly tokens gathered and scattered along tensor, and gradients scattered along data. In lockstep, forward
and backward ticks of 1F1B and ZB-H1 wait for one another, so 1F1B whose devices all go forward, then all back, is
faster, in as flat a memory; and ZB-H1 keeps what its gradients of weights wait for.

Source: Shoeybi et al. 2019 (arXiv:1909.08053), Korthikanti et al. 2022 (arXiv:2205.05198), Rajbhandari et al. 2020
(arXiv:1910.02054), Narayanan et al. 2021 (arXiv:2104.04473); chips as in https://cloud.google.com/tpu/docs/v5e.

Command: JAX_PLATFORMS=cpu python experiments/model_parallel_costs.py
Expected: the tables above; without the TPU's compiler, which `pip install "jax[tpu]"` brings, the first alone.
Time: six minutes on two CPU cores at rest, four of them the TPU's compiler.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfed import experiment, mesh, plot, report
from jfed.collectives import count
from jfed.core import Algorithm
from jfed.parallel import schedules
from jfed.parallel.attention import all_to_all_attention, zigzag_attention
from jfed.parallel.experts import mixture_of_experts
from jfed.parallel.layered import AXES, Layered
from jfed.parallel.schedules import Schedule
from jfed.parallel.sharded import on_mesh
from jfed.parallel.transformer import transformer

PARTS = ("ways", "tpu")


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": schedules.gpipe,
    "gpipe_fused": lambda p, m: schedules.fused(schedules.gpipe(p, m)),
    "1f1b": schedules.one_f_one_b,
    "1f1b_lockstep": schedules.one_f_one_b_lockstep,
    "zb_h1": schedules.zb_h1,
}
EXPERTS = 8


class Message(NamedTuple):
    """What a compiled program sends with one instruction."""

    bytes: float  # sent by a device each time; of XLA's own collectives, the least that they must send
    hops: int  # one after another
    times: int  # in a step, on the device that runs it most often
    asynchronous: bool  # starts and ends with instructions of their own
    hidden: bool  # there are products in between


class Way(NamedTuple):
    """A mesh, and what is set beside it."""

    axes: tuple[str, ...]  # those of all devices; several share them, 2 each, and the first gets the rest
    model: dict[str, Any] = {}
    options: dict[str, Any] = {}


SPLIT = {"sequence_parallel": True}
FULLY = {"fully_sharded": True}
WAYS = {
    "one_device": Way(()),
    "data": Way(("data",)),
    "fully_sharded": Way(("data",), options=FULLY),
    "tensor": Way(("tensor",)),
    "sequence_parallel_tensor": Way(("tensor",), SPLIT),
    "collective_matmul": Way(("tensor",), SPLIT | {"overlap": True}),
    "ring_attention": Way(("sequence",)),
    "zigzag_attention": Way(("sequence",), {"sequence_attention": zigzag_attention}),
    "all_to_all_attention": Way(("sequence",), {"sequence_attention": all_to_all_attention}),
    "pipeline_gpipe": Way(("pipe",), options={"schedule": "gpipe"}),
    "pipeline_1f1b": Way(("pipe",), options={"schedule": "1f1b"}),
    "pipeline_zb_h1": Way(("pipe",), options={"schedule": "zb_h1"}),
    "3d": Way(("data", "pipe", "tensor"), options={"schedule": "1f1b"}),
    "3d_fully_sharded": Way(("data", "pipe", "tensor"), SPLIT, FULLY | {"schedule": "1f1b"}),
    "experts_one_device": Way((), {"feed_forward": mixture_of_experts(EXPERTS)}),
    "experts": Way(("expert",), {"feed_forward": mixture_of_experts(EXPERTS)}),
}
# data, pipe, tensor, and the schedule, for chips in rows of a slice.
BUILDS = {
    "v5e:4x4": (((2, 4, 2), "1f1b_lockstep"), ((2, 4, 2), "zb_h1"), ((4, 2, 2), "gpipe_fused")),
    "v5e:8x8": (((4, 4, 4), "1f1b_lockstep"), ((8, 4, 2), "zb_h1")),
}
# https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s in bfloat16, 16 GB, 1600 Gbit/s over four links of two ways.
PEAK, MEMORY, ALPHA, BETA = 197e12, 16e9, 1e-6, 1 / 50e9  # a microsecond a hop is assumed


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    parts: tuple[str, ...] = PARTS
    ways: tuple[str, ...] = tuple(WAYS)
    devices: int = 8  # of the first part
    vocabulary: int = 256
    width: int = 64
    layers: int = 8
    heads: int = 8
    context: int = 64
    batch_size: int = 16
    microbatches: int = 8
    steps: int = 4
    slices: tuple[str, ...] = tuple(BUILDS)
    tpu_vocabulary: int = 32768
    tpu_width: int = 2048
    tpu_layers: int = 24
    tpu_context: int = 1024
    tpu_microbatches: int = 16
    tpu_examples: int = 4  # in a microbatch


SMOKE = {
    "parts": ("ways",),
    "ways": ("one_device", "fully_sharded", "pipeline_1f1b"),
    "devices": 2,
    "layers": 2,
    "microbatches": 2,
    "steps": 2,
}


def main(config: Config) -> None:
    """Splits the model in every way, compiles the large one, then shows tables and a picture."""
    if (odd := [part for part in config.parts if part not in PARTS]) or not config.parts:
        raise ValueError(f"model_parallel_costs(parts={odd}): choose from {', '.join(PARTS)}.")
    if odd := [way for way in config.ways if way not in WAYS]:
        raise ValueError(f"model_parallel_costs(ways={odd}): choose from {', '.join(WAYS)}.")
    if odd := [name for name in config.slices if name not in BUILDS]:
        raise ValueError(f"model_parallel_costs(slices={odd}): choose from {', '.join(BUILDS)}.")
    if config.steps < 1:
        raise ValueError(f"model_parallel_costs(steps={config.steps}): must be at least 1; the loss is of the last.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine of Google's to ask
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        mesh.use_cores(config.devices)
    cells: dict[str, Callable] = {}
    if "ways" in config.parts:
        cells |= {way: functools.partial(cost, config, way) for way in config.ways}
    built = builds(config) if "tpu" in config.parts else {}
    cells |= {cell: functools.partial(build, config, *what) for cell, what in built.items()}
    if not cells:
        raise ValueError("model_parallel_costs(parts=...): nothing is left to do; take the part ways, and a way.")
    whole, results = experiment.over_cells("model_parallel_costs", config, cells)
    if "ways" in config.parts and config.ways:
        show_ways(config, whole, {way: results[way] for way in config.ways})
    if built:
        show_builds({what: results[cell] for cell, what in built.items()})
    print(f"picture and metrics: {whole.folder}\n")
    report.finish(whole, {f"{cell}_{name}": x for cell, found in results.items() for name, x in found.items()})


def cost(config: Config, way: str) -> dict[str, Any]:
    """Memory, bytes sent and the loss of one way."""
    sizes = axes_of(config, way)
    model, devices = model_of(config, way), mesh.make(tuple(sizes.values()), tuple(sizes))
    table = table_of(config, way)
    method = on_mesh(
        model,
        optax.adam(0.01),
        mesh=devices,
        recompute=False,
        **WAYS[way].options | ({"schedule": table, "microbatches": config.microbatches} if table else {}),
    )
    losses = []
    for seed in range(config.seeds):
        start, drawn, key = jax.random.split(jax.random.key(seed), 3)
        shape = (config.batch_size, config.context + 1)
        tokens = jax.random.randint(drawn, shape, 0, config.vocabulary)
        batch, state = {"x": tokens[:, :-1], "y": tokens[:, 1:]}, method.init(model.init(start))
        if not seed:
            held = np.zeros(len(jax.devices()), np.int64)
            for x in jax.tree.leaves((state.params, state.optimizer)):
                for shard in x.addressable_shards:
                    held[shard.device.id] += shard.data.nbytes
            step = jax.jit(method.round).lower(state, batch, key).compile()
            if table is None or len(sizes) == 1:
                sent = int(count.traced(method.round, state, batch, key).sent.max())
            else:  # there a loop sends that goes round by the table, which no counter of programs knows
                sent = round(sum(x.times * x.bytes for x in read(step.as_text(), table)))
        for _ in range(config.steps):
            state, metrics = step(state, batch, key)
        losses.append(float(metrics["loss"]))
    return {
        "axes": sizes,
        "held": int(held.max()),
        "temporary": step.memory_analysis().temp_size_in_bytes,
        "sent": sent,
        "theory": theory(config, way),
        "loss": float(np.mean(losses)),
    }


def axes_of(config: Config, way: str) -> dict[str, int]:
    """Devices along each axis."""
    names = WAYS[way].axes
    first = config.devices // 2 ** (len(names) - 1) if names else 1
    return dict(zip(names or ("data",), [first] + [2] * (len(names) - 1), strict=True))


def table_of(config: Config, way: str) -> Schedule | None:
    """The way's schedule, if it is a pipeline."""
    name = WAYS[way].options.get("schedule")
    return None if name is None else SCHEDULES[name](axes_of(config, way)["pipe"], config.microbatches)


def model_of(config: Config, way: str) -> Layered:
    """The transformer, split in that way."""
    sizes = {"width": config.width, "layers": config.layers, "heads": config.heads, "context": config.context}
    return transformer(config.vocabulary, **sizes, **WAYS[way].model)


def theory(config: Config, way: str) -> int:
    """Bytes that a device sends in a step; the busiest, or of a pipeline one that had the entrance and the exit."""
    n = {axis: axes_of(config, way).get(axis, 1) for axis in AXES}
    t, s, e = n["tensor"], n["sequence"], n["expert"]
    table, settings = table_of(config, way), WAYS[way].model
    m = config.microbatches if table else 1
    b, tokens, width = config.batch_size // (n["data"] * e * m), config.context // s, config.width
    blocks, h = config.layers // n["pipe"], 4 * b * tokens * width  # h bytes of activations
    total = parameters(config, way, n, m) + 2 * shared(4, n["data"] * n["pipe"] * e)  # the loss
    total += m * ((4 * blocks + 2) * 2 * shared(h, t) + 3 * 2 * shared(4 * b * tokens, t))
    if "sequence_parallel" in settings:
        added = 6 * blocks + 2  # vectors that all devices of the axis add to, or multiply with, each token
        total += m * (added * 2 * shared(4 * width, t) + shared(4 * tokens * width, t))  # and positions
    if s > 1:
        ring = (5 * s - 4) * h + 2 * (s - 1) * 4 * b * config.heads * tokens
        of_block = {zigzag_attention: ring + 8 * h, all_to_all_attention: 8 * shared(h, s)}
        total += blocks * of_block.get(settings.get("sequence_attention"), ring) + 2 * 2 * shared(4 * b, s)
    if e > 1:
        room = math.ceil(1.25 * 2 * tokens / EXPERTS)
        total += blocks * 4 * shared(4 * b * EXPERTS * room * width, e)
    if table:
        total += 2 * len(table.op) * h / (t if "sequence_parallel" in settings else 1)
    return round(total)


def parameters(config: Config, way: str, n: dict[str, int], m: int) -> float:
    """Bytes of parameters and their gradients that a device sends."""
    model, total = model_of(config, way), 0.0
    data = n["data"] if "fully_sharded" in WAYS[way].options else 1
    parts = jax.eval_shape(lambda key: model.split(model.init(key)), jax.random.key(0))
    for part, arrays, specs in zip(parts._fields, parts, model.specs, strict=True):
        flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(arrays), flat, strict=True):
            in_blocks = part == "blocks"
            shape = x.shape[1:] if in_blocks else x.shape
            k = 4 * x.size / math.prod(n[axis] for axis in spec if axis) / (n["pipe"] if in_blocks else 1)
            alike = math.prod(n[axis] for axis in ("data", "sequence", "expert") if axis not in spec)
            alike *= 1 if in_blocks else n["pipe"]
            split = [n[axis] if axis else 1 for axis in (*spec, *[None] * (len(shape) - len(spec)))]
            if data > 1 and any(size % data == 0 for size, parts_ in zip(shape, split, strict=True) if parts_ == 1):
                # For gradients a block's kernels and scales are gathered again; they are scattered every microbatch.
                times = m * (2 if "bias" in str(path[-1]) else 3) if in_blocks else 2
                total += times * shared(k, data) + 2 * shared(k / data, alike // data)
            else:
                total += 2 * shared(k, alike)
    return total


def shared(k: float, n: int) -> float:
    """Bytes that a device sends to gather k from n devices, to scatter a sum of k or to exchange k; a sum needs two."""
    return k * (n - 1) / n


def show_ways(config: Config, whole: report.Run, results: dict[str, dict[str, Any]]) -> None:
    """A table of all ways, and their bytes held and sent."""
    rows = []
    for way, r in results.items():
        alone = results.get("experts_one_device" if "experts" in way else "one_device")
        difference = r["sent"] - r["theory"]
        rows.append(
            {
                "": way.replace("_", " "),
                "mesh": ", ".join(f"{axis} {n}" for axis, n in r["axes"].items()),
                "parameters, optimizer": report.human_bytes(r["held"]),
                "temporary": report.human_bytes(r["temporary"]),
                "sent": report.human_bytes(r["sent"]),
                "theory": f"differs by {difference}" if difference else "equal",
                "loss": f"{r['loss']:.5f}",
                "off one device": "" if alone is None else f"{abs(r['loss'] - alone['loss']):.1e}",
            }
        )
    print(report.table(f"A step on {config.devices} devices, of each of them; loss after {config.steps}", rows), "\n")
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for way, r in results.items():
        if not WAYS[way].axes:
            continue
        kind = WAYS[way].axes[0] if len(r["axes"]) == 1 else "several axes"
        memory = (r["held"] + r["temporary"]) / 2**20
        groups.setdefault(kind, {})[way.replace("_", " ")] = (r["sent"] / 2**20, memory)
    if groups:
        plot.plot_points(
            whole.folder / "costs.png",
            groups,
            xlabel="MiB sent by a device in a step",
            ylabel="MiB held by a device",
            title=f"One transformer, split over {config.devices} devices",
        )


def builds(config: Config) -> dict[str, tuple]:
    """What the TPU compiler shall build, by the name of its cell; nothing where there is none."""
    from jax.experimental import topologies

    try:
        topologies.get_topology_desc(platform="tpu", topology_name=next(iter(BUILDS)))
    except Exception as error:  # whatever the plugin raises where it is not installed
        print(f'no TPU compiler here ({str(error).splitlines()[0]}); pip install "jax[tpu]", no TPU is needed\n')
        return {}
    jax.config.update("jax_enable_compilation_cache", False)  # which cannot read a program for devices not there
    return {
        f"{name.replace(':', '-')}_{'x'.join(map(str, sizes))}_{way}": (name, sizes, way)
        for name in config.slices
        for sizes, way in BUILDS[name]
    }


def build(config: Config, name: str, sizes: tuple[int, int, int], way: str) -> dict[str, Any]:
    """The step of a large transformer for a slice, compiled without making an array."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    row_by_row = sorted(topology.devices, key=lambda chip: (chip.coords[1], chip.coords[0]))
    chips = Mesh(np.array(row_by_row).reshape(sizes), ("data", "pipe", "tensor"))
    (d, p, t), m = sizes, config.tpu_microbatches
    model = transformer(
        config.tpu_vocabulary,
        width=config.tpu_width,
        layers=config.tpu_layers,
        heads=config.tpu_width // 128,
        context=config.tpu_context,
        sequence_parallel=True,
        compute_dtype=jnp.bfloat16,
    )
    table = SCHEDULES[way](p, m)
    method = on_mesh(
        model, optax.adamw(3e-4), mesh=chips, microbatches=m, schedule=table, fully_sharded=True, recompute=True
    )
    step, shapes = program(method, model, chips, (d * m * config.tpu_examples, config.tpu_context))
    begin = time.perf_counter()
    built = step.lower(*shapes).compile()
    seconds, memory, messages = time.perf_counter() - begin, built.memory_analysis(), read(built.as_text(), table)
    one, leave = flops(config)
    passes = one * config.tpu_layers / (p * table.chunks * t) / PEAK
    idle = schedules.predict(
        table, forward=passes, input_gradient=passes, weight_gradient=passes, recompute=passes
    ).lockstep_bubble
    busy = m * (4 * passes * table.chunks + 3 * leave / t / PEAK)
    waits = sum(lasts(x) for x in messages if not x.hidden)
    step_seconds = (busy + waits) / (1 - idle)
    needed = 3 * d * m * (one * config.tpu_layers + leave)
    return {
        "params": sum(x.size for x in jax.tree.leaves(shapes[0].params)),
        "tokens": shapes[1]["x"].size,
        "state": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "memory": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "compile_seconds": seconds,
        "compilers_seconds": built.cost_analysis().get("optimal_seconds", 0.0),
        "busy_seconds": busy,
        "waiting_seconds": waits,
        "hidden_seconds": sum(lasts(x) for x in messages if x.hidden),
        "idle": idle,
        "step_seconds": step_seconds,
        "utilisation": needed / (chips.size * PEAK * step_seconds),
        "sends": sum(x.times for x in messages),
        "asynchronous": sum(x.times for x in messages if x.asynchronous),
        "hidden": sum(x.times for x in messages if x.hidden),
        "sent": sum(x.times * x.bytes for x in messages),
        "sent_hidden": sum(x.times * x.bytes for x in messages if x.hidden),
    }


def flops(config: Config) -> tuple[float, float]:
    """Of the forward pass of a microbatch through a block and through the exit; the attention's mask saves none."""
    context, width = config.tpu_context, config.tpu_width
    tokens = config.tpu_examples * context
    return 24.0 * tokens * width**2 + 4.0 * tokens * context * width, 2.0 * tokens * width * config.tpu_vocabulary


def program(method: Algorithm, model: Layered, chips: Mesh, shape: tuple[int, int]) -> tuple[Callable, tuple]:
    """The step, whose state is donated, and the shapes of what it is given, each on its chips."""
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(model.init, key)
    state, places = jax.eval_shape(method.init, params), jax.jit(method.init).lower(params).compile().output_shardings

    def on(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(chips, PartitionSpec("data")))
    key = on(key, NamedSharding(chips, PartitionSpec()))
    return jax.jit(method.round, donate_argnums=0), (jax.tree.map(on, state, places), {"x": tokens, "y": tokens}, key)


_KINDS = r"all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_PRODUCT = re.compile(r" (convolution|dot)\(|custom_call_target=\"tpu_custom_call")


def read(text: str, table: Schedule) -> list[Message]:
    """What the text of a scheduled program sends, and what happens meanwhile.

    The pipeline's loop has a turn a tick. A loop in it has one or none: each device does each kind of op for every
    microbatch and chunk, and in these the entrance's or exit's part for every microbatch, on one device.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif " = " in line:
            lines.append(line)
    m = table.microbatches
    turns = (1, len(table.op), m * table.chunks, m, m)
    return list(_messages(bodies, entry, turns))


def _messages(bodies: dict[str, list[str]], name: str, turns: tuple[int, ...]) -> Iterator[Message]:
    lines = bodies[name]
    for i, line in enumerate(lines):
        label, kind = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(", line).groups()
        called = _called(line)
        if kind in ("while", "conditional"):
            for inner in called:
                yield from _messages(bodies, inner, turns[1:])
            continue
        if kind == "fusion":
            inside = [one for one in bodies[called[0]] if re.search(rf" ({_KINDS})\(", one)]
            if not inside or label.startswith("async-collective-done") or called[0].startswith("async_collective"):
                continue  # the collective goes on, or ends
            (line,) = inside
        elif not re.fullmatch(rf"({_KINDS})(-start)?", kind):
            continue
        asynchronous = kind.endswith("-start") or label.startswith("async-collective-start")
        done = f"%{label.replace('start', 'done')} = "
        between = lines[i + 1 : next((j for j, one in enumerate(lines) if done in one), i + 1)]
        hidden = asynchronous and any(_multiplies(bodies, one) for one in between)
        bytes_, hops = _sent(line, scattered=any(one.startswith("all-reduce-scatter") for one in called))
        yield Message(bytes_, hops, turns[0], asynchronous, hidden)


def _called(line: str) -> list[str]:
    found = re.findall(r"\b(?:body|calls|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)", line)
    return re.findall(r"[\w.\-]+", " ".join(found))


def _multiplies(bodies: dict[str, list[str]], line: str) -> bool:
    return bool(_PRODUCT.search(line)) or any(_multiplies(bodies, one) for f in _called(line) for one in bodies[f])


def _sent(line: str, scattered: bool) -> tuple[float, int]:
    """Bytes a device sends, and hops; of a sum that is `scattered` each device takes its part."""
    shape, kind = re.match(rf"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KINDS})(?:-start)?\(", line).groups()
    sizes = [
        _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    ]
    if kind == "collective-permute":
        return float(sizes[0]), 1
    others = _group(line) - 1
    if kind == "reduce-scatter":
        return float(sum(sizes) * others), others
    rounds = 2 if kind == "all-reduce" and not scattered else 1
    return rounds * sum(sizes) * others / (others + 1), rounds * others


def _group(line: str) -> int:
    """How many devices take part."""
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        along = re.findall(r"'(\w+)'", axes[2])
        return math.prod(int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", axes[1]) if axis in along or not along)
    if rows := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return rows[1].count(",") + 1
    if rows := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(rows[1])
    raise ValueError(f"model_parallel_costs: groups of devices written in an unknown way: {line.strip()[:200]}")


def lasts(message: Message) -> float:
    """Seconds in a step, by the alpha-beta model."""
    return message.times * (message.hops * ALPHA + message.bytes * BETA)


def show_builds(results: dict[tuple, dict[str, Any]]) -> None:
    """Tables of what the TPU compiler made."""
    memory, times = [], []
    for (name, sizes, way), r in results.items():
        label = {"": f"{name}, {' x '.join(map(str, sizes))}, {way.replace('_', ' ')}"}
        parts = {what: f"{r[what] / 1e9:.2f} GB" for what in ("state", "temporary", "memory")}
        fits = {"of 16 GB": f"{100 * r['memory'] / MEMORY:.0f} %", "compiled in": f"{r['compile_seconds']:.0f} s"}
        memory.append(label | parts | fits)
        times.append(
            label
            | {what: _milliseconds(r[f"{what}_seconds"]) for what in ("busy", "waiting", "hidden")}
            | {"idle": f"{100 * r['idle']:.0f} %", "a step": _milliseconds(r["step_seconds"])}
            | {"tokens/s": f"{r['tokens'] / r['step_seconds']:,.0f}", "of peak": f"{100 * r['utilisation']:.0f} %"}
            | {"sends, asynchronous, hidden": f"{r['sends']}, {r['asynchronous']}, {r['hidden']}"}
            | {"bytes, hidden": f"{r['sent'] / 1e9:.2f} GB, {100 * r['sent_hidden'] / r['sent']:.0f} %"}
        )
    params = next(iter(results.values()))["params"]
    print(report.table(f"{params / 1e9:.3f} B parameters, 16 bytes each in one chip {16e-9 * params:.1f} GB", memory))
    print()
    print(report.table("A step of a chip, estimated, and its messages", times), "\n")


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
