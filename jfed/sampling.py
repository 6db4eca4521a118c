"""Who takes part in a round. A sampler is a pure function `(population, key, t) -> Cohort`.

All of them run inside a compiled program; `t` is the number of rounds completed before. `steps` is
`work.steps`, which tells how many local steps a client of a given size completes. Weights are each
client's number of examples n_k, as in FedAvg, except where clients are drawn in proportion to it;
`equally_weighted` makes them all alike. Samplers around a sampler, for stragglers and availability, are
in `jfed.availability`.

Letters: N clients in the population, C clients in a cohort, T rounds of a schedule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate
from jfed.core import Cohort, Population, Sampler, make_cohort

_MANY = 2**11  # clients; below, a permutation of all is as quick

Steps = Callable[[jax.Array], jax.Array]


def uniform(cohort_size: int, *, steps: Steps) -> Sampler:
    """C different clients, every set of C equally likely (McMahan et al. 2017, arXiv:1602.05629).

    Raises:
      ValueError: if `cohort_size` is not a whole number of at least 1; when the sampler meets a
        population of fewer clients.
    """
    _validate.at_least_one("uniform", "cohort_size", cohort_size, "a good start is a tenth of the clients")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        n = _clients_for("uniform", cohort_size, population)
        ids = _distinct(key, n, cohort_size)
        return make_cohort(population, ids, steps=steps)

    return sample


def with_replacement(cohort_size: int, *, steps: Steps) -> Sampler:
    """C independent uniform draws; a client drawn twice counts twice, with the same local training.

    Raises:
      ValueError: if `cohort_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("with_replacement", "cohort_size", cohort_size, "a good start is a tenth of the clients")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        ids = jax.random.randint(key, (cohort_size,), 0, population.size.shape[0])
        return make_cohort(population, ids, steps=steps)

    return sample


def by_size(cohort_size: int, *, steps: Steps) -> Sampler:
    """C independent draws, client k with probability n_k / n, averaged with equal weights.

    The average is then unbiased for the mean over all examples (Li et al. 2020, arXiv:1907.02189,
    scheme I). A client drawn twice counts twice. Clients of a population of 2^31 rows or more, which
    only a stream has, weigh NaN: a round counts them under `"dropped"`.

    Raises:
      ValueError: if `cohort_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("by_size", "cohort_size", cohort_size, "a good start is a tenth of the clients")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        # Integer cumulative sizes: float32 probabilities of a million clients would not add up.
        last_row = jnp.cumsum(population.size)
        row = jax.random.randint(key, (cohort_size,), 0, last_row[-1])
        countable = jnp.all(last_row[1:] >= last_row[:-1])  # sums that wrap fall
        ids = jnp.where(countable, jnp.searchsorted(last_row, row, side="right"), 0)
        cohort = make_cohort(population, ids, steps=steps, weight=jnp.ones(cohort_size))
        return cohort._replace(weight=jnp.where(countable, cohort.weight, jnp.nan))

    return sample


def poisson(rate: float, *, capacity: int, steps: Steps) -> Sampler:
    """Every client independently with probability `rate`; the cohort's size varies, its shape does not.

    Slots that are not needed are empty. Should more than `capacity` clients come up, a random
    `capacity` of them stay: choose it a few standard deviations above `rate * N`.

    Raises:
      ValueError: if `rate` is not in [0, 1], or `capacity` not a whole number of at least 1; when
        the sampler meets a population of fewer than `capacity` clients.
    """
    _validate.within("poisson", "rate", rate, 0.0, 1.0, "it is the probability that a client takes part")
    _validate.at_least_one("poisson", "capacity", capacity, "a good start is 1.5 * rate * N")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        n = _clients_for("poisson", capacity, population, name="capacity")
        # The lowest draws are a uniform choice among those below the rate.
        lowest, ids = jax.lax.top_k(-jax.random.uniform(key, (n,)), capacity)
        return make_cohort(population, jnp.where(-lowest < rate, ids, n), steps=steps)

    return sample


def full(*, steps: Steps) -> Sampler:
    """Every client, every round."""

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        return make_cohort(population, jnp.arange(population.size.shape[0]), steps=steps)

    return sample


def schedule(ids: np.ndarray, *, steps: Steps) -> Sampler:
    """The cohorts given: row `t` in round `t`, starting over after the last.

    Args:
      ids: [T, C] integers; a number outside [0, N), such as -1, leaves its slot empty.
      steps: local steps by size.

    Raises:
      ValueError: if `ids` is not a table of integers.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"schedule(ids of shape {ids.shape} and dtype {ids.dtype}): ids must be integers [T, C], "
            "one row of client numbers a round; fill short rows with -1."
        )

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        return make_cohort(population, jnp.asarray(ids)[t % ids.shape[0]], steps=steps)

    return sample


def equally_weighted(sampler: Sampler) -> Sampler:
    """The clients of another sampler, each of the same weight: 1 for everybody present.

    Their mean is then over clients, whatever their sizes. Empty slots keep a weight of 0, and a weight that is
    not a number stays so.

    Args:
      sampler: draws the cohort, with the key given here.

    >>> population = Population((), jnp.array([0, 2, 5]), jnp.array([2, 3, 0]))
    >>> print(equally_weighted(full(steps=lambda size: size))(population, jax.random.key(0), 0).weight)
    [1. 1. 0.]
    """

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        cohort = sampler(population, key, t)
        return cohort._replace(weight=jnp.where(cohort.weight > 0, 1.0, cohort.weight))

    return sample


def _clients_for(where: str, wanted: int, population: Population, name: str = "cohort_size") -> int:
    n = population.size.shape[0]
    if wanted > n:
        raise ValueError(f"{where}({name}={wanted}): the population has {n} clients; ask for at most {n}.")
    return n


def _distinct(key: jax.Array, n: int, count: int) -> jax.Array:
    """`count` different numbers below `n`, every ordered choice equally likely: [count] int32."""

    def by_permutation(key):
        return jax.random.choice(key, n, (count,), replace=False).astype(jnp.int32)

    if n < _MANY or n < 4 * count:
        return by_permutation(key)
    # Sorting a million clients would cost more than training a cohort of small ones. The first `count`
    # different values among independent draws have the same distribution. (Under `vmap` both ways are computed.)
    draw_key, rare_key = jax.random.split(key)
    drawn = jax.random.randint(draw_key, (2 * count,), 0, n, jnp.int32)
    turn = jnp.arange(2 * count)
    new = jnp.full(n, 2 * count).at[drawn].min(turn)[drawn] == turn  # nobody drew it before
    return jax.lax.cond(
        jnp.sum(new) >= count,
        lambda: drawn[jnp.nonzero(new, size=count)[0]],
        lambda: by_permutation(rare_key),
    )
