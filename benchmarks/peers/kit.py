"""jfed itself: FedAvg from public names, clients dealt to all cores.

Variants: "best" runs as is fastest for the task: clients dealt to one CPU device a core, but for the cnn, whose
operations are large enough to be split among the cores, and small models whose clients all take the same steps,
which train side by side with no schedule. "single" keeps to one device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from protocol import Job, Peer, mean_over, serve

from jfed import algorithms, clients, core, local, mesh, models, run, sampling

# Clients training at once on each device.
WIDTH = {
    "cpu": {"2nn": 1, "cnn": 1, "lstm": 1, "logreg": 16},
    "gpu": {"2nn": 64, "cnn": 64, "lstm": 64, "logreg": 1024},
}


def build(job: Job) -> Peer:
    """The peer; counts what is compiled after its first round."""
    alike = job.task == "logreg" and np.ptp(job.size) == 0
    if job.variant == "best" and job.task != "cnn" and not alike:
        jax.config.update("jax_num_cpu_devices", job.cores)
    model = model_of(job)
    loss = models.cross_entropy(model)
    work = local.sgd(loss, optax.sgd(job.learning_rate), batch_size=job.batch_size)
    client_map = clients.vectorised() if alike else clients.lanes(WIDTH[jax.default_backend()][job.task])
    devices = mesh.make()
    if devices.size > 1:
        client_map = clients.sharded(devices, client_map)
    fedavg = algorithms.fedavg(work, client_map=client_map)
    sampler = sampling.schedule(job.cohorts, steps=work.steps)
    population = core.Population({"x": job.x, "y": job.y}, job.start, job.size)
    population = mesh.replicate(population, devices)
    key = mesh.replicate(jax.random.key(0), devices)
    now = {"round": 0, "state": mesh.replicate(fedavg.init(tree_of(job.params)), devices)}
    compiled: list[int] = []  # the round during which each program was compiled
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(now["round"]) if "backend_compile" in event else None
    )

    def one_round(ids: np.ndarray) -> None:
        state, metrics = run.scan_rounds(
            fedavg, sampler, population, now["state"], key, rounds=1, start=np.int32(now["round"])
        )
        now.update(state=jax.block_until_ready(state), round=now["round"] + 1)

    judge = jax.jit(loss)

    def loss_of(params: dict) -> float:
        return mean_over(job, lambda x, y: np.asarray(judge(params, {"x": x, "y": y})))

    def total_loss() -> float:
        seen = len(compiled)
        value = loss_of(fedavg.params(now["state"]))
        del compiled[seen:]  # judging is no part of a round
        return value

    def report() -> dict:
        return {"compiled_later": sum(r > 0 for r in compiled), "initial_loss": loss_of(tree_of(job.params))}

    return Peer(one_round, total_loss, report)


def model_of(job: Job) -> models.Model:
    """The task's model from the zoo, or by hand where the zoo has none."""
    if job.task == "2nn":
        return models.two_nn()
    if job.task == "logreg":
        return models.logistic_regression(60, 10)
    if job.task == "lstm":
        return models.char_lstm(job.params["embed/embedding"].shape[0], hidden=128, layers=1)

    def pool(x):
        if job.pooling == "own":
            return models.max_pool(x)
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

    def conv(p, x):
        return models.conv2d(x, p["kernel"], padding="VALID") + p["bias"][None, None, None]

    def layer(p, x):
        return models.linear(x, p["kernel"]) + p["bias"][None]

    def apply(p, x):
        x = jax.nn.relu(conv(p["conv_0"], x))
        x = jax.nn.relu(pool(conv(p["conv_1"], x)))  # max and relu commute
        x = jax.nn.relu(layer(p["dense_0"], x.reshape(x.shape[0], -1)))
        return layer(p["dense_1"], x)

    return models.from_pair(lambda key: tree_of(job.params), apply)


def tree_of(params: dict[str, np.ndarray]) -> dict:
    """Params as the zoo nests them."""
    tree: dict = {}
    for path, value in params.items():
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = jnp.asarray(value)
    return tree


if __name__ == "__main__":
    serve(build)
