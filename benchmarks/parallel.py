"""What a step of the transformer costs by each way of dealing it to devices, and how well one GPU is used.

Asked, one after another:

    schemes    on 8 and on 2 virtual CPU devices, for each scheme: a step's time beside that of one device, temporary
               memory of a device, bytes it sends, permutes and how many of them the compiler made asynchronous
    gpu        on one GPU, where there is one: share of its peak in useful work (MFU) by model, batch, kind of
               attention and recomputation, and a step's memory

Schemes take turns; times are medians, ratios medians of those of a turn. Every device computes in one thread, so
devices beyond the cores share them, and n devices that never wait take 1/n of one device's time on n cores. What is
sent, and the memory, are read off the compiled program. A device of a pipeline chooses at run time what it does, so
where that sends too (3-D) bytes are not known. "Differs" is from one device, in the loss before and the sum of squares
of parameters after a step; PipeDream, asynchronous, takes a step a microbatch and is not comparable.

Useful are 6 N + 12 L H T operations a token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): N parameters but for
the embedding and the positions, which are looked up, L layers of width H, T tokens of context. Neither recomputation
counts nor that a causal half of attention is not needed. Tables of peaks are NVIDIA's, of dense bfloat16 products.

Command: python benchmarks/parallel.py
Time: four minutes on eight cores; `--parts gpu` takes four minutes at most, `--smoke` a minute or two.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import mesh, report
from jfed.collectives import count
from jfed.parallel import attention, experts, schedules
from jfed.parallel.layered import Layered
from jfed.parallel.pipedream import pipedream
from jfed.parallel.sharded import on_mesh
from jfed.parallel.transformer import transformer

PARTS = ("schemes", "gpu")
DEVICES = (8, 2)
SIZES = {"width": 128, "layers": 16, "heads": 8, "context": 128}
SMALL = {"width": 16, "layers": 4, "heads": 2, "context": 16}
VOCABULARY, EXAMPLES, TURNS = 512, 16, 5
SMOKE = ("one device", "data", "overlap", "1f1b", "pipedream")
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # operations a second
GPT2_VOCABULARY, GPT2_CONTEXT = 50304, 1024
SECONDS = 1.0  # a block of timed steps lasts about as long


class Scheme(NamedTuple):
    """One way of dealing the model to n devices."""

    axes: Callable[[int], dict[str, int] | None]  # of the mesh; None where n is too small
    model: str = "dense"
    options: Callable[[int], dict[str, Any]] = lambda n: {}
    make: Callable = on_mesh


class Row(NamedTuple):
    """One configuration of the GPU's part."""

    layers: int
    width: int
    heads: int
    batch: int
    attention: str = "cudnn"
    recompute: bool = False
    vocabulary: int = GPT2_VOCABULARY


def along(axis: str) -> Callable[[int], dict[str, int]]:
    """All devices along one axis."""
    return lambda n: {axis: n}


def cube(n: int) -> dict[str, int] | None:
    """Two devices along each of three axes."""
    return {"data": 2, "pipe": 2, "tensor": 2} if n == 8 else None


def piped(schedule: Callable, **options: Any) -> Callable[[int], dict[str, Any]]:
    """A schedule of two microbatches a device."""
    return lambda n: {"microbatches": 2 * n, "schedule": schedule, **options}


