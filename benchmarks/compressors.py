"""What compression costs: operators beside a copy, `top_k` beside XLA's, a round beside one without, and PyTorch.

Asked, each part in a process of its own:

    operators   seconds to encode and to decode a tree of `--size` float32 numbers, normal ones
    top_k       `top_k` of a vector beside `jax.lax.top_k` of its magnitudes alone
    round       a federated round of `experiments/quickstart.py` with an uplink beside one without
    peers       encoding and decoding beside PyTorch's kernels, kits made for it, and plain ops, on the same arrays

How operators are timed: one compiled program encodes and decodes again and again, each in a loop of its own, so that
the message is written out in between, and into the same buffers every time. On a CPU the first write to fresh memory
takes longer than what is written. What they are compared to is a copy, the tree plus a number, in such a loop. XLA's
moving out of loops what stays the same in them is switched off. "one program" is that loop where XLA may fuse decoding
with encoding, as it may in a client's program with `error_feedback` or `decoded`. "called" is two jitted calls, one to
encode and one to decode, that write to fresh buffers, and beside them a copy by a call.

PyTorch's process gets the same arrays and as many threads, keeps what it frees (by settings of glibc), and decodes into
arrays that are there. It is stopped while it is not its turn.

What is compared takes turns; seconds are medians, ratios medians of those of a turn. GB/s are the tree's bytes over the
time of encoding and decoding.

Command: python benchmarks/compressors.py
Time: on two cores at rest a quarter of an hour for the operators, minutes for the others; `--smoke` takes a minute.
"""

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jfed import algorithms, clients, compress, core, data, experiment, local, mesh, models, report, sampling

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import process as processes

PARTS = ("operators", "top_k", "round", "peers")
SHAPES = ((1024, 4096), (4096, 1024), (1000, 1000), (777, 777), (4096,), (1000,), (333,))  # ten million numbers
SECONDS = 0.2  # a measurement repeats what it measures for about as long
SMOKE = ("quantize(4, nearest)", "error_feedback(scaled_sign)")
processes.ENVIRONMENTS["compression"] = (
    "torch==2.13.0",
    "numpy==2.3.5",  # hivemind does not run with 2.4
    "hivemind==1.1.12",
    "bitsandbytes==0.50.2",
    "torchao==0.18.0",
)
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


def operators() -> dict[str, optax.GradientTransformation]:
    """What is measured, by name."""
    found = {}
    for bits in (8, 4, 2, 1):
        for rounding in ("stochastic", "nearest"):
            for per in (None, 256):
                words = [str(bits), *(["nearest"] if rounding == "nearest" else []), *([f"per={per}"] if per else [])]
                found[f"quantize({', '.join(words)})"] = compress.quantize(bits, rounding=rounding, per=per)
    four = compress.quantize(4, rounding="nearest")
    return found | {
        "qsgd(7)": compress.qsgd(7),
        "terngrad": compress.terngrad(),
        "sign": compress.sign(),
        "scaled_sign": compress.scaled_sign(),
        "natural": compress.natural(),
        "bfloat16": compress.low_precision("bfloat16"),
        "float8_e4m3fn": compress.low_precision("float8_e4m3fn"),
        "float8_e5m2": compress.low_precision("float8_e5m2"),
        "top_k(.01)": compress.top_k(0.01),
        "top_k(.05)": compress.top_k(0.05),
        "top_k(.01, sampled)": compress.top_k(0.01, method="sampled"),
        "top_k(.05, sampled)": compress.top_k(0.05, method="sampled"),
        "random_k(.01)": compress.random_k(0.01),
        "ternary(.05)": compress.ternary(0.05),
        "rotate": compress.rotate(),
        "drive": compress.drive(),
        "eden(2)": compress.eden(2),
        "power_sgd(2)": compress.power_sgd(2),
        "count_sketch(5, 100_000) of all": compress.over_tree(compress.count_sketch(5, 100_000)),
        "top_k(.05), quantize(4, nearest)": optax.chain(compress.top_k(0.05), four),
        "error_feedback(scaled_sign)": compress.error_feedback(compress.scaled_sign()),
    }


def tree_of(size: int) -> dict[str, jax.Array]:
    """About `size` normal numbers in arrays of a model's shapes."""
    rng, scale = np.random.default_rng(0), math.sqrt(size / 10_000_000)
    shapes = [tuple(max(1, round(side * scale)) for side in shape) for shape in SHAPES]
    return {str(i): jnp.asarray(rng.standard_normal(shape, np.float32)) for i, shape in enumerate(shapes)}


def updating(operator: optax.GradientTransformation) -> Callable:
    """`(tree, state, i) -> message, state`, random numbers being those of round `i`."""
    operator, key = optax.with_extra_args_support(operator), jax.random.key(0)
    return lambda tree, state, i: operator.update(tree, state, tree, key=jax.random.fold_in(key, i), round=i)


