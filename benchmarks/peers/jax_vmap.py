"""Hand-written JAX, the cohort side by side: `vmap` over clients, masked, until the longest is done."""

import jax
import jax.numpy as jnp
import numpy as np
from jax_models import losses_of
from protocol import Job, Peer, mean_over, padded, serve


def build(job: Job) -> Peer:
    """The peer; the number of steps is the cohort's largest, known at run time, so nothing is compiled twice."""
    losses = losses_of(job.task, job.pooling)
    x, y = jnp.asarray(job.x), jnp.asarray(job.y)
    state = {"params": jax.tree.map(jnp.asarray, job.params)}
    rng = np.random.default_rng(0)

    def batch_loss(params, x, y, real):
        return jnp.sum(jnp.where(real, losses(params, x, y), 0.0)) / jnp.maximum(jnp.sum(real), 1)

    def round_fn(params, x, y, rows, real, steps, weight):
        def step(t, clients):  # where a client is done, no example is real and its gradient is 0
            at = rows[:, t]
            g = jax.vmap(jax.grad(batch_loss))(clients, x[at], y[at], real[:, t])
            return jax.tree.map(lambda p, g: p - job.learning_rate * g, clients, g)

        clients = jax.tree.map(lambda p: jnp.broadcast_to(p, (rows.shape[0], *p.shape)), params)
        clients = jax.lax.fori_loop(0, jnp.max(steps), step, clients)
        return jax.tree.map(lambda p: jnp.tensordot(weight / jnp.sum(weight), p, 1), clients)

    program, judge = jax.jit(round_fn, donate_argnums=0), jax.jit(losses)

    def one_round(ids: np.ndarray) -> None:
        rows, real, steps = padded(job, ids, rng)
        weight = job.size[ids].astype(np.float32)
        state["params"] = jax.block_until_ready(program(state["params"], x, y, rows, real, steps, weight))

    return Peer(one_round, lambda: mean_over(job, lambda x, y: np.asarray(judge(state["params"], x, y))))


if __name__ == "__main__":
    serve(build)
