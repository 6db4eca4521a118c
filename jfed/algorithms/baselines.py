"""What a federated method is compared with: every client alone, and all data in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import tree
from jfed.algorithms._work import optimizer_of, same, specialised
from jfed.core import Algorithm, ClientWork, Population, Traffic


def local_only(work: ClientWork, *, num_clients: int, **options) -> Algorithm:
    """Every client trains its own model, and none is ever sent.

    `params` of its state is the mean of the clients' models; `personal` is a client's own.

    Args:
      work: usually `local.sgd(...)`; its carry has a field `params`.
      num_clients: clients in the population, N.
      **options: `client_map` of `federated`.
    """

    def own(shared, client):
        return shared._replace(params=client.state)

    def finish_fn(shared, client, carry):
        _, added = work.finish(own(shared, client), client, carry)
        return ((), carry.params), added

    def update_fn(mean, state, params):
        return jax.tree.map(jnp.zeros_like, params), state

    inner = specialised(
        "local_only",
        work._replace(
            start=lambda shared, client: work.start(own(shared, client), client),
            step=lambda shared, client, carry, t: work.step(own(shared, client), client, carry, t),
            finish=finish_fn,
        ),
        options,
        uplink=None,
        aggregator=None,
        server=optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn),
        num_clients=num_clients,
        memory=same,
        message=lambda params: (),
    )

    return _without_traffic(inner)._replace(
        params=lambda state: jax.tree.map(lambda x: jnp.mean(x, 0), state.memory),
        personal=lambda state, i: tree.take(state.memory, i),
    )


def centralised(work: ClientWork, **options) -> Algorithm:
    """All data in one place: a population of one client (`pooled`), whose optimizer remembers.

    Its rounds send nothing; what bringing the data there costs is `data.upload_bytes`.

    Args:
      work: usually `local.sgd(...)`; its carry has a field `optimizer`. A round is its epochs.
      **options: `client_map` of `federated`.

    Raises:
      ValueError: if the work cannot be remade.
    """

    def finish_fn(shared, client, carry):
        change, added = work.finish(shared, client, carry)
        return (change, carry.optimizer), added

    def start_fn(shared, client):
        return work.start(shared, client)._replace(optimizer=client.state)

    return _without_traffic(
        specialised(
            "centralised",
            work._replace(start=start_fn, finish=finish_fn),
            options,
            num_clients=1,
            memory=optimizer_of("centralised", work).init,
        )
    )


def _without_traffic(algorithm: Algorithm) -> Algorithm:
    def round_fn(state, cohort, key):
        state, metrics = algorithm.round(state, cohort, key)
        nothing = jnp.zeros(cohort.ids.shape, jnp.uint32)
        return state, metrics | {"traffic": Traffic(cohort.ids, nothing, nothing)}

    return algorithm._replace(round=round_fn)


def pooled(population: Population) -> Population:
    """The clients' rows as those of one client; rows that are nobody's are left out. Not for traced populations.

    >>> print(pooled(Population(jnp.arange(5.0), jnp.array([0, 2]), jnp.array([2, 3]))).size)
    [5]
    """
    start, size = np.asarray(population.start), np.asarray(population.size)
    rows = np.concatenate([np.arange(first, first + count) for first, count in zip(start, size, strict=True)])
    examples = population.examples
    if any(not np.array_equal(rows, np.arange(leaf.shape[0])) for leaf in jax.tree.leaves(examples)):
        examples = tree.take(examples, jnp.asarray(rows))
    return Population(examples, jnp.zeros(1, jnp.int32), jnp.array([rows.size], jnp.int32))
