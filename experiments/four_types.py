"""Four ways to learn one task from data on many devices: offloading, distributed, federated, collaborative.

Claim: without a server no node carries more than another, and the busiest carries least: 22 MB to reach 95 % by one
neighbour at a time, against 57 MB at a server that averages models and 9.6 GB at one that averages gradients. But each
device then carries 25 to 50 times what it does in federated learning, and has a model of its own, of which the worst
lags behind. Where data are as small as here, a server that is sent them all has done with 27 MB, and soonest on phones.

| 64 devices, to 95 %       | rounds     | worst peer, % | through a device | the busiest node | in a round |
|---------------------------|------------|---------------|------------------|------------------|------------|
| offloading                | 1          |               | 417 kB           | 26.7 MB          | 16.5 MB    |
| distributed, server       | 471 ± 13   |               | 149.7 MB         | 9.6 GB           | 20.4 MB    |
| distributed, ring         | 471 ± 13   |               | 295.0 MB         | 295.0 MB         | 627 kB     |
| federated, 8 a round      | 18 ± 6     |               | 894 kB           | 57.2 MB          | 2.5 MB     |
| collaborative, ring       | not in 100 | 90.0          | 63.6 MB          | 63.6 MB          | 636 kB     |
| collaborative, 6 others   | 24 ± 3     | 92.1          | 44.9 MB          | 44.9 MB          | 1.9 MB     |
| collaborative, one peer   | 70 ± 7     | 87.1          | 22.3 MB          | 22.3 MB          | 318 kB     |

| simulated               | phones: seconds | joules a device | server | cluster: seconds | joules a device | server |
|-------------------------|-----------------|-----------------|--------|------------------|-----------------|--------|
| offloading              |            1.04 |             1.6 |    4.4 |            0.029 |            .003 |    2.5 |
| distributed, server     |             193 |             491 |    766 |             7.71 |             1.4 |     77 |
| distributed, ring       |            3161 |             969 |        |             3.08 |             2.6 |        |
| federated               |             8.2 |             2.7 |    4.6 |            0.053 |             .11 |    .46 |
| collaborative, ring     |           (51)  |           (213) |        |          (0.067) |           (5.0) |        |
| collaborative, 6 others |              32 |             148 |        |            0.028 |             1.4 |        |
| collaborative, one peer |              21 |              76 |        |            0.038 |             3.3 |        |

Mean of three seeds. Bytes are those sent and received, measured in the rounds that were run: uploads coded as PNG, the
methods' own traffic, edge by edge, and for gradients the messages of the all-reduce's program. With k = 159 kB, the
model, n devices and C of them a round, a round's are 2 k n at a server of gradients, 4 k (n - 1) / n on a ring of them,
2 k C at a server of models, 4 k on a ring of peers and 2 k with one peer. Offloading sends 258 kB of images a device;
with more than 735 kB federated learning would send less. On phones a ring of gradients waits for the latency of 126
messages in turn at each step. Peers' models reach 95 % on average, and the worst of them in 39 rounds with six
neighbours and not in 100 with one; on the ring the mean is 94.3 % after 100 rounds, whose costs are given.

What leaves a device, and who sees it: all its data, the server (offloading); its gradient at every step, the server;
sums of gradients, a neighbour (ring); its model once it has trained, the server in rounds it takes part in (federated),
or its neighbours in all rounds (collaborative).

Source: distributed: Patarasuk and Yuan 2009 (J. Parallel Distrib. Comput. 69, pp. 117-124); federated: McMahan et al.
2017 (arXiv:1602.05629); collaborative: Lian et al. 2017 (arXiv:1705.09056), here adapting before combining, and Ying et
al. 2021 (arXiv:2110.13363) for exponential graphs; the phones' rates: Huang et al. 2012 (MobiSys). MNIST, Dirichlet(.5)
over 64 devices; 784-50-10; batches of 10, an epoch a round. Rates by hand: .3 for federated and collaborative learning
(better than .1), .5 for distributed (about as 1.0), .1 on the server.

Seconds: a round lasts as long as its slowest device computes, then as its busiest link is busy, and a latency for each
message that waits for another; FLOPs are XLA's count for a gradient. Joules: of computing, and of each byte; waiting
costs nothing. Settings but the phones' rates are assumed, see `SETTINGS`.

Command: python experiments/four_types.py
Expected: the tables above.
Time: four minutes on two CPU cores.
Needs the MNIST files; the error says where they are looked for.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import (
    algorithms,
    clients,
    data,
    experiment,
    gossip,
    ledger,
    local,
    models,
    parallel,
    plot,
    report,
    run,
    sampling,
)
from jfed.collectives import count, dedicated_servers_all_reduce, network, ring_all_reduce
from jfed.core import Population
from jfed.gossip import topology
from jfed.models.modules import MLP


class Setting(NamedTuple):
    """Devices, a server and their links; computing is sustained float32, in small batches."""

    device: float  # FLOP a second
    watts: float  # of a device that computes
    server: float  # FLOP a second
    server_watts: float
    up: float  # bytes a second, from a device
    down: float  # bytes a second, to a device
    link: float  # bytes a second, to and from the server
    latency: float  # seconds from end to end
    up_joules: float  # of a device, a byte that it sends
    down_joules: float  # of a device, a byte that it is sent
    link_joules: float  # of the server, a byte either way


# Rates of the phones' links are the medians of LTE users, 6 and 13 Mbit/s, in the abstract of Huang et al. 2012. All
# else is assumed: radios of 4 W that send and 2 W that receive, a server on 1 Gbit/s with a card of 10 W. In the
# cluster the server is like the devices, on 10 Gbit/s with 10 W a card.
SETTINGS = {
    "phones": Setting(
        device=10e9,
        watts=3.0,
        server=1e12,
        server_watts=300.0,
        up=0.75e6,
        down=1.625e6,
        link=125e6,
        latency=0.05,
        up_joules=4 / 0.75e6,
        down_joules=2 / 1.625e6,
        link_joules=10 / 125e6,
    ),
    "cluster": Setting(
        device=1e12,
        watts=300.0,
        server=1e12,
        server_watts=300.0,
        up=1.25e9,
        down=1.25e9,
        link=1.25e9,
        latency=50e-6,
        up_joules=10 / 1.25e9,
        down_joules=10 / 1.25e9,
        link_joules=10 / 1.25e9,
    ),
}
GRAPHS = {
    "collaborative_ring": topology.ring,
    "collaborative_exponential": topology.exponential,
    "collaborative_one_peer": topology.one_peer_exponential,
}
WAYS = ("offloading", "distributed", "federated", *GRAPHS)
SEEN = {
    "offloading": "server: all data",
    "distributed_server": "server: every device's gradient, each step",
    "distributed_ring": "a neighbour: sums of gradients, each step",
    "federated": "server: models of the round's devices",
    "collaborative_ring": "2 neighbours: its model, each round",
    "collaborative_exponential": "{slots} neighbours: its model, each round",
    "collaborative_one_peer": "1 of {period} in turn: its model, each round",
}


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3
    devices: int = 64
    alpha: float = 0.5  # Dirichlet's: how evenly classes are dealt to devices
    hidden: int = 50
    batch_size: int = 10  # of every device, and of the server that has all data
    target: float = 0.95
    central_rate: float = 0.1
    central_steps: int = 600  # of a round
    central_rounds: int = 30  # at most, as below
    distributed_rate: float = 0.5
    steps: int = 1000
    steps_every: int = 25  # between evaluations
    cohort: int = 8  # devices of a federated round
    rate: float = 0.3  # of federated and collaborative devices
    epochs: int = 1  # of their rounds
    federated_rounds: int = 200
    rounds: int = 100
    every: int = 5  # rounds between evaluations
    ways: tuple[str, ...] = WAYS
    download: bool = False  # fetch MNIST if it is not found


SMOKE = {
    "seeds": 1,
    "devices": 8,
    "hidden": 10,
    "target": 0.5,
    "central_rounds": 2,
    "central_steps": 50,
    "steps": 20,
    "steps_every": 10,
    "cohort": 2,
    "federated_rounds": 4,
    "rounds": 4,
    "every": 2,
    "ways": ("offloading", "distributed", "federated", "collaborative_one_peer"),
}


class Round(NamedTuple):
    """What was sent and trained on, by the devices and the server, the last of n + 1."""

    sends: count.Counted
    examples: np.ndarray  # [n + 1]


class Point(NamedTuple):
    """Test accuracy of devices' models after some rounds, and the rounds since the point before, each so many times."""

    rounds: int
    mean: float
    worst: float
    since: list[tuple[Round, int]]


