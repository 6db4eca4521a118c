"""The types everything in jfed is written with.

A method is an `Algorithm`: three pure functions. A round of it hands one `ClientWork`, the
mathematics of a single client, to a `ClientMap`, which decides how many clients run at once and on
how many devices. Data are a `Population`, the clients of one round a `Cohort`.

Letters: N clients in the population, C clients in a cohort, E examples, T rounds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate

Tree = Any
"""Any pytree of arrays."""


class Population(NamedTuple):
    """Every client's examples end to end, without padding; client `i` owns rows `start[i] + [0, size[i])`."""

    examples: Tree  # leaves [E, ...]
    start: jax.Array  # [N] int32, first row of each client
    size: jax.Array  # [N] int32, number of rows


class Cohort(NamedTuple):
    """The clients of one round. A single client is a `Cohort` of scalars, its `examples` left out.

    A client that occurs twice must have the same `steps` and `weight` both times.
    """

    ids: jax.Array  # [C] int32, row in the population; N = empty slot, its writes are dropped
    start: jax.Array  # [C] int32, first row in `examples`
    size: jax.Array  # [C] int32, number of rows; 0 in an empty slot
    steps: jax.Array  # [C] int32, local steps this client completes
    weight: jax.Array  # [C] float32, aggregation weight; 0 = absent, and with no steps not even looked at
    examples: Tree = ()  # leaves [E, ...], the rows that `start` and `size` speak of
    state: Tree = ()  # leaves [C, ...], what a method remembers of each client


class Traffic(NamedTuple):
    """Bytes of a round, client by client; all 0 of those that sent or were sent nothing."""

    ids: jax.Array  # [C] int32, as in the cohort
    up: jax.Array  # [C] uint32, sent by the client; float32 from 2 GiB on
    down: jax.Array  # [C] uint32, sent to the client; float32 from 2 GiB on
    edges: Tree = ()  # of peers: [S, C], what each heard in each slot of its topology


Sampler = Callable[[Population, jax.Array, jax.Array], Cohort]
"""`(population, key, t) -> Cohort`: who takes part in round t; see `jfed.sampling`."""


class Shared(NamedTuple):
    """What all clients of a round see alike."""

    params: Tree  # the round's global model
    examples: Tree  # leaves [E, ...]
    key: jax.Array  # the round's key; client i draws from `fold_in(key, i)`
    round: jax.Array  # [] int32, rounds completed before this one
    extra: Tree = ()  # whatever else a method sends to everyone


class ClientWork(NamedTuple):
    """What ONE client does in a round, written without a client axis."""

    steps: Callable  # (size) -> local steps of a client that completes its work; elementwise
    start: Callable  # (shared, client) -> carry
    step: Callable  # (shared, client, carry, t) -> carry       one local step, 0 <= t < client.steps
    finish: Callable  # (shared, client, carry) -> (kept, added)
    # Of work that trains by gradients, for methods that change how it does; its carry has a field `params`.
    remake: Callable | None = None  # (change) -> ClientWork; change: (gradient, optimizer) -> (gradient, optimizer)
    whole: Callable | None = None  # (shared, client, params) -> sums of loss and gradient over all its examples


class ClientMap(Protocol):
    """Runs a `ClientWork` for every client of a cohort.

    Law: the result equals running each client alone, stacking `kept` and summing `added`, whatever
    the order of clients, the number at once, and the number of devices. A client with neither steps
    nor weight is absent: its row of `kept` is zero, and it adds nothing.
    """

    def __call__(self, work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        """Returns `(kept, added)`: leaves [C, ...], and leaves without a client axis."""
        ...


class Algorithm(NamedTuple):
    """A method of distributed learning, federated or decentralised."""

    init: Callable  # params -> state
    round: Callable  # (state, cohort, key) -> (state, metrics)
    params: Callable  # state -> params, the model to evaluate
    personal: Callable | None = None  # (state, id) -> params, client id's own model, where a method has such


def make_cohort(
    population: Population,
    ids: jax.Array,
    *,
    steps: Callable[[jax.Array], jax.Array],
    weight: jax.Array | None = None,
) -> Cohort:
    """Looks up the clients `ids` in a population.

    Args:
      population: the data of all N clients.
      ids: [C] integers; one outside [0, N) makes an empty slot.
      steps: maps sizes [C] to local steps [C], usually `work.steps`.
      weight: [C] aggregation weights; by default each client's number of examples. It becomes 0
        where a client has no examples.

    Returns:
      A `Cohort` over the population's own examples (nothing is copied).

    Raises:
      ValueError: if there is no id or no client, if ids are not integers, or if the weights are
        known (not traced) and negative, not finite or all zero.

    >>> population = Population(jnp.arange(5.0), jnp.array([0, 2]), jnp.array([2, 3]))
    >>> cohort = make_cohort(population, jnp.array([1, 2]), steps=lambda size: 4 * size)
    >>> print(cohort.size, cohort.steps, cohort.weight)
    [3 0] [12  0] [3. 0.]
    """
    start, sizes = jnp.asarray(population.start), jnp.asarray(population.size)
    n, ids = sizes.shape[0], jnp.asarray(ids)
    if ids.ndim != 1 or 0 in (ids.size, n) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"make_cohort(ids of shape {ids.shape} and dtype {ids.dtype}, population of {n}): ids must be one row of "
            "at least one integer, and the population hold a client."
        )
    ids = ids.astype(jnp.int32)
    real = (ids >= 0) & (ids < n)
    ids = jnp.where(real, ids, n)
    row = jnp.minimum(ids, n - 1)
    size = jnp.where(real, sizes[row], 0)
    if weight is None:
        weight = size
    elif _validate.is_concrete(weight):
        w = np.asarray(weight)
        if not np.all(np.isfinite(w)) or np.any(w < 0) or not np.any(w > 0):
            raise ValueError(
                f"make_cohort(weight={w}): weights must be finite, at least 0 and not all 0; "
                "leave weight out to weight clients by their number of examples."
            )
    return Cohort(
        ids=ids,
        start=jnp.where(real, start[row], 0),
        size=size,
        steps=jnp.where(size > 0, steps(size), 0).astype(jnp.int32),
        weight=jnp.where(size > 0, jnp.asarray(weight, jnp.float32), 0.0),
        examples=population.examples,
    )
