"""Asynchronous against synchronous training, on a clock: what waiting for the slowest costs.

Claim: with clients whose speeds differ by orders of magnitude, FedBuff reaches a given accuracy in less
simulated time than FedAvg, which waits for the slowest of its cohort in every round.

| 10,000 updates | hours to 80 % | final accuracy | hours in all |
|----------------|---------------|----------------|--------------|
| FedAvg         |   4.89 ± 1.07 |   84.0 ± 0.2 % | 12.78 ± 0.37 |
| FedBuff        |   0.12 ± 0.03 |   84.3 ± 0.5 % |  0.72 ± 0.01 |
| FedAsync       |   0.19 ± 0.04 |   83.0 ± 0.2 % |  0.76 ± 0.02 |

Simulated hours, mean and standard deviation of three seeds. That FedBuff is 40 times as fast as FedAvg, where its paper
has 3.3 times, is the spread of speeds: a round of FedAvg lasts as long as the slowest of 50 clients, of whom two
in a hundred take more than twenty times the median.

Source: Nguyen et al. 2022 (arXiv:2106.06639), section 5: the time a client takes is drawn from a half-normal
distribution; buffer K = 10. Xie et al. 2019 (arXiv:1903.03934) for FedAsync, with its polynomial discount of
staleness. Here a client's speed is also its own, log-normal over clients, and its time grows with its local
steps. All train at most 50 clients at a time and receive as many updates, but for the few that FedBuff and FedAsync
spend on filling their places; learning rates are the best of four for each, by the time to the target on test data:
0.2 for FedAvg, 0.1 for the others. Messages take no time.

Command: python experiments/async_vs_sync.py
Expected: the table above.
Time: 13 minutes on two CPU cores that did other work too.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import (
    algorithms,
    availability,
    clients,
    core,
    data,
    experiment,
    local,
    mesh,
    models,
    plot,
    report,
    run,
    sampling,
)
from jfed.models.modules import MLP

METHODS = ("FedAvg", "FedBuff", "FedAsync")


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3
    methods: tuple[Literal["FedAvg", "FedBuff", "FedAsync"], ...] = METHODS
    num_clients: int = 500
    alpha: float = 0.3  # Dirichlet concentration over labels
    concurrency: int = 50  # clients training at any moment; FedAvg's cohort
    buffer: int = 10
    mixing: float = 0.6  # FedAsync's alpha
    updates: int = 10_000  # client updates received by the server, the same for all
    epochs: int = 2
    batch_size: int = 10
    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)  # of the clients; each method has its best
    sigma: float = 1.5  # of the logarithm of a client's seconds a step
    target: float = 0.8
    points: int = 50  # of each curve


SMOKE = {
    "methods": ("FedAvg", "FedBuff"),
    "num_clients": 40,
    "concurrency": 10,
    "buffer": 5,
    "updates": 100,
    "epochs": 1,
    "learning_rates": (0.05,),
    "target": 0.2,
    "points": 10,
}


def main(config: Config) -> None:
    """Trains each method for the same number of updates, then shows time to the target."""
    train, test = data.fashion_small()
    owner = data.partition.dirichlet(jax.random.key(0), train["y"], num_clients=config.num_clients, alpha=config.alpha)
    population = data.by_owner(train, owner, num_classes=10)
    model = models.from_nnx(lambda rngs: MLP(784, 50, 10, rngs=rngs))
    loss, metrics = models.cross_entropy(model), models.metrics(model)
    pace = jnp.exp(config.sigma * jax.random.normal(jax.random.key(1), (config.num_clients,)))  # seconds a step

    def work(learning_rate):
        return local.sgd(loss, optax.sgd(learning_rate), batch_size=config.batch_size, epochs=config.epochs)

    def duration(key: jax.Array, cohort: core.Cohort) -> jax.Array:
        """Half-normal, by the client's own pace and its local steps."""
        chance = availability.per_client(jax.random.normal)(key, cohort)
        return cohort.steps * pace[jnp.minimum(cohort.ids, config.num_clients - 1)] * jnp.abs(chance)

    many, few = config.concurrency, config.buffer
    serial = {"client_map": clients.lanes(1)}
    out = {"concurrency": many, "duration": duration} | serial
    make = {
        "FedAvg": lambda rate: availability.timed(algorithms.fedavg(work(rate), **serial), duration),
        "FedBuff": lambda rate: algorithms.fedbuff(work(rate), buffer=few, **out),
        "FedAsync": lambda rate: algorithms.fedasync(work(rate), mixing=config.mixing, **out),
    }
    each = {"FedAvg": many, "FedBuff": few, "FedAsync": 1}  # updates a step of the server
    # What is drawn are clients for the places that fall free: twice the updates, so that all are soon taken.
    steps = work(0.1).steps
    samplers = {
        "FedAvg": sampling.uniform(many, steps=steps),
        "FedBuff": sampling.equally_weighted(sampling.uniform(2 * few, steps=steps)),
        "FedAsync": sampling.uniform(2, steps=steps),
    }

    def cell(name: str) -> dict[str, Any]:
        rounds = config.updates // each[name]
        every = max(rounds // config.points, 1)

        def judge(state):
            params, seconds = state
            return {"accuracy": run.evaluate(metrics, params, test)["accuracy"], "seconds": seconds}

        found = run.sweep(
            lambda learning_rate: clocked(make[name](learning_rate)),
            {"learning_rate": config.learning_rates},
            init=model.init,
            sampler=samplers[name],
            population=population,
            judge=judge,
            rounds=rounds - rounds % every,
            every=every,
            seeds=config.seeds,
            mesh=mesh.make((min(jax.device_count(), len(config.learning_rates)),)),
            progress=False,
        )
        best = run.quickest_setting(found, "accuracy", config.target, at="seconds")
        return {
            "setting": best.setting,
            "at_an_end": run.at_an_end(found, best.setting),
            "reached": best.reached,
            "accuracy": found.curves["accuracy"][best.index],
            "seconds": found.curves["seconds"][best.index],
        }

    cells = {name: lambda name=name: cell(name) for name in config.methods}
    whole, results = experiment.over_cells("async_vs_sync", config, cells)
    rows, pictured = [], {}
    summary: dict[str, Any] = {"seeds": config.seeds, "target": config.target}
    for name, result in results.items():
        hours, accuracy = np.array(result["seconds"]) / 3600, np.array(result["accuracy"])  # [seeds, points]
        reached = np.array([np.nan if r is None else r for r in result["reached"]]) / 3600
        rows.append(
            {
                "method": name,
                "rate": f"{result['setting']['learning_rate']:g}{', an end' if result['at_an_end'] else ''}",
                f"hours to {100 * config.target:.0f} %": report.mean_and_std(reached, 2),
                "final accuracy, %": report.mean_and_std(100 * accuracy[:, -1]),
                "hours in all": report.mean_and_std(hours[:, -1], 2),
            }
        )
        everybody = bool(np.all(np.isfinite(reached)))
        summary |= report.spread(f"{name}_hours", reached) if everybody else {f"{name}_hours": None}
        summary |= report.spread(f"{name}_accuracy", accuracy[:, -1])
        pictured[name] = hours.mean(0), 100 * accuracy.mean(0)
    plot.plot_curves(
        whole.folder / "accuracy.png",
        pictured,
        xlabel="simulated hours",
        ylabel="test accuracy, %",
        title=f"{config.updates} client updates, on a clock",
        reference={f"target {100 * config.target:.0f} %": 100 * config.target},
    )
    print(report.table(f"Simulated time of {config.updates} updates, mean ± standard deviation over seeds", rows), "\n")
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def clocked(algorithm: core.Algorithm) -> core.Algorithm:
    """A method whose rounds report `seconds`, with their sum beside its model."""

    def round_fn(state, cohort, key):
        inner, seconds = state
        inner, metrics = algorithm.round(inner, cohort, key)
        return (inner, seconds + metrics["seconds"]), metrics

    return algorithm._replace(
        init=lambda params: (algorithm.init(params), jnp.zeros(())),
        round=round_fn,
        params=lambda state: (algorithm.params(state[0]), state[1]),
    )


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