class Task(NamedTuple):
    """The data and the model."""

    population: Population
    test: Any
    model: models.Model
    loss: Callable
    metrics: Callable
    nbytes: int  # of the model
    flops: float  # of an example's gradient, counted in the program


def main(config: Config) -> None:
    """Learns in each way up to the target, then shows what that took."""
    if odd := [way for way in config.ways if way not in WAYS]:
        raise ValueError(f"four_types(ways={odd}): choose from {', '.join(WAYS)}.")
    if not config.ways:
        raise ValueError("four_types(ways=()): name one at least, such as federated.")
    task = the_task(config)
    ways = {"offloading": offloading, "distributed": distributed, "federated": federated}
    ways |= {name: collaborative(name, graph(config.devices)) for name, graph in GRAPHS.items()}
    cells = {name: functools.partial(each_seed, config, task, ways[name]) for name in config.ways}
    whole, results = experiment.over_cells("four_types", config, cells)
    found = {name: seeds for result in results.values() for name, seeds in result.items()}
    at_target = {name: at(seeds, config.target) for name, seeds in found.items()}

    summary: dict[str, Any] = {"seeds": config.seeds, "target": config.target, "model_bytes": task.nbytes}
    summary["flops_an_example"] = task.flops
    for name, one in at_target.items():
        summary |= {f"{name}_{what}": value for what, value in one.items()}
    until = f"until devices' models have {100 * config.target:g} %"
    rows = [learned(name, one, config.devices) for name, one in at_target.items()]
    print(report.table(f"{config.devices} devices, {until} on average", rows), "\n")
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for setting in SETTINGS:
        rows = [simulated(name, one, setting) for name, one in at_target.items()]
        print(report.table(f"{setting}, simulated, {until}", rows), "\n")
        points[setting] = {
            short(name, one): (one["busiest_bytes"] / 1e6, float(np.log10(one[f"{setting}_seconds"])))
            for name, one in at_target.items()
        }
    percent = f"{100 * config.target:g} %"
    plot.plot_points(
        whole.folder / "seconds.png",
        points,
        xlabel="megabytes through the busiest node",
        ylabel="log10 of the simulated seconds",
        title=f"What {percent} takes (* not reached)",
        log_x=True,
    )
    curves = {
        f"{short(name)}, {kind}": (seeds[0]["rounds"], [100 * value for value in seeds[0][kind]])
        for name, seeds in found.items()
        if name in GRAPHS
        for kind in ("mean", "worst")
    }
    if curves:
        plot.plot_curves(
            whole.folder / "peers.png",
            curves,
            xlabel="round",
            ylabel="test accuracy, %",
            title="Models of peers without a server",
            reference={f"target {percent}": 100 * config.target},
        )
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def learned(name: str, one: dict[str, Any], devices: int) -> dict[str, str]:
    """A row of what is measured, whatever devices and links are like."""
    slots = topology.exponential(devices).source.shape[1]
    period = topology.period(topology.one_peer_exponential(devices))
    rounds = f"{one['rounds']:.0f}" + (f" ± {one['rounds_std']:.0f}" if "rounds_std" in one else "")
    rounds = rounds if one["reached"] else f"not in {one['rounds']:.0f}"
    peers, worst = name in GRAPHS, one["rounds_until_the_worst"]
    return {
        "": worded(name),
        "rounds": "1" if name == "offloading" else rounds,
        "accuracy, %": f"{100 * one['mean']:.1f}",
        "worst peer, %": f"{100 * one['worst']:.1f}" if peers else "",
        "until it has it": ("-" if worst is None else f"{worst:.0f}") if peers else "",
        "through a device": report.human_bytes(one["device_bytes"]),
        "the busiest node": report.human_bytes(one["busiest_bytes"]),
        "in a round": report.human_bytes(one["busiest_bytes_of_a_round"]),
        "who sees what": SEEN[name].format(slots=slots, period=period),
    }