INTERLEAVED = functools.partial(schedules.interleaved, chunks=2)
ZB_H1_CUBE = {"microbatches": 4, "schedule": schedules.zb_h1, "fully_sharded": True}
SCHEMES = {
    "one device": Scheme(lambda n: {"data": 1}),
    "data": Scheme(along("data")),
    "fsdp": Scheme(along("data"), options=lambda n: {"fully_sharded": True}),
    "tensor": Scheme(along("tensor")),
    "sequence-parallel": Scheme(along("tensor"), "sequence_parallel"),
    "overlap": Scheme(along("tensor"), "overlap"),
    "ring": Scheme(along("sequence")),
    "zigzag": Scheme(along("sequence"), "zigzag"),
    "all to all": Scheme(along("sequence"), "all_to_all"),
    "experts, one device": Scheme(lambda n: {"data": 1}, "experts"),
    "experts": Scheme(along("expert"), "experts"),
    "naive": Scheme(along("pipe"), options=piped(schedules.naive)),
    "gpipe": Scheme(along("pipe"), options=piped(schedules.gpipe)),
    "1f1b": Scheme(along("pipe"), options=piped(schedules.one_f_one_b)),
    "1f1b, fused": Scheme(along("pipe"), options=piped(lambda p, m: schedules.fused(schedules.one_f_one_b(p, m)))),
    "1f1b, kept": Scheme(along("pipe"), options=piped(schedules.one_f_one_b, recompute=False)),
    "interleaved": Scheme(along("pipe"), options=piped(INTERLEAVED)),
    "zb_h1": Scheme(along("pipe"), options=piped(schedules.zb_h1)),
    "pipedream": Scheme(along("pipe"), options=lambda n: {"microbatches": 2 * n}, make=pipedream),
    "3-D": Scheme(cube, options=lambda n: {"microbatches": 4}),
    "3-D, fsdp, zb_h1": Scheme(cube, "sequence_parallel", options=lambda n: ZB_H1_CUBE),
}
MODELS: dict[str, Callable] = {
    "dense": transformer,
    "sequence_parallel": functools.partial(transformer, sequence_parallel=True),
    "overlap": functools.partial(transformer, sequence_parallel=True, overlap=True),
    "zigzag": functools.partial(transformer, sequence_attention=attention.zigzag_attention),
    "all_to_all": functools.partial(transformer, sequence_attention=attention.all_to_all_attention),
    "experts": lambda vocabulary, **sizes: transformer(
        vocabulary, feed_forward=experts.mixture_of_experts(8, hidden=2 * sizes["width"]), **sizes
    ),
}
SMALL_GPT, MEDIUM_GPT, WIDE_GPT = (12, 768, 12), (24, 1024, 16), (24, 2048, 16)
ROWS = (  # the most telling first: what does not fit in the time is left out
    Row(*SMALL_GPT, 16),
    Row(*SMALL_GPT, 16, attention="xla"),
    Row(*MEDIUM_GPT, 16),
    Row(*MEDIUM_GPT, 16, recompute=True),
    Row(*WIDE_GPT, 8, recompute=True),
    Row(*WIDE_GPT, 8),
    Row(*SMALL_GPT, 32),
    Row(*SMALL_GPT, 16, vocabulary=1024),
    Row(*MEDIUM_GPT, 32, recompute=True),
    Row(*MEDIUM_GPT, 8, attention="xla"),
)
ROWS_SMOKE = (Row(2, 32, 2, 2, attention="xla", vocabulary=64), Row(2, 32, 2, 2, "xla", True, 64), Row(2, 30, 4, 2))


def batch_of(vocabulary: int, examples: int, tokens: int) -> dict[str, np.ndarray]:
    """Tokens drawn at random."""
    drawn = np.random.default_rng(0).integers(0, vocabulary, (examples, tokens + 1), np.int32)
    return {"x": drawn[:, :-1], "y": drawn[:, 1:]}


def measure(names: list[str], sizes: dict[str, int], turns: int) -> dict[str, dict[str, Any]]:
    """What each scheme costs on all devices there are."""
    n, key, steps, found = jax.device_count(), jax.random.key(0), {}, {}
    batch = batch_of(VOCABULARY, EXAMPLES, sizes["context"])
    for name in names:
        scheme = SCHEMES[name]
        axes = scheme.axes(n)
        if axes is None:
            continue
        model = MODELS[scheme.model](VOCABULARY, **sizes)
        devices = mesh.make(tuple(axes.values()), tuple(axes))
        method = scheme.make(model, optax.adam(1e-3), mesh=devices, **scheme.options(n))
        state = method.init(model.init(key))
        program = jax.jit(method.round).lower(state, batch, key).compile()
        after, metrics = program(state, batch, key)
        squares = sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(method.params(after)))
        steps[name] = functools.partial(program, state, batch, key)
        found[name] = {
            "loss": float(metrics["loss"]),
            "squares": squares,
            "seconds": [],
            "temporary": program.memory_analysis().temp_size_in_bytes,
            "state": program.memory_analysis().argument_size_in_bytes,
        } | sent_by(program.as_text())
    for _ in range(turns):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step())
            found[name]["seconds"].append(time.perf_counter() - began)
    return found


def sent_by(text: str) -> dict[str, Any]:
    """Bytes and permutes of a compiled step, None where the program does not say."""
    try:
        counted = count.compiled(text)
    except ValueError as error:
        return {"sent": None, "permutes": None, "asynchronous": None, "why": str(error)}
    sent = int(counted.sent.max())
    return {"sent": sent, "permutes": counted.permutes, "asynchronous": counted.asynchronous}


