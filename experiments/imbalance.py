"""One device with 10,000 examples beside 10,000 devices with one each, as one compiled program.

Claim: such a population trains as any other. Whether clients are drawn uniformly and weighted by their
examples, or by size and weighted alike, FedAvg ends within half a point of the same network trained
with all 20,000 examples in one place, and above the large device on its own. And a round takes time
by the local steps there are, not by those of the longest client times the number of clients.

| trained                                    | local steps | test accuracy |
|--------------------------------------------|-------------|---------------|
| 100 clients a round, uniform, weights n_k  |     105,994 |       96.84 % |
| 10 clients a round, by size, equal weights |     160,140 |       96.63 % |
| the large device alone                     |      30,000 |       95.90 % |
| all examples in one place                  |      60,000 |       97.07 % |

| cohort of a round               | local steps | longest x clients | seconds |
|---------------------------------|-------------|-------------------|---------|
| 100 small devices               |         100 |               100 |    0.12 |
| the large one                   |       1,000 |             1,000 |    0.68 |
| the large one and 99 small      |       1,099 |           100,000 |    0.63 |
| the large one, drawn ten times  |      10,000 |            10,000 |    5.98 |
| the large one and nine small    |       1,009 |            10,000 |    0.45 |
| the same, clients side by side  |       1,009 |            10,000 |    8.67 |

Uniform rounds meet the large device once in a hundred, and are in between a step along the mean
gradient of a hundred examples; by size it is half of all draws, and trains as often as it is drawn.
The two without a federation have a learning rate of .03, the others of .1; none was tuned.

Source: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1, for uniform draws; Li et al. 2020
(arXiv:1907.02189), scheme I, for draws by size. Data: MNIST.

Command: python experiments/imbalance.py
Expected: the tables above, up to half a point and the speed of the machine (one seed; the quickest of
five rounds, side by side of one).
Time: seven minutes on two CPU cores that were busy with other work, as they were for the tables.
Needs the MNIST files; the error says where they are looked for.
"""

import dataclasses
import functools
import time

import jax
import numpy as np
import optax

from jfed import algorithms, clients, core, data, experiment, local, models, plot, report, run, sampling


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    large: int = 10_000  # examples of the one large device
    small: int = 10_000  # devices with one example each
    cohort: int = 100  # clients a round, drawn uniformly
    rounds: int = 1000  # of those
    by_size_cohort: int = 10  # clients a round, drawn by size
    passes: int = 30  # rounds by size, and passes over the data of the other two
    batch_size: int = 10
    learning_rate: float = 0.1
    centralised_learning_rate: float = 0.03  # with all data in one place, 0.1 leaves the end of training noisy
    lanes: int = 1  # clients training at once on each device; on a CPU each core is one
    repeats: int = 5  # of each round that is timed; the quickest counts
    download: bool = False  # fetch MNIST if it is not found


SMOKE = {"large": 300, "small": 300, "cohort": 20, "rounds": 20, "passes": 2, "repeats": 1}


