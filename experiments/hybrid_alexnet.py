"""The AlexNet of "one weird trick" on several workers: bytes by every way of splitting it, counted, and how it trains.

Claim: convolutions hold few numbers and make many activities, dense layers the other way round; so data-parallel
convolutions before model-parallel dense layers send less than either way alone where dense layers are wide and batches
not too large, and train the same model up to rounding. Of the three schemes, the one in parts waits least.

| 8 workers                | sent       | before turn 1 | turns in line | loss | accuracy, % |
|--------------------------|------------|---------------|---------------|------|-------------|
| one worker               |          0 |               |               | .809 |        69.2 |
| data-parallel            |  412.8 MiB |               |               | .805 |        69.7 |
| model-parallel           | 1550.4 MiB |               |               |      |             |
| all at once              |  143.8 MiB |      31.5 MiB |      31.5 MiB | .802 |        70.1 |
| in turns                 |  143.8 MiB |      31.5 MiB |     252.0 MiB | .805 |        69.7 |
| in parts                 |  143.8 MiB |       3.9 MiB |      31.5 MiB | .804 |        69.8 |
| in turns, variable batch |  143.8 MiB |      31.5 MiB |     252.0 MiB | .641 |        77.1 |
| in parts, variable batch |  143.8 MiB |       3.9 MiB |      31.5 MiB | .647 |        76.6 |

Sent is by a worker in a step of the full model, 128 images each, counted in the program and equal to theory to the
byte; that all workers have all images is not counted for model-parallel training. The next two columns are what the
busiest worker sends of features before dense layers can begin, and over all turns one after another. Data-parallel
training sends less than the hybrid in batches of 4096 (412.8 against 511.1 MiB; they cross at 3,274 by theory), and in
batches of 1024 with 512 or 1024 dense units (58.1 and 98.3 against 94.8 and 101.8 MiB). Loss and accuracy
are on the test images of Fashion-MNIST, of a small model (99,156 parameters) after 60 steps of 512: one seed, far from
converged, with one rate of .003 for all. The first five that are trained differ by rounding alone. It grows: at a rate
of .01, where the loss leaps, they end between 46 % and 63 %. A variable batch takes eight dense updates a step, so its
lead at equal rates and equal steps does not say that it would lead at rates chosen for each.

Source: Krizhevsky 2014 (arXiv:1404.5997).

Command: python experiments/hybrid_alexnet.py
Expected: the table above.
Time: eight minutes on two CPU cores, beside much other work.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

from jfed import core, data, experiment, models, parallel, plot, report, run
from jfed.collectives import count
from jfed.core import Algorithm
from jfed.parallel import conjugate
from jfed.parallel.hybrid import (
    Dense,
    HybridModel,
    HybridParams,
    alexnet,
    assemble_all,
    bytes_sent,
    dense_layers,
    hybrid,
    hybrid_variable_batch,
    in_parts,
    in_turns,
    whole,
)

SCHEMES: dict[str, Callable] = {
    "all_at_once": assemble_all,
    "in_turns": in_turns,
    "in_parts": in_parts,
}
VARIABLE = {"in_turns_variable_batch": in_turns, "in_parts_variable_batch": in_parts}
WAYS = ("one_worker", "data_parallel", "model_parallel", *SCHEMES, *VARIABLE)
IMAGES, CLASSES = (224, 224, 3), 1000


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    workers: int = 8
    images: int = 128
    """Of a worker, of which bytes are counted in the table."""
    steps: int = 60
    """Of training the small model."""
    batch_size: int = 512
    """Of training."""
    width: float = 1 / 16
    """Of the small model: a factor of all layers."""
    learning_rate: float = 0.003
    dense_learning_rate: float = 0.003
    """Of dense layers that are updated after every turn."""
    dense_units: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    batch_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    ways: tuple[str, ...] = WAYS


SMOKE = {
    "workers": 2,
    "steps": 2,
    "batch_size": 16,
    "width": 1 / 64,
    "dense_units": (512,),
    "batch_sizes": (256,),
    "ways": ("model_parallel", "in_parts_variable_batch"),
}


def main(config: Config) -> None:
    """Counts every way and trains by it, then shows a table and two pictures."""
    if odd := [way for way in config.ways if way not in WAYS]:
        raise ValueError(f"hybrid_alexnet(ways={odd}): choose from {', '.join(WAYS)}.")
    if not (config.ways and config.dense_units and config.batch_sizes):
        raise ValueError("hybrid_alexnet(ways, dense_units, batch_sizes): give one of each at least.")
    cells = {way: functools.partial(found, config, way) for way in config.ways}
    cells |= {
        f"{what}_{value}": functools.partial(sizes, config, **{what: value})
        for what, values in (("units", config.dense_units), ("batch", config.batch_sizes))
        for value in values
    }
    recorded, results = experiment.over_cells("hybrid_alexnet", config, cells)
    for what, values, xlabel in (
        ("units", config.dense_units, f"units of a dense layer, batches of {config.workers * config.images}"),
        ("batch", config.batch_sizes, "images in a batch, 4096 units"),
    ):
        found_at = [results[f"{what}_{value}"] for value in values]
        names = ("data-parallel", "model-parallel", "hybrid")
        plot.plot_curves(
            recorded.folder / f"bytes_by_{what}.png",
            {name: (values, [each[name] / 2**20 for each in found_at]) for name in names},
            xlabel=xlabel,
            ylabel="MiB sent by a worker a step",
            title=f"AlexNet on {config.workers} workers",
        )
    rows = [
        {
            "": way.replace("_", " "),
            "sent": _mebibytes(result["sent"]),
            "theory": result["theory"],
            "first turn": _mebibytes(result["first_turn"]),
            "one turn after another": _mebibytes(result["turns"]),
            "loss": _number(result["loss"], ".3f"),
            "accuracy": _number(result["accuracy"], ".1%"),
        }
        for way, result in results.items()
        if way in config.ways
    ]
    print(report.table(f"A step of {config.workers} workers with {config.images} images each", rows), "\n")
    print(f"pictures and metrics: {recorded.folder}\n")
    shown = ("sent", "first_turn", "turns", "loss", "accuracy")
    summary = {f"{way}_{name}": results[way][name] for way in config.ways for name in shown}
    right = all(result["theory"] in ("equal", "") for result in results.values())
    report.finish(recorded, summary | {"counted_as_theory": right, "seeds": config.seeds})


def found(config: Config, way: str) -> dict[str, Any]:
    """What one way sends for the full model, and how it trains the small one."""
    n, result = config.workers, {"sent": 0, "theory": "", "first_turn": None, "turns": None}
    size, scheme = n * config.images, (SCHEMES | VARIABLE).get(way)
    if way != "one_worker":
        sent, theory = sends(way, n, size)
        result |= {"sent": sent, "theory": _compared(sent, theory)}
    if scheme is not None:
        features = jax.eval_shape(alexnet().features, shapes().features, _images(config.images))
        waits = [int(count.all_reduce(collect, n, features).sent.max()) for collect in scheme(n).collect]
        result |= {"first_turn": waits[0], "turns": sum(waits)}
    trained = {"loss": None, "accuracy": None} if way == "model_parallel" else training(config, way)
    return result | trained


def sizes(config: Config, units: int = 4096, batch: int | None = None) -> dict[str, Any]:
    """Bytes that a worker sends by each way, of a model with dense layers of so many units."""
    size = config.workers * config.images if batch is None else batch
    ways = {"data-parallel": "data_parallel", "model-parallel": "model_parallel", "hybrid": "in_parts"}
    pairs = {name: sends(way, config.workers, size, units) for name, way in ways.items()}
    compared = {_compared(*pair) for pair in pairs.values()} - {"equal"}
    return {name: sent for name, (sent, _) in pairs.items()} | {"theory": ", ".join(compared) or "equal"}


def sends(way: str, n: int, size: int, units: int = 4096) -> tuple[int, int]:
    """Bytes of the busiest worker a step, counted in the program, and by theory."""
    params, batch = shapes(units), {"x": _images(size), "y": jax.ShapeDtypeStruct((size,), jnp.int32)}
    convolutions, dense = (sum(x.size for x in jax.tree.leaves(part)) for part in params)
    widths = [params.dense[0].kernel.shape[0], *(layer.bias.size for layer in params.dense)]
    if way == "data_parallel":
        average = count.all_reduce(jax.lax.psum, n, params)
        return int(average.sent.max()), -(-2 * 4 * (convolutions + dense) * (n - 1) // n)
    if way == "model_parallel":
        activities = [side**2 * c.bias.size for side, c in zip((27, 13, 13, 13, 6), params.features, strict=True)]
        theory = 4 * size * (2 * (sum(activities) + sum(widths[1:-1])) + widths[-1]) * (n - 1) // n
        return int(count.all_reduce(split_gradient, n, (_split(params, n), batch)).sent.max()), theory
    devices = AbstractMesh((n,), ("workers",), axis_types=(AxisType.Auto,))
    method = made(alexnet(), way, devices, 0.1, 0.1)
    counted = count.traced(method.round, jax.eval_shape(method.init, params), batch, jax.random.key(0))
    return int(counted.sent.max()), bytes_sent(convolutions, widths, batch_size=size, workers=n)


def shapes(units: int = 4096) -> HybridParams:
    """Of the full model's parameters, with so many units in both hidden dense layers."""
    features, dense = jax.eval_shape(alexnet(IMAGES, CLASSES).init, jax.random.key(0))
    widths = (dense[0].kernel.shape[0], units, units, CLASSES)
    layers = [
        Dense(jax.ShapeDtypeStruct((i, o), jnp.float32), jax.ShapeDtypeStruct((o,), jnp.float32))
        for i, o in zip(widths, widths[1:], strict=False)
    ]
    return HybridParams(features, tuple(layers))


