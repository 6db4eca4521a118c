"""The four tasks, as arrays: examples, clients, cohorts, initial models.

Images are smooth random fields, labels those of a random linear teacher, so that losses fall; the text
is the Shakespeare that comes with jfed, a client a role. Each task has clients of one size ("even") and
of log-normal sizes, sigma 1, from a tenth to ten times the mean ("heavy"; for the text, its own sizes).

Letters: N clients, C clients in a cohort, E examples, T rounds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jfed import data


class Task(NamedTuple):
    """Sizes of a task and what it trains on."""

    clients: int  # N
    mean: int  # examples of a client
    cohort: int  # C
    learning_rate: float
    examples: Callable  # (size [N], rng) -> {"x": [E, ...], "y": [E, ...]}
    model: Callable  # (rng) -> initial params by name
    batch_size: int = 10
    tolerance: float = 0.1  # peers shuffle differently: by which share of the loss's fall their losses may differ


def arrays(name: str, kind: str, rounds: int, *, small: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """All arrays of a task, by the names of `protocol.Job`; those of the initial model have a "/" in theirs.

    Args:
      name: a key of `TASKS`.
      kind: "even" or "heavy".
      rounds: T.
      small: a twentieth of the clients, for a test.
      seed: of everything random.
    """
    task, rng = TASKS[name], np.random.default_rng(seed)
    count = task.clients // 20 if small else task.clients
    cohort = max(2, task.cohort // 20) if small else task.cohort
    if name == "lstm":
        examples, size = roles(count, task.mean, kind, rng)
    else:
        size = np.full(count, task.mean) if kind == "even" else lognormal(count, task.mean, rng)
        examples = task.examples(size, rng)
    cohorts = np.stack([rng.choice(count, cohort, replace=False) for _ in range(rounds)])
    return {
        "x": examples["x"],
        "y": examples["y"].astype(np.int32),
        "start": (np.cumsum(size) - size).astype(np.int32),
        "size": size.astype(np.int32),
        "cohorts": cohorts.astype(np.int32),
        **{path: value.astype(np.float32) for path, value in task.model(rng).items()},
    }


def lognormal(count: int, mean: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes [N] with sigma 1, clipped to [mean / 10, 10 mean], of about `mean` on average."""
    size = rng.lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(np.round(size), max(1, mean // 10), 10 * mean).astype(int)


def images(side: int, low: int, channels: int) -> Callable:
    """Images of `side` x `side` that are random fields of `low` x `low` blocks and some noise."""

    def make(size: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        count, scale = int(size.sum()), side // low
        field = rng.normal(size=(count, low, low, channels)).astype(np.float32)
        x = 0.3 * field.repeat(scale, 1).repeat(scale, 2)
        x += 0.1 * rng.standard_normal(x.shape, dtype=np.float32)
        y = np.argmax(field.reshape(count, -1) @ rng.normal(size=(low * low * channels, 10)), 1)
        return {"x": x, "y": y}

    return make


def vectors(features: int) -> Callable:
    """Standard normal vectors."""

    def make(size: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.normal(size=(int(size.sum()), features)).astype(np.float32)
        return {"x": x, "y": np.argmax(x @ rng.normal(size=(features, 10)), 1)}

    return make


def flat(make: Callable) -> Callable:
    """The same examples with `x` as [E, features]."""

    def made(size: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        examples = make(size, rng)
        return examples | {"x": examples["x"].reshape(len(examples["x"]), -1)}

    return made


def roles(count: int, mean: int, kind: str, rng: np.random.Generator) -> tuple[dict, np.ndarray]:
    """Windows of 80 characters of `count` roles: `mean` each, or as many as there are up to 50."""
    train, _, _ = data.shakespeare()
    size = np.asarray(train.size)
    chosen = rng.choice(np.flatnonzero(size >= mean) if kind == "even" else size.size, count, replace=False)
    size = np.full(count, mean) if kind == "even" else np.minimum(size[chosen], 50)
    rows = np.concatenate([int(train.start[i]) + np.arange(n) for i, n in zip(chosen, size, strict=True)])
    return {name: np.asarray(train.examples[name])[rows] for name in ("x", "y")}, size


def dense(rng: np.random.Generator, name: str, into: int, out: int) -> dict[str, np.ndarray]:
    """A dense layer from LeCun's normal distribution, its bias zero."""
    return {f"{name}/kernel": rng.normal(size=(into, out)) / np.sqrt(into), f"{name}/bias": np.zeros(out)}


def conv(rng: np.random.Generator, name: str, into: int, out: int) -> dict[str, np.ndarray]:
    """A 3 x 3 convolution, likewise."""
    kernel = rng.normal(size=(3, 3, into, out)) / np.sqrt(9 * into)
    return {f"{name}/kernel": kernel, f"{name}/bias": np.zeros(out)}


def two_nn(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """784-200-200-10."""
    return dense(rng, "dense_0", 784, 200) | dense(rng, "dense_1", 200, 200) | dense(rng, "dense_2", 200, 10)


def cnn(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The CIFAR-10 model of pfl-research's benchmarks, without its dropout: 1,626,442 parameters."""
    convs = conv(rng, "conv_0", 3, 32) | conv(rng, "conv_1", 32, 64)
    return convs | dense(rng, "dense_0", 14 * 14 * 64, 128) | dense(rng, "dense_1", 128, 10)


def lstm(rng: np.random.Generator, symbols: int = 76, embedding: int = 8, hidden: int = 128) -> dict[str, np.ndarray]:
    """Embedding, one LSTM layer (gates in the order input, forget, cell, output), dense to the next character."""
    return {
        "embed/embedding": rng.normal(size=(symbols, embedding)) / np.sqrt(embedding),
        "layer_0/input": rng.normal(size=(embedding, 4 * hidden)) / np.sqrt(embedding),
        "layer_0/recurrent": rng.normal(size=(hidden, 4 * hidden)) / np.sqrt(hidden),
        "layer_0/bias": np.zeros(4 * hidden),
        **dense(rng, "out", hidden, symbols),
    }


TASKS = {
    "2nn": Task(1000, 100, 50, 0.1, flat(images(28, 7, 1)), two_nn),
    "cnn": Task(1000, 50, 50, 0.1, images(32, 4, 3), cnn, tolerance=0.3),  # as much as one more round brings
    "lstm": Task(400, 10, 20, 0.5, roles, lstm),
    "logreg": Task(10_000, 10, 1000, 0.1, vectors(60), lambda rng: dense(rng, "dense_0", 60, 10)),
}
