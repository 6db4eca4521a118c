"""FedJAX: its own federated averaging over in-memory client datasets.

Variants are FedJAX's backends: "jit" calls a jitted step for every batch, "pmap" one client a device.
Its batches are all full: a client's last one is filled up with examples of another pass.

FedJAX 0.0.17 uses `jax.tree_map` and so runs on JAX below 0.6.
"""

import os

import numpy as np
from protocol import Job, Peer, mean_over, serve


def build(job: Job) -> Peer:
    """The peer."""
    if job.variant == "pmap":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={job.cores}"
    import fedjax
    import jax
    import jax.numpy as jnp
    from jax_models import losses_of

    losses = losses_of(job.task, job.pooling)

    def gradient(params, batch, key):
        return jax.grad(lambda p: jnp.mean(losses(p, batch["x"], batch["y"])))(params)

    with fedjax.for_each_client_backend(job.variant):
        fedavg = fedjax.algorithms.fed_avg.federated_averaging(
            gradient,
            fedjax.optimizers.sgd(job.learning_rate),
            fedjax.optimizers.sgd(1.0),
            fedjax.ShuffleRepeatBatchHParams(batch_size=job.batch_size, num_epochs=1),
        )
    state = {"server": fedavg.init(jax.tree_util.tree_map(jnp.asarray, job.params))}
    datasets = [
        fedjax.ClientDataset({"x": job.x[first : first + n], "y": job.y[first : first + n]})
        for first, n in zip(job.start, job.size, strict=True)
    ]
    keys = list(jax.random.split(jax.random.PRNGKey(0), job.cohorts.shape[1]))  # nothing here draws from them

    def one_round(ids: np.ndarray) -> None:
        clients = [(int(i), datasets[i], key) for i, key in zip(ids, keys, strict=True)]
        server, _ = fedavg.apply(state["server"], clients)
        # The pmap backend leaves an axis of one in front of everything, at which the next round would fail.
        params = {name: server.params[name].reshape(value.shape) for name, value in job.params.items()}
        state["server"] = server.replace(params=jax.block_until_ready(params))

    judge = jax.jit(losses)
    return Peer(one_round, lambda: mean_over(job, lambda x, y: np.asarray(judge(state["server"].params, x, y))))


if __name__ == "__main__":
    serve(build)
