"""Samplers around a sampler: clients that stay away, come late, or do a part of the work.

A straggler is a client that would not finish in time. FedAvg waits no longer and drops it; FedProx takes
what it has done by then (Li et al. 2020, arXiv:1812.06127, section 5.2). `drop` and `partial_work` make
stragglers of the same clients, so that the two rules meet on equal terms.

Letters: C clients in a cohort, N in the population, E epochs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate
from jfed.core import Cohort, Population, Sampler


def per_client(draw: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, Cohort], jax.Array]:
    """Lifts `draw(key) -> []` to `(key, cohort) -> [C]`: each client draws from `fold_in(key, id)`.

    >>> from jfed import core
    >>> population = core.Population((), jnp.array([0, 2]), jnp.array([2, 3]))
    >>> cohort = core.make_cohort(population, jnp.array([1, 0, 1]), steps=lambda size: size)
    >>> first, second, again = per_client(jax.random.uniform)(jax.random.key(0), cohort)
    >>> bool(first == again), bool(first == second)
    (True, False)
    """
    return lambda key, cohort: jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(cohort.ids)


def dropout(sampler: Sampler, rate: float) -> Sampler:
    """Each client sampled stays away with probability `rate`, whatever the others do.

    It is then absent: it weighs nothing, does nothing, and keeps what it remembers. It counts as sent the
    model, since nobody knew.

    Args:
      sampler: draws the cohort.
      rate: probability, in [0, 1].

    Raises:
      ValueError: if `rate` is not in [0, 1].

    >>> from jfed import core, sampling
    >>> population = core.Population((), jnp.arange(1000), jnp.ones(1000, int))
    >>> half = dropout(sampling.full(steps=lambda size: size), 0.5)
    >>> cohort = half(population, jax.random.key(0), 0)
    >>> bool(450 < jnp.sum(cohort.weight > 0) < 550)
    True
    """
    _validate.within("dropout", "rate", rate, 0.0, 1.0, "it is the probability that a client stays away")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        sampler_key, own_key = jax.random.split(key)
        cohort = sampler(population, sampler_key, t)
        stays = per_client(jax.random.uniform)(own_key, cohort) >= rate
        return only(cohort, stays)

    return sample


def drop(sampler: Sampler, fraction: float) -> Sampler:
    """FedAvg's rule: a random `fraction` of the clients present are stragglers, and are dropped.

    Guarantees:
      * Of P different clients present, the whole number nearest to `(1 - fraction) P` stay, as in the paper's
        published code: 10, 5 and 1 of 10 at 0, 50 and 90 %.
      * With the same key and fraction, the stragglers are those of `partial_work`; with a larger fraction
        there are more of them, and the same ones among them.

    Args:
      sampler: draws the cohort.
      fraction: of the clients present, in [0, 1].

    Raises:
      ValueError: if `fraction` is not in [0, 1].

    >>> from jfed import core, sampling
    >>> population = core.Population((), jnp.arange(10), jnp.ones(10, int))
    >>> everyone = sampling.full(steps=lambda size: 20 * size)
    >>> print(jnp.sum(drop(everyone, 0.9)(population, jax.random.key(0), 0).weight))
    1.0
    """
    _validate.within("drop", "fraction", fraction, 0.0, 1.0, "FedProx's paper has 0, 0.5 and 0.9")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        sampler_key, own_key = jax.random.split(key)
        cohort = sampler(population, sampler_key, t)
        late, _ = _stragglers(own_key, cohort, fraction)
        return only(cohort, ~late)

    return sample


def partial_work(sampler: Sampler, fraction: float, epochs: int) -> Sampler:
    """FedProx's rule: stragglers complete Uniform{1..E} epochs in place of E, and are averaged as ever.

    The range is the paper's; its published code never draws E itself.

    Guarantees:
      * With the same key and fraction, the stragglers are the clients that `drop` drops.
      * A straggler does a whole number of epochs, at least one, and keeps its weight; nobody else changes.
        (Where `steps` are not E equal epochs, it does that share of them, rounded down, and at least one.)

    Args:
      sampler: draws the cohort; its `steps` are those of E epochs.
      fraction: of the clients present, in [0, 1].
      epochs: E, as given to the work.

    Raises:
      ValueError: if `fraction` is not in [0, 1], or `epochs` not a whole number of at least 1.

    >>> from jfed import core, sampling
    >>> population = core.Population((), jnp.arange(5), jnp.ones(5, int))
    >>> late = partial_work(sampling.full(steps=lambda size: 20 * size), 1.0, epochs=20)
    >>> cohort = late(population, jax.random.key(0), 0)
    >>> bool(jnp.all((cohort.steps >= 1) & (cohort.steps <= 20) & (cohort.weight == 1)))
    True
    """
    _validate.within("partial_work", "fraction", fraction, 0.0, 1.0, "FedProx's paper has 0, 0.5 and 0.9")
    _validate.at_least_one("partial_work", "epochs", epochs, "it is the number of epochs of a client in time")

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        sampler_key, own_key = jax.random.split(key)
        cohort = sampler(population, sampler_key, t)
        late, work_key = _stragglers(own_key, cohort, fraction)
        done = per_client(lambda k: jax.random.randint(k, (), 1, epochs + 1, jnp.int32))(work_key, cohort)
        each, over = cohort.steps // epochs, cohort.steps % epochs  # apart, so that no product overflows
        steps = jnp.maximum(done * each + done * over // epochs, 1)
        return cohort._replace(steps=jnp.where(late & (cohort.steps > 0), steps, cohort.steps))

    return sample


def distributed_steps(sampler: Sampler, draw: Callable[[jax.Array, Cohort], jax.Array]) -> Sampler:
    """Every client completes a share of its steps, from any distribution.

    A share rounds to the nearest whole number of steps, and to at least one; a client whose share is 0, or
    NaN, is absent. Shares outside [0, 1] are taken as the nearest of the two.

    Args:
      sampler: draws the cohort.
      draw: `(key, cohort) -> [C]`, shares in [0, 1]; `per_client` makes one that is independent of the
        cohort's order. A client that occurs twice must have the same share both times.

    >>> from jfed import core, sampling
    >>> population = core.Population((), jnp.arange(3), jnp.array([2, 4, 8]))
    >>> half = distributed_steps(sampling.full(steps=lambda size: size), lambda key, cohort: 0.5 * jnp.ones(3))
    >>> print(half(population, jax.random.key(0), 0).steps)
    [1 2 4]
    """

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        sampler_key, own_key = jax.random.split(key)
        cohort = sampler(population, sampler_key, t)
        share = draw(own_key, cohort)
        if jnp.shape(share) != cohort.ids.shape:
            raise ValueError(
                f"distributed_steps(draw): returned shape {jnp.shape(share)} for a cohort of {cohort.ids.shape[0]}; "
                "return one share a client, as per_client does."
            )
        steps = jnp.maximum(jnp.round(jnp.clip(share, 0.0, 1.0) * cohort.steps).astype(jnp.int32), 1)
        fewer = cohort._replace(steps=jnp.where(cohort.steps > 0, steps, 0))
        return only(fewer, share > 0)

    return sample


def only(cohort: Cohort, stays: jax.Array) -> Cohort:
    """The cohort in which those for whom `stays` [C] does not hold are absent."""
    return cohort._replace(steps=jnp.where(stays, cohort.steps, 0), weight=jnp.where(stays, cohort.weight, 0.0))


def present(cohort: Cohort) -> jax.Array:
    """Who takes part: [C] bool."""
    return (cohort.weight != 0) | (cohort.steps > 0)


def _stragglers(key: jax.Array, cohort: Cohort, fraction: float) -> tuple[jax.Array, jax.Array]:
    """Who is a straggler, [C] bool, and a key for what becomes of them.

    They are the different clients present with the lowest draws. A client that occurs twice counts once: were it
    cut apart, it would train in two ways.
    """
    choice_key, work_key = jax.random.split(key)
    here = present(cohort)
    turn = per_client(jax.random.uniform)(choice_key, cohort)
    order = jnp.lexsort((cohort.ids, turn, ~here))
    ids, here = cohort.ids[order], here[order]
    first = here & jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    count = jnp.sum(first)
    # A table for every count, in double precision where it can be, so that a half goes where the published code's does.
    xp = np if _validate.is_concrete(fraction) else jnp
    staying = jnp.asarray(xp.round(xp.arange(cohort.ids.size + 1) * (1 - fraction)), jnp.int32)[count]
    late = here & (jnp.cumsum(first) <= count - staying)
    return jnp.zeros_like(late).at[order].set(late), work_key