def simulated(name: str, one: dict[str, Any], setting: str) -> dict[str, str]:
    """A row of seconds and joules."""
    return {
        "": worded(name, one),
        "seconds": f"{one[f'{setting}_seconds']:.4g}",
        "of them computing": f"{one[f'{setting}_computing']:.3g}",
        "joules of a device": f"{one[f'{setting}_joules']:.3g}",
        "of the server": f"{one[f'{setting}_server_joules']:.3g}",
    }


def worded(name: str, one: dict[str, Any] | None = None) -> str:
    """A way's name in tables and pictures."""
    words = name.replace("_", ", ", 1).replace("_", " ")
    return words if one is None or one["reached"] else f"{words} (not reached)"


def short(name: str, one: dict[str, Any] | None = None) -> str:
    """Its name in pictures."""
    words = name.removeprefix("collaborative_").replace("distributed_", "gradients, ").replace("_", " ")
    return words if one is None or one["reached"] else f"{words}*"


def the_task(config: Config) -> Task:
    """MNIST dealt unevenly, and a network of one hidden layer."""
    train, test = data.fashion_small() if config.smoke else data.mnist(download=config.download)
    if config.smoke:
        train, test = jax.tree.map(lambda x: x[:1000], (train, test))
    owner = data.partition.dirichlet(jax.random.key(0), train["y"], num_clients=config.devices, alpha=config.alpha)
    model = models.from_nnx(lambda rngs: MLP(784, config.hidden, 10, rngs=rngs))
    loss, params = models.cross_entropy(model), jax.eval_shape(model.init, jax.random.key(0))
    batch = {name: leaf[: config.batch_size] for name, leaf in train.items()}
    gradient = jax.jit(jax.grad(lambda params, batch: jnp.mean(loss(params, batch))))
    flops = gradient.lower(params, batch).cost_analysis()["flops"] / config.batch_size
    population = data.by_owner(train, owner, num_classes=10)
    nbytes = sum(4 * x.size for x in jax.tree.leaves(params))
    return Task(population, test, model, loss, models.metrics(model), nbytes, flops)


