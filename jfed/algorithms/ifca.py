"""IFCA: clients of a few kinds, each kind with its own model, and nobody knowing who is of which.

Every client takes the model, of k, with the lowest loss on its data, trains it, and is averaged with the
others that took it (Ghosh et al. 2020, arXiv:2006.04088, Algorithm 1, model averaging).

Letters of the paper: theta_j model of cluster j, k clusters, F_i loss of client i.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.algorithms._work import scaled, specialised, whole_of
from jfed.core import Algorithm, ClientWork


def ifca(work: ClientWork, *, clusters: int, num_clients: int, **options) -> Algorithm:
    """FedAvg with k models; `init` takes their params, leaves [k, ...], which must differ.

    `params` of its state is the model that most clients took when they last took part; `personal` is the
    one a client took, before that the same as `params`. Every client is sent all k models and sends one.

    Args:
      work: usually `local.sgd(...)`.
      clusters: k.
      num_clients: clients in the population, N.
      **options: those of `fedavg`, without `aggregator`.

    Raises:
      ValueError: if `clusters` is not a whole number of at least 1, or the work does not say what its loss is.

    >>> from jfed import local, models
    >>> model = models.logistic_regression(2, 2)
    >>> work = local.sgd(models.cross_entropy(model), optax.sgd(0.1), batch_size=4)
    >>> algorithm = ifca(work, clusters=3, num_clients=10)
    >>> state = algorithm.init(jax.vmap(model.init)(jax.random.split(jax.random.key(0), 3)))
    """
    _validate.at_least_one("ifca", "clusters", clusters, "2 to 4 are usual")
    whole = whole_of("ifca", work)

    def start_fn(shared, client):
        def loss(j):
            return whole(shared, client, tree.take(shared.params, j)).loss

        losses = jax.lax.map(loss, jnp.arange(clusters))
        # A model that has overflowed is nobody's choice.
        cluster = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf)).astype(jnp.int32)
        return cluster, work.start(of(shared, cluster), client)

    def of(shared, cluster):
        return shared._replace(params=tree.take(shared.params, cluster))

    def step_fn(shared, client, carry, t):
        cluster, carry = carry
        return cluster, work.step(of(shared, cluster), client, carry, t)

    def finish_fn(shared, client, carry):
        cluster, carry = carry
        change, added = work.finish(of(shared, cluster), client, carry)
        return ({"model": change, "cluster": jax.nn.one_hot(cluster, clusters)}, cluster), added

    def decode(message, shared):
        taken = message["cluster"]
        return {
            "model": jax.tree.map(lambda x: jnp.multiply.outer(taken.astype(x.dtype), x), message["model"]),
            "share": taken,
        }

    def update_fn(mean, state, params=None):
        del params
        share = mean["share"]
        each = 1.0 / jnp.where(share > 0, share, 1.0)  # a model nobody took stays
        return jax.vmap(scaled)(-each, mean["model"]), state

    inner = specialised(
        "ifca",
        ClientWork(work.steps, start_fn, step_fn, finish_fn),
        options,
        parts=("model",),
        aggregator=None,
        server=optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn),
        num_clients=num_clients,
        memory=lambda params: jnp.full((), -1, jnp.int32),
        message=lambda params: {"model": tree.take(params, 0), "cluster": jnp.zeros(clusters)},
        decode=decode,
    )

    def most_taken(state):
        known = (state.memory[:, None] == jnp.arange(clusters)[None]).astype(jnp.int32)
        return jnp.argmax(jnp.sum(known, 0))

    def personal(state, i):
        cluster = state.memory[i]
        return tree.take(state.params, jnp.where(cluster >= 0, cluster, most_taken(state)))

    return inner._replace(params=lambda state: tree.take(state.params, most_taken(state)), personal=personal)
