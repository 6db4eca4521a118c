"""Sixteen peers whose data differ: RelaySGD's main table, and who keeps up with an all-reduce.

Claim: RelaySGD and SGP come near an all-reduce however much peers' data differ; D-PSGD on a ring falls behind, the
farther the more they differ, with momentum of its own most of all.

| Dirichlet                    | alpha 1    | alpha .1   | alpha .01  | paper: 1 | .1   | .01  |
|------------------------------|------------|------------|------------|----------|------|------|
| all-reduce                   | 85.1 ± 0.2 | 85.3 ± 0.1 | 85.3 ± 0.2 |     87.0 | 87.0 | 87.0 |
| the same, momentum           | 87.2 ± 0.2 | 87.3 ± 0.1 | 87.2 ± 0.9 |     90.2 | 90.2 | 90.2 |
| RelaySGD, chain              | 83.4 ± 0.1 | 81.9 ± 0.3 | 81.8 ± 0.1 |     87.3 | 87.2 | 86.5 |
| the same, local momentum     | 86.3 ± 0.1 | 85.1 ± 0.3 | 84.4 ± 0.9 |     89.5 | 89.2 | 88.4 |
| SGP, exponential             | 84.6 ± 0.1 | 84.1 ± 0.2 | 83.5 ± 0.3 |     87.4 | 86.7 | 86.7 |
| the same, local momentum     | 86.9 ± 0.1 | 86.1 ± 0.3 | 84.2 ± 0.1 |     89.5 | 89.2 | 87.5 |
| D2, ring                     | 84.3 ± 0.1 | 82.6 ± 0.6 | 80.5 ± 0.5 |     87.2 | 84.0 | 38.2 |
| the same, local momentum     | 86.6 ± 0.2 | 84.5 ± 0.8 | 82.9 ± 0.5 |     88.2 | 88.5 | 61.0 |
| D-PSGD, ring                 | 84.3 ± 0.6 | 81.9 ± 0.5 | 78.4 ± 1.5 |     87.4 | 79.9 | 53.9 |
| the same, quasi-global mom.  | 86.8 ± 0.1 | 84.3 ± 0.7 | 80.9 ± 1.9 |     89.5 | 84.8 | 63.3 |
| the same, local momentum     | 86.4 ± 0.2 | 81.1 ± 1.7 | 75.3 ± 1.9 |          |      | 46.3 |

Test accuracy in per cent, the mean of all peers' own models, over three seeds, each with its own split; the paper's is
of another model and data, 200 epochs. At alpha .01 the order is the paper's: all-reduce, SGP and RelaySGD, then D2 and
D-PSGD. From all-reduce to D-PSGD on a ring it is .9, 3.3 and 6.9 points as alpha falls, with local momentum .8, 6.2 and
11.9. What is not the paper's: gaps are smaller; RelaySGD is .9 to 3.5 points behind all-reduce and at alpha 1 and .1,
without momentum, not ahead of D-PSGD, as on a chain of 16 news is late and ten epochs are short; and D2, which failed
in one of the paper's three seeds, does not. At alpha .01 D-PSGD's worst peer has 76.5 %, the average of all models
80.1 %; with local momentum 73.4 and 77.3 %. Only with D-PSGD, at alpha .1 and .01, do peers differ by more than a few
tenths.

Source: Vogels et al. 2021 (arXiv:2110.04175), the table for VGG-11 and CIFAR-10, and its published code: 16 peers,
batches of 32 each, Dirichlet shares of classes cut into equal parts, Nesterov momentum .9, weight decay 1e-4, a rate
that rises over the first fortieth of the rounds and falls by ten after 3/4 and 9/10 of them. It is chosen on the first
seed; RelaySGD's grid is five times the others', as there, since on a chain news is late, and that of D-PSGD with
momentum half of theirs.

What differs: by default a network of two hidden layers of 64 on Fashion-MNIST, at 14 x 14 pixels, for 10 epochs in
place of 200; `--setting vgg11` is the paper's model and data, at the paper's rates, for an accelerator. D2's ring is
nine tenths of the paper's, whose smallest eigenvalue, -1/3, is where D2 stops being stable. SGP's two exchanges a step
are one round of a graph that is their product. The double binary trees of the paper are not here.

Command: python experiments/decentralised_noniid.py
Expected: the table above.
Time: seven minutes on two CPU cores.
Needs the Fashion-MNIST files; `--setting vgg11` those of CIFAR-10.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jfed import clients, core, data, experiment, gossip, local, mesh, models, plot, report, run, sampling
from jfed.gossip import topology
from jfed.models.modules import MLP

GROUP = 10  # peers that classes are shared out over at a time
RATES = {"plain": (0.08, 0.2, 0.5, 1.2), "momentum": (0.02, 0.05, 0.12, 0.3)}  # of the all-reduce
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10's colours


class Method(NamedTuple):
    """A row of the table."""

    title: str
    build: Callable  # (work, peers, rate, momentum, **options) -> Algorithm
    momentum: bool
    scale: float  # of its rates, those of the all-reduce being 1
    published: dict[float, tuple[float, float]]  # alpha -> accuracy in per cent, rate


def with_sgd(family: Callable) -> Callable:
    """`build` of a method that takes an optimizer for each peer."""

    def build(work, peers, rate, momentum, **options):
        optimizer = optax.sgd(rate, momentum=momentum, nesterov=momentum is not None)
        return family(work, peers, optimizer=optimizer, **options)

    return build


def quasi_global(work, peers, rate, momentum, **options):
    """D-PSGD with momentum of where all models go."""
    ring = topology.ring(peers)
    return gossip.quasi_global(work, ring, learning_rate=rate, momentum=momentum, nesterov=True, **options)


def two_exchanges(peers: int) -> topology.Topology:
    """The one-peer exponential graph, two of its rounds at a time."""
    rounds = topology.matrices(topology.one_peer_exponential(peers))
    rounds = np.concatenate([rounds, rounds]) if len(rounds) % 2 else rounds
    return topology.from_matrix(rounds[1::2] @ rounds[::2], name="two exchanges of one-peer exponential")


all_reduce = with_sgd(lambda work, n, **options: gossip.adapt_then_combine(work, topology.complete(n), **options))
relay = with_sgd(lambda work, n, **options: gossip.relay(work, topology.chain(n), **options))
dpsgd = with_sgd(lambda work, n, **options: gossip.adapt_then_combine(work, topology.ring(n), **options))
d2 = with_sgd(lambda work, n, **options: gossip.d2(work, topology.lazy(topology.ring(n), 0.9), **options))
sgp = with_sgd(lambda work, n, **options: gossip.push_sum(work, two_exchanges(n), **options))


def published(accuracies: tuple[float, ...], rates: tuple[float, ...]) -> dict[float, tuple[float, float]]:
    """A row of the paper, for alpha 1, .1 and .01."""
    return dict(zip((1.0, 0.1, 0.01), zip(accuracies, rates, strict=True), strict=True))


METHODS = {
    "all_reduce": Method("all-reduce", all_reduce, False, 1, published((87.0,) * 3, (0.1,) * 3)),
    "all_reduce_momentum": Method("+ momentum", all_reduce, True, 1, published((90.2,) * 3, (0.1,) * 3)),
    "relay": Method("RelaySGD, chain", relay, False, 5, published((87.3, 87.2, 86.5), (2, 2, 1))),
    "relay_momentum": Method("+ local momentum", relay, True, 5, published((89.5, 89.2, 88.4), (0.5, 0.5, 0.125))),
    "sgp": Method("SGP, exponential", sgp, False, 1, published((87.4, 86.7, 86.7), (0.4, 0.2, 0.2))),
    "sgp_momentum": Method("+ local momentum", sgp, True, 1, published((89.5, 89.2, 87.5), (0.1, 0.1, 0.025))),
    "d2": Method("D2, ring", d2, False, 1, published((87.2, 84.0, 38.2), (0.2, 0.2, 0.1))),
    "d2_momentum": Method("+ local momentum", d2, True, 1, published((88.2, 88.5, 61.0), (0.05, 0.05, 0.0125))),
    "dpsgd": Method("D-PSGD, ring", dpsgd, False, 1, published((87.4, 79.9, 53.9), (0.4, 0.1, 0.2))),
    "quasi_global": Method(
        "+ quasi-global momentum", quasi_global, True, 0.5, published((89.5, 84.8, 63.3), (0.1, 0.025, 0.05))
    ),
    # Not in the paper's table; one run of its code, at the last alpha.
    "dpsgd_momentum": Method("+ local momentum", dpsgd, True, 0.5, {0.01: (46.3, 0.0125)}),
}


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3
    setting: Literal["fashion", "vgg11"] = "fashion"
    methods: tuple[str, ...] = tuple(METHODS)
    alphas: tuple[float, ...] = (1.0, 0.1, 0.01)
    rates: tuple[float, ...] = ()
    """Tried, of the all-reduce; by default a grid for `fashion`, and for `vgg11` the paper's, where there is one."""
    epochs: int | None = None
    """By default 10 for `fashion`, and 200 for `vgg11`."""
    every: int | None = None
    """Epochs between judgements, one compiled program; by default a fifth, or a twentieth, of all."""
    peers: int = 16
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 1e-4
    hidden: tuple[int, ...] = (64, 64)
    """Layers of the small network."""
    download: bool = False
    """Fetch the data set if it is not found."""


