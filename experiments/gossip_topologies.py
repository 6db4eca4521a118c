"""Every topology: how fast peers agree, predicted and measured, and what that is worth to D-PSGD.

Claim: from the models that a graph brings together least, 64 peers that average agree exactly as fast as the spectral
gap says: the consensus distance shrinks by 1 - gap a round, to within 7e-8, and falls to a thousandth in the round
that is foretold, on all 18 graphs. How well the same peers learn is another matter: of graphs of one gap some do well
and some fail. A star, whose leaves keep 63/64 of their own models, has five times the gap of a ring and is the
worst of all; a directed ring has the second smallest gap and ends six points above a ring, with half the bytes; graphs
that make the exact mean every 6 rounds do no better than a torus, which needs 56 for a thousandth, though it sends four
times as much. What tells is how far the peers' gradients, which differ, pull models apart meanwhile: the norm of the
sum of all W^t - 11^T / n.

| 64 peers             |    gap | rounds to .001 | pulled apart | kB a round | the busiest | accuracy, % | lowest |
|----------------------|--------|----------------|--------------|------------|-------------|-------------|--------|
| complete             |      1 |              1 |          .99 |       1978 |        1978 |  89.2 ± 0.2 |   87.3 |
| exponential          |  .2857 |             21 |         1.28 |        188 |         188 |  88.9 ± 0.1 |   86.8 |
| base-4               |      1 |              3 |         1.39 |         94 |          94 |  88.7 ± 0.1 |   86.3 |
| hypercube            |  .2857 |             21 |         1.59 |        188 |         188 |  88.7 ± 0.1 |   86.6 |
| Erdos-Renyi          |  .2501 |             24 |         1.72 |        266 |         471 |  88.5 ± 0.1 |   85.9 |
| random 4-regular     |  .1406 |             46 |         2.31 |        126 |         126 |  88.1 ± 0.2 |   85.3 |
| torus 8x8            |  .1172 |             56 |         2.71 |        126 |         126 |  87.9 ± 0.3 |   85.1 |
| random matchings     |  .2288 |             26 |         2.35 |         31 |          31 |  87.5 ± 0.4 |   81.9 |
| one-peer exponential |      1 |              6 |         2.23 |         31 |          31 |  87.5 ± 0.1 |   82.0 |
| base-2               |      1 |              6 |         2.23 |         31 |          31 |  87.5 ± 0.2 |   82.6 |
| small world          |  .0282 |            242 |         5.93 |        126 |         188 |  86.8 ± 0.2 |   81.5 |
| grid 8x8             |  .0323 |            211 |         6.25 |        110 |         126 |  86.7 ± 0.8 |   80.5 |
| directed ring        |  .0012 |           5732 |         3.63 |         31 |          31 |  86.0 ± 0.1 |   80.7 |
| geometric            |  .0137 |            500 |         11.2 |        194 |         314 |  85.5 ± 1.4 |   77.3 |
| ring                 |  .0032 |           2149 |         46.8 |         63 |          63 |  79.7 ± 0.4 |   68.7 |
| chain                |  .0008 |           8599 |         63.9 |         62 |          63 |  78.0 ± 1.1 |   65.0 |
| binary tree          |  .0044 |           1550 |         33.1 |         62 |          94 |  76.5 ± 1.2 |   62.4 |
| star                 |  .0156 |            439 |         63.0 |         62 |        1978 |  32.0 ± 1.1 |   14.4 |

kB are those that a peer sends, on average, and the busiest. Rank correlation with the accuracy: of the gap .80, of
being pulled apart -.95. The gap of graphs that change is that of a period: 1 where this makes the exact mean, and then
nothing is left of the distance, measured. From random models, in place of the worst, a thousandth takes 14 to 30 %
fewer rounds, on the star just as many. Three seeds, mean and standard deviation; the average of all models, which
nobody has, scores 88.5 to 89.7 %, on the star 81.7.

The task is softmax regression of MNIST, dealt in two shards sorted by label to each peer, 500 rounds of D-PSGD with
batches of 16 and a rate of .1. Undirected graphs have Metropolis weights. Random ones are drawn once, of seed 0:
geometric of radius sqrt(2 ln n / (pi n)), Erdos-Renyi of 2 ln n / n, small world of 4 neighbours rewired at .1.

Source: Xiao and Boyd 2004 (Systems and Control Letters 53, pp. 65-78) for the rate; Lian et al. 2017
(arXiv:1705.09056) for D-PSGD; Vogels, Hendrikx and Jaggi 2023 (arXiv:2301.02151) find that the gap does not predict how
peers learn, of data that are alike.

Command: python experiments/gossip_topologies.py
Expected: the table above; graphs.png, decay.png, accuracy_by_gap.png and accuracy_by_pulled_apart.png.
Time: three and a half minutes on two CPU cores.
Needs the MNIST files; the error says where they are looked for.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import core, data, experiment, gossip, local, models, plot, report, run, sampling
from jfed.gossip import topology

EPSILON = 1e-3  # of the first consensus distance, at which peers count as agreed
DRAWN_ROUNDS = 60  # of averaging, in the picture

MAKE = {
    "chain": lambda n: topology.chain(n),
    "directed_ring": lambda n: topology.directed_ring(n),
    "ring": lambda n: topology.ring(n),
    "binary_tree": lambda n: topology.binary_tree(n),
    "star": lambda n: topology.star(n),
    "geometric": lambda n: topology.geometric(n, radius(n), seed=0),
    "grid": lambda n: topology.grid(*sides(n)),
    "small_world": lambda n: topology.small_world(n, 4, 0.1, seed=0),
    "torus": lambda n: topology.torus(*sides(n)),
    "erdos_renyi": lambda n: topology.erdos_renyi(n, 2 * math.log(n) / n, seed=0),
    "random_regular": lambda n: topology.random_regular(n, 4, seed=0),
    "hypercube": lambda n: topology.hypercube(n),
    "exponential": lambda n: topology.exponential(n),
    "complete": lambda n: topology.complete(n),
    "random_matchings": lambda n: topology.random_matchings(n, 16, seed=0),
    "one_peer_exponential": lambda n: topology.one_peer_exponential(n),
    "base_2": lambda n: topology.base_graph(n, 1),
    "base_4": lambda n: topology.base_graph(n, 3),
}
KEPT = ("gap", "diameter", "until", "until_measured", "sent", "busiest")
DECAYS = ("ring", "star", "grid", "torus", "exponential", "one_peer_exponential")  # in the picture


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3  # deals of the images, and random starts
    peers: int = 64
    topologies: tuple[str, ...] = tuple(MAKE)
    numbers: int = 100  # of each peer's model where peers only average
    longest: int = 20_000  # rounds of averaging, at most
    rounds: int = 500  # of training
    batch_size: int = 16
    learning_rate: float = 0.1
    drawn: int = 16  # peers of the graphs in the picture
    small: bool = False  # the images that come with jfed, in place of MNIST
    download: bool = False  # fetch MNIST if it is not found


SMOKE = {
    "peers": 8,
    "topologies": ("ring", "one_peer_exponential"),
    "numbers": 3,
    "rounds": 20,
    "drawn": 8,
    "small": True,
}


class Task(NamedTuple):
    """What all topologies learn."""

    populations: list[core.Population]  # a deal of the images to peers, for each seed
    test: core.Tree
    model: models.Model
    work: core.ClientWork
    metrics: Callable
    reader: core.Algorithm  # tells the models of a state, of whichever topology


def the_task(config: Config) -> Task:
    """Images in two shards a peer, sorted by label: most peers see two classes."""
    train, test = data.fashion_small() if config.small else data.mnist(download=config.download)
    model = models.logistic_regression(784, 10)
    work = local.stochastic_gradient(models.cross_entropy(model), batch_size=config.batch_size)
    owners = [
        data.partition.shards(jax.random.key(seed), train["y"], num_clients=config.peers)
        for seed in range(config.seeds)
    ]
    populations = [data.by_owner(train, owner, num_classes=10) for owner in owners]
    reader = gossip.dpsgd(work, topology.ring(config.peers), optimizer=optax.sgd(config.learning_rate))
    return Task(populations, test, model, work, models.metrics(model), reader)


def main(config: Config) -> None:
    """Averages and trains on every topology, then shows tables and pictures."""
    if odd := sorted(set(config.topologies) - set(MAKE)):
        raise ValueError(f"gossip_topologies(topologies={odd}): choose from {', '.join(MAKE)}.")
    if min(config.peers, config.drawn) < 6:
        few = f"peers={config.peers}, drawn={config.drawn}"
        raise ValueError(f"gossip_topologies({few}): some graphs need 6 peers or more; a good start is 16.")
    graphs = {name: MAKE[name](config.peers) for name in config.topologies if there_is(name, config.peers)}
    task = the_task(config)
    cells = {name: lambda g=graph: agreeing(config, g) | learning(config, task, g) for name, graph in graphs.items()}
    whole, results = experiment.over_cells("gossip_topologies", config, cells)

    agreed, learned, summary = [], [], {"seeds": config.seeds}
    points: dict[str, list[tuple[float, float, float]]] = {}  # gap, pulled apart, accuracy
    for name, found in results.items():
        exact = found["shrinks"] == 0
        title, pulled = graphs[name].name, pulled_apart(graphs[name], config.rounds)
        agreed.append(
            {
                "": title,
                "gap": f"{found['gap']:.4f}",
                "measured": f"{found['left']:.1g} left after {found['period']}"
                if exact
                else f"{1 - found['shrinks_measured']:.4f}",
                "random start": "" if not found["late"] else f"{1 - np.mean(found['late']):.4f}",
                "diameter": f"{found['diameter']:g}",
                f"rounds to {EPSILON:g}": found["until"],
                "measured ": found["until_measured"],
                "random start ": worded(found["until_at_random"]),
            }
        )
        accuracy = {kind: 100 * np.array(found[kind]) for kind in ("mean", "lowest", "averaged")}
        learned.append(
            {
                "": title,
                "gap": f"{found['gap']:.4f}",
                "pulled apart": f"{pulled:.2f}",
                "sent a round": report.human_bytes(found["sent"]),
                "by the busiest": report.human_bytes(found["busiest"]),
                "peers' accuracy": report.mean_and_std(accuracy["mean"]),
                "the lowest": report.mean_and_std(accuracy["lowest"]),
                "averaged model": report.mean_and_std(accuracy["averaged"]),
                "consensus": report.mean_and_std(found["consensus"], digits=3),
            }
        )
        points[title] = found["gap"], pulled, accuracy["mean"].mean()
        summary |= {f"{name}_{what}": found[what] for what in KEPT}
        summary |= {f"{name}_gap_measured": 1 - found["shrinks_measured"], f"{name}_pulled_apart": pulled}
        summary |= {f"{name}_{what}": np.mean(found[what]) for what in ("mean", "lowest", "averaged", "consensus")}
    print(report.table(f"{config.peers} peers average", agreed), "\n")
    print(report.table(f"They train by D-PSGD for {config.rounds} rounds; test accuracy, %", learned), "\n")
    gap, pulled, accuracy = (ranks(column) for column in np.array(list(points.values())).T)
    summary["ranks_gap"] = np.corrcoef(gap, accuracy)[0, 1]
    summary["ranks_pulled_apart"] = np.corrcoef(-pulled, accuracy)[0, 1]
    ranked = f"{summary['ranks_gap']:.2f}, of being pulled apart {-summary['ranks_pulled_apart']:.2f}"
    print(f"rank correlation with peers' accuracy: of the gap {ranked}\n")
    pictures(config, whole, graphs, results, points)
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def learning(config: Config, task: Task, graph: topology.Topology) -> dict[str, Any]:
    """What peers' own models score after D-PSGD, and what they sent."""
    algorithm = gossip.dpsgd(task.work, graph, optimizer=optax.sgd(config.learning_rate))
    sampler = sampling.full(steps=task.work.steps)
    found: dict[str, Any] = {"mean": [], "lowest": [], "averaged": [], "consensus": []}
    for seed, population in enumerate(task.populations):
        start, key = jax.random.split(jax.random.key(seed))
        state = algorithm.init(task.model.init(start))
        state, metrics = run.scan_rounds(algorithm, sampler, population, state, key, rounds=config.rounds)
        scores = run.evaluate_peers(task.metrics, task.reader, state, task.test)["accuracy"]
        found["consensus"].append(float(metrics["consensus"][-1]))
        for kind in ("mean", "lowest", "averaged"):
            found[kind].append(float(getattr(scores, kind)))
    sent = np.asarray(metrics["traffic"].up, float).mean(0)
    return found | {"sent": sent.mean(), "busiest": sent.max()}


