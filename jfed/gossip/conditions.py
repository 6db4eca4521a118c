"""Samplers around a sampler: messages that are lost, links that fail, peers that come and go.

What happens in a round is data of its cohort: `weight` 0 is a peer that is away, `steps` are those that a straggler
completes, and `state`, an array [C, n] of flags, tells what each peer hears of each. Stragglers and absence are those
of `jfed.availability`.

>>> from jfed import core, sampling
>>> lossy = lost_messages(sampling.full(steps=lambda size: size), 0.1)
>>> cohort = lossy(core.Population((), jnp.arange(100), jnp.ones(100, int)), jax.random.key(0), 0)
>>> cohort.state.shape, bool(0.88 < cohort.state.mean() < 0.92)
((100, 100), True)

Letters: n peers, C slots of a cohort, T rounds.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _noise, _validate
from jfed.availability.stragglers import only
from jfed.core import Cohort, Population, Sampler


def lost_messages(sampler: Sampler, rate: float) -> Sampler:
    """Each message is lost with probability `rate`, whatever becomes of others; nobody knows beforehand.

    Args:
      sampler: draws the cohort.
      rate: in [0, 1].

    Raises:
      ValueError: if `rate` is not in [0, 1].
    """
    _validate.within("lost_messages", "rate", rate, 0, 1, "0.01 is one of a hundred")

    def hears(key, t, hearer, speaker, n):
        return _at(key, hearer * n + speaker) >= rate

    return _hearing(sampler, hears)


def failed_links(sampler: Sampler, rate: float, *, rounds: int = 1, seed: int = 0) -> Sampler:
    """Each link, both ways of it, is down with probability `rate`, for `rounds` rounds on end.

    The mixing matrix of an undirected graph then stays symmetric, as peers take their own models in the place of what
    they do not hear.

    Args:
      sampler: draws the cohort.
      rate: in [0, 1].
      rounds: after so many it is drawn anew whether a link is up.
      seed: which links fail, where that lasts for several rounds; the run's key has no say in it then.

    Raises:
      ValueError: if `rate` is not in [0, 1], or `rounds` not a whole number of at least 1.
    """
    _validate.within("failed_links", "rate", rate, 0, 1, "0.1 is one of ten")
    _validate.at_least_one("failed_links", "rounds", rounds, "1 draws anew in every round")

    def hears(key, t, hearer, speaker, n):
        # The key is that of a round: what outlasts it must be drawn from something else.
        key = key if rounds == 1 else jax.random.fold_in(jax.random.key(seed), t // rounds)
        return _at(key, jnp.minimum(hearer, speaker) * n + jnp.maximum(hearer, speaker)) >= rate

    return _hearing(sampler, hears)


def joining(sampler: Sampler, *, first: Any = 0, last: Any = None) -> Sampler:
    """Peers that are there from one round to another, both included: they join late, or leave for good.

    A peer that joins has the model that everybody began with, and comes to the others' by mixing.

    Args:
      sampler: draws the cohort.
      first: round in which a peer joins, one number or [n].
      last: its last round; by default none.

    Raises:
      ValueError: if a round is not a whole number.
    """
    for name, value in (("first", first), ("last", 0 if last is None else last)):
        if not np.issubdtype(np.asarray(value).dtype, np.integer):
            raise ValueError(f"joining({name}={value!r}): rounds are whole numbers.")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        cohort = sampler(population, key, t)
        n = population.size.shape[0]

        def of(value):
            value = jnp.asarray(value)
            if value.shape not in ((), (n,)):
                raise ValueError(f"joining: rounds of shape {value.shape} for {n} peers; give one, or [{n}].")
            return jnp.take(value, cohort.ids, mode="clip") if value.ndim else value

        there = t >= of(first)
        return only(cohort, there if last is None else there & (t <= of(last)))

    return sample


def recorded(sampler: Sampler, hears: Any) -> Sampler:
    """What was heard in so many rounds, from a record, over and over.

    Args:
      sampler: draws the cohort.
      hears: [T, n, n] bool, `hears[t, i, j]`: in round t i hears what j sends.

    Raises:
      ValueError: if it has another shape or is not of flags.
    """
    hears = np.asarray(hears)
    if hears.ndim != 3 or hears.shape[1] != hears.shape[2] or hears.dtype != bool or not hears.size:
        raise ValueError(f"recorded(hears of {hears.dtype}{list(hears.shape)}): give [T, n, n] of bool.")

    def of(key, t, hearer, speaker, n):
        if n != hears.shape[1]:
            raise ValueError(f"recorded(hears of {hears.shape[1]} peers): there are {n}.")
        return jnp.asarray(hears)[t % hears.shape[0], hearer, speaker]

    return _hearing(sampler, of)


def _hearing(sampler: Sampler, hears) -> Sampler:
    """A cohort in which messages come through only where `hears(key, t, hearer, speaker, n)` holds."""

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        sampler_key, own_key = jax.random.split(key)
        cohort = sampler(population, sampler_key, t)
        n = population.size.shape[0]
        hearer, speaker = jnp.minimum(cohort.ids, n - 1)[:, None], jnp.arange(n, dtype=jnp.int32)[None]
        hearer, speaker = jnp.broadcast_arrays(hearer, speaker)
        here = hears(own_key, jnp.asarray(t), hearer, speaker, n)
        return cohort._replace(state=here & cohort.state if jax.tree.leaves(cohort.state) else here)

    return sample


def _at(key: jax.Array, index: jax.Array) -> jax.Array:
    """Uniform numbers in [0, 1) that depend on the key and each number of `index` alone."""
    words = _noise.words(key)
    mixed = _noise.scramble(_noise.scramble(index.astype(jnp.uint32) ^ words[0]) + words[1])
    return (mixed >> 8).astype(jnp.float32) * jnp.float32(2**-24)