SMOKE = {
    "methods": ("relay", "dpsgd"),
    "alphas": (0.1,),
    "rates": (0.2,),
    "epochs": 2,
    "every": 1,
    "hidden": (32,),
}


class Task(NamedTuple):
    """What all methods train."""

    train: core.Tree
    test: core.Tree
    model: models.Model
    epochs: int
    every: int  # epochs between judgements


def main(config: Config) -> None:
    """Trains by every method, then shows tables and a picture."""
    check(config, "decentralised_noniid", METHODS)
    task = task_of(config)

    @functools.cache  # one program a method
    def trainer_of(method):
        momentum = config.momentum if METHODS[method].momentum else None
        build = functools.partial(METHODS[method].build, peers=config.peers, momentum=momentum)
        return trainer(config, task, build, lambda sampler: sampler)

    rates = {
        (name, alpha): found
        for name in config.methods
        for alpha in config.alphas
        if (found := rates_of(config, METHODS[name], alpha))
    }
    if not rates:
        raise ValueError(f"decentralised_noniid(alphas={config.alphas}): no rates are published; give --rates.")
    cells = {
        f"{name}_{alpha:g}": lambda name=name, alpha=alpha, tried=tried: tuned(
            trainer_of(name), task, tried, config.seeds, alpha
        )
        for (name, alpha), tried in rates.items()
    }
    whole, results = experiment.over_cells("decentralised_noniid", config, cells)
    summary: dict[str, Any] = {"seeds": config.seeds}
    rows, details = [], []
    for name in config.methods:
        method, row = METHODS[name], {"": METHODS[name].title}
        for alpha in (alpha for alpha in config.alphas if (name, alpha) in rates):
            found = results[f"{name}_{alpha:g}"]
            row[f"alpha {alpha:g}"] = final(found, "mean")
            row[f"paper, {alpha:g}"] = f"{method.published[alpha][0]}" if alpha in method.published else ""
            summary |= report.spread(f"{name}_{alpha:g}", np.array(found["mean"])[:, -1])
            details.append({"": method.title, "alpha": f"{alpha:g}"} | described(found))
        rows.append(row)
    summary["seconds"] = {cell: found["seconds"] for cell, found in results.items()}
    print(report.table("Test accuracy, %, mean of peers", rows), "\n")
    print(report.table("What is behind it", details), "\n")
    for alpha in config.alphas:
        curves = {name: results[f"{name}_{alpha:g}"] for name in config.methods if (name, alpha) in rates}
        if not curves:
            continue
        plot.plot_curves(
            whole.folder / f"accuracy_{alpha:g}.png",
            {name: (found["epochs"], 100 * np.mean(found["mean"], axis=0)) for name, found in curves.items()},
            xlabel="epoch",
            ylabel="test accuracy, mean of peers, %",
            title=f"{config.peers} peers, Dirichlet({alpha:g})",
        )
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def check(config: Any, where: str, methods: dict[str, Any]) -> None:
    """Raises a `ValueError` if settings name nothing to do."""
    if odd := sorted(set(config.methods) - set(methods)):
        raise ValueError(f"{where}(methods={odd}): choose from {', '.join(methods)}.")
    for name in ("peers", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{where}({name}={getattr(config, name)}): must be at least 1; 16 and 32 are the paper's.")


def task_of(config: Any) -> Task:
    """The data, the model, and how long it is trained."""
    if config.setting == "vgg11":
        (train, test), model, epochs, points = data.cifar10(download=config.download), vgg11(), 200, 20
    else:
        train, test = data.fashion_small() if config.smoke else data.fashion_mnist(download=config.download)
        train, test = ({"x": data.downscale(part["x"], 14), "y": part["y"]} for part in (train, test))
        model, epochs, points = models.from_nnx(lambda rngs: MLP(14 * 14, *config.hidden, 10, rngs=rngs)), 10, 5
    epochs = epochs if config.epochs is None else config.epochs
    every = max(epochs // points, 1) if config.every is None else config.every
    if epochs < 1 or every < 1 or epochs % every:
        raise ValueError(f"task(epochs={epochs}, every={every}): every must divide epochs; choose another.")
    if len(train["y"]) < config.peers * config.batch_size:
        raise ValueError(f"task(batch_size={config.batch_size}): {config.peers} peers have fewer images; lower it.")
    return Task(train, test, model, epochs, every)


def rates_of(config: Config, method: Method, alpha: float) -> list[float]:
    """Those that are tried; none where the paper's are asked for and there is none."""
    if config.rates or config.setting == "fashion":
        grid = config.rates or RATES["momentum" if method.momentum else "plain"]
        return [method.scale * rate for rate in grid]
    return [method.published[alpha][1]] if alpha in method.published else []


def tuned(train: Callable, task: Task, rates: list[float], seeds: int, alpha: float) -> dict[str, Any]:
    """Trains at each rate on the first seed, and at the one that ends best, by the mean of peers, on the others."""
    began = time.monotonic()
    at_first = train([(rate, 0) for rate in rates], alpha)
    ends = [100 * curve["mean"][-1] for curve in at_first]
    best = int(np.argmax(ends))
    curves = [at_first[best], *train([(rates[best], seed) for seed in range(1, seeds)], alpha)]
    return {
        "rates": rates,
        "accuracies": ends,
        "rate": rates[best],
        "epochs": list(range(task.every, task.epochs + 1, task.every)),
        **{name: [curve[name] for curve in curves] for name in curves[0]},
        "seconds": round(time.monotonic() - began, 1),
    }


def trainer(config: Any, task: Task, build: Callable, conditions: Callable) -> Callable:
    """A function from pairs of rate and seed, and alpha, to curves; as many train at once as there are devices.

    Args:
      config: of an experiment.
      task: what is trained.
      build: `(work, rate=, client_map=) -> Algorithm`.
      conditions: makes of a sampler one in which messages are lost, and the like.
    """
    loss, metrics = models.cross_entropy(task.model), models.metrics(task.model)
    per_epoch = len(task.train["y"]) // (config.peers * config.batch_size)
    total = task.epochs * per_epoch
    parts = np.array_split(np.arange(len(task.train["y"])), config.peers)
    start, size = (np.array([f(part) for part in parts], np.int32) for f in (np.min, np.size))

    def decayed(params, batch, key):
        squares = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))
        return loss(params, batch, key) + config.weight_decay / 2 * squares

    work = local.stochastic_gradient(decayed, batch_size=config.batch_size)
    sampler = conditions(sampling.full(steps=work.steps))
    make = functools.partial(build, work, client_map=clients.vectorised(max_steps=1))
    template = make(rate=1.0)

    def begin(seed):
        return template.init(task.model.init(jax.random.split(jax.random.key(seed))[0]))

    def stretch(state, rate, seed, rows, train, test, first):
        population = core.Population(jax.tree.map(lambda x: jnp.take(x, rows, axis=0), train), start, size)

        def round_fn(state, cohort, key):
            return make(rate=rate * factor(state.round, total)).round(state, cohort, key)

        state, history = run.scan_rounds(
            template._replace(round=round_fn),
            sampler,
            population,
            state,
            jax.random.split(jax.random.key(seed))[1],
            rounds=task.every * per_epoch,
            start=first,
        )
        everyone = clients.vectorised()
        scores = run.evaluate_peers(metrics, template, state, test, client_map=everyone)["accuracy"]
        judged = {name: value for name, value in scores._asdict().items() if name != "each"}
        return state, judged | {"consensus": history["consensus"][-1]}

    devices = mesh.make()
    begin = jax.jit(on_each(begin, devices, 1))
    stretch = jax.jit(on_each(stretch, devices, 4), donate_argnums=0)
    train, test = (mesh.replicate(part, devices) for part in (task.train, task.test))

    def trained(runs: list[tuple[float, int]], alpha: float) -> list[dict[str, list[float]]]:
        curves: list[dict[str, list[float]]] = []
        count = devices.size
        for here in (runs[i : i + count] for i in range(0, len(runs), count)):
            filled = here + here[-1:] * (count - len(here))
            rate, seed = np.array([r for r, _ in filled], np.float32), np.array([s for _, s in filled], np.int32)
            rows = np.stack([dealt(task.train["y"], config.peers, alpha, s) for s in seed])
            state, points = begin(seed), []
            for first in range(0, total, task.every * per_epoch):
                state, judged = stretch(state, rate, seed, rows, train, test, np.int32(first))
                points.append(jax.device_get(judged))
            for i in range(len(here)):
                curves.append({name: [float(point[name][i]) for point in points] for name in points[0]})
        return curves

    return trained