def pulled_apart(graph: topology.Topology, rounds: int) -> float:
    """The consensus distance that D-PSGD comes to in so many rounds, over the rate and the gradients' deviation.

    That is if every peer always has the same gradient, which differ from each other at random: x <- W x - g then ends
    in the sum of g, W g, W W g, ..., of which this is the root mean square.
    """
    w, n = topology.matrices(graph), topology.peers(graph)
    once = np.eye(n) - 1 / n
    total = once
    for t in reversed(range(1, rounds)):
        once = once @ w[t % len(w)]
        total = total + once
    return float(np.linalg.norm(total) / math.sqrt(n))


def there_is(name: str, n: int) -> bool:
    """Whether there is such a graph of n peers: hypercubes are of powers of 2."""
    return name != "hypercube" or not n & (n - 1)


def radius(n: int) -> float:
    """At which most geometric graphs are connected."""
    return math.sqrt(2 * math.log(n) / (math.pi * n))


def sides(n: int) -> tuple[int, int]:
    """Rows and columns of the rectangle of n peers that is nearest to a square."""
    rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
    return rows, n // rows


def agreeing(config: Config, graph: topology.Topology) -> dict[str, Any]:
    """What is foretold of a graph, and what averaging on it shows."""
    n, period = topology.peers(graph), topology.period(graph)
    shrinks, until = topology.contraction(graph), topology.mixing_time(graph, EPSILON)
    rounds = int(min(-(-max(until, period) // period) * period, config.longest // period * period))
    algorithm, sampler = gossip.averaging(graph), sampling.full(steps=lambda size: size)
    everybody = core.Population((), jnp.arange(n), jnp.ones(n, jnp.int32))

    def distances(start: np.ndarray) -> np.ndarray:
        """[rounds] relative to that of the start, [n, numbers], whose mean over peers is 0."""
        start = jnp.asarray(start - start.mean(0), jnp.float32)
        state = algorithm.init(jnp.zeros(config.numbers))._replace(params=start)
        _, metrics = run.scan_rounds(algorithm, sampler, everybody, state, jax.random.key(0), rounds=rounds)
        return np.asarray(metrics["consensus"]) / float(gossip.consensus_distance(start))

    def worst(of: int) -> np.ndarray:
        """The models that so many rounds bring together least."""
        direction = np.linalg.svd(after(graph, of))[2][0]
        return np.outer(direction, np.ones(config.numbers))

    found: dict[str, Any] = {
        "gap": topology.spectral_gap(graph),
        "shrinks": shrinks,
        "period": period,
        "diameter": topology.diameter(graph),
        "until": until if math.isfinite(until) else None,
    }
    ends = distances(worst(period))[period - 1]
    found |= {"left": float(ends), "shrinks_measured": float(ends ** (1 / period))}
    slowest = distances(worst(until - 1)) if until <= rounds else np.ones(1)
    found["until_measured"] = reached(slowest)
    at_random = [
        distances(jax.random.normal(jax.random.key(seed), (n, config.numbers))) for seed in range(config.seeds)
    ]
    found["until_at_random"] = [reached(one) for one in at_random]
    half = rounds // period // 2 * period
    late = [(one[-1] / one[half - 1]) ** (1 / (rounds - half)) for one in at_random if half and shrinks]
    return found | {"late": late, "decay": at_random[0][:DRAWN_ROUNDS]}


def after(graph: topology.Topology, rounds: int) -> np.ndarray:
    """[n, n], what so many rounds leave of the differences between peers."""
    n = topology.peers(graph)
    w = topology.matrices(graph)
    apart = np.eye(n) - 1 / n
    whole, rest = divmod(rounds, len(w))
    once, some = np.eye(n), np.eye(n)
    for t, matrix in enumerate(w):
        once = matrix @ once
        some = once if t < rest else some
    return apart @ some @ np.linalg.matrix_power(once, whole) @ apart


def reached(distances: np.ndarray) -> int | None:
    """Rounds until the distance was at most EPSILON of the first."""
    there = np.flatnonzero(distances <= EPSILON)
    return int(there[0]) + 1 if there.size else None


def ranks(values: np.ndarray) -> np.ndarray:
    """[N], how many are lower, and half of those that are alike to nine digits."""
    values = np.round(values, 9)
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


def worded(rounds: list[int | None]) -> str:
    """Rounds that several starts took."""
    return "-" if None in rounds else report.mean_and_std(rounds, digits=0)


def pictures(config: Config, whole: report.Run, graphs: dict, results: dict, points: dict) -> None:
    """The graphs, how peers come together on them, and what they then learn."""
    drawn = {}
    for name in config.topologies:
        if not there_is(name, config.drawn):
            continue
        graph = MAKE[name](config.drawn)
        rounds: list[list[tuple[int, int]]] = [[] for _ in range(min(topology.period(graph), 5))]
        for t, i, j, _ in topology.edges(graph):
            if t < len(rounds):
                rounds[t].append((i, j))
        few = "" if len(rounds) == topology.period(graph) else f", {len(rounds)} of {topology.period(graph)} rounds"
        note = f"gap {topology.spectral_gap(graph):.3f}{few}"
        drawn[graph.name] = plot.Graph(rounds, places(name, config.drawn), note)
    plot.plot_graphs(whole.folder / "graphs.png", drawn, title=f"Topologies of {config.drawn} peers")
    t = 1 + np.arange(DRAWN_ROUNDS)
    decay = {graphs[name].name: results[name] for name in results if name in DECAYS}
    seen = {title: np.clip(found["decay"][:DRAWN_ROUNDS], 1e-7, None) for title, found in decay.items()}
    foretold = {title: found["shrinks"] ** t for title, found in decay.items()}
    if decay:
        plot.plot_curves(
            whole.folder / "decay.png",
            {title: (t[: len(y)], y) for title, y in seen.items()},
            expected={title: (t, np.where(y > 1e-7, y, np.nan)) for title, y in foretold.items() if y[0]},
            xlabel="round",
            ylabel="consensus distance, of the first",
            title=f"{config.peers} peers of random models average; dashed: (1 - gap)^t",
            log_y=True,
        )
    for i, what, words in ((0, "gap", "spectral gap"), (1, "pulled_apart", "pulled apart by gradients that differ")):
        groups: dict[str, dict[str, tuple[float, float]]] = {"stays the same": {}, "changes from round to round": {}}
        for title, name in zip(points, results, strict=True):
            kind = "stays the same" if results[name]["period"] == 1 else "changes from round to round"
            groups[kind][title] = points[title][i], points[title][2]
        plot.plot_points(
            whole.folder / f"accuracy_by_{what}.png",
            groups,
            xlabel=words,
            ylabel=f"peers' mean test accuracy after {config.rounds} rounds, %",
            title=f"D-PSGD of {config.peers} peers, one or two digits each",
            log_x=True,
        )


def places(name: str, n: int) -> np.ndarray:
    """[n, 2], where the peers of a graph are drawn."""
    if name in ("grid", "torus"):
        row, column = np.divmod(np.arange(n), sides(n)[1])
        return np.stack([column, -row], axis=1)
    if name == "binary_tree":
        depth = np.floor(np.log2(np.arange(n) + 1))
        along = (np.arange(n) + 1 - 2**depth + 0.5) / 2**depth
        return np.stack([along, -0.22 * depth], axis=1)
    if name == "star":
        return np.concatenate([np.zeros((1, 2)), plot.circle(n - 1)])
    if name == "geometric":
        return topology.geometric_positions(n, radius(n), seed=0)
    if name == "hypercube":  # its Petrie projection
        bits = np.arange(n)[:, None] >> np.arange(n.bit_length() - 1) & 1
        angle = np.pi * (np.arange(bits.shape[1]) + 0.5) / bits.shape[1]
        return bits @ np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return plot.circle(n)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
