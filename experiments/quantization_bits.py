"""What quantization costs and saves, bit by bit.

Claim: the bytes of an update fall linearly with the bits of a number, and accuracy stays down to two of them, rounded
at random, or to the nearest with error feedback.

| bits | a message | stochastic, % | nearest, %  | with error feedback, % |
|------|-----------|---------------|-------------|------------------------|
|    1 |   24.9 kB | 82.1 ± 1.6    | 44.1 ± 2.3  | 58.1 ± 5.2             |
|    2 |   49.9 kB | 82.8 ± 0.8    | 79.9 ± 0.9  | 82.5 ± 0.7             |
|    3 |   74.8 kB | 82.8 ± 0.9    | 82.5 ± 0.6  | 82.7 ± 0.7             |
|    4 |   99.7 kB | 82.8 ± 0.8    | 82.7 ± 0.7  | 82.8 ± 0.9             |
|    8 |  199.3 kB | 82.8 ± 0.6    | 82.8 ± 0.6  | 82.8 ± 0.7             |
|   32 |  796.8 kB | 82.8 ± 0.6    |             |                        |

The 2NN on the images that come with jfed, 100 clients, Dirichlet(.5), ten a round, 100 rounds; mean test accuracy of
the last three evaluations, mean and deviation of three seeds. A message takes 24,899.6 bytes for each bit of width,
d / 8 being 24,901, and 54 besides; no width is further than 0.02 % from that line. One bit to the nearest knows 0 and
one other level: for one bit there are signs.

Source: the claim of lecture notes on decentralised learning, that cost is linear in bit width; operators as in
`jfed.compress.quantize`.

Command: python experiments/quantization_bits.py --bits 1 2 3 4 8 32
Expected: the table above; without options ten widths.
Time: four minutes on two CPU cores, beside other work.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from jfed import algorithms, clients, compress, core, data, experiment, local, models, plot, report, run, sampling, tree

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3
    rounds: int = 100
    every: int = 10  # rounds between evaluations
    num_clients: int = 100
    cohort: int = 10
    epochs: int = 2
    batch_size: int = 20
    learning_rate: float = 0.1
    alpha: float = 0.5
    bits: tuple[int, ...] = BITS


SMOKE = {"num_clients": 50, "cohort": 5, "rounds": 4, "every": 2, "epochs": 1, "bits": (1, 32)}


def main(config: Config) -> None:
    """Trains at every width, then shows a table and two pictures."""
    if odd := sorted(set(config.bits) - set(BITS)):
        raise ValueError(f"quantization_bits(bits={odd}): choose from {', '.join(map(str, BITS))}.")
    if len(set(config.bits)) < 2:
        raise ValueError(f"quantization_bits(bits={list(config.bits)}): a line needs two widths; add another.")
    train, test = data.fashion_small()
    owner = data.partition.dirichlet(
        jax.random.key(0), train["y"], num_clients=config.num_clients, alpha=config.alpha, min_size=10
    )
    population = data.by_owner(train, owner, num_classes=10)
    kinds = ("stochastic", "nearest", "error feedback")
    cells = {
        f"{kind.replace(' ', '_')}_{bits}": lambda kind=kind, bits=bits: trained(config, population, test, kind, bits)
        for kind in kinds
        for bits in config.bits
        if bits <= 8 or kind == "stochastic"
    }
    whole, results = experiment.over_cells("quantization_bits", config, cells)
    rows, summary, curves = [], {"seeds": config.seeds}, {kind: ([], []) for kind in kinds}
    for bits in config.bits:
        row = {"bits": bits}
        for kind in kinds:
            found = results.get(f"{kind.replace(' ', '_')}_{bits}")
            if found is None:
                continue
            accuracy = 100 * np.array(found["accuracy"])
            row |= {"a message": report.human_bytes(found["message"]), f"{kind}, %": report.mean_and_std(accuracy)}
            summary |= report.spread(f"{kind.replace(' ', '_')}_{bits}", accuracy)
            curves[kind][0].append(bits)
            curves[kind][1].append(accuracy.mean())
        rows.append(row)
    message = np.array([results[f"stochastic_{bits}"]["message"] for bits in config.bits], float)
    slope, base = np.polyfit(config.bits, message, 1)
    off = np.abs(message - (slope * np.array(config.bits) + base)) / message
    summary |= {"bytes_a_bit": float(slope), "bytes_at_0_bits": float(base), "largest_deviation": float(off.max())}
    print(report.table(f"After {config.rounds} rounds", rows), "\n")
    print(
        f"A message takes {slope:.1f} bytes for each bit of width and {base:.0f} besides; no width is further than "
        f"{100 * off.max():.2f} % from that line.\n"
    )
    plot.plot_curves(
        whole.folder / "bytes.png",
        {"a client's message": (config.bits, message / 1e3)},
        xlabel="bits a number",
        ylabel="kB",
        title="Bytes are linear in the bits",
    )
    plot.plot_curves(
        whole.folder / "accuracy.png",
        {kind: curve for kind, curve in curves.items() if curve[0]},
        xlabel="bits a number",
        ylabel=f"test accuracy after {config.rounds} rounds, %",
        title="Accuracy by the bits of an update",
    )
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def trained(config: Config, population: core.Population, test: dict, kind: str, bits: int) -> dict[str, Any]:
    """Final accuracy of every seed at a width, and the bytes of a message."""
    model = models.two_nn()
    loss = models.cross_entropy(model)
    work = local.sgd(loss, optax.sgd(config.learning_rate), batch_size=config.batch_size, epochs=config.epochs)
    client_map, place = experiment.over_devices(clients.lanes(1))
    algorithm = algorithms.fedavg(
        work, uplink=uplink_of(kind, bits), client_map=client_map, num_clients=config.num_clients
    )
    sampler, judge = sampling.uniform(config.cohort, steps=work.steps), models.metrics(model)
    accuracy = []
    for seed in range(config.seeds):
        start, key = jax.random.split(jax.random.key(seed))
        _, metrics = run.scan_rounds(
            algorithm,
            sampler,
            place(population),
            place(algorithm.init(model.init(start))),
            place(key),
            rounds=config.rounds,
            every=config.every,
            judge=judge,
            examples=place(test),
        )
        # The mean of the last evaluations: single ones vary.
        accuracy.append(float(metrics["judged"]["accuracy"][-3:].mean()))
    message = int(metrics["traffic"].up.max())
    dense = tree.nbytes(jax.eval_shape(model.init, jax.random.key(0)))
    assert (bits == 32) == (message == dense)
    return {"accuracy": accuracy, "message": message}


def uplink_of(kind: str, bits: int) -> optax.GradientTransformation | None:
    """The uplink of a width: from 16 bits on floats, below that a grid."""
    if bits == 32:
        return None
    if bits == 16:
        return compress.low_precision("bfloat16")
    if kind == "stochastic":
        return compress.quantize(bits)
    nearest = compress.quantize(bits, rounding="nearest")
    return nearest if kind == "nearest" else compress.error_feedback(nearest, refuse=bits > 1)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
