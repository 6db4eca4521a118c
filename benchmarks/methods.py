"""What a round of each method costs beside a round of FedAvg.

The task is FedAvg's 2NN (199,210 parameters) on images of MNIST's shape: 100 clients of 100 examples, 20 a
round, batch 10, one epoch. Rounds of all methods take turns in one process, so that a machine that
drifts harms none; the figure is the median of the ratios to FedAvg's round of the same turn. Bytes are
those of one message.

Command: python benchmarks/methods.py
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import algorithms, availability, clients, data, local, mesh, models, report, sampling

N, EACH, COHORT = 100, 100, 20


def methods(model, work, learning_rate: float, client_map, public) -> dict:
    """Name -> algorithm, all on the same work."""
    own = {"num_clients": N, "client_map": client_map}
    plain = {"client_map": client_map}
    a, kind = algorithms, algorithms.Kind(model.apply, work)
    taught = {"kind_of": [0] * N, "public": public, "public_size": EACH} | plain
    head = {"is_local": lambda path: path.startswith("dense_2"), **own}
    seconds = availability.exponential(1.0)  # simulated: how long a client is away
    return {
        "fedavg": a.fedavg(work, **plain),
        "fedprox": a.fedprox(work, mu=0.1, **plain),
        "fedavgm": a.fedavgm(work, **plain),
        "fedadagrad": a.fedadagrad(work, learning_rate=0.01, **plain),
        "fedadam": a.fedadam(work, learning_rate=0.01, **plain),
        "fedyogi": a.fedyogi(work, learning_rate=0.01, **plain),
        "fednova": a.fednova(work, **plain),
        "qfedavg": a.qfedavg(work, q=1.0, learning_rate=learning_rate, **plain),
        "afl": a.afl(work, learning_rate=0.1, **own),
        "scaffold": a.scaffold(work, **own),
        "feddyn": a.feddyn(work, alpha=0.01, **own),
        "mimelite": a.mimelite(work, **plain),
        "mime": a.mime(work, **plain),
        "fedper": a.fedper(work, **head),
        "fedrep": a.fedrep(work, head_epochs=1, **head),
        "lg_fedavg": a.lg_fedavg(work, **head | {"is_local": lambda path: not path.startswith("dense_2")}),
        "ditto": a.ditto(work, strength=0.1, **own),
        "apfl": a.apfl(work, alpha=0.5, **own),
        "pfedme (K = 5)": a.pfedme(work, strength=15.0, personal_learning_rate=0.1, **own),
        "perfedavg_fo": a.perfedavg_fo(work, alpha=0.01, **plain),
        "perfedavg_hf": a.perfedavg_hf(work, alpha=0.01, **plain),
        "perfedavg": a.perfedavg(work, alpha=0.01, **plain),
        "local_only": a.local_only(work, **own),
        "ifca (3 clusters)": a.ifca(work, clusters=3, **own),
        "fedbuff (all return)": a.fedbuff(work, concurrency=COHORT, buffer=COHORT, duration=seconds, **plain),
        "fedasync (one returns)": a.fedasync(work, concurrency=COHORT, mixing=0.6, duration=seconds, **plain),
        "fedmd": a.fedmd([kind], digest=optax.sgd(learning_rate), digest_batch=10, **taught),
        "feddf": a.feddf([kind], distill=optax.sgd(learning_rate), distill_batch=10, **taught),
    }


def main() -> None:
    """Times rounds in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help="methods beside fedavg")
    chosen = parser.parse_args()
    mesh.use_cores()
    rng = np.random.default_rng(0)
    examples = {
        "x": rng.random((N * EACH, 28, 28, 1), np.float32),
        "y": rng.integers(0, 10, N * EACH).astype(np.int32),
    }
    devices = mesh.make()
    population = mesh.replicate(data.population(examples, [EACH] * N), devices)
    model, learning_rate = models.two_nn(), 0.05
    work = local.sgd(models.cross_entropy(model), optax.sgd(learning_rate), batch_size=10)
    sampler = sampling.uniform(COHORT, steps=work.steps)
    client_map = clients.sharded(devices, clients.lanes(1))
    public = rng.random((EACH, 28, 28, 1), np.float32)
    table = methods(model, work, learning_rate, client_map, public)
    if unknown := set(chosen.only) - set(table):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose among {', '.join(table)}")
    if chosen.only:
        table = {name: algorithm for name, algorithm in table.items() if name in ("fedavg", *chosen.only)}
    params = model.init(jax.random.key(0))
    programs, states, metrics = {}, {}, {}
    with report.progress(len(table), "compiling", unit="methods") as advance:
        for name, algorithm in table.items():

            def one_round(state, population, key, t, algorithm=algorithm):
                sample_key, round_key = jax.random.split(jax.random.fold_in(key, t))
                return algorithm.round(state, sampler(population, sample_key, t), round_key)

            start = params
            if name.startswith("ifca"):
                start = jax.tree.map(lambda *x: jnp.stack(x), *(model.init(jax.random.key(i)) for i in range(3)))
            if name in ("fedmd", "feddf"):  # one kind of model
                start = (params,)
            states[name] = mesh.replicate(algorithm.init(start), devices)
            programs[name] = jax.jit(one_round, donate_argnums=0)
            states[name], metrics[name] = jax.block_until_ready(
                programs[name](states[name], population, jax.random.key(1), 0)
            )
            advance(1)
    took: dict[str, list[float]] = {name: [] for name in table}
    with report.progress(chosen.turns, "turns", unit="turns") as advance:
        for turn in range(1, chosen.turns + 1):
            for name in table:
                began = time.perf_counter()
                states[name], metrics[name] = jax.block_until_ready(
                    programs[name](states[name], population, jax.random.key(1), turn)
                )
                took[name].append(time.perf_counter() - began)
            advance(1)
    rows = []
    for name in table:
        ratios = [mine / its for mine, its in zip(took[name], took["fedavg"], strict=True)]
        rows.append(
            {
                "method": name,
                "median": f"{1e3 * statistics.median(took[name]):.0f} ms",
                "to FedAvg's": f"{statistics.median(ratios):.2f}",
                "sent to a client": report.human_bytes(int(metrics[name]["traffic"].down.max())),
                "by it": report.human_bytes(int(metrics[name]["traffic"].up.max())),
            }
        )
    print(report.table(f"A round of {COHORT} clients of {EACH} examples, 2NN, median of {chosen.turns}", rows))


if __name__ == "__main__":
    main()