def each_seed(config: Config, task: Task, way: Callable) -> dict[str, list[dict[str, Any]]]:
    """A way's curves and costs, for each title that it goes by and each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(config.seeds):
        for title, (points, last) in way(config, task, jax.random.key(seed)).items():
            found.setdefault(title, []).append(costs(task, points, last))
    return found


def offloading(config: Config, task: Task, key: jax.Array) -> dict[str, tuple]:
    """All data to the server, which trains, and sends everybody the model."""
    n = config.devices
    sizes = data.upload_bytes(data.image_codec("png"), task.population)
    upload = Round(messages(n + 1, (np.arange(n), n, sizes)), np.zeros(n + 1))
    work = local.sgd(task.loss, optax.sgd(config.central_rate), batch_size=config.batch_size)
    method = algorithms.centralised(work, client_map=clients.lanes(1))
    sampler = sampling.full(steps=lambda size: jnp.full(size.shape, config.central_steps))
    init_key, train_key = jax.random.split(key)
    params = task.model.init(init_key)
    there = np.zeros(n + 1)
    there[n] = config.central_steps * config.batch_size
    trained = Round(messages(n + 1), there)
    points = [begun(task, params)._replace(since=[(upload, 1)])]
    state, pooled = method.init(params), algorithms.pooled(task.population)
    for moment in run.iterate(method, sampler, pooled, state, train_key, rounds=config.central_rounds):
        points.append(judged(task, moment.round, method.params(moment.state), [(trained, 1)]))
        if points[-1].mean >= config.target:
            break
    return {"offloading": (points, to_all(config, task))}


def distributed(config: Config, task: Task, key: jax.Array) -> dict[str, tuple]:
    """Every device's gradient in every step: averaged by a server besides, and around a ring."""
    n, b = config.devices, config.batch_size
    method = parallel.data_parallel(task.loss, optax.sgd(config.distributed_rate), workers=n)

    def shares(population: Population, key: jax.Array, t: jax.Array) -> Any:
        place = jax.random.uniform(key, (n, b)) * population.size[:, None]
        rows = population.start[:, None] + jnp.minimum(place.astype(jnp.int32), population.size[:, None] - 1)
        return jax.tree.map(lambda x: x[rows.reshape(-1)], population.examples)

    init_key, train_key = jax.random.split(key)
    params = task.model.init(init_key)
    examples = np.append(np.full(n, float(b)), 0.0)
    by_server = count.all_reduce(dedicated_servers_all_reduce, n + 1, params)
    by_ring = count.all_reduce(ring_all_reduce, n, params)
    by_ring = by_ring._replace(sent=np.append(by_ring.sent, 0), received=np.append(by_ring.received, 0))
    points = [begun(task, params)]
    state, every = method.init(params), config.steps_every
    for moment in run.iterate(method, shares, task.population, state, train_key, rounds=config.steps, every=every):
        points.append(judged(task, moment.round, method.params(moment.state), []))
        if points[-1].mean >= config.target:
            break

    def by(sends: count.Counted) -> list[Point]:
        step, pairs = Round(sends, examples), itertools.pairwise(points)
        return [points[0], *(now._replace(since=[(step, now.rounds - before.rounds)]) for before, now in pairs)]

    return {"distributed_server": (by(by_server), None), "distributed_ring": (by(by_ring), None)}


