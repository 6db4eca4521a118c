"""What a step of data-parallel training sends, by every way of averaging gradients: theory, and counted in the program.

Claim: all exact ways train the same model, up to the order of additions; they differ in bytes, rounds and time alone:
everyone to everyone sends k n (n - 1) in all, a parameter server besides n workers takes k n in and out, s of them
k n / s each, a ring 2 k (n - 1) / n at each worker, and what programs send is equal to that to the byte.

| 8 workers                      | sent / k | in all / k | rounds | on a switch | in two hosts | accuracy, % |
|--------------------------------|----------|------------|--------|-------------|--------------|-------------|
| one worker                     |        0 |          0 |      0 |        0 ms |         0 ms |        82.3 |
| everyone to everyone           |        7 |         56 |      1 |     4.81 ms |     11.00 ms |        82.3 |
| parameter server, works too    |        7 |         14 |      2 |     9.62 ms |      5.50 ms |        82.3 |
| two servers, work too          |        4 |         14 |      2 |     5.16 ms |      5.90 ms |        82.3 |
| as many servers as workers     |     1.75 |         14 |      2 |     1.82 ms |      4.15 ms |        82.3 |
| ring                           |     1.75 |         14 |     14 |     1.82 ms |      1.82 ms |        82.3 |
| ring, both ways at once        |     1.75 |         14 |     14 |     2.52 ms |      2.52 ms |        82.3 |
| halving and doubling           |     1.75 |         14 |      6 |     1.42 ms |      2.96 ms |        82.3 |
| doubling                       |        3 |         24 |      3 |     2.06 ms |      2.76 ms |        82.2 |
| tree                           |        3 |         14 |      6 |     4.12 ms |      1.39 ms |        82.2 |
| hierarchical, groups of 4      |     1.75 |         14 |      8 |     1.52 ms |      1.05 ms |        82.3 |
| torus, 2 x 4                   |     1.75 |         14 |      8 |     1.92 ms |      2.41 ms |        82.2 |
| a server besides               |        8 |         16 |      2 |    11.00 ms |              |             |
| four servers besides           |        2 |         16 |      2 |     3.35 ms |     10.05 ms |             |
| ring, 8 bits                   |     .438 |       3.50 |     14 |     1.68 ms |      1.68 ms |        82.1 |
| ring, 4 bits                   |     .219 |       1.75 |     14 |     1.54 ms |      1.54 ms |        82.0 |
| top 1 % at 4 bits, feedback    |     .048 |       0.38 |      1 |             |              |        83.5 |

k is the model's gradient. Sent is by the busiest device, which is a server in the rows of servers. Seconds are the
alpha-beta model's: on a switch with 10 Gbit/s and 50 us to each device, and in two hosts with 300 GB/s and 2 us inside,
10 Gbit/s and 50 us from host to host. Accuracies are of 8 simulated workers that train the 2NN of 199,210 parameters on
10,000 images of Fashion-MNIST for 400 steps of 128, mean of three seeds.

Source: the volumes are those of Patarasuk and Yuan 2009 (J. Parallel Distrib. Comput. 69, pp. 117-124), Thakur et al.
2005 (Int. J. High Perform. Comput. Appl. 19(1), pp. 49-66) and Li et al. 2014 (OSDI).

Command: python experiments/data_parallel_costs.py --seeds 3
Expected: the table above.
Time: six minutes on two CPU cores, beside other work.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfed import collectives, compress, core, data, experiment, models, parallel, plot, report, run
from jfed.collectives import compressed, cost, count, network

EXACT: dict[str, Callable] = {
    "everyone_to_everyone": collectives.one_shot_all_reduce,
    "parameter_server": collectives.parameter_server_all_reduce,
    "two_servers": collectives.sharded_servers_all_reduce,
    "as_many_servers_as_workers": collectives.two_shot_all_reduce,
    "ring": collectives.ring_all_reduce,
    "bidirectional_ring": collectives.bidirectional_ring_all_reduce,
    "halving_doubling": collectives.halving_doubling_all_reduce,
    "doubling": collectives.doubling_all_reduce,
    "tree": collectives.tree_all_reduce,
    "hierarchical": collectives.hierarchical_all_reduce,
    "torus": collectives.torus_all_reduce,
}
APART = {
    "server_apart": functools.partial(collectives.dedicated_servers_all_reduce, servers=1),
    "four_servers_apart": functools.partial(collectives.dedicated_servers_all_reduce, servers=4),
}
TOP = optax.chain(compress.top_k(0.01), compress.quantize(4, rounding="nearest"))
COMPRESSED = {
    "ring_8_bits": {"all_reduce": compressed.ring(compress.quantize(8))},
    "ring_4_bits": {"all_reduce": compressed.ring(compress.quantize(4))},
    "top_1_percent_feedback": {"uplink": compress.error_feedback(TOP)},
}
SWITCH = {"alpha": 50e-6, "beta": 8 / 10e9}
INSIDE, ACROSS = (2e-6, 1 / 300e9), (50e-6, 8 / 10e9)


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    workers: int = 8
    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 0.1
    ways: tuple[str, ...] = ("one_worker", *EXACT, *APART, *COMPRESSED)


SMOKE = {"steps": 8, "batch_size": 32, "ways": ("ring", "four_servers_apart", "top_1_percent_feedback")}


def main(config: Config) -> None:
    """Counts and trains every way, then shows a table and a picture."""
    known = ("one_worker", *EXACT, *APART, *COMPRESSED)
    if odd := [way for way in config.ways if way not in known]:
        raise ValueError(f"data_parallel_costs(ways={odd}): choose from {', '.join(known)}.")
    if not config.ways:
        raise ValueError("data_parallel_costs(ways=()): name one at least, such as ring.")
    if config.workers % 2:
        raise ValueError(f"data_parallel_costs(workers={config.workers}): two hosts share them; take an even number.")
    cells = {way: functools.partial(found, config, way) for way in config.ways}
    whole, results = experiment.over_cells("data_parallel_costs", config, cells)
    k = results[config.ways[0]]["k"]
    rows = [
        {
            "": way.replace("_", " "),
            "sent by the busiest / k": f"{result['sent'] / k:.4g}",
            "in all / k": f"{result['total'] / k:.4g}",
            "rounds": result["rounds"],
            "theory": result["theory"],
            "on a switch": _milliseconds(result["on_a_switch"]),
            "in two hosts": _milliseconds(result["in_two_hosts"]),
            "accuracy": "" if result["accuracy"] is None else f"{100 * result['accuracy']:.1f} %",
        }
        for way, result in results.items()
    ]
    numbers = k // 4
    plot.plot_curves(
        whole.folder / "time.png",
        {
            way.replace("_", " "): ([n.bit_length() - 1 for n in (2, 4, 8, 16, 32, 64, 128, 256)], times)
            for way, f in EXACT.items()
            if (times := [1e3 * _on_a_switch(f, 2**i, numbers) for i in range(1, 9)])[-1] < 3e3
        },
        xlabel="log2 of the workers",
        ylabel="milliseconds an all-reduce",
        title=f"An all-reduce of {report.human_bytes(k)} on a switch with 10 Gbit/s",
    )
    print(report.table(f"A step of {config.workers} workers, k = {report.human_bytes(k)}", rows), "\n")
    print(f"picture and metrics: {whole.folder}\n")
    summary = {
        f"{way}_{name}": r[name] for way, r in results.items() for name in ("sent", "total", "rounds", "accuracy")
    }
    report.finish(whole, summary | {"k": k, "seeds": config.seeds})


def found(config: Config, way: str) -> dict[str, Any]:
    """What one way sends, in theory and in its program, how long that takes, and the model it trains."""
    model = models.two_nn()
    gradient = jax.eval_shape(model.init, jax.random.key(0))
    k = sum(4 * x.size for x in jax.tree.leaves(gradient))
    result = {"k": k, "sent": 0, "total": 0, "rounds": 0, "theory": "", "on_a_switch": 0.0, "in_two_hosts": 0.0}
    if way != "one_worker":
        result |= counted(config, way, gradient)
    trained = None
    if way not in APART:
        workers = 1 if way == "one_worker" else config.workers
        options = COMPRESSED.get(way) or {"all_reduce": EXACT.get(way)}
        trained = accuracy(config, model, workers, options)
    return result | {"accuracy": trained}


def counted(config: Config, way: str, gradient: Any) -> dict[str, Any]:
    """Bytes, rounds and model seconds of one average."""
    n = config.workers + (0 if way not in APART else APART[way].keywords["servers"])
    exact = EXACT.get(way) or APART.get(way)
    if exact is None:
        options = COMPRESSED[way]

        def average(x, axis_name):
            if "uplink" in options:
                link = optax.chain(options["uplink"], compressed.averaged(axis_name))
                return link.update(x, link.init(x), key=jax.random.key(0), round=0)[0]
            return options["all_reduce"](x, axis_name, key=jax.random.key(0), round=0)

        sends = count.all_reduce(average, n, gradient)
    else:
        sends = count.all_reduce(exact, n, gradient)
    times = {"on_a_switch": None, "in_two_hosts": None}
    if not sends.opaque:
        times["on_a_switch"] = network.seconds(sends, network.switch(n, **SWITCH))
        if n % 2 == 0:
            hosts = network.hosts(2, n // 2, inside=INSIDE, across=ACROSS)
            times["in_two_hosts"] = network.seconds(sends, hosts)
    said = ""
    if exact is not None:
        theory = cost.of(exact, n, sum(x.size for x in jax.tree.leaves(gradient)))
        same = (sends.sent.max(), sends.received.max(), count.total(sends), sends.rounds) == theory[:4]
        said = "equal" if same else f"differs: {theory}"
    return {"sent": int(sends.sent.max()), "total": count.total(sends), "rounds": sends.rounds, "theory": said} | times


def accuracy(config: Config, model: models.Model, workers: int, options: dict[str, Any]) -> float:
    """Of the models that so many workers train, mean over seeds."""
    train, test = data.fashion_small()
    population = core.Population(train, jnp.array([0]), jnp.array([train["y"].shape[0]]))
    method = parallel.data_parallel(
        models.cross_entropy(model), optax.sgd(config.learning_rate), workers=workers, **options
    )

    def one_seed(key):
        order, start, drawn = jax.random.split(key, 3)
        sampler, state = parallel.batches(config.batch_size, key=order), method.init(model.init(start))
        state, _ = run.scan_rounds(method, sampler, population, state, drawn, rounds=config.steps)
        return run.evaluate(models.metrics(model), method.params(state), test)["accuracy"]

    # Seeds one after another, in one program.
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return float(jnp.mean(jax.jit(lambda keys: jax.lax.map(one_seed, keys))(keys)))


def _on_a_switch(f: Callable, n: int, numbers: int) -> float:
    return cost.on_a_switch(cost.of(f, n, numbers), **SWITCH)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f} ms"


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
