"""CHOCO on a ring of 25 peers: loss against bytes by compressor, and how large a step each bears.

Claim: compressed differences learn what exact models do, with 4 bits a number to the third digit at an eighth of the
bytes; scaled signs come to a loss of .25 above the minimum with a 21st. One number of a hundred needs small steps, and
in as many rounds falls behind, though ahead of exact models that send no more bytes. Averaging alone by the top 1 %
converges with a step size of .046 and diverges with .1, which shows after 700 rounds; the one that is proven, 5.9e-7,
is safe and so small that 6000 rounds take off half a per cent.

| learning         | rate | step size | bytes a round | above the minimum | exact, as many bytes | sent until .25 |
|------------------|------|-----------|---------------|-------------------|----------------------|----------------|
| exact            |    3 |           |        62,800 |              .063 |                 .063 |        6.4 MB  |
| QSGD, 8 bits     |    3 |         1 |        15,708 |              .063 |                 .221 |         1.7 MB |
| 4 bits           |    3 |         1 |         7,866 |              .063 |                 .344 |         .80 MB |
| scaled signs     |    3 |       .8* |         1,972 |              .078 |                 .828 |         .30 MB |
| top 1 %          |  10* |      .06* |           892 |              .506 |                1.500 |                |
| random 1 %       |  10* |    .0075* |           648 |              .752 |                2.198 |                |

| averaging    | step size | bytes a round | after 1500 rounds |    3000 |    6000 |
|--------------|-----------|---------------|-------------------|---------|---------|
| exact        |         1 |        16,000 |           3.6e-13 | 3.6e-13 | 3.6e-13 |
| QSGD, 8 bits |         1 |         4,008 |           4.2e-13 | 4.2e-13 | 4.2e-13 |
| 4 bits       |         1 |         2,016 |           4.0e-13 | 4.0e-13 | 4.0e-13 |
| scaled signs |        .1 |           508 |            1.7e-4 |  9.9e-7 |  1.6e-8 |
|              |        .8 |               |            3.4e-7 |  2.9e-7 |  1.7e-6 |
|              |         1 |               |            1.2e-6 |  1.1e-3 |     700 |
| top 1 %      |    5.9e-7 |           226 |              .999 |    .998 |    .995 |
|              |       .02 |               |              .025 |  6.8e-3 |  5.4e-4 |
|              |      .046 |               |            5.0e-3 |  2.6e-4 |  7.3e-7 |
|              |       .06 |               |            2.5e-3 |  5.5e-5 |  2.6e-8 |
|              |        .1 |               |               .52 |    2000 | diverged |
| random 1 %   |      .005 |           176 |              .096 |    .054 |    .025 |
|              |     .0075 |               |              .097 |    .038 |    .013 |
|              |       .02 |               |             7.5e4 |   6.7e8 | diverged |

One seed. Learning: the regularised loss, over all images, of the average of all models after 600 rounds; a star marks
the highest value tried, which for step sizes is the highest with which averaging converged. Averaging: the squared
consensus distance, of the first, of 2000 numbers; 4e-13 is what float32 can tell. Bytes are a peer's, to both its
neighbours. The random 1 % are the same places for all peers, and each waits 100 rounds for its turn on average: with a
step size above 1 / (100 |I - W|), .0075 here, models have overstepped by then.

Source: Koloskova, Stich and Jaggi 2019 (arXiv:1902.00340), whose ring of 25, d = 2000 and tuned step size for the top
1 %, .046, these are. They learn other data; here it is softmax regression of 10,000 images of MNIST, sorted by label
and cut into a stretch a peer, with batches of 16, an L2 penalty of .001 / 2 and rates that fall as 1 / (1 + t / 150).

Command: python experiments/choco.py
Expected: the tables above, which leave out some rows; bytes.png, rounds.png, gossip.png and step_sizes_*.png.
Time: 6 minutes on two CPU cores that did four times as much other work; 3.5 minutes of processor time.
Needs the MNIST files; the error says where they are looked for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import clients, compress, core, data, experiment, gossip, local, models, plot, report, run, sampling
from jfed.gossip import topology


class Way(NamedTuple):
    """A compressor, and the step sizes to try."""

    title: str
    compressor: Callable[[], optax.GradientTransformation]
    gossip: tuple[float, ...]  # of averaging alone; 0 stands for the one that is proven
    sgd: tuple[float, ...]  # of learning; all such that averaging alone converges


WAYS = {
    "exact": Way("exact", optax.identity, (1.0,), (1.0,)),
    "quantize_4": Way("4 bits", lambda: compress.quantize(4, rounding="nearest"), (0.5, 1.0), (1.0,)),
    "qsgd_8_bits": Way("QSGD, 8 bits", lambda: compress.qsgd(127), (0.5, 1.0), (1.0,)),
    "scaled_sign": Way("scaled signs", compress.scaled_sign, (0.1, 0.3, 0.8, 1.0), (0.3, 0.6, 0.8)),
    "top_1": Way("top 1 %", lambda: compress.top_k(0.01), (0.0, 0.02, 0.046, 0.06, 0.1), (0.046, 0.06)),
    "random_1": Way(
        "random 1 %", lambda: compress.random_k(0.01, scale="none"), (0.0025, 0.005, 0.0075, 0.02), (0.005, 0.0075)
    ),
}
QUALITY = 0.01  # omega of the ways that have the step size 0: k / d
POINTS = 100  # of a curve of averaging


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 1
    peers: int = 25
    ways: tuple[str, ...] = tuple(WAYS)
    numbers: int = 2000  # d of averaging alone
    gossip_rounds: int = 6000
    rounds: int = 600  # of learning
    every: int = 5  # rounds between two points of learning
    images: int = 10_000
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (1.0, 3.0, 10.0)
    halved: int = 150  # rounds after which the rate is half of what it was, a third after twice as many
    target: float = 0.25  # loss above the minimum, to be reached
    regularisation: float = 1e-3  # of the squared norm, halved
    small: bool = False  # the images that come with jfed, in place of MNIST
    download: bool = False  # fetch MNIST if it is not found


SMOKE = {
    "ways": ("exact", "scaled_sign"),
    "peers": 5,
    "numbers": 200,
    "gossip_rounds": 100,
    "rounds": 20,
    "every": 10,
    "images": 500,
    "learning_rates": (1.0,),
    "small": True,
}


def main(config: Config) -> None:
    """Averages, then learns, by every compressor; then shows tables and pictures."""
    if odd := sorted(set(config.ways) - set(WAYS)):
        raise ValueError(f"choco(ways={odd}): choose from {', '.join(WAYS)}.")
    if config.gossip_rounds % POINTS:
        raise ValueError(
            f"choco(gossip_rounds={config.gossip_rounds}): must be a multiple of {POINTS}; 6000 is enough."
        )
    task = functools.cache(lambda: the_task(config))
    cells = {f"gossip_{name}": lambda name=name: averaged(config, WAYS[name]) for name in config.ways}
    cells |= {f"sgd_{name}": lambda name=name: learned(config, task(), WAYS[name]) for name in config.ways}
    whole, results = experiment.over_cells("choco", config, cells)
    summary: dict[str, Any] = {"seeds": config.seeds}
    of_gossip(config, whole, results, summary)
    of_learning(config, whole, results, summary)
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def averaged(config: Config, way: Way) -> dict[str, Any]:
    """The squared consensus distance of CHOCO-Gossip, of the first, at each step size."""
    n, ring = config.peers, topology.ring(config.peers)
    proven = gossip.choco_step_size(ring, quality=QUALITY)
    sizes = [size or proven for size in way.gossip]

    def make(step_size):
        algorithm = gossip.choco_gossip(ring, compressor=way.compressor(), step_size=step_size)

        def init_fn(x):
            return algorithm.init(jnp.zeros(config.numbers))._replace(params=x)

        return tallied(algorithm._replace(init=init_fn))

    def start(key):
        x = jax.random.normal(key, (n, config.numbers))
        return (x - jnp.mean(x, 0)) / gossip.consensus_distance(x)

    found = run.sweep(
        make,
        {"step_size": sizes},
        init=start,
        sampler=sampling.full(steps=lambda size: size),
        population=core.Population((), jnp.arange(n), jnp.ones(n, jnp.int32)),
        judge=lambda state: {"error": gossip.consensus_distance(state[0].params) ** 2, "sent": state[1]},
        rounds=config.gossip_rounds,
        every=config.gossip_rounds // POINTS,
        seeds=config.seeds,
        progress=False,
    )
    return {
        "step_sizes": sizes,
        "rounds": found.rounds,
        "error": found.curves["error"],  # [step sizes, seeds, points]
        "sent": found.curves["sent"][0, 0],
    }


class Task(NamedTuple):
    """What the peers learn."""

    population: core.Population
    model: models.Model
    loss: Callable
    objective: Callable  # params -> the regularised loss of all images
    least: float  # its minimum


def the_task(config: Config) -> Task:
    """Logistic regression of images sorted by label, a stretch for each peer, dealt out at random."""
    train, _ = data.fashion_small() if config.small else data.mnist(download=config.download)
    train = {name: values[: config.images] for name, values in train.items()}
    owner = data.partition.shards(jax.random.key(0), train["y"], num_clients=config.peers, shards_per_client=1)
    population = data.by_owner(train, owner, num_classes=10)
    model = models.logistic_regression(784, 10)
    entropy = models.cross_entropy(model)

    def loss(params, batch, key=None):
        return entropy(params, batch, key) + config.regularisation / 2 * optax.tree.norm(params, squared=True)

    def objective(params):
        return jnp.mean(loss(params, population.examples))

    optimizer = optax.lbfgs()

    def descend(carry, _):
        params, state = carry
        value, slope = optax.value_and_grad_from_state(objective)(params, state=state)
        updates, state = optimizer.update(slope, state, params, value=value, grad=slope, value_fn=objective)
        return (optax.apply_updates(params, updates), state), value

    params = model.init(jax.random.key(0))
    _, values = jax.jit(lambda carry: jax.lax.scan(descend, carry, length=200))((params, optimizer.init(params)))
    return Task(population, model, loss, objective, float(jnp.min(values)))


def learned(config: Config, task: Task, way: Way) -> dict[str, Any]:
    """How far the averaged model of CHOCO-SGD is above the minimum, at its best rate and step size."""
    ring = topology.ring(config.peers)
    work = local.stochastic_gradient(task.loss, batch_size=config.batch_size)
    whole_model = compress.over_tree(way.compressor())

    def make(learning_rate, step_size):
        options = {
            "optimizer": optax.sgd(lambda t: learning_rate / (1 + t / config.halved)),
            "client_map": clients.vectorised(),
        }
        if way.compressor is optax.identity:
            algorithm = gossip.adapt_then_combine(work, ring, **options)
        else:
            algorithm = gossip.choco(work, ring, compressor=whole_model, step_size=step_size, **options)
        return tallied(algorithm)

    def judge(state):
        peers, sent = state
        mean = jax.tree.map(lambda x: jnp.mean(x, 0), peers.params)
        above, consensus = task.objective(mean) - task.least, gossip.consensus_distance(peers.params)
        return {"above": above, "consensus": consensus, "sent": sent}

    found = run.sweep(
        make,
        {"learning_rate": config.learning_rates, "step_size": way.sgd},
        init=task.model.init,
        sampler=sampling.full(steps=work.steps),
        population=task.population,
        judge=judge,
        rounds=config.rounds,
        every=config.every,
        seeds=config.seeds,
        progress=False,
    )
    best = run.best_setting(found, "above", order=min)
    at = found.settings.index(best)
    return {
        "setting": best,
        "at_an_end": run.at_an_end(found, best),
        "rounds": found.rounds,
        "above": found.curves["above"][at],  # [seeds, points]
        "consensus": found.curves["consensus"][at],
        "sent": found.curves["sent"][at, 0],
        "settings": found.settings,
        "ends": found.curves["above"][:, :, -1],
    }


def tallied(algorithm: core.Algorithm) -> core.Algorithm:
    """The same method, whose state has the bytes beside it that the busiest peer has sent; `params` is that state."""

    def round_fn(state, cohort, key):
        inner, metrics = algorithm.round(state[0], cohort, key)
        return (inner, state[1] + jnp.max(metrics["traffic"].up).astype(jnp.float32)), metrics

    return core.Algorithm(
        init=lambda params: (algorithm.init(params), jnp.zeros(())), round=round_fn, params=lambda state: state
    )


def of_gossip(config: Config, whole: report.Run, results: dict, summary: dict) -> None:
    """The table of averaging, and its picture."""
    rows, curves = [], {}
    for name in config.ways:
        found = results[f"gossip_{name}"]
        error = np.array(found["error"], float).mean(1)  # [step sizes, points]; not finite once it has diverged
        a_round = found["sent"][-1] / found["rounds"][-1]
        for size, curve in zip(found["step_sizes"], error, strict=True):
            row = {"": WAYS[name].title, "step size": f"{size:.2g}", "sent a round": report.human_bytes(a_round)}
            for share in (4, 2, 1):
                error_then = curve[POINTS // share - 1]
                row[f"after {config.gossip_rounds // share}"] = f"{error_then:.1e}" if error_then < 1e9 else "diverged"
            rows.append(row)
            summary[f"gossip_{name}_{size:.2g}"] = curve[-1]
        summary[f"gossip_{name}_sent_a_round"] = a_round
        best = error[np.nanargmin(error[:, -1])]
        curves[WAYS[name].title] = np.array(found["sent"]) / 1e3, best
    print(report.table(f"{config.peers} peers average: squared consensus distance, of the first", rows), "\n")
    plot.plot_curves(
        whole.folder / "gossip.png",
        curves,
        xlabel="sent by a peer, kB",
        ylabel="squared consensus distance, of the first",
        title=f"CHOCO-Gossip on a ring of {config.peers}, d = {config.numbers}",
        log_x=True,
        log_y=True,
    )
    for name in config.ways:
        found, words = (
            results[f"gossip_{name}"],
            {"xlabel": "round", "ylabel": "squared consensus distance, of the first"},
        )
        if len(found["step_sizes"]) > 2:
            errors = np.array(found["error"], float).mean(1)
            plot.plot_curves(
                whole.folder / f"step_sizes_{name}.png",
                {f"{size:.2g}": (found["rounds"], e) for size, e in zip(found["step_sizes"], errors, strict=True)},
                title=f"CHOCO-Gossip, {WAYS[name].title}, by step size",
                log_y=True,
                **words,
            )


def of_learning(config: Config, whole: report.Run, results: dict, summary: dict) -> None:
    """The table of learning, and its pictures."""
    rows, by_bytes, by_rounds = [], {}, {}
    exact = results["sgd_exact"] if "exact" in config.ways else None
    for name in config.ways:
        found, title = results[f"sgd_{name}"], WAYS[name].title
        above = np.array(found["above"], float)
        mean, sent = above.mean(0), np.array(found["sent"])
        row = {
            "": title,
            "rate": f"{found['setting']['learning_rate']:g}",
            "step size": f"{found['setting']['step_size']:g}",
            "at an end": ", ".join(found["at_an_end"]),
            "sent a round": report.human_bytes(sent[-1] / found["rounds"][-1]),
            "half way": f"{mean[len(mean) // 2 - 1]:.3f}",
            f"after {config.rounds}": report.mean_and_std(above[:, -1], digits=3),
            "consensus": report.mean_and_std(np.array(found["consensus"], float)[:, -1], digits=2),
        }
        summary |= report.spread(f"sgd_{name}", above[:, -1]) | {f"sgd_{name}_sent": sent[-1]}
        needed = report.reached(sent.tolist(), (-mean).tolist(), -config.target)
        row[f"sent until {config.target:g}"] = "-" if needed is None else report.human_bytes(needed)
        summary[f"sgd_{name}_sent_to_target"] = needed
        if exact is not None:
            then = np.interp(sent[-1], exact["sent"], np.array(exact["above"], float).mean(0), left=np.nan)
            row["exact with as many bytes"] = report.mean_and_std([then], digits=3)
            summary[f"sgd_{name}_exact_with_as_many"] = then
        rows.append(row)
        by_bytes[title], by_rounds[title] = (sent / 1e6, mean), (found["rounds"], mean)
    print(report.table(f"{config.peers} peers learn: loss of the averaged model, above the minimum", rows), "\n")
    words = {"ylabel": "loss above the minimum", "log_y": True}
    title = f"Logistic regression on a ring of {config.peers}, sorted labels"
    plot.plot_curves(
        whole.folder / "bytes.png", by_bytes, xlabel="sent by a peer, MB", title=title, log_x=True, **words
    )
    plot.plot_curves(whole.folder / "rounds.png", by_rounds, xlabel="round", title=title, **words)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