def federated(config: Config, task: Task, key: jax.Array) -> dict[str, tuple]:
    """A few devices a round train the server's model; in the end everybody is sent it."""
    n, sizes = config.devices, np.asarray(task.population.size)
    client_map, place = experiment.over_devices(clients.lanes(1))
    work = local.sgd(task.loss, optax.sgd(config.rate), batch_size=config.batch_size, epochs=config.epochs)
    method, sampler = algorithms.fedavg(work, client_map=client_map), sampling.uniform(config.cohort, steps=work.steps)
    init_key, train_key = jax.random.split(key)
    params = task.model.init(init_key)
    points = [begun(task, params)]
    start = place((method.init(params), train_key))
    for moment in run.iterate(
        method, sampler, place(task.population), *start, rounds=config.federated_rounds, every=config.every
    ):
        rounds = []
        for ids, up, down in zip(*map(np.asarray, moment.metrics["traffic"][:3]), strict=True):
            examples = np.zeros(n + 1)
            examples[ids] = config.epochs * sizes[ids]
            rounds.append((Round(messages(n + 1, (n, ids, down), (ids, n, up)), examples), 1))
        points.append(judged(task, moment.round, method.params(moment.state), rounds))
        if points[-1].mean >= config.target:
            break
    return {"federated": (points, to_all(config, task))}


def collaborative(name: str, graph: topology.Topology) -> Callable:
    """Peers train their own models, each round averaged with those of their neighbours."""

    def way(config: Config, task: Task, key: jax.Array) -> dict[str, tuple]:
        n, sizes = config.devices, np.asarray(task.population.size)
        client_map, place = experiment.over_devices(clients.lanes(1))
        work = local.sgd(task.loss, optax.sgd(config.rate), batch_size=config.batch_size, epochs=config.epochs)
        method = gossip.adapt_then_combine(work, graph, client_map=client_map, by_edge=True)
        sampler = sampling.full(steps=work.steps)
        init_key, train_key = jax.random.split(key)
        params = task.model.init(init_key)
        examples = np.append(config.epochs * sizes, 0.0)
        test = place(task.test)
        points = [begun(task, params)]
        start = place((method.init(params), train_key))
        for moment in run.iterate(
            method, sampler, place(task.population), *start, rounds=config.rounds, every=config.every
        ):
            traffic = jax.tree.map(np.asarray, moment.metrics["traffic"])
            rounds = []
            for i, t in enumerate(range(points[-1].rounds, moment.round)):
                one = jax.tree.map(lambda x, i=i: x[i], traffic)
                links = ledger.by_edge(graph, one, start=t)
                source, target = np.array(list(links)).T
                sends = messages(n + 1, (source, target, np.array(list(links.values()))))
                if not (np.array_equal(sends.sent[:n], one.up) and np.array_equal(sends.received[:n], one.down)):
                    raise RuntimeError(f"round {t}: what went over links and what peers sent differ")
                rounds.append((Round(sends, examples), 1))
            scores = run.evaluate_peers(task.metrics, method, moment.state, test, client_map=client_map)["accuracy"]
            points.append(Point(moment.round, float(scores.mean), float(scores.lowest), rounds))
            if points[-1].worst >= config.target:
                break
        return {name: (points, None)}

    return way


def begun(task: Task, params: Any) -> Point:
    """The model that everybody begins with, known to all by its seed."""
    return judged(task, 0, params, [])


def judged(task: Task, rounds: int, params: Any, since: list[tuple[Round, int]]) -> Point:
    """A point at which all have one model."""
    accuracy = float(run.evaluate(task.metrics, params, task.test)["accuracy"])
    return Point(rounds, accuracy, accuracy, since)


def to_all(config: Config, task: Task) -> Round:
    """The server sends everybody the model."""
    n = config.devices
    return Round(messages(n + 1, (n, np.arange(n), task.nbytes)), np.zeros(n + 1))