def repeated(step: Callable, held: core.Tree, *arguments: Any, seconds: float) -> Callable[..., float]:
    """Compiles a loop of `step(i, held, *arguments) -> held`, which writes into `held` from repeat to repeat.

    Returns:
      `run(*arguments)`, seconds a repeat, of as many as take about `seconds` with the arguments given here.
    """

    def loop(held, repeats, arguments):
        return lax.fori_loop(0, repeats, lambda i, held: step(i, held, *arguments), held)

    program = jax.jit(loop, donate_argnums=0)
    now = {"held": jax.tree.map(jnp.copy, held), "repeats": 1}

    def run(*arguments):
        began = time.perf_counter()
        now["held"] = jax.block_until_ready(program(now["held"], now["repeats"], arguments))
        return (time.perf_counter() - began) / now["repeats"]

    run(*arguments)  # compiles
    now["repeats"] = max(2, min(50, round(seconds / run(*arguments))))
    return run


def apart(operator: optax.GradientTransformation, tree: core.Tree, seconds: float) -> tuple[Callable, int]:
    """`run(tree, encodes, decodes)` of a loop with a loop for encoding and one for decoding, and bytes of a message."""
    update = updating(operator)
    state = operator.init(tree)
    message, state = jax.jit(update)(tree, state, 0)

    def step(i, held, tree, encodes, decodes):
        message, made, state = held
        message, state = lax.fori_loop(0, encodes, lambda _, held: update(tree, held[1], i), (message, state))
        made = lax.fori_loop(0, decodes, lambda _, made: compress.decode(message), made)
        return message, made, state

    return repeated(step, (message, tree, state), tree, 1, 1, seconds=seconds), compress.nbytes(message)


def fused(operator: optax.GradientTransformation, tree: core.Tree, seconds: float) -> Callable:
    """A loop in which decoding follows encoding with nothing between; `run(tree)`."""
    update = updating(operator)

    def step(i, held, tree):
        message, state = update(tree, held[1], i)
        return compress.decode(message), state

    return repeated(step, (tree, operator.init(tree)), tree, seconds=seconds)


def called(operator: optax.GradientTransformation, tree: core.Tree) -> Callable[[], float]:
    """Two jitted calls; `run()`."""
    encode, decode = jax.jit(updating(operator)), jax.jit(compress.decode)
    now = {"state": operator.init(tree), "round": 0}

    def run():
        began = time.perf_counter()
        message, state = encode(tree, now["state"], now["round"])
        jax.block_until_ready(decode(message))
        now.update(state=state, round=now["round"] + 1)
        return time.perf_counter() - began

    return run


def copying(tree: core.Tree, seconds: float) -> dict[str, Callable[[], float]]:
    """A copy in a loop and one by a jitted call."""

    def plus(tree, number):
        return jax.tree.map(lambda x: x + number, tree)

    loop = repeated(lambda i, held, tree, number: plus(tree, number), tree, tree, 0.0, seconds=seconds)
    call = jax.jit(plus)

    def run():
        began = time.perf_counter()
        jax.block_until_ready(call(tree, 0.0))
        return time.perf_counter() - began

    return {"copy": lambda: loop(tree, 0.0), "called copy": run}


def turns(
    count: int, runs: dict[str, Callable[[], float]], advance: Callable[[int], None] = lambda n: None
) -> dict[str, list[float]]:
    """Seconds of each, one after another, `count` times after one that is left out; another begins each turn."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(count + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = runs[name]()
            if turn:
                took[name].append(seconds)
        advance(min(turn, 1))
    return took


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median over turns of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def percent(a: list[float], b: list[float]) -> str:
    """Their ratio."""
    return f"{100 * median_ratio(a, b):.0f} %"


def milliseconds(values: list[float]) -> str:
    """The median."""
    return f"{1e3 * statistics.median(values):.1f} ms"


def keep_in_loops() -> None:
    """Has XLA compute in a loop what it could compute once before it; comes before JAX has started."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_disable_hlo_passes=while-loop-invariant-code-motion".strip()


def of_operators(options: argparse.Namespace) -> None:
    """A row an operator."""
    keep_in_loops()
    tree = tree_of(options.size)
    size = sum(x.size for x in jax.tree.leaves(tree))
    copies, table = copying(tree, options.seconds), chosen(options)
    with report.progress(len(table), "operators", unit="operators") as advance:
        rows = []
        for name, operator in table.items():
            rows.append({"operator": name} | of_operator(operator, tree, copies, options))
            advance(1)
    took = turns(options.turns, copies)
    speed = 4e-9 * size / statistics.median(took["copy"])
    print(f"A copy takes {milliseconds(took['copy'])}, {speed:.2f} GB/s; called, {milliseconds(took['called copy'])}")
    print(report.table(f"Encoding and decoding {size:,} numbers, median of {options.turns}", rows))


