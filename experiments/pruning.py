"""Pruning by magnitude during federated training: accuracy and bytes by sparsity.

Claim: four fifths of the weights of the 2NN can be pruned while it trains without loss, nine tenths for a point, and
the bytes of both ways fall with them, zeros being left out and a bit for each number telling where they are.

| zeros | accuracy, % | a message | of all | coded |
|-------|-------------|-----------|--------|-------|
| 0 %   | 83.6 ± 0.8  | 796.8 kB  |      1 | 796.8 |
| 50 %  | 83.9 ± 0.9  | 424.1 kB  |  1/1.9 | 424.1 |
| 80 %  | 83.3 ± 0.9  | 185.5 kB  |  1/4.3 | 176.9 |
| 90 %  | 82.5 ± 0.9  |  99.1 kB  |  1/8.0 |  90.5 |
| 95 %  | 80.7 ± 1.0  |  50.1 kB  | 1/15.9 |  46.8 |
| 98 %  | 78.6 ± 1.3  |  24.3 kB  | 1/32.8 |  20.4 |

Test accuracy after 150 rounds, mean and deviation of three seeds; a client's message once the mask stays, from round
100 on, and as much to it; "coded", in kB, is the last model's own after lossless coding. Nothing is lost on the way.

Source: Zhu and Gupta 2017 (arXiv:1710.01878) for the schedule; that the zeros of a pruned model are compressed away,
lecture notes on decentralised learning.

Command: python experiments/pruning.py
Expected: the table above.
Time: six minutes on two CPU cores, beside other work.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from jfed import algorithms, clients, compress, core, data, experiment, local, models, plot, report, run, sampling
from jfed.compress import lossless


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3
    rounds: int = 150
    every: int = 10  # rounds between evaluations
    begin: int = 20  # round in which pruning begins
    end: int = 90  # round from which on the mask stays
    num_clients: int = 100
    cohort: int = 10
    epochs: int = 2
    batch_size: int = 20
    learning_rate: float = 0.1
    alpha: float = 0.5
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)


SMOKE = {
    "num_clients": 50,
    "cohort": 5,
    "rounds": 8,
    "every": 2,
    "begin": 1,
    "end": 4,
    "epochs": 1,
    "sparsities": (0.0, 0.9),
}


def main(config: Config) -> None:
    """Trains at every sparsity, then shows a table and a picture."""
    if not 0 <= config.begin < config.end or switch(config) >= config.rounds or config.rounds % config.every:
        raise ValueError(
            f"pruning(begin={config.begin}, end={config.end}, every={config.every}, rounds={config.rounds}): pruning "
            f"begins and ends, and rounds follow, a multiple of every and more than {switch(config)}; choose others."
        )
    train, test = data.fashion_small()
    owner = data.partition.dirichlet(
        jax.random.key(0), train["y"], num_clients=config.num_clients, alpha=config.alpha, min_size=10
    )
    population = data.by_owner(train, owner, num_classes=10)
    cells = {
        f"sparsity_{sparsity}": lambda s=sparsity: trained(config, population, test, s)
        for sparsity in config.sparsities
    }
    whole, results = experiment.over_cells("pruning", config, cells)
    rows, summary, curves = [], {"seeds": config.seeds}, {}
    for sparsity in config.sparsities:
        found = results[f"sparsity_{sparsity}"]
        accuracy = 100 * np.array(found["accuracy"])  # [seeds, points]
        summary |= report.spread(f"sparsity_{sparsity}", accuracy[:, -1])
        rows.append(
            {
                "zeros": f"{100 * found['zeros']:.1f} %",
                "accuracy, %": report.mean_and_std(accuracy[:, -1]),
                "a message before": report.human_bytes(found["before"]),
                "then up": report.human_bytes(found["up"]),
                "and down": report.human_bytes(found["down"]),
                "of all": f"1/{found['before'] / found['up']:.1f}",
                "coded": report.human_bytes(found["coded"]),
            }
        )
        curves[f"{sparsity:g}"] = (found["rounds"], accuracy.mean(0))
    plot.plot_curves(
        whole.folder / "accuracy.png",
        curves,
        xlabel="round",
        ylabel="test accuracy, %",
        title=f"Pruned from round {config.begin} to {config.end}, by the share of zeros",
    )
    print(report.table(f"After {config.rounds} rounds", rows), "\n")
    print(f"picture and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def trained(config: Config, population: core.Population, test: dict, sparsity: float) -> dict[str, Any]:
    """Curves of every seed, and the bytes of a message before the mask stays and after."""
    model = models.two_nn()
    optimizer = optax.chain(compress.frozen_zeros(), optax.sgd(config.learning_rate))
    work = local.sgd(models.cross_entropy(model), optimizer, batch_size=config.batch_size, epochs=config.epochs)
    schedule = compress.cubic(sparsity, begin=config.begin, end=config.end)
    server = optax.chain(optax.sgd(1.0), compress.prune(schedule))
    client_map, place = experiment.over_devices(clients.lanes(1))
    sampler = sampling.uniform(config.cohort, steps=work.steps)

    def method(link):
        # While the mask still changes the model is sent whole; then, what is not zero and where it lies.
        algorithm = algorithms.federated(work, server=server, client_map=client_map, uplink=link)
        if link is None:
            return algorithm
        return algorithms.compressed_downlink(algorithm, link, num_clients=config.num_clients, whole=link, refuse=False)

    first, whole = switch(config), method(None)
    curves, judge = [], {"every": config.every, "judge": models.metrics(model), "examples": place(test)}
    for seed in range(config.seeds):
        start, key = jax.random.split(jax.random.key(seed))
        everyone, key = place(population), place(key)
        state, before = run.scan_rounds(
            whole, sampler, everyone, place(whole.init(model.init(start))), key, rounds=first, **judge
        )
        algorithm, link = whole, optax.identity()
        if sparsity:
            link = compress.nonzeros(jax.device_get(state.params))
            algorithm = method(link)
            again = algorithm.init(state.params)
            state = place(again._replace(model=again.model._replace(server=state.server, round=state.round)))
        state, after = run.scan_rounds(
            algorithm, sampler, everyone, state, key, rounds=config.rounds - first, start=first, **judge
        )
        curves.append([*before["judged"]["accuracy"].tolist(), *after["judged"]["accuracy"].tolist()])
    params = jax.device_get(algorithm.params(state))
    message, _ = link.update(params, link.init(params))
    assert all(map(np.array_equal, jax.tree.leaves(compress.decode(message)), jax.tree.leaves(params)))
    weights = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(params) if x.ndim > 1])
    return {
        "accuracy": curves,
        "rounds": list(range(config.every, config.rounds + 1, config.every)),
        "zeros": float(np.mean(weights == 0)),
        "before": int(before["traffic"].up.max()),
        "up": int(after["traffic"].up.max()),
        "down": int(after["traffic"].down.max()),
        "coded": len(lossless.encode(jax.tree.map(np.asarray, message))),
    }


def switch(config: Config) -> int:
    """The round from which on zeros are left out: one more than the mask needs, for what was pruned last to settle."""
    return config.end + config.every - config.end % config.every


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