def on_each(f: Callable, devices: Any, split: int) -> Callable:
    """Runs `f` once on every device; the first `split` arguments and the result have a leading axis of devices."""

    def one(*args):
        own = [jax.tree.map(lambda x: x[0], arg) for arg in args[:split]]
        return jax.tree.map(lambda x: x[None], f(*own, *args[split:]))

    def all_of_them(*args):
        specs = (P("clients"),) * split + (P(),) * (len(args) - split)
        return mesh.shard_map(mesh=devices, in_specs=specs, out_specs=P("clients"))(one)(*args)

    return all_of_them


def factor(t: jax.Array, total: int) -> jax.Array:
    """The schedule of rates: what the rate is multiplied by in round t."""
    done = (t + 1) / total
    return jnp.minimum(1.0, 40 * done) * jnp.where(done > 0.9, 0.01, jnp.where(done > 0.75, 0.1, 1.0))


def dealt(labels: np.ndarray, peers: int, alpha: float, seed: int) -> np.ndarray:
    """The order of examples that, cut into equal parts, gives peers theirs.

    For each class shares are drawn over the peers of a group, of whom those that have their part already get none; the
    group is drawn again until each has half of a part.
    """
    rng = np.random.default_rng(seed)
    order, found = rng.permutation(len(labels)), []
    for first in range(0, peers, GROUP):
        members = min(GROUP, peers - first)
        rows = order[len(order) * first // peers : len(order) * (first + members) // peers]
        part, sizes = len(rows) / members, np.zeros(members, int)
        while sizes.min() < part // 2:
            held: list[list[np.ndarray]] = [[] for _ in range(members)]
            sizes = np.zeros(members, int)
            for label in np.unique(labels):
                share = np.zeros(members)
                while not share.sum() > 0:
                    share = rng.dirichlet(np.full(members, alpha)) * (sizes < part)
                of_class = rows[labels[rows] == label]
                ends = (np.cumsum(share / share.sum()) * len(of_class)).astype(int)[:-1]
                for rows_of, some in zip(held, np.split(of_class, ends), strict=True):
                    rows_of.append(some)
                sizes = np.array([sum(map(len, rows_of)) for rows_of in held])
        found += [np.concatenate(rows_of) for rows_of in held]
    return np.concatenate(found)


def described(found: dict[str, Any]) -> dict[str, str]:
    """The rest of what a cell found, in words: other figures, and the rates tried."""
    tried = zip(found["rates"], found["accuracies"], strict=True)
    return {
        "mean": final(found, "mean"),
        "lowest": final(found, "lowest"),
        "spread": final(found, "spread", 2),
        "averaged model": final(found, "averaged"),
        "rate": f"{found['rate']:g}",
        "rates tried: accuracy": ", ".join(f"{rate:g}: {accuracy:.1f}" for rate, accuracy in tried),
    }


def final(found: dict[str, Any], name: str, digits: int = 1) -> str:
    """A figure at the end of all seeds, in per cent."""
    return report.mean_and_std(100 * np.array(found[name])[:, -1], digits)


def vgg11() -> models.Model:
    """VGG-11 for images of 32 x 32, without normalisation; training images are cropped and mirrored at random."""
    widths = (64, 128, 256, 256, 512, 512, 512, 512)
    pooled = (0, 1, 3, 5, 7)  # convolutions that a pool follows
    dense = (512, 512, 512, 10)

    def init_fn(key):
        convolution_keys, dense_keys = (jax.random.split(k, len(widths)) for k in jax.random.split(key))
        convolutions = [
            {"kernel": jax.random.normal(k, (3, 3, i, o)) * (2 / (9 * o)) ** 0.5, "bias": jnp.zeros(o)}
            for k, i, o in zip(convolution_keys, (3, *widths[:-1]), widths, strict=True)
        ]

        def layer(key, i, o):
            kernel_key, bias_key, bound = *jax.random.split(key), i**-0.5
            return {
                "kernel": jax.random.uniform(kernel_key, (i, o), minval=-bound, maxval=bound),
                "bias": jax.random.uniform(bias_key, (o,), minval=-bound, maxval=bound),
            }

        layers = [layer(k, i, o) for k, i, o in zip(dense_keys[:3], dense[:-1], dense[1:], strict=True)]
        return {"convolutions": convolutions, "dense": layers}

    def apply_fn(params, x, key=None):
        crop_key, *dropout_keys = [None] * 3 if key is None else jax.random.split(key, 3)
        x = x if key is None else cropped(x, crop_key)
        x = (x - jnp.array(MEAN).reshape(1, 1, 1, 3)) / jnp.array(DEVIATION).reshape(1, 1, 1, 3)
        for i, layer in enumerate(params["convolutions"]):
            x = jax.nn.relu(models.conv2d(x, layer["kernel"]) + layer["bias"].reshape(1, 1, 1, -1))
            x = models.max_pool(x) if i in pooled else x
        x = x.reshape(x.shape[0], -1)
        for layer, dropout_key in zip(params["dense"][:-1], dropout_keys, strict=True):
            if key is not None:
                x = jnp.where(jax.random.bernoulli(dropout_key, 0.5, x.shape), 2 * x, 0)
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        return x @ params["dense"][-1]["kernel"] + params["dense"][-1]["bias"][None]

    return models.Model(init_fn, apply_fn)


def cropped(x: jax.Array, key: jax.Array, border: int = 4) -> jax.Array:
    """Each of the images x [B, H, W, C] moved by up to `border` pixels, over black, and mirrored or not."""
    place_key, mirror_key = jax.random.split(key)
    padded = jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    corner = jax.random.randint(place_key, (x.shape[0], 2), 0, 2 * border + 1)
    moved = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:]))(padded, corner)
    mirrored = jax.random.bernoulli(mirror_key, 0.5, (x.shape[0], 1, 1, 1))
    return jnp.where(mirrored, moved[:, :, ::-1], moved)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