def of_operator(
    operator: optax.GradientTransformation,
    tree: core.Tree,
    copies: dict[str, Callable[[], float]],
    options: argparse.Namespace,
) -> dict[str, str]:
    """An operator's row."""
    loop, nbytes = apart(operator, tree, options.seconds)
    together, size = fused(operator, tree, options.seconds), sum(x.size for x in jax.tree.leaves(tree))
    runs = {
        "encode": lambda: loop(tree, 1, 0),
        "decode": lambda: loop(tree, 0, 1),
        "both": lambda: loop(tree, 1, 1),
        "fused": lambda: together(tree),
        "called": called(operator, tree),
    }
    took = turns(options.turns, copies | runs)
    return {
        "bits": f"{8 * nbytes / size:.2f}",
        "encode": milliseconds(took["encode"]),
        "decode": milliseconds(took["decode"]),
        "both": milliseconds(took["both"]),
        "GB/s": f"{4e-9 * size / statistics.median(took['both']):.2f}",
        "copy / both": percent(took["copy"], took["both"]),
        "one program": milliseconds(took["fused"]),
        "called": milliseconds(took["called"]),
        "called copy / called": percent(took["called copy"], took["called"]),
    }


def of_top_k(options: argparse.Namespace) -> None:
    """A row a length and fraction."""
    keep_in_loops()
    rows, sizes = [], [options.size, *([200_000] if options.size > 200_000 else [])]
    with report.progress(2 * len(sizes), "top_k", unit="settings") as advance:
        for d in sizes:
            x = jnp.asarray(np.random.default_rng(0).standard_normal(d, np.float32))
            for fraction in (0.01, 0.05):
                methods = ("lax.top_k", "exact", "sampled")
                runs = {method: selecting(x, fraction, method, options.seconds) for method in methods}
                took = turns(options.turns, runs)
                row = {"numbers": f"{d:,}", "kept": f"{100 * fraction:.0f} %"}
                row |= {name: milliseconds(values) for name, values in took.items()}
                for method in ("exact", "sampled"):
                    row[f"{method} / lax.top_k"] = f"{median_ratio(took[method], took['lax.top_k']):.3f}"
                rows.append(row)
                advance(1)
    print(report.table(f"Encoding by top_k, median of {options.turns}", rows))


def selecting(x: jax.Array, fraction: float, method: str, seconds: float) -> Callable[[], float]:
    """`run()` of a loop of encoding by `top_k`, or of XLA's own of the magnitudes."""

    def function(x):
        if method == "lax.top_k":
            return lax.top_k(jnp.abs(x), math.ceil(fraction * x.size - 1e-9))
        return updating(compress.top_k(fraction, method=method))(x, optax.EmptyState(), 0)[0]

    run = repeated(lambda i, held, x: function(x), jax.jit(function)(x), x, seconds=seconds)
    return lambda: run(x)


def of_round(options: argparse.Namespace) -> None:
    """A row an uplink."""
    mesh.use_cores()
    n, cohort, epochs = (50, 10, 1) if options.smoke else (1000, 100, 5)
    train, _ = data.fashion_small()
    owner = data.partition.dirichlet(jax.random.key(0), train["y"], num_clients=n, alpha=0.3)
    client_map, place = experiment.over_devices(clients.lanes(1))
    population = place(data.by_owner(train, owner, num_classes=10))
    model = models.two_nn()
    work = local.sgd(models.cross_entropy(model), optax.sgd(0.1), batch_size=10, epochs=epochs)
    sampler = sampling.uniform(cohort, steps=work.steps)
    params, key = place(model.init(jax.random.key(0))), place(jax.random.key(1))
    uplinks = {
        "none": None,
        "quantize(8)": compress.quantize(8),
        "quantize(8, nearest)": compress.quantize(8, rounding="nearest"),
        "sign": compress.sign(),
        "scaled_sign": compress.scaled_sign(),
        "error_feedback(scaled_sign)": compress.error_feedback(compress.scaled_sign()),
    }
    if options.smoke:
        uplinks = {name: uplinks[name] for name in ("none", "error_feedback(scaled_sign)")}
    runs, sent = {}, {}
    with report.progress(len(uplinks) + options.turns, "rounds", unit="steps") as advance:
        for name, uplink in uplinks.items():
            memory = {"num_clients": n} if name.startswith("error_feedback") else {}
            algorithm = algorithms.fedavg(work, uplink=uplink, client_map=client_map, **memory)

            def one_round(state, population, key, t, algorithm=algorithm):
                sample_key, round_key = jax.random.split(jax.random.fold_in(key, t))
                return algorithm.round(state, sampler(population, sample_key, t), round_key)

            program = jax.jit(one_round, donate_argnums=0)
            now = {"state": place(algorithm.init(params)), "round": 0}

            def run(name=name, program=program, now=now):
                began = time.perf_counter()
                state, metrics = jax.block_until_ready(program(now["state"], population, key, now["round"]))
                seconds = time.perf_counter() - began
                now.update(state=state, round=now["round"] + 1)
                sent[name] = int(metrics["traffic"].up.max())
                return seconds

            run()  # compiles
            runs[name] = run
            advance(1)
        took = turns(options.turns, runs, advance)
    rows = [
        {
            "uplink": name,
            "median": milliseconds(values),
            "to none's": f"{median_ratio(values, took['none']):.3f}",
            "sent by a client": report.human_bytes(sent[name]),
        }
        for name, values in took.items()
    ]
    title = f"A round of {cohort} of {n} clients, 2NN, {epochs} epochs, {jax.device_count()} devices"
    print(report.table(f"{title}, median of {options.turns}", rows))


