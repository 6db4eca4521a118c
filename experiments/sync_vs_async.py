"""Synchronous against asynchronous updates by a parameter server: time of an epoch, convergence, cost of staleness.

Claim: with workers of heavy-tailed speeds, asynchronous updates make an epoch five times as short as synchronous ones,
whose every step waits for the slowest, and learn as much in it, for they make a step of every gradient: 80 % is reached
in a twelfth of the time. Staleness has its price all the same: where every gradient is equally old, the best rate is
lower and less is learned in eight epochs from an age of 8 on.

| 16 workers        | seconds an epoch | staleness, largest | accuracy after 8 epochs | seconds to 80 % |
|-------------------|------------------|--------------------|-------------------------|-----------------|
| synchronous       |      174.2 ± 8.3 |             0, 0   |              81.0 ± 1.1 |    1199 ± 135   |
| bound 1           |      117.9 ± 6.3 |           8.9, 43  |              82.3 ± 0.6 |     548 ± 56    |
| bound 4           |       82.6 ± 7.6 |          10.3, 95  |              81.4 ± 2.2 |     373 ± 52    |
| asynchronous      |       33.9 ± 1.1 |         14.9, 497  |              81.6 ± 2.8 |      96 ± 29    |
| staleness-aware   |       33.9 ± 1.1 |         14.9, 497  |              82.3 ± 2.2 |     135 ± 16    |
| delay-compensated |       33.9 ± 1.1 |         14.9, 497  |              82.9 ± 1.5 |      93 ± 30    |

| staleness of every gradient   |    0 |    1 |    2 |    4 |    8 |   16 |      32 |
|-------------------------------|------|------|------|------|------|------|---------|
| accuracy after 8 epochs, %    | 85.4 | 84.5 | 85.4 | 84.1 | 81.5 | 78.1 |    71.3 |
| its rate, the best of seven   |  .05 |   .1 |   .1 |  .05 | .025 | .025 |  .00625 |
| accuracy at the rate .05      | 85.4 | 84.4 | 85.3 | 84.1 | 80.5 | 39.2 |    10.0 |

Three seeds, mean and standard deviation; seconds are simulated. Epochs are counted in gradients: a synchronous step
takes 16 of them, so it makes a sixteenth of the steps. Neither the staleness-aware rate nor delay compensation gains
more here, over a rate that is tuned, than seeds differ.

A server and two workers that are really processes lose and learn what the simulation of their trace does, on this
machine to the bit (largest relative difference of a loss: 0): 78.9 % after 2 epochs synchronously, 80.0 %
asynchronously.

Source: bounded staleness, Ho et al. 2013 (NeurIPS); staleness-aware rate, Zhang et al. 2016 (arXiv:1511.05950);
adaptive delay compensation, Zheng et al. 2017 (arXiv:1609.08326). Here: 2NN on 10,000 images of Fashion-MNIST, batches
of 32, SGD. The seconds of a gradient are log-normal with sigma 1, around a median of the worker's own, log-normal with
sigma 0.3. Accuracy is that of the rate best for it, the time to 80 % that of the rate best for that, both on test data,
of seven rates (four times as large for synchronous and staleness-aware updates) and two strengths of compensation.
Messages take no time.

Command: python experiments/sync_vs_async.py
Expected: the tables above.
Time: 16 minutes on two CPU cores that did as much other work; 13 minutes of processor time.
"""

import dataclasses
import multiprocessing
import secrets
import socket
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import availability, core, data, experiment, mesh, models, plot, report, run
from jfed.parallel.arrivals import recorded, simulated
from jfed.parallel.asynchronous import asynchronous, random_batch
from jfed.parallel.corrections import adaptive_delay_compensation, scale_by_age
from jfed.parallel.parameter_server import serve, work


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3
    workers: int = 16
    batch_size: int = 32
    epochs: int = 8  # gradients are counted, the same for all
    learning_rates: tuple[float, ...] = (0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)  # of one gradient
    strengths: tuple[float, ...] = (2.0, 20.0)  # of the delay compensation
    bounds: tuple[int, ...] = (1, 4)
    sigma: float = 1.0  # of the logarithm of the seconds a gradient takes
    pace: float = 0.3  # of the logarithm of a worker's own median
    target: float = 0.8
    delays: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)  # staleness of every gradient, by so many workers more than one
    real_epochs: int = 2  # of a server and two workers that are really processes


