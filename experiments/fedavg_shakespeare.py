"""FedAvg on Shakespeare: predicting the next character, one client a speaking role.

Claim: a character model trained by FedAvg over a thousand speaking roles, fifty of them a round,
predicts the next character of speeches it has not seen far better than the guess that most often
followed the last character, and better with every stretch of rounds.

Source: McMahan et al. 2017 (arXiv:1602.05629), section 3: the task and its non-IID split by role.
The paper's model is a two-layer LSTM and its target 54 % on another edition of the plays; one GRU
layer is used here (`--model lstm` gives the paper's), sized for a CPU.

Command: python experiments/fedavg_shakespeare.py
Expected: above 45 % within 15 rounds and 51 % after 60, against 27.6 % by frequency.
Time: 60 rounds in half an hour on one CPU core.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np
import optax

from jfed import algorithms, clients, data, experiment, local, models, plot, report, run, sampling


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    model: Literal["gru", "lstm", "transformer"] = "gru"
    hidden: int = 256  # units of a recurrent layer
    cohort: int = 50  # clients a round
    rounds: int = 60
    epochs: int = 5  # over a client's windows, a round
    batch_size: int = 10  # windows of 80 characters
    learning_rate: float = 1.0
    clip: float = 5.0  # norm of a local gradient
    lanes: int = 1  # clients training at once on each device; more on an accelerator
    every: int = 5  # rounds between evaluations
    min_speeches: int = 2  # roles with fewer are left out


SMOKE = {"hidden": 16, "cohort": 3, "rounds": 2, "every": 1, "min_speeches": 200}


def main(config: Config) -> None:
    """Trains, then shows accuracy beside the frequency baseline."""
    train, test, vocabulary = data.shakespeare(min_speeches=config.min_speeches)
    symbols = len(vocabulary) + 1
    print(f"{len(train.size)} roles, {len(train.examples['x'])} windows to train on, {symbols} symbols\n")
    baseline = frequency_baseline(train, test)

    if config.model == "transformer":
        model = models.transformer(symbols, width=128, layers=2, heads=4, context=80)
    elif config.model == "lstm":
        model = models.char_lstm(symbols, hidden=config.hidden)
    else:
        model = models.char_gru(symbols, hidden=config.hidden)
    metrics = models.metrics(model)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.sgd(config.learning_rate))
    work = local.sgd(models.cross_entropy(model), optimizer, batch_size=config.batch_size, epochs=config.epochs)
    client_map, place = experiment.over_devices(clients.lanes(config.lanes))
    spread_train, spread_test = place((train, test))
    fedavg = algorithms.fedavg(work, client_map=client_map)
    sampler = sampling.uniform(config.cohort, steps=work.steps)

    def one_seed(folder: report.Run, key: jax.Array) -> dict:
        init_key, train_key = jax.random.split(key)
        for row, params in experiment.record(
            folder,
            fedavg,
            sampler,
            spread_train,
            place(model.init(init_key)),
            place(train_key),
            rounds=config.rounds,
            every=config.every,
            judge=lambda params: run.evaluate(metrics, params, spread_test.examples, batch_size=128),
        ):
            pass
        own = run.evaluate_clients(metrics, params, spread_test, client_map=client_map)["accuracy"]
        rows = report.rows(folder.folder)
        plot.plot_curves(
            folder.folder / "accuracy.png",
            {"FedAvg": ([r["round"] for r in rows], [100 * r["accuracy"] for r in rows])},
            xlabel="round",
            ylabel="next-character accuracy on held-out speeches, %",
            title=f"FedAvg, Shakespeare, {config.model}, {len(train.size)} roles",
            reference={f"most frequent next character {100 * baseline:.1f} %": 100 * baseline},
        )
        return {
            "accuracy": row["accuracy"],
            "baseline_accuracy": baseline,
            **experiment.fairness(folder, own, judged_on="the role's held-out speeches"),
            **{name: row[name] for name in ("bytes_up", "bytes_down", "seconds")},
            "rounds": row["round"],
        }

    whole, summary = experiment.over_seeds("fedavg_shakespeare", config, one_seed)
    shown = {
        "next-character accuracy": f"{100 * summary['accuracy']:.1f} %",
        "most frequent next character": f"{100 * summary['baseline_accuracy']:.1f} %",
        "rounds": f"{summary['rounds']:.0f}",
    }
    experiment.conclude(whole, f"FedAvg, Shakespeare, {config.model}", shown, summary)


def frequency_baseline(train, test) -> float:
    """Accuracy of guessing, after each character, the one that followed it most often in training."""

    def pairs(population):
        x, y = (np.asarray(population.examples[name]).ravel() for name in ("x", "y"))
        return x[y >= 0], y[y >= 0]

    x, y = pairs(train)
    table = np.zeros((128, 128), int)
    np.add.at(table, (x, y), 1)
    x, y = pairs(test)
    return float(np.mean(table.argmax(1)[x] == y))


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
