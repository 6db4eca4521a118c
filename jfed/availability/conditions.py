"""Devices that can train only at certain times, such as while charging and on WiFi.

A condition is a function `(key, ids [K], t) -> [K] bool`: who is available in round t. A client's habits,
such as its hours, come of its id or of an array [N]; chance comes of the key, and is new each round.
`available` samples from those available. Days and time zones make the clients of a round alike, which
biases training (Eichner et al. 2019, arXiv:1904.10120): give phases that go with the data to study that.

Letters: N clients in the population, K ids, C clients in a cohort.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate
from jfed.availability._values import check_each, of_client
from jfed.core import Cohort, Population, Sampler, make_cohort

Condition = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(key, ids [K], t) -> [K] bool`, whether each client is available in round t."""

_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 over the golden ratio


def available(cohort_size: int, is_available: Condition, *, steps: Callable[[jax.Array], jax.Array]) -> Sampler:
    """C different clients drawn uniformly among those available; slots beyond their number are empty.

    A client without examples is not available. In a round in which nobody is, nobody reports.

    Args:
      cohort_size: C.
      is_available: who can take part.
      steps: local steps by size, usually `work.steps`.

    Raises:
      ValueError: if `cohort_size` is not a whole number of at least 1; when the sampler meets a population of
        fewer clients, or a condition that does not give a truth value for each.

    >>> from jfed import core
    >>> population = core.Population((), jnp.arange(10), jnp.ones(10, int))
    >>> charging_on_wifi = all_of(periodic(24, 0.4, phase=[0] * 5 + [12] * 5), bernoulli(0.8))
    >>> sample = available(3, charging_on_wifi, steps=lambda size: size)
    >>> by_day, by_night = (sample(population, jax.random.key(0), t).ids for t in (0, 12))
    >>> bool(jnp.all(by_day < 5)), bool(jnp.all(by_night >= 5))
    (True, True)
    """
    _validate.at_least_one("available", "cohort_size", cohort_size, "a good start is a tenth of the clients")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        n = population.size.shape[0]
        if cohort_size > n:
            raise ValueError(
                f"available(cohort_size={cohort_size}): the population has {n} clients; ask for at most {n}."
            )
        choice_key, condition_key = jax.random.split(key)
        there = is_available(condition_key, jnp.arange(n, dtype=jnp.int32), t)
        if jnp.shape(there) != (n,) or there.dtype != bool:
            raise ValueError(
                f"available(is_available): returned {jnp.shape(there)} for {n} clients; return a bool for each."
            )
        there &= population.size > 0
        # The lowest draws are a uniform choice.
        lowest, ids = jax.lax.top_k(jnp.where(there, -jax.random.uniform(choice_key, (n,)), -2.0), cohort_size)
        return make_cohort(population, jnp.where(lowest > -2.0, ids, n), steps=steps)

    return sample


def bernoulli(probability: Any) -> Condition:
    """Each client is available with its probability, in every round anew.

    Args:
      probability: one for all clients, or [N]; in [0, 1].

    Raises:
      ValueError: if a probability is not in [0, 1]; when it meets more ids than probabilities.

    >>> print(bernoulli([0.0, 1.0])(jax.random.key(0), jnp.arange(2), 0))
    [False  True]
    """
    check_each("bernoulli", "probability", probability, "1 is always", low=0, high=1)

    def condition(key: jax.Array, ids: jax.Array, t: jax.Array) -> jax.Array:
        _check_ids("bernoulli", "probability", probability, ids)
        return _uniform(key, ids) < of_client(probability, ids)

    return condition


