"""What every peer does alike: read the job, train a round when told to, answer in JSON.

The command line names a JSON file: the task's numbers, and the folder of its arrays. Then, one line each
way: `round` trains the next cohort and is answered by `{"seconds"}`; `loss` and `finish` are answered by
`{"loss"}`, the mean cross-entropy of the global model over `JUDGED` examples, and `finish` ends the peer.
The first round builds and compiles, its time counted from when the arrays are in memory.

Numpy only: peers run in environments of their own.

Letters: N clients, C clients in a cohort, E examples, S steps, B batch size, T rounds.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

JUDGED = 5000  # examples whose losses are compared


class Job(NamedTuple):
    """A task as every peer gets it."""

    task: str  # 2nn, cnn, lstm or logreg
    variant: str  # which of a peer's ways to run; each peer names its own
    pooling: str  # "own" or "reshape"
    batch_size: int
    learning_rate: float
    cores: int
    x: np.ndarray  # [E, ...]
    y: np.ndarray  # [E] or [E, time] int32, -1 where there is none
    start: np.ndarray  # [N] int32, first row of each client
    size: np.ndarray  # [N] int32
    cohorts: np.ndarray  # [T, C] int32
    params: dict[str, np.ndarray]  # initial model; dense kernels [in, out], others [h, w, in, out]


class Peer(NamedTuple):
    """A peer that is built."""

    round: Callable[[np.ndarray], None]  # trains the clients given, [C]; returns when the model is there
    loss: Callable[[], float]
    report: Callable[[], dict] = dict  # what else to answer at the end


def load(path: str) -> Job:
    """The job a JSON file describes; its arrays are mapped, so that all peers share the pages of the examples."""
    with open(path, encoding="utf-8") as file:
        spec = json.load(file)
    folder = Path(spec.pop("arrays"))
    # "c": writes stay this process's own. PyTorch warns of arrays that cannot be written.
    found = {
        file.relative_to(folder).with_suffix("").as_posix(): np.load(file, mmap_mode="c")
        for file in folder.rglob("*.npy")
    }
    params = {name: found.pop(name) for name in sorted(found) if "/" in name}
    return Job(**spec, **found, params=params)


def open_channel() -> tuple[Callable[[], str], Callable[[dict], None]]:
    """`(hear, say)`: the next command, and an answer; whatever else prints goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return lambda: sys.stdin.readline().strip() or "finish", say


def serve(build: Callable[[Job], Peer]) -> None:
    """Runs a peer until it is told to finish."""
    hear, say = open_channel()
    job = load(sys.argv[1])
    say({"ready": True})
    peer, done = None, 0
    while (command := hear()) == "round" or peer is not None:
        if command == "round":
            began = time.perf_counter()
            peer = peer or build(job)
            peer.round(job.cohorts[done])
            say({"seconds": time.perf_counter() - began})
            done += 1
        else:
            say({"loss": peer.loss()} | (peer.report() if command == "finish" else {}))
            if command == "finish":
                return


def padded(job: Job, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cohort's batches, shuffled, padded to the population's longest client so that shapes never change.

    Returns:
      `(rows, real, steps)`: [C, S, B] int32 rows of the examples, [C, S, B] bool, and [C] int32.
    """
    size = job.size[ids]
    batch = job.batch_size
    longest = -(-int(job.size.max()) // batch) * batch
    draws = rng.random((len(ids), longest), dtype=np.float32)
    draws[np.arange(longest) >= size[:, None]] = 2.0  # places past the end sort last
    place = np.argsort(draws, axis=1)
    real = np.arange(longest) < size[:, None]
    rows = job.start[ids][:, None] + np.where(real, place, 0)
    shape = (len(ids), -1, batch)
    return rows.reshape(shape).astype(np.int32), real.reshape(shape), (-(-size // batch)).astype(np.int32)


def mean_over(job: Job, losses: Callable[[np.ndarray, np.ndarray], np.ndarray], chunk: int = 500) -> float:
    """The mean of `losses(x, y)`, one number an example, over `JUDGED` examples spread evenly, or all there are."""
    rows = np.linspace(0, len(job.x) - 1, min(JUDGED, len(job.x))).astype(int)
    parts = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
    return sum(float(np.sum(losses(job.x[part], job.y[part]), dtype=np.float64)) for part in parts) / len(rows)