def messages(nodes: int, *rounds: tuple[Any, Any, Any]) -> count.Counted:
    """Messages as `count` has them, of rounds in turn, each (from, to, bytes)."""
    sent, received, steps = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64), []
    for one in rounds:
        source, target, nbytes = (x.astype(np.int64) for x in np.broadcast_arrays(*one))
        np.add.at(sent, source, nbytes)
        np.add.at(received, target, nbytes)
        steps.append(count.Step(np.stack([source, target], 1), nbytes, 1))
    return count.Counted(sent, received, len(steps), tuple(steps), 0, 0, None)


def costs(task: Task, points: list[Point], last: Round | None) -> dict[str, Any]:
    """What all rounds up to each point took, and what is sent once the model is found."""
    total, of_a_round, table = None, 0, []
    for point in points:
        for one, times in point.since:
            of_a_round = max(of_a_round, int((one.sends.sent + one.sends.received).max()))
            total = added(total, took(task, one), times)
        table.append(total if last is None else added(total, took(task, last), 1))
    n = task.population.size.shape[0]
    nothing = jax.tree.map(np.zeros_like, total)
    found: dict[str, list[float]] = {}
    for spent in (nothing if one is None else one for one in table):
        row = {"device_bytes": spent["through"][:n].mean(), "busiest_bytes": spent["through"].max()}
        for name in SETTINGS:
            row |= {f"{name}_{what}": spent[name][what] for what in ("seconds", "computing")}
            row |= {
                f"{name}_joules": spent[name]["joules"][:n].mean(),
                f"{name}_server_joules": spent[name]["joules"][n],
            }
        for name, value in row.items():
            found.setdefault(name, []).append(float(value))
    curves = {name: [getattr(point, name) for point in points] for name in ("rounds", "mean", "worst")}
    return curves | found | {"busiest_bytes_of_a_round": of_a_round}


def took(task: Task, one: Round) -> dict[str, Any]:
    """Bytes through each node, and seconds and joules in each setting, of one round."""
    n = task.population.size.shape[0]
    spent: dict[str, Any] = {"through": (one.sends.sent + one.sends.received).astype(float)}
    for name, setting in SETTINGS.items():
        computing = one.examples * task.flops / np.append(np.full(n, setting.device), setting.server)
        sending = network.seconds(one.sends, wires(setting, n)) + setting.latency * one.sends.rounds
        watts = np.append(np.full(n, setting.watts), setting.server_watts)
        up = np.append(np.full(n, setting.up_joules), setting.link_joules)
        down = np.append(np.full(n, setting.down_joules), setting.link_joules)
        spent[name] = {
            "seconds": computing.max() + sending,
            "computing": computing.max(),
            "joules": computing * watts + one.sends.sent * up + one.sends.received * down,
        }
    return spent


def wires(setting: Setting, n: int) -> network.Network:
    """A link up and one down for each device and the server, which meet in a network that is never busy.

    Messages that travel at once share no latency, so a round's is added apart.
    """
    ends = [*range(n), "server"]
    names = tuple((way, end) for way in ("up", "down") for end in ends)
    rates = np.array([setting.up] * n + [setting.link] + [setting.down] * n + [setting.link])
    return network.Network(n + 1, names, np.zeros(len(names)), 1 / rates, lambda a, b: (a, n + 1 + b))


def added(total: Any, more: Any, times: int) -> Any:
    """The sum, leaf by leaf."""
    more = jax.tree.map(lambda x: x * times, more)
    return more if total is None else jax.tree.map(np.add, total, more)


def at(seeds: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Means over seeds of what it took until the mean over devices reaches the target, or until the end if never.

    Between two points it is interpolated; `mean` is the best so far, as in `report.reached`.
    """
    seeds = [one | {"mean": np.maximum.accumulate(one["mean"]).tolist()} for one in seeds]
    places = [report.reached(one["rounds"], one["mean"], target) for one in seeds]
    ends = [one["rounds"][-1] if place is None else place for one, place in zip(seeds, places, strict=True)]
    worst = [report.reached(one["rounds"], one["worst"], target) for one in seeds]
    columns = [name for name, values in seeds[0].items() if isinstance(values, list)]
    return {
        name: float(np.mean([np.interp(end, one["rounds"], one[name]) for one, end in zip(seeds, ends, strict=True)]))
        for name in columns
    } | {
        **report.spread("rounds", ends),
        "reached": None not in places,
        "rounds_until_the_worst": None if None in worst else float(np.mean(worst)),
        "busiest_bytes_of_a_round": float(np.mean([one["busiest_bytes_of_a_round"] for one in seeds])),
    }


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
