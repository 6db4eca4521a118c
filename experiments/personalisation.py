"""Personal models: what each client gains from the others without giving up its own data's peculiarities.

Claim: pFedMe's personal models are better than Per-FedAvg's model after a local step, and that is better than FedAvg's,
which has to serve all.

| MNIST, two digits a client | global model | after a step | own model  |
|----------------------------|--------------|--------------|------------|
| every client alone         |   69.1 ± 1.8 |   91.0 ± 1.5 | 98.4 ± 0.0 |
| FedAvg                     |   88.5 ± 0.4 |   90.0 ± 0.4 |            |
| Per-FedAvg (Hessian-free)  |   88.5 ± 0.4 |   90.0 ± 0.4 |            |
| pFedMe                     |   87.8 ± 0.8 |   89.3 ± 0.6 | 97.4 ± 0.1 |
| Ditto                      |   85.4 ± 0.5 |   88.5 ± 0.4 | 96.5 ± 0.1 |
| APFL                       |   87.7 ± 0.7 |   89.4 ± 0.7 | 98.3 ± 0.0 |

| Synthetic(.5, .5)          | global model | after a step | own model  |
|----------------------------|--------------|--------------|------------|
| every client alone         |   12.9 ± 7.2 |   63.5 ± 6.6 | 90.1 ± 1.0 |
| FedAvg                     |   78.0 ± 0.3 |   85.2 ± 0.3 |            |
| Per-FedAvg (Hessian-free)  |   61.5 ± 6.6 |   85.2 ± 0.2 |            |
| pFedMe                     |   76.8 ± 0.4 |   85.1 ± 0.2 | 86.8 ± 0.2 |
| Ditto                      |   76.9 ± 0.7 |   85.1 ± 0.2 | 87.1 ± 0.5 |
| APFL                       |   76.9 ± 0.7 |   84.8 ± 0.5 | 88.7 ± 0.7 |

Test accuracy in per cent over three seeds. The order of the claim holds on both sets. Two things the papers do not
tell: FedAvg's model after the same step is as good as Per-FedAvg's, and with so many examples a client of two
digits, or of a model of its own, does best alone; the global model of clients alone is the mean of theirs.

Source: Dinh et al. 2020 (arXiv:2006.08848), section 5 and the commands of its repository: multinomial logistic
regression; batches of 20, 20 local steps; MNIST over 20 users of two digits each, 5 of them a round, and
Synthetic(.5, .5) over 100 users, 10 of them a round; pFedMe with K = 5, lambda = 15 (20 for synthetic), beta = 1.
Per-FedAvg: Fallah et al. 2020 (arXiv:2002.07948), judged after one local step. Accuracy is over all clients' test
examples together, a quarter of MNIST. What differs: 200 rounds instead of 800, users of MNIST of equal size, and
learning rates that are the best of four for each method, by its final accuracy.

Command: python experiments/personalisation.py
Expected: the tables above.
Time: six minutes on two CPU cores.
Needs the MNIST files; `--sets synthetic` does without.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import algorithms, clients, data, experiment, local, mesh, models, plot, report, run, sampling

METHODS = ("alone", "FedAvg", "Per-FedAvg", "pFedMe", "Ditto", "APFL")


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3
    rounds: int = 200
    steps: int = 20  # local steps, whatever a client's size
    batch_size: int = 20
    sets: tuple[Literal["mnist", "synthetic"], ...] = ("mnist", "synthetic")
    methods: tuple[Literal["alone", "FedAvg", "Per-FedAvg", "pFedMe", "Ditto", "APFL"], ...] = METHODS
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)  # tried for every method
    adapting: float = 0.03  # rate of the local step that the global models are judged after, and Per-FedAvg's alpha
    download: bool = False  # fetch MNIST if it is not found


TITLES = {"mnist": "MNIST, two digits a client", "synthetic": "Synthetic(.5, .5)"}
SMOKE = {"rounds": 4, "sets": ("synthetic",), "methods": ("FedAvg", "pFedMe"), "learning_rates": (0.03,)}


def mnist(config: Config) -> dict[str, Any]:
    """Twenty users of two digits each."""
    train, _ = data.fashion_small() if config.smoke else data.mnist(download=config.download)
    owner = data.partition.shards(jax.random.key(0), train["y"], num_clients=20, shards_per_client=2)
    population = data.by_owner(train, owner, num_classes=10)
    kept, held = data.split(population, 0.75, key=jax.random.key(1))
    return {"train": kept, "test": held, "model": models.logistic_regression(784, 10), "cohort": 5, "lambda": 15.0}


def synthetic(config: Config) -> dict[str, Any]:
    """A hundred users whose models and inputs differ."""
    num_clients, factor = (20, 1) if config.smoke else (100, 5)
    train, test = data.synthetic(jax.random.key(0), 0.5, 0.5, num_clients=num_clients, size_factor=factor)
    return {"train": train, "test": test, "model": models.logistic_regression(60, 10), "cohort": 10, "lambda": 20.0}


def main(config: Config) -> None:
    """Trains every method on both sets, then shows what clients' own models reach."""
    sets = {name: {"mnist": mnist, "synthetic": synthetic}[name](config) for name in config.sets}

    def cell(where: str, name: str) -> dict:
        task = sets[where]
        n = task["train"].size.shape[0]
        model = task["model"]
        loss, metrics = models.cross_entropy(model), models.metrics(model)

        def work(learning_rate):
            return local.sgd(loss, optax.sgd(learning_rate), batch_size=config.batch_size)

        def make(learning_rate):
            options: dict[str, Any] = {"client_map": clients.lanes(1)}
            own = options | {"num_clients": n}
            w = work(learning_rate)
            return {
                "alone": lambda: algorithms.local_only(w, **own),
                "FedAvg": lambda: algorithms.fedavg(w, **options),
                "Per-FedAvg": lambda: algorithms.perfedavg_hf(w, alpha=config.adapting, **options),
                "pFedMe": lambda: algorithms.pfedme(
                    w, strength=task["lambda"], personal_learning_rate=learning_rate, inner_steps=5, **own
                ),
                "Ditto": lambda: algorithms.ditto(w, strength=1.0, **own),
                "APFL": lambda: algorithms.apfl(w, alpha=0.5, **own),
            }[name]()

        template = make(0.1)
        key = jax.random.key(7)

        def judge(state):
            """Accuracy over all test examples, of the global model, after a local step, and of clients' own."""
            share = task["test"].size / jnp.sum(task["test"].size)

            def over_all(found):
                return jnp.sum(jnp.where(share > 0, share * found["accuracy"], 0.0))

            params = template.params(state)
            found = {
                "global": over_all(run.evaluate_clients(metrics, params, task["test"])),
                "adapted": over_all(
                    run.evaluate_adapted(
                        metrics, work(config.adapting), params, task["train"], task["test"], key, steps=1
                    )
                ),
            }
            if template.personal is not None:
                found["own"] = over_all(run.evaluate_clients(metrics, state, task["test"], personal=template.personal))
            return found

        found = run.sweep(
            lambda learning_rate: make(learning_rate)._replace(params=lambda state: state),
            {"learning_rate": config.learning_rates},
            init=model.init,
            sampler=sampling.uniform(task["cohort"], steps=lambda size: jnp.full(size.shape, config.steps)),
            population=task["train"],
            judge=judge,
            rounds=config.rounds,
            every=max(config.rounds // 10, 1),
            seeds=config.seeds,
            mesh=mesh.make((min(jax.device_count(), len(config.learning_rates)),)),
            progress=False,
        )
        decides = {"FedAvg": "global", "Per-FedAvg": "adapted"}.get(name, "own")
        best = run.best_setting(found, decides)
        place = found.settings.index(best)
        return {
            "setting": best,
            "rounds": found.rounds,
            "judged": decides,
            **{k: c[place] for k, c in found.curves.items()},
        }

    names = config.methods
    cells = {f"{where}, {name}": (lambda w=where, n=name: cell(w, n)) for where in sets for name in names}
    whole, results = experiment.over_cells("personalisation", config, cells)

    summary: dict[str, Any] = {}
    for where in sets:
        rows, curves = [], {}
        for name in names:
            result = results[f"{where}, {name}"]
            row = {"method": name, "rate": result["setting"]["learning_rate"]}
            for kind in ("global", "adapted", "own"):
                final = [100 * curve[-1] for curve in result[kind]] if kind in result else [np.nan]
                row[{"global": "global model", "adapted": "after a step", "own": "own model"}[kind]] = (
                    report.mean_and_std(final)
                )
            rows.append(row)
            curve = 100 * np.mean(result[result["judged"]], 0)
            curves[name] = (result["rounds"], curve)
            summary[f"{where}, {name}"] = curve[-1] / 100
        print(report.table(f"{TITLES[where]}: test accuracy of all clients' examples, %", rows), "\n")
        plot.plot_curves(
            whole.folder / f"{where}.png",
            curves,
            xlabel="round",
            ylabel="test accuracy, %",
            title=f"Personal models, {TITLES[where]}",
        )
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
