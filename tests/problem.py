"""One small federated problem for all tests: softmax regression, twelve ragged clients.

Tests share it, and its shapes, so that few programs are compiled.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jfed import shuffle
from jfed.core import Cohort, Population, make_cohort

FEATURES, CLASSES, CLIENTS = 4, 3, 12
SIZES = np.array([7, 1, 5, 12, 3, 9, 2, 6, 4, 8, 1, 10], np.int32)


def make_population() -> Population:
    rng = np.random.default_rng(0)
    rows = int(SIZES.sum())
    start = np.concatenate([[0], np.cumsum(SIZES)[:-1]])
    examples = {
        "x": jnp.asarray(rng.normal(size=(rows, FEATURES)), jnp.float32),
        "y": jnp.asarray(rng.integers(0, CLASSES, rows), jnp.int32),
    }
    return Population(examples, jnp.asarray(start, jnp.int32), jnp.asarray(SIZES))


POPULATION = make_population()
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(1).normal(size=(FEATURES, CLASSES)) * 0.3, jnp.float32),
    "b": jnp.asarray([0.1, -0.2, 0.0], jnp.float32),
}


def logits(params, x):
    return x @ params["w"] + params["b"][None]


def loss(params, batch, key):
    del key
    z = logits(params, batch["x"])
    return jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, batch["y"][:, None], 1)[:, 0]


def metrics(params, batch):
    one = jnp.ones(batch["y"].shape)
    hit = jnp.argmax(logits(params, batch["x"]), 1) == batch["y"]
    return {"loss": (loss(params, batch, None), one), "accuracy": (hit.astype(jnp.float32), one)}


def cohort_of(ids, work, **options) -> Cohort:
    return make_cohort(POPULATION, jnp.asarray(ids), steps=work.steps, **options)


def examples_of(i: int) -> dict:
    rows = slice(int(POPULATION.start[i]), int(POPULATION.start[i]) + int(SIZES[i]))
    return {"x": np.asarray(POPULATION.examples["x"][rows]), "y": np.asarray(POPULATION.examples["y"][rows])}


def numpy_gradient(params, x, y):
    """Gradient of the mean cross-entropy in float64, by the formula and not by differentiation."""
    z = x @ params["w"] + params["b"]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return {"w": x.T @ p / len(y), "b": p.mean(0)}


def numpy_sgd_client(params, i, key, *, learning_rate, batch_size, epochs):
    """ClientUpdate of McMahan et al. 2017, Algorithm 1, with the kit's batch order; float64."""
    data = examples_of(i)
    w = {k: np.asarray(v, np.float64) for k, v in params.items()}
    words = shuffle.draw(jax.random.fold_in(key, i))
    n = int(SIZES[i])
    for epoch in range(epochs):
        order = np.asarray(shuffle.position(words, jnp.arange(n), n, epoch=epoch))
        for first in range(0, n, batch_size):
            rows = order[first : first + batch_size]
            g = numpy_gradient(w, data["x"][rows], data["y"][rows])
            w = {k: w[k] - learning_rate * g[k] for k in w}
    return w


def close(a, b, tolerance=1e-5):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)
