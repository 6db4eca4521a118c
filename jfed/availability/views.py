"""Continuous data: populations that grow, drift, or gain clients from round to round.

All rows lie in the population from the start; a view tells which of them are there in round t, by other
numbers in `start` and `size`. Nothing is copied and no shape changes, so one program serves all rounds.
Rows of a client come in the order in which they are stored.

Letters: N clients in the population.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jfed.availability._values import check_each, check_length, of_client
from jfed.core import Cohort, Population, Sampler

View = Callable[[Population, jax.Array], Population]
"""`(population, t) -> population` as it is in round t."""


def over_time(sampler: Sampler, view: View) -> Sampler:
    """Samples from the population as it is in round t.

    Sizes, and with them weights, steps and the chances of `sampling.by_size`, are those of the rows that are
    there. Views combine: `over_time(over_time(sampler, arriving(...)), growing(...))`.

    Args:
      sampler: draws the cohort, with the key given here.
      view: what the population is in round t.

    >>> from jfed import core, sampling
    >>> population = core.Population((), jnp.array([0, 9]), jnp.array([9, 3]))
    >>> sample = over_time(sampling.full(steps=lambda size: size), growing(1, 2))
    >>> for t in range(3):
    ...     print(sample(population, jax.random.key(0), t).size)
    [1 1]
    [3 3]
    [5 3]
    """

    def sample(population: Population, key: jax.Array, t: jax.Array) -> Cohort:
        return sampler(view(population, jnp.asarray(t, jnp.int32)), key, t)

    return sample


def growing(first: Any, per_round: Any) -> View:
    """Each client has its first rows, and more come: `min(size, first + floor(per_round * t))` of them in round t.

    Args:
      first: rows there in round 0, one number for all clients or [N].
      per_round: rows that come in a round, likewise; 0.1 is a row in ten rounds. (Counted in float32.)

    Raises:
      ValueError: if `first` is not whole and at least 0, or `per_round` not finite and at least 0; when the
        view meets a population of another N.

    >>> print(growing(0, 0.5)(Population((), jnp.array([0]), jnp.array([9])), 5).size)
    [2]
    """
    check_each("growing", "first", first, "1 lets everybody train from the start", low=0, whole=True)
    check_each("growing", "per_round", per_round, "0 is a population that stays as it is", low=0)

    def view(population: Population, t: jax.Array) -> Population:
        size = jnp.asarray(population.size)
        for name, value in (("first", first), ("per_round", per_round)):
            check_length("growing", name, value, size.shape[0])
        old = jnp.minimum(size, first)
        return population._replace(size=old + jnp.minimum(size - old, _come(per_round, size, t)))

    return view


def sliding(window: Any, per_round: Any) -> View:
    """Each client has a window of its rows, which moves on: drift, where rows are stored in an order.

    In round t it holds rows `o + [0, min(size, window))`, `o = min(floor(per_round * t), size - window)`: it
    stays at the client's last rows when it has reached them.

    Args:
      window: rows at a time, one number for all clients or [N].
      per_round: rows that the window moves in a round, likewise; 0.1 is a row in ten rounds.

    Raises:
      ValueError: if `window` is not whole and at least 1, or `per_round` not finite and at least 0; when the
        view meets a population of another N.

    >>> seen = sliding(4, 3)(Population(jnp.zeros(12), jnp.array([0, 9]), jnp.array([9, 3])), 1)
    >>> print(seen.start, seen.size)
    [3 9] [4 3]
    """
    check_each("sliding", "window", window, "a tenth of a client's rows makes ten different ones", low=1, whole=True)
    check_each("sliding", "per_round", per_round, "0 is a window that stays where it is", low=0)

    def view(population: Population, t: jax.Array) -> Population:
        size = jnp.asarray(population.size)
        for name, value in (("window", window), ("per_round", per_round)):
            check_length("sliding", name, value, size.shape[0])
        seen = jnp.minimum(size, window)
        offset = jnp.minimum(size - seen, _come(per_round, size, t))
        return population._replace(start=population.start + offset, size=seen)

    return view


def arriving(joined: Any) -> View:
    """Client i exists from round `joined[i]` on; before, it has no rows, and a slot that draws it is empty.

    `available` draws only clients that exist; the other samplers may draw one that does not, and the round is
    then smaller.

    Args:
      joined: [N] whole rounds of at least 0.

    Raises:
      ValueError: if `joined` is not [N] whole numbers of at least 0; when the view meets a population of another N.

    >>> print(arriving([0, 5])(Population((), jnp.array([0, 9]), jnp.array([9, 3])), 4).size)
    [9 0]
    """
    check_each("arriving", "joined", joined, "0 is there from the start", low=0, whole=True)

    def view(population: Population, t: jax.Array) -> Population:
        check_length("arriving", "joined", joined, population.size.shape[0])
        return population._replace(size=jnp.where(t >= jnp.asarray(joined), population.size, 0))

    return view


def _come(per_round: Any, size: jax.Array, t: jax.Array) -> jax.Array:
    """Rows that have come by round t, [N] int32, for clients [N]; at most 2^30."""
    rate = of_client(per_round, jnp.arange(size.shape[0]))
    come = jnp.minimum(jnp.floor(rate * jnp.asarray(t, jnp.float32)), 2.0**30).astype(jnp.int32)
    return jnp.broadcast_to(come, size.shape)
