"""Time of a federated round under the kit and under what one would pick instead, on the same arrays.

Asked: how long a round of FedAvg takes on one machine's CPU in the kit, in FedJAX, pfl and Flower, and in
hand-written loops in PyTorch and JAX, with clients of one size and of many; and whether the kit compiles anything
after its first round.

Every peer is a process of its own, most in an environment of their own, made here on first use. All get the
same examples, cohorts and initial model and do the same local steps: one epoch of plain SGD a client, average
weighted by examples. Rounds are interleaved, peers stopped by a signal while others run. Each peer's mean
cross-entropy over the examples judged must agree with the kit's after as many rounds, to a share of what it fell by
that each task names, or its row says "differs": examples are shuffled within a client, by each peer in its own way.

Command: python benchmarks/simulation.py --out simulation.json
Time: two hours on two cores for everything, minutes with `--tasks 2nn logreg`; `--smoke` takes seconds.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jfed import report

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import process as processes
import tasks

CORES = 2
REFERENCE = "jfed"
SIZES = ("even", "heavy")


class Row(NamedTuple):
    """A row of the table: a script in peers/, the environment it runs in, and which of its ways to run."""

    script: str
    variant: str = ""
    environment: str | None = None  # None: this interpreter
    tasks: tuple[str, ...] = tuple(tasks.TASKS)


ROWS = {
    REFERENCE: Row("kit", "best"),
    "jfed, 1 device": Row("kit", "single"),
    "FedJAX": Row("fedjax_peer", "jit", "fedjax"),
    "FedJAX, pmap": Row("fedjax_peer", "pmap", "fedjax"),
    "pfl, 1 process": Row("pfl_peer", "1", "pfl"),
    "pfl, 2 processes": Row("pfl_peer", "2", "pfl"),
    "Flower": Row("flower_peer", "tuned", "flower"),
    "Flower, as its tutorial": Row("flower_peer", "tutorial", "flower"),
    "PyTorch loop, 1 thread": Row("torch_loop", "1", "torch"),
    "PyTorch loop, 2 threads": Row("torch_loop", "2", "torch"),
    "PyTorch vmap": Row("torch_vmap", "", "torch"),
    "JAX scan": Row("jax_scan", "plain"),
    "JAX scan, best": Row("jax_scan", "best", None, ("cnn",)),
    "JAX vmap": Row("jax_vmap"),
}
SMOKE_ROWS = ("jfed", "jfed, 1 device", "JAX scan", "JAX scan, best", "JAX vmap")


def measure(name: str, kind: str, options: argparse.Namespace) -> dict[str, dict]:
    """Runs all peers of one task, a round each in turn.

    Returns:
      By row: `first` and `seconds` (of every later round); of those that ran to their end `rounds`, `loss`,
      `reference_loss` (the kit's after as many rounds) and `differs`; of the kit `compiled_later`,
      `initial_loss` and `losses`; of those that failed `error`.
    """
    rounds = options.repeats + 1
    found, living = {}, {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        spec = write_arrays(Path(scratch) / "arrays", name, kind, rounds, options)

        def start(row: str) -> None:
            folder = Path(scratch) / str(len(found))
            found[row] = {"seconds": []}
            script, variant, environment, _ = ROWS[row]
            living[row] = processes.start(
                script, environment, spec | {"variant": variant}, folder, venvs=options.venvs, patience=options.patience
            )

        def train(row: str, done: int) -> None:
            seconds = processes.ask(living[row], "round")["seconds"]
            if done == 1:
                found[row]["first"] = seconds
            else:
                found[row]["seconds"].append(seconds)
            if row == REFERENCE:
                found[row].setdefault("losses", []).append(processes.ask(living[row], "loss")["loss"])
            if done == rounds or (done >= 3 and seconds > options.slow):
                found[row].update(processes.ask(living[row], "finish"), rounds=done)
                processes.kill(living.pop(row))
            print(f"{name} {kind}, round {done}, {row}: {seconds:.4f} s", file=sys.stderr)

        try:
            for row in options.peers:
                if name in ROWS[row].tasks:
                    _or_note(found, living, row, start, row)
            for done in range(1, rounds + 1):
                for row in list(living):
                    _or_note(found, living, row, train, row, done)
        finally:
            for process in living.values():
                processes.kill(process)
    compare(found, tasks.TASKS[name].tolerance)
    return found


def write_arrays(folder: Path, name: str, kind: str, rounds: int, options: argparse.Namespace) -> dict:
    """Writes a task's arrays, a file each, and returns what a peer must be told besides its variant."""
    for path, value in tasks.arrays(name, kind, rounds, small=options.smoke).items():
        file = folder / f"{path}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, value)
    return {
        "task": name,
        "arrays": str(folder),
        "batch_size": tasks.TASKS[name].batch_size,
        "learning_rate": tasks.TASKS[name].learning_rate,
        "pooling": options.pooling,
        "cores": CORES,
    }


def compare(found: dict[str, dict], tolerance: float) -> None:
    """Adds to every result the kit's loss after as many rounds, and whether the two differ."""
    kit = found.get(REFERENCE, {})
    for result in found.values():
        if "loss" in result and len(kit.get("losses", ())) >= result["rounds"]:
            reference = kit["losses"][result["rounds"] - 1]
            fall = kit.get("initial_loss", float("nan")) - reference
            differs = not abs(result["loss"] - reference) <= tolerance * fall
            result.update(reference_loss=reference, differs=differs)


def _or_note(found: dict, living: dict, row: str, action, *arguments) -> None:
    """Does something with a peer; if the peer fails, writes that down and goes on without it."""
    try:
        action(*arguments)
    except processes.Failed as error:
        found[row]["error"] = str(error)
        living.pop(row, None)
        print(f"{row}: {error}", file=sys.stderr)


def shown(found: dict[str, dict]) -> list[dict]:
    """Rows of the table."""
    base = statistics.median(found.get(REFERENCE, {}).get("seconds") or [float("nan")])
    rows = []
    for row, result in found.items():
        line = {"peer": row} | dict.fromkeys(("best", "median", "median / jfed's", "first", "loss"), "–")
        if result["seconds"]:
            median = statistics.median(result["seconds"])
            line |= {
                "best": report.human_seconds(min(result["seconds"])),
                "median": report.human_seconds(median),
                "median / jfed's": f"{median / base:.2f}",
                "first": report.human_seconds(result["first"]),
                "loss": f"{result.get('loss', float('nan')):.4f}",
            }
        notes = [
            result.get("error"),
            f"differs: the kit's loss is {result['reference_loss']:.4f}" if result.get("differs") else None,
            f"{len(result['seconds'])} timed rounds" if len(result["seconds"]) < _most(found) else None,
            f"{result['compiled_later']} compiled later" if "compiled_later" in result else None,
        ]
        rows.append(line | {"notes": "; ".join(filter(None, notes))})
    return rows


def _most(found: dict[str, dict]) -> int:
    return max(len(result["seconds"]) for result in found.values())


def main() -> None:
    """Measures what the command line asks for; prints a table a task, and writes raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--peers", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--pooling", choices=("own", "reshape"), default="own", help="max pooling of the cnn")
    parser.add_argument("--venvs", type=Path, default=Path(__file__).parents[1] / ".venv-peers")
    parser.add_argument("--patience", type=float, default=900, help="seconds until a peer counts as hung")
    parser.add_argument("--slow", type=float, default=30, help="a peer slower than this a round gets two timed rounds")
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, few rounds, rows of this interpreter only")
    options = parser.parse_args()
    if options.smoke:
        options.repeats, options.peers = 2, [row for row in options.peers if row in SMOKE_ROWS]
    if hasattr(os, "sched_setaffinity"):  # what a peer takes the machine to be
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that peers, stopped as they are, do not outlive this
    everything = {}
    for name in options.tasks:
        for kind in options.sizes:
            began = time.perf_counter()
            found = measure(name, kind, options)
            everything[f"{name} {kind}"] = found
            title = f"{name}, {kind} sizes, {CORES} cores, a round; {report.human_seconds(time.perf_counter() - began)}"
            print(report.table(title, shown(found)), flush=True)
            if options.out:
                options.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