def periodic(period: int, share: Any, *, phase: Any = None) -> Condition:
    """Each client is available for a share of every period, always at the same hours.

    Client i is available in round t if `(t + phase_i) mod period < share_i * period`.

    Args:
      period: rounds, such as those of a day.
      share: of the period, one for all clients or [N]; in [0, 1].
      phase: whole rounds of at least 0 that a client's day is ahead, one number for all or [N]. By default spread
        over the period by the golden ratio, so that at all times about the same share of clients, and of any
        that are numbered in a row, is available.

    Raises:
      ValueError: if `period` is not a whole number of at least 1, a share is not in [0, 1], or a phase is not a
        whole number of at least 0; when it meets more ids than shares or phases.

    >>> print(periodic(4, 0.5, phase=[0, 1])(jax.random.key(0), jnp.arange(2), 1))
    [ True False]
    """
    _validate.at_least_one("periodic", "period", period, "24 is a day of rounds of an hour")
    check_each("periodic", "share", share, "0.3 is a night", low=0, high=1)
    _check_phase("periodic", phase)

    def condition(key: jax.Array, ids: jax.Array, t: jax.Array) -> jax.Array:
        _check_ids("periodic", "share", share, ids)
        hours = of_client(share, ids) * period - 1e-4  # 0.6 of 25 hours are 15, though a float32 product is more
        return _hour("periodic", period, phase, ids, t) < hours

    return condition


def diurnal(period: int, *, low: Any, high: Any, phase: Any = None) -> Condition:
    """Each client is available by chance, with a probability that swings between `low` and `high` once a period.

    It is `low + (high - low) (1 + cos(2 pi (t + phase_i) / period)) / 2`, drawn anew in each round.

    Args:
      period: rounds of a day.
      low: probability at the worst hour, one for all clients or [N]; in [0, 1].
      high: probability at the best.
      phase: as in `periodic`; 0 puts all clients into one time zone.

    Raises:
      ValueError: as in `periodic`.

    >>> noon = diurnal(24, low=0.0, high=1.0, phase=[0, 12])
    >>> print(noon(jax.random.key(0), jnp.arange(2), 24))
    [ True False]
    """
    _validate.at_least_one("diurnal", "period", period, "24 is a day of rounds of an hour")
    check_each("diurnal", "low", low, "0 is never at night", low=0, high=1)
    check_each("diurnal", "high", high, "1 is always at noon", low=0, high=1)
    _check_phase("diurnal", phase)

    def condition(key: jax.Array, ids: jax.Array, t: jax.Array) -> jax.Array:
        _check_ids("diurnal", "low", low, ids)
        _check_ids("diurnal", "high", high, ids)
        angle = 2 * np.pi / period * _hour("diurnal", period, phase, ids, t)
        lowest = of_client(low, ids)
        return _uniform(key, ids) < lowest + (of_client(high, ids) - lowest) * (1 + jnp.cos(angle)) / 2

    return condition


def all_of(*conditions: Condition) -> Condition:
    """Available where all conditions hold, each with its own chance: charging, and on WiFi.

    Raises:
      ValueError: if there is no condition.
    """
    if not conditions:
        raise ValueError("all_of(): there is no condition; give at least one.")

    def condition(key: jax.Array, ids: jax.Array, t: jax.Array) -> jax.Array:
        holds = [one(jax.random.fold_in(key, i), ids, t) for i, one in enumerate(conditions)]
        return jnp.all(jnp.stack(holds), 0)

    return condition


def _uniform(key: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), dtype=jnp.float32))(ids)


def _hour(where: str, period: int, phase: Any, ids: jax.Array, t: jax.Array) -> jax.Array:
    """Rounds since each client's day began: [K] float32 in [0, period)."""
    if phase is None:
        part = (ids.astype(jnp.uint32) * _GOLDEN).astype(jnp.float32) / 2.0**32
        ahead = jnp.floor(part * period)
    else:
        _check_ids(where, "phase", phase, ids)
        ahead = jnp.broadcast_to(of_client(phase, ids), ids.shape)
    return (jnp.asarray(t, jnp.int32) % period + ahead) % period


def _check_phase(where: str, phase: Any) -> None:
    if phase is not None:
        check_each(where, "phase", phase, "leave it out to spread clients over the period", low=0, whole=True)


def _check_ids(where: str, name: str, value: Any, ids: jax.Array) -> None:
    if np.ndim(value) and np.shape(value)[0] < ids.shape[0]:
        raise ValueError(
            f"{where}({name} of shape {np.shape(value)}): there are {ids.shape[0]} clients; give one number for each."
        )
