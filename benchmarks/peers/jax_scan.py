"""Hand-written JAX, clients one after another: a round is one jitted scan over clients, a loop over steps inside.

Variant "best": convolutions whose gradients XLA:CPU is fast at, and pooling by reshape.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax_models import losses_of
from protocol import Job, Peer, mean_over, padded, serve


def build(job: Job) -> Peer:
    """The peer; data lie on the device, batches are rows drawn on the host."""
    best = job.variant == "best"
    losses = losses_of(job.task, "reshape" if best else job.pooling, canonical=best)
    x, y = jnp.asarray(job.x), jnp.asarray(job.y)
    state = {"params": jax.tree.map(jnp.asarray, job.params)}
    rng = np.random.default_rng(0)

    def batch_loss(params, x, y, real):
        return jnp.sum(jnp.where(real, losses(params, x, y), 0.0)) / jnp.maximum(jnp.sum(real), 1)

    def round_fn(params, x, y, rows, real, steps, weight):
        def client(total, c):
            rows, real, steps, weight = c

            def step(t, params):
                g = jax.grad(batch_loss)(params, x[rows[t]], y[rows[t]], real[t])
                return jax.tree.map(lambda p, g: p - job.learning_rate * g, params, g)

            trained = jax.lax.fori_loop(0, steps, step, params)
            return jax.tree.map(lambda s, p: s + weight * p, total, trained), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(client, zeros, (rows, real, steps, weight))
        return jax.tree.map(lambda s: s / jnp.sum(weight), total)

    program, judge = jax.jit(round_fn, donate_argnums=0), jax.jit(losses)

    def one_round(ids: np.ndarray) -> None:
        rows, real, steps = padded(job, ids, rng)
        weight = job.size[ids].astype(np.float32)
        state["params"] = jax.block_until_ready(program(state["params"], x, y, rows, real, steps, weight))

    return Peer(one_round, lambda: mean_over(job, lambda x, y: np.asarray(judge(state["params"], x, y))))


if __name__ == "__main__":
    serve(build)
