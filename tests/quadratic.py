"""Quadratics `F_i(x) = 1/2 sum_d a_id (x_d - b_id)^2`, one example a client: theory can be checked on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import local, run, sampling
from jfed.core import Population

DIMENSIONS, CLIENTS = 3, 8


def population(spread=1.0, *, curvatures=True) -> Population:
    """Eight clients whose optima lie `spread` apart, with unlike curvatures or all 1."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=(CLIENTS, DIMENSIONS))
    b = 2.0 + spread * (b - b.mean(0))
    a = rng.uniform(0.3, 1.0, size=b.shape) if curvatures else np.ones_like(b)
    examples = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return Population(examples, jnp.arange(CLIENTS, dtype=jnp.int32), jnp.ones(CLIENTS, jnp.int32))


def loss(x, batch, key):
    return jnp.sum(batch["a"] * (x[None] - batch["b"]) ** 2, 1) / 2


def optimum(population):
    """Of the sum of all clients' losses."""
    a, b = (np.asarray(population.examples[name], np.float64) for name in "ab")
    return (a * b).sum(0) / a.sum(0)


def work(steps, learning_rate=0.1):
    return local.sgd(loss, optax.sgd(learning_rate), batch_size=1, epochs=steps)


def distances(algorithm, population, work, *, rounds, sampler=None):
    """From the optimum, after each round of full participation from 0; [rounds]."""
    sampler = sampling.full(steps=work.steps) if sampler is None else sampler
    state, found = algorithm.init(jnp.zeros(DIMENSIONS)), []
    moments = run.iterate(algorithm, sampler, population, state, jax.random.key(0), rounds=rounds)
    for moment in moments:
        found.append(np.linalg.norm(algorithm.params(moment.state) - optimum(population)))
    return np.array(found)


def rounds_to(distances, target):
    """Rounds until the distance is below `target` for good; infinity if it is not."""
    above = np.flatnonzero(distances >= target)
    last = above[-1] + 1 if above.size else 0
    return np.inf if last == distances.size else last + 1