def schemes(devices: tuple[int, ...], names: list[str], sizes: dict[str, int], turns: int) -> dict[str, Any]:
    """A table for each number of devices."""
    everything = {}
    for n in devices:
        found = everything[f"{n} devices"] = in_a_process(n, names, sizes, turns)
        rows = []
        for name, row in found.items():
            alone = found.get("experts, one device" if SCHEMES[name].model == "experts" else "one device", row)
            ratio = statistics.median(a / b for a, b in zip(row["seconds"], alone["seconds"], strict=True))
            comparable = SCHEMES[name].make is not pipedream
            differs = max(abs(row[what] / alone[what] - 1) for what in ("loss", "squares"))
            rows.append(
                {
                    "scheme": name,
                    "step": report.human_seconds(statistics.median(row["seconds"])),
                    "/ one device": f"{ratio:.2f}",
                    "temporary": report.human_bytes(row["temporary"]),
                    "state and batch": report.human_bytes(row["state"]),
                    "sent by a device": "unknown" if row["sent"] is None else report.human_bytes(row["sent"]),
                    "permutes": _word(row["permutes"]),
                    "asynchronous": _word(row["asynchronous"]),
                    "differs": f"{differs:.0e}" if comparable else "",
                }
            )
        print(report.table(f"{n} virtual devices, {sizes}, {EXAMPLES} examples", rows), "\n", flush=True)
    return everything


def in_a_process(n: int, names: list[str], sizes: dict[str, int], turns: int) -> dict[str, dict[str, Any]]:
    """`measure` where there are so many devices, of one thread each."""
    flags = f"--xla_force_host_platform_device_count={n} --xla_cpu_multi_thread_eigen=false"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--child", json.dumps([names, sizes, turns])]
    output = subprocess.run(command, capture_output=True, text=True, env=env)
    if output.returncode:
        sys.exit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


def gpu(rows: tuple[Row, ...], *, context: int, peak: float | None, seconds: float, out: Path | None) -> list[dict]:
    """A table of the accelerator's use, begun anew by every row that is done in time."""
    began, device, found = time.monotonic(), jax.devices()[0], []
    known = [value for name, value in PEAKS.items() if name in device.device_kind]
    if peak is None and not known:
        sys.exit(f"gpu: the peak of {device.device_kind!r} is not known here; give --peak, in TFLOP/s of bfloat16.")
    peak = known[0] if peak is None else peak
    print(f"{device.device_kind}, peak {peak / 1e12:g} TFLOP/s", flush=True)
    side = 8192 if device.platform == "gpu" else 256
    drawn = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)  # of ones it would be faster
    square = side**3 * 2 / seconds_of(jax.jit(jnp.matmul), drawn)
    del drawn
    print(f"a product of {side} x {side} in bfloat16: {square / 1e12:.4g} TFLOP/s", flush=True)
    for row in rows:
        shown = row._asdict() | {"context": context}
        # A row has to compile, which takes half a minute.
        if time.monotonic() - began > seconds - 30:
            shown |= {"error": "no time left"}
        else:
            try:
                shown |= step_of(row, context, peak)
            except Exception as error:  # one that does not fit, or that this device or version has not
                shown |= {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}
        gc.collect()
        found.append(shown)
        print({name: value for name, value in shown.items() if value is not None}, flush=True)
        if out is not None:
            out.write_text(json.dumps({"device": device.device_kind, "square": square, "peak": peak, "rows": found}))
    table = [
        {
            "L, H, heads, B": f"{row['layers']}, {row['width']}, {row['heads']}, {row['batch']}",
            "V": row["vocabulary"],
            "attention": row["attention"],
            "recompute": "yes" if row["recompute"] else "no",
            "N": "" if "error" in row else f"{row['counted'] / 1e6:.0f}M of {row['parameters'] / 1e6:.0f}M",
            "step": "" if "error" in row else f"{1e3 * row['step']:.1f} ms",
            "tokens/s": "" if "error" in row else f"{row['tokens_per_second']:.4g}",
            "MFU": "" if "error" in row else f"{100 * row['mfu']:.1f} %",
            "temporary": "" if "error" in row else report.human_bytes(row["temporary"]),
            "state": "" if "error" in row else report.human_bytes(row["state"]),
            "compiled in": "" if "error" in row else f"{row['compile_seconds']:.0f} s",
            "error": row.get("error", ""),
        }
        for row in found
    ]
    print(report.table(f"A step on one {device.device_kind}, {context} tokens, bfloat16, AdamW", table), "\n")
    return found