SMOKE = {
    "workers": 3,
    "epochs": 1,
    "learning_rates": (0.05, 0.1),
    "strengths": (2.0,),
    "bounds": (1,),
    "target": 0.3,
    "delays": (0, 2),
    "real_epochs": 1,
}


def main(config: Config) -> None:
    """Trains by each way of updating and each staleness, then by real processes."""
    train, test = data.fashion_small()
    num_examples = len(train["y"])
    population = core.Population(train, jnp.array([0]), jnp.array([num_examples]))
    model = models.two_nn()
    loss, metrics = models.cross_entropy(model), models.metrics(model)
    epoch = num_examples // config.batch_size  # gradients
    half = max(epoch // 2, 1)
    n = config.workers
    median = jnp.exp(config.pace * jax.random.normal(jax.random.key(0), (n,)))
    heavy = availability.lognormal(median, sigma=config.sigma)
    even = availability.lognormal(1.0, sigma=0.0)

    def sweep(workers: int, arrivals, factor: int = 1, strengths: tuple[float, ...] = (), **options) -> run.Sweep:
        """All learning rates, times `factor`, side by side."""

        def make(learning_rate, strength=None):
            compensated = {} if strength is None else {"correction": adaptive_delay_compensation(strength)}
            optimizer, batch = optax.sgd(learning_rate), random_batch(config.batch_size)
            settings = {"workers": workers, "arrivals": arrivals, "batch": batch} | compensated | options
            return tallied(asynchronous(loss, optimizer, **settings))

        def judge(state):
            params, tally = state
            return {"accuracy": run.evaluate(metrics, params, test)["accuracy"]} | tally

        rates = [rate * factor for rate in config.learning_rates]
        return run.sweep(
            make,
            {"learning_rate": rates} | ({"strength": strengths} if strengths else {}),
            init=model.init,
            sampler=whole,
            population=population,
            judge=judge,
            rounds=2 * half * config.epochs,
            every=half,
            seeds=config.seeds,
            mesh=mesh.make((min(jax.device_count(), len(rates)),)),
            progress=False,
        )

    def compared(*arguments, **options) -> dict[str, Any]:
        found = sweep(n, *arguments, **options)
        quickest = run.quickest_setting(found, "accuracy", config.target, at="seconds")
        best = run.best_setting(found, "accuracy")
        at = found.settings.index(best)
        return {
            "best": best,
            "ends": run.at_an_end(found, best),
            "quickest": quickest.setting,
            "quickest_ends": run.at_an_end(found, quickest.setting),
            "reached": quickest.reached,
            "accuracy": found.curves["accuracy"][at],
            "seconds": found.curves["seconds"][at],
            "staleness": found.curves["staleness"][at, :, -1],
            "oldest": found.curves["oldest"][at, :, -1],
        }

    def of_delay(delay: int) -> dict[str, Any]:
        found = sweep(delay + 1, simulated(even))
        return {"accuracy": found.curves["accuracy"][:, :, -1], "oldest": float(found.curves["oldest"].max())}

    free = simulated(heavy)
    ways = {"synchronous": lambda: compared(simulated(heavy, bound=0), factor=4, buffer=n)}
    ways |= {f"bound {s}": lambda s=s: compared(simulated(heavy, bound=s)) for s in config.bounds}
    ways |= {
        "asynchronous": lambda: compared(free),
        "staleness-aware": lambda: compared(free, factor=4, correction=scale_by_age()),
        "delay-compensated": lambda: compared(free, strengths=config.strengths),
    }
    cells = ways | {f"staleness {d}": lambda d=d: of_delay(d) for d in config.delays}
    cells |= {f"real {name}": lambda b=b, k=k: real(config, b, k) for name, b, k in REAL}
    whole_run, results = experiment.over_cells("sync_vs_async", config, cells)

    summary: dict[str, Any] = {"seeds": config.seeds, "target": config.target}
    rows, on_clock, on_epochs = [], {}, {}
    for name in ways:
        result = results[name]
        accuracy, seconds = np.array(result["accuracy"]), np.array(result["seconds"])  # [seeds, points]
        reached = np.array([np.nan if r is None else r for r in result["reached"]])
        of_epoch = seconds[:, -1] / config.epochs
        rows.append(
            {
                "updates": name,
                "seconds an epoch": report.mean_and_std(of_epoch),
                "staleness": report.mean_and_std(result["staleness"]),
                "largest": f"{max(result['oldest']):.0f}",
                f"accuracy after {config.epochs} epochs, %": report.mean_and_std(100 * accuracy[:, -1]),
                "rate": worded(result["best"], result["ends"]),
                f"seconds to {100 * config.target:.0f} %": report.mean_and_std(reached),
                "its rate": worded(result["quickest"], result["quickest_ends"]),
            }
        )
        summary |= report.spread(f"{name}_seconds_an_epoch", of_epoch)
        summary |= report.spread(f"{name}_accuracy", accuracy[:, -1])
        everybody = bool(np.all(np.isfinite(reached)))
        timed = f"{name}_seconds_to_target"
        summary |= report.spread(timed, reached) if everybody else {timed: None}
        on_clock[name] = seconds.mean(0), 100 * accuracy.mean(0)
        on_epochs[name] = (np.arange(accuracy.shape[1]) + 1) / 2, 100 * accuracy.mean(0)
    print(report.table(f"{n} workers, heavy-tailed speeds; mean ± standard deviation over seeds", rows), "\n")

    by_delay = {d: 100 * np.array(results[f"staleness {d}"]["accuracy"]) for d in config.delays}  # [rates, seeds]
    fresh = int(np.argmax(by_delay[min(config.delays)].mean(1)))
    rows, best_of, fixed = [], [], []
    for delay, accuracy in by_delay.items():
        best = int(np.argmax(accuracy.mean(1)))
        best_of.append(accuracy[best].mean())
        fixed.append(accuracy[fresh].mean())
        rows.append(
            {
                "staleness": delay,
                "accuracy at its best rate, %": report.mean_and_std(accuracy[best]),
                "rate": f"{config.learning_rates[best]:g}",
                f"at {config.learning_rates[fresh]:g}, %": report.mean_and_std(accuracy[fresh]),
            }
        )
        summary |= report.spread(f"staleness {delay}_accuracy", accuracy[best] / 100)
    print(report.table(f"Every gradient equally old; after {config.epochs} epochs", rows), "\n")

    rows = []
    for name, *_ in REAL:
        result = results[f"real {name}"]
        rows.append(
            {
                "two real workers": name,
                "seconds an epoch": f"{result['seconds']:.2f}",
                "staleness": f"{result['staleness']:.2f}",
                "accuracy, %": f"{100 * result['accuracy']:.1f}",
                "replayed, %": f"{100 * result['replayed']:.1f}",
                "largest difference of a loss": f"{result['difference']:.1e}",
            }
        )
        summary |= {f"real {name}_{what}": result[what] for what in ("accuracy", "replayed", "difference")}
    print(report.table("Processes on this machine, and the simulation replaying them", rows), "\n")

    picture = {"ylabel": "test accuracy, %"}
    target = {f"target {100 * config.target:.0f} %": 100 * config.target}
    clock = {"xlabel": "simulated seconds", "title": "On the clock", "reference": target}
    plot.plot_curves(whole_run.folder / "on_the_clock.png", on_clock, **picture, **clock)
    plot.plot_curves(
        whole_run.folder / "on_epochs.png",
        on_epochs,
        **picture,
        xlabel="epochs",
        title="Epoch by epoch",
        reference=target,
    )
    plot.plot_curves(
        whole_run.folder / "staleness.png",
        {"best rate": (config.delays, best_of), f"rate {config.learning_rates[fresh]:g}": (config.delays, fixed)},
        **picture,
        xlabel="staleness of every gradient",
        title=f"Accuracy after {config.epochs} epochs",
    )
    print(f"pictures and metrics: {whole_run.folder}\n")
    report.finish(whole_run, summary)


REAL = (("synchronous", 0, 2), ("asynchronous", None, 1))  # name, bound, buffer
RATE = 0.05


def real(config: Config, bound: int | None, buffer: int) -> dict[str, Any]:
    """A server here and two workers in processes of their own, on CPUs; then the simulation of what they did."""
    train, test = data.fashion_small()
    model, key = models.two_nn(), jax.random.key(0)
    batch, optimizer = random_batch(config.batch_size), optax.sgd(RATE)
    epoch = len(train["y"]) // config.batch_size
    rounds = epoch * config.real_epochs
    authkey = secrets.token_bytes(16)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work_there, args=(address, authkey, w, config.batch_size)) for w in range(2)]
    with jax.default_device(jax.devices("cpu")[0]):
        params = model.init(jax.random.key(1))
        for worker in workers:
            worker.start()
        try:
            together = {"workers": 2, "rounds": rounds, "key": key, "bound": bound, "buffer": buffer}
            served = serve(optimizer, params, address=address, authkey=authkey, **together)
        finally:
            for worker in workers:
                worker.join(30)
                worker.kill()
        loss = models.cross_entropy(model)
        arrivals = recorded(served.trace)
        method = asynchronous(loss, optimizer, workers=2, arrivals=arrivals, batch=batch, buffer=buffer)
        population = core.Population(train, jnp.array([0]), jnp.array([len(train["y"])]))
        state, replayed = run.scan_rounds(method, whole, population, method.init(params), key, rounds=rounds)
        metrics = models.metrics(model)
        difference = np.abs(served.losses - replayed["loss"]) / replayed["loss"]
        return {
            "accuracy": float(run.evaluate(metrics, served.params, test)["accuracy"]),
            "replayed": float(run.evaluate(metrics, method.params(state), test)["accuracy"]),
            "difference": float(difference.max()),
            "staleness": float(replayed["staleness"].mean()),
            "seconds": float(served.trace.seconds.sum() / config.real_epochs),
        }