def split_gradient(own: tuple, axis_name: str) -> HybridParams:
    """The gradient of a worker's channels of every convolution and units of every dense layer: model-parallel.

    Activities are gathered before every layer but the first, whose images all workers have.
    """

    def convolution(x, kernel, **window):
        x = x if x.shape[3] == kernel.shape[2] else conjugate.gathered(x, axis_name, 3)
        return models.conv2d(x, kernel, **window)

    def mean_loss(params, batch):
        h = alexnet(convolution=convolution).features(params.features, batch["x"])
        h = conjugate.gathered(h, axis_name, 1)
        return jnp.mean(loss(dense_layers(params.dense, h, jax.nn.relu, axis_name), batch["y"]))

    return jax.grad(mean_loss)(*own)


def training(config: Config, way: str) -> dict[str, float]:
    """Loss and accuracy of the small model on the test images, means over seeds."""
    train, test = data.fashion_small()
    population = core.Population(train, jnp.array([0]), jnp.array([train["y"].shape[0]]))
    workers = 1 if way == "one_worker" else config.workers
    classes = -(-10 // config.workers) * config.workers  # some that no label names, so that workers divide them
    split = alexnet((28, 28, 1), classes, width=config.width, stem=(5, 1), convolution=models.conv2d)
    method = made(split, way, workers, config.learning_rate, config.dense_learning_rate)
    model = models.Model(split.init, whole(split))

    def one_seed(key):
        order, start, drawn = jax.random.split(key, 3)
        sampler, state = parallel.batches(config.batch_size, key=order), method.init(model.init(start))
        state, _ = run.scan_rounds(method, sampler, population, state, drawn, rounds=config.steps)
        return run.evaluate(models.metrics(model), method.params(state), test)

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    judged = jax.jit(lambda keys: jax.lax.map(one_seed, keys))(keys)
    return {name: float(jnp.mean(judged[name])) for name in ("loss", "accuracy")}


def made(model: HybridModel, way: str, workers: Any, rate: float, dense_rate: float) -> Algorithm:
    """The algorithm of one way."""
    optimizer = optax.sgd(rate, momentum=0.9)
    if way in ("one_worker", "data_parallel"):
        apply = whole(model)
        return parallel.data_parallel(
            lambda params, batch, key: loss(apply(params, batch["x"]), batch["y"]), optimizer, workers=workers
        )
    if way in VARIABLE:
        dense = optax.sgd(dense_rate, momentum=0.9)
        return hybrid_variable_batch(
            model, loss, optimizer, workers=workers, scheme=VARIABLE[way], dense_optimizer=dense
        )
    return hybrid(model, loss, optimizer, workers=workers, scheme=SCHEMES[way])


def loss(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Softmax cross-entropy of each example, [B]."""
    return models.cross_entropy(models.from_pair(lambda key: (), lambda _, x: x))((), {"x": logits, "y": y})


def _split(params: HybridParams, n: int) -> HybridParams:
    """A worker's channels and units."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // n), x.dtype), params)


def _images(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *IMAGES), jnp.float32)


def _compared(sent: int, theory: int) -> str:
    return "equal" if sent == theory else f"differs: {theory}"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