def main(config: Config) -> None:
    """Trains in four ways, times rounds, and shows both."""
    train, test = data.fashion_small() if config.smoke else data.mnist(download=config.download)
    used = config.large + config.small
    if used > len(train["y"]):
        raise ValueError(
            f"imbalance(large={config.large}, small={config.small}): there are {len(train['y'])} examples; lower one."
        )
    drawn = np.asarray(jax.random.permutation(jax.random.key(0), len(train["y"])))[:used]
    rows = {name: leaf[drawn] for name, leaf in train.items()}
    population = data.population(rows, [config.large] + [1] * config.small, num_classes=10)
    # In one place: the first has all rows. Of the same shape, so that one program trains either.
    everything = data.population(rows, [used] + [0] * config.small, allow_empty=True)

    model = models.two_nn()
    loss, metrics = models.cross_entropy(model), models.metrics(model)
    client_map, place = experiment.over_devices(clients.lanes(config.lanes))
    side_by_side, _ = experiment.over_devices(clients.vectorised())
    population, everything, test = place((population, everything, test))
    work = local.sgd(loss, optax.sgd(config.learning_rate), batch_size=config.batch_size)
    calm = local.sgd(loss, optax.sgd(config.centralised_learning_rate), batch_size=config.batch_size)
    fedavg = algorithms.fedavg(work, client_map=client_map)
    one_place = algorithms.fedavg(calm, client_map=client_map)
    first = sampling.schedule(np.array([[0]]), steps=calm.steps)
    ways = {  # method, sampler, data, rounds, rounds between judgements
        "uniform": (
            fedavg,
            sampling.uniform(config.cohort, steps=work.steps),
            population,
            config.rounds,
            max(config.rounds // 20, 1),
        ),
        "by_size": (fedavg, sampling.by_size(config.by_size_cohort, steps=work.steps), population, config.passes, 1),
        "large_alone": (one_place, first, population, config.passes, 1),
        "centralised": (one_place, first, everything, config.passes, 1),
    }

    def one_seed(folder: report.Run, key: jax.Array) -> dict:
        init_key, train_key = jax.random.split(key)
        initial, train_key = place((model.init(init_key), train_key))
        curves, found = {}, {}
        for name, (method, sampler, owned, rounds, every) in ways.items():
            # The seed's own folder is that of the first way; the others are held against it.
            own = folder if name == "uniform" else report.open_run(folder.folder / name, folder.config, resume=True)
            for row, _ in experiment.record(
                own,
                method,
                sampler,
                owned,
                initial,
                train_key,
                rounds=rounds,
                every=every,
                judge=lambda params: run.evaluate(metrics, params, test),
                description=name.replace("_", " "),
            ):
                pass
            logged = report.rows(own.folder)
            steps = np.cumsum([r["steps"] for r in logged])
            curves[name.replace("_", " ")] = steps, [100 * r["accuracy"] for r in logged]
            found |= {f"{name}_accuracy": row["accuracy"], f"{name}_steps": int(steps[-1])}
            found[f"{name}_seconds"] = row["seconds"]
            if name == "uniform":
                told = {key: row[key] for key in ("accuracy", "bytes_up", "bytes_down", "seconds")}
                found |= told | {"rounds": row["round"]}
        plot.plot_curves(
            folder.folder / "accuracy.png",
            curves,
            xlabel="local steps",
            ylabel="test accuracy, %",
            title=f"One device of {config.large} examples, {config.small} of one",
        )
        times = rounds_timed(config, work, (client_map, side_by_side), population, initial, train_key)
        print(report.table("A round", [{k: readable(v) for k, v in row.items()} for row in times]), "\n")
        return found | {f"round_of_{row['cohort'].replace(' ', '_')}": row["seconds"] for row in times}

    whole, summary = experiment.over_seeds("imbalance", config, one_seed)
    table = {}
    for name in ways:
        steps, accuracy = summary[f"{name}_steps"], 100 * summary[f"{name}_accuracy"]
        table[f"{name.replace('_', ' ')}, {steps:,.0f} local steps"] = f"{accuracy:.2f} %"
    experiment.conclude(whole, "One large device and many of one example: test accuracy", table, summary)


def rounds_timed(config, work, maps, population, initial, key) -> list[dict]:
    """Rounds of FedAvg by cohort, in one program; the last, by another, with its clients side by side."""
    client_map, side_by_side = maps

    def timed(name, client_map, ids, repeats):
        seconds = []
        for _ in range(1 + repeats):  # the first compiles
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(one_round(work, client_map, population, initial, ids, key))
            seconds.append(time.perf_counter() - began)
        longest = config.large // config.batch_size if 0 in ids else 1
        clients = int(metrics["reports"])
        return {
            "cohort": name,
            "local steps": int(metrics["steps"]),
            "longest times clients": longest * clients,
            "seconds": min(seconds[1:]),
        }

    slots = np.arange(config.cohort)
    cohorts = {
        "small ones": slots + 1,
        "large alone": np.where(slots == 0, 0, -1),
        "large and small": slots,
        "large ten times": np.where(slots < 10, 0, -1),
        "large and nine small": np.where(slots < 10, slots, -1),
    }
    found = [timed(name, client_map, ids, config.repeats) for name, ids in cohorts.items()]
    return [*found, timed("the same side by side", side_by_side, slots[:10], 1)]


@functools.partial(jax.jit, static_argnames=("work", "client_map"))
def one_round(work, client_map, population, params, ids, key):
    """A round of FedAvg with these clients."""
    fedavg = algorithms.fedavg(work, client_map=client_map)
    return fedavg.round(fedavg.init(params), core.make_cohort(population, ids, steps=work.steps), key)


def readable(value: str | float) -> str:
    """A number as a person reads it."""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