def work_there(address: tuple[str, int], authkey: bytes, worker: int, batch_size: int) -> None:
    """A worker process."""
    jax.config.update("jax_platforms", "cpu")
    train, _ = data.fashion_small()
    model = models.two_nn()
    params = model.init(jax.random.key(1))
    join = {"address": address, "authkey": authkey, "worker": worker}
    work(models.cross_entropy(model), params, train, batch=random_batch(batch_size), **join)


def tallied(algorithm: core.Algorithm) -> core.Algorithm:
    """A method with, beside its model, its seconds so far and the mean and largest staleness."""

    def init_fn(params):
        return algorithm.init(params), {name: jnp.zeros(()) for name in ("seconds", "ages", "oldest", "rounds")}

    def round_fn(state, cohort, key):
        inner, tally = state
        inner, metrics = algorithm.round(inner, cohort, key)
        age = metrics["staleness"].astype(jnp.float32)
        tally = {
            "seconds": tally["seconds"] + metrics["seconds"],
            "ages": tally["ages"] + age,
            "oldest": jnp.maximum(tally["oldest"], age),
            "rounds": tally["rounds"] + 1,
        }
        return (inner, tally), metrics

    def params_fn(state):
        inner, tally = state
        mean = tally["ages"] / tally["rounds"]
        return algorithm.params(inner), {"seconds": tally["seconds"], "staleness": mean, "oldest": tally["oldest"]}

    return algorithm._replace(init=init_fn, round=round_fn, params=params_fn)


def whole(population: core.Population, key: jax.Array, t: jax.Array) -> core.Tree:
    """All examples, from which each worker draws its batches."""
    return population.examples


def worded(setting: dict[str, float], ends: list[str]) -> str:
    """A setting in a table; `*` marks the lowest or highest value tried."""
    return ", ".join(f"{value:g}{'*' if name in ends else ''}" for name, value in setting.items())


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
