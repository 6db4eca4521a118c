"""FedAvg with a thousand clients on real images: what jfed does, in one script.

Claim: trained by FedAvg on 1000 clients with very different data (Dirichlet(0.3) over labels, ten
images each on average), a small network classifies at least 80 % of the test images, not far below
the same network trained with all data in one place.

Source: McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1; label skew by Dirichlet as in Hsu et al.
2019 (arXiv:1909.06335). Data: 10,000 + 2,000 images of Fashion-MNIST, embedded in the kit.

Command: python experiments/quickstart.py
Expected: 84 % after 150 rounds, 85 to 86 % with all data in one place.
Time: about a minute on two CPU cores, compilation included.
"""

import dataclasses

import jax
import optax

from jfed import algorithms, clients, data, experiment, local, models, plot, report, run, sampling


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    num_clients: int = 1000
    alpha: float = 0.3  # Dirichlet concentration over labels; smaller is more skewed
    cohort: int = 100  # clients a round
    rounds: int = 150
    epochs: int = 5  # over a client's data, a round
    batch_size: int = 10
    learning_rate: float = 0.1
    lanes: int = 1  # clients training at once on each device; on a CPU each core is one
    centralised_epochs: int = 20
    centralised_learning_rate: float = 0.03  # with all data in one place, 0.1 leaves the end of training noisy


SMOKE = {"num_clients": 50, "cohort": 10, "rounds": 20, "epochs": 1, "centralised_epochs": 1}


def main(config: Config) -> None:
    """Trains, then shows a table, two pictures and the summary."""
    train, test = data.fashion_small()
    owner = data.partition.dirichlet(jax.random.key(0), train["y"], num_clients=config.num_clients, alpha=config.alpha)
    population = data.by_owner(train, owner, num_classes=10)
    print(data.skew.table(data.skew.skew(population, num_classes=10)), "\n")

    model = models.two_nn()
    loss, metrics = models.cross_entropy(model), models.metrics(model)
    client_map, place = experiment.over_devices(clients.lanes(config.lanes))
    spread, test = place((population, test))

    optimizer = optax.sgd(config.learning_rate)
    work = local.sgd(loss, optimizer, batch_size=config.batch_size, epochs=config.epochs)
    fedavg = algorithms.fedavg(work, client_map=client_map)
    sampler = sampling.uniform(config.cohort, steps=work.steps)

    # All data in one place is a federation of one.
    everything = data.population(train, [len(train["y"])])
    epoch = local.sgd(loss, optax.sgd(config.centralised_learning_rate), batch_size=config.batch_size)
    centralised = algorithms.fedavg(epoch, client_map=clients.lanes(1))

    def judge(params):
        return run.evaluate(metrics, params, test)

    def one_seed(folder: report.Run, key: jax.Array) -> dict:
        init_key, train_key = jax.random.split(key)
        initial = model.init(init_key)
        for row, params in experiment.record(
            folder,
            fedavg,
            sampler,
            spread,
            place(initial),
            place(train_key),
            rounds=config.rounds,
            every=10,
            judge=judge,
        ):
            pass
        own = run.evaluate_clients(metrics, params, spread, client_map=client_map)["accuracy"]
        state, _ = run.scan_rounds(
            centralised,
            sampling.full(steps=epoch.steps),
            everything,
            centralised.init(initial),
            train_key,
            rounds=config.centralised_epochs,
        )
        reference = float(judge(centralised.params(state))["accuracy"])
        rows = report.rows(folder.folder)
        plot.plot_curves(
            folder.folder / "accuracy.png",
            {"FedAvg": ([r["round"] for r in rows], [100 * r["accuracy"] for r in rows])},
            xlabel="round",
            ylabel="test accuracy, %",
            title=f"FedAvg, {config.num_clients} clients, Dirichlet({config.alpha})",
            reference={f"centralised {100 * reference:.1f} %": 100 * reference},
        )
        return {
            "accuracy": row["accuracy"],
            "centralised_accuracy": reference,
            **experiment.fairness(folder, own, judged_on="the client's training images"),
            **{name: row[name] for name in ("bytes_up", "bytes_down", "seconds")},
            "rounds": row["round"],
        }

    whole, summary = experiment.over_seeds("quickstart", config, one_seed)
    shown = {
        "test accuracy": f"{100 * summary['accuracy']:.1f} %",
        "the same model, centralised": f"{100 * summary['centralised_accuracy']:.1f} %",
        "rounds": f"{summary['rounds']:.0f}",
    }
    experiment.conclude(whole, "FedAvg", shown, summary)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