def step_of(row: Row, context: int, peak: float) -> dict[str, Any]:
    """Time and memory of a configuration's step, and its share of the peak."""
    model = gpt(row, context)
    params = model.init(jax.random.key(0))
    looked_up = params["embed"]["embedding"].size + params["positions"].size
    parameters = sum(x.size for x in jax.tree.leaves(params))
    method = on_mesh(model, optax.adamw(1e-4), mesh=mesh.make((1,), ("data",)), recompute=row.recompute)
    state = method.init(params)
    del params
    batch, key = jax.device_put(batch_of(row.vocabulary, row.batch, context)), jax.random.key(0)
    began = time.perf_counter()
    program = jax.jit(method.round, donate_argnums=0).lower(state, batch, key).compile()
    compiled_in, memory = time.perf_counter() - began, program.memory_analysis()
    state, metrics = program(state, batch, key)
    first = float(metrics["loss"])
    state, metrics = program(state, batch, key)
    jax.block_until_ready(state)

    def steps(times: int) -> float:
        nonlocal state, metrics
        began = time.perf_counter()
        for _ in range(times):
            state, metrics = program(state, batch, key)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - began) / times

    times = max(2, min(50, int(SECONDS / steps(2))))
    step = statistics.median(steps(times) for _ in range(3))
    tokens = row.batch * context
    useful = (6 * (parameters - looked_up) + 12 * row.layers * row.width * context) * tokens
    return {
        "parameters": parameters,
        "counted": parameters - looked_up,
        "step": step,
        "tokens_per_second": tokens / step,
        "mfu": useful / step / peak,
        "temporary": memory.temp_size_in_bytes,
        "state": memory.argument_size_in_bytes,
        "compile_seconds": compiled_in,
        "losses": [first, float(metrics["loss"])],
    }


def gpt(row: Row, context: int) -> Layered:
    """The transformer of a row, in bfloat16."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=row.attention)
    sizes = {"width": row.width, "layers": row.layers, "heads": row.heads, "context": context}
    return transformer(row.vocabulary, **sizes, attention=attend, compute_dtype=jnp.bfloat16)


def seconds_of(f: Callable, x: jax.Array) -> float:
    """Of a product with itself, the median of five blocks."""
    jax.block_until_ready(f(x, x))
    blocks = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([f(x, x) for _ in range(10)])
        blocks.append((time.perf_counter() - began) / 10)
    return statistics.median(blocks)


def _word(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="by default schemes, and gpu where there is one")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, help="by default all; one device is always measured")
    parser.add_argument("--devices", nargs="+", type=int, choices=DEVICES, default=DEVICES)
    parser.add_argument("--peak", type=float, help="TFLOP/s of bfloat16, of a GPU that is not known here")
    parser.add_argument("--seconds", type=float, default=240.0, help="that the gpu part may take")
    parser.add_argument("--out", type=Path, help="a file for what was found, JSON")
    parser.add_argument("--smoke", action="store_true", help="a small part, to see that it works")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.child:
        print(json.dumps(measure(*json.loads(chosen.child))))
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores", flush=True)
    on_gpu = jax.default_backend() == "gpu"
    parts = chosen.parts or (PARTS if on_gpu else PARTS[:1])
    found: dict[str, Any] = {}
    if "gpu" in parts:
        rows, context = (ROWS_SMOKE, 16) if chosen.smoke else (ROWS, GPT2_CONTEXT)
        peak = None if chosen.peak is None else 1e12 * chosen.peak
        found["gpu"] = gpu(rows, context=context, peak=peak, seconds=chosen.seconds, out=chosen.out)
    if "schemes" in parts:
        names = list(chosen.schemes or (SMOKE if chosen.smoke else SCHEMES))
        names = list(dict.fromkeys(["one device", *names]))
        if any(SCHEMES[name].model == "experts" for name in names):
            names.insert(1, "experts, one device")
            names = list(dict.fromkeys(names))
        devices, sizes, turns = ((2,), SMALL, 2) if chosen.smoke else (tuple(chosen.devices), SIZES, TURNS)
        found["schemes"] = schemes(devices, names, sizes, turns)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