def of_peers(options: argparse.Namespace) -> None:
    """A row a peer of each operator."""
    keep_in_loops()
    tree, rows = tree_of(options.size), []
    size = sum(x.size for x in jax.tree.leaves(tree))
    os.environ.update(KEEP_MEMORY)  # of the process that is started
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        arrays = Path(scratch) / "arrays"
        arrays.mkdir()
        for name, x in tree.items():
            np.save(arrays / f"{name}.npy", x)
        spec = {"arrays": str(arrays), "cores": cores(), "seconds": options.seconds}
        folder = Path(scratch) / "torch"
        peer = processes.start(
            "torch_compression", "compression", spec, folder, venvs=options.venvs, patience=options.patience
        )
        try:
            told = processes.ask(peer, "ways")
            print(", ".join(f"{kit} {version}" for kit, version in told["versions"].items()))
            table = {name: operator for name, operator in chosen(options).items() if name in told["ways"]}
            with report.progress(len(table), "peers", unit="operators") as advance:
                for name, operator in table.items():
                    rows += beside(name, operator, tree, peer, told["ways"][name], options)
                    advance(1)
        finally:
            processes.kill(peer)
    print(report.table(f"Encoding and decoding {size:,} numbers, {cores()} threads, median of {options.turns}", rows))


def beside(
    name: str,
    operator: optax.GradientTransformation,
    tree: core.Tree,
    peer: processes.Process,
    ways: list[str],
    options: argparse.Namespace,
) -> list[dict[str, str]]:
    """An operator's rows."""
    loop, nbytes = apart(operator, tree, options.seconds)
    answers: dict[str, dict] = {"jfed": {"bytes": nbytes}}

    def asked(way):
        answers[way] = processes.ask(peer, f"{name}\t{way}")
        return answers[way]["encode"] + answers[way]["decode"]

    took = turns(options.turns, {"jfed": lambda: loop(tree, 1, 1)} | {way: lambda way=way: asked(way) for way in ways})
    return [
        {
            "operator": name,
            "by": way,
            "bits": f"{8 * answers[way]['bytes'] / sum(x.size for x in jax.tree.leaves(tree)):.2f}",
            "encode and decode": milliseconds(values),
            "it / jfed": f"{median_ratio(values, took['jfed']):.2f}",
        }
        for way, values in took.items()
    ]


def chosen(options: argparse.Namespace) -> dict[str, optax.GradientTransformation]:
    """The operators the command line asks for."""
    return {name: operator for name, operator in operators().items() if not options.only or name in options.only}


def cores() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Runs each part in a process of its own, or a single one in this."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=int, default=10_000_000, help="numbers of the tree, about")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], metavar="OPERATOR", help=", ".join(operators()))
    parser.add_argument("--venvs", type=Path, default=Path(__file__).parents[1] / ".venv-peers")
    parser.add_argument("--patience", type=float, default=900, help="seconds until a peer counts as hung")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, few operators, nothing but this interpreter")
    options = parser.parse_args()
    if unknown := set(options.only) - set(operators()):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose among {', '.join(operators())}")
    options.seconds = SECONDS
    if options.smoke:
        options.size, options.turns, options.seconds = 20_000, 2, 0.0
        options.only = options.only or list(SMOKE)
        options.parts = [part for part in options.parts if part != "peers"]
        if not options.parts:
            parser.error("--smoke --parts peers: peers need environments of their own; leave --smoke out")
    if len(options.parts) > 1:
        for part in options.parts:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--parts", part], check=True)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a peer, stopped as it is, does not outlive this
    measure = {"operators": of_operators, "top_k": of_top_k, "round": of_round, "peers": of_peers}
    for part in options.parts:
        measure[part](options)
        print(f"jax {jax.__version__}, {cores()} cores, {jax.devices()[0].device_kind}", flush=True)


if __name__ == "__main__":
    main()
