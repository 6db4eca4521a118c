"""How long clients take: for asynchronous methods, and for rounds that tell how long they lasted.

A duration is a function `(key, cohort) -> [C]` of seconds between a client's setting out and its return.
It is simulated and has nothing to do with how long the simulation runs.

Letters: N clients in the population, C clients in a cohort.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jfed import _streams, _validate
from jfed.availability._values import check_each, of_client
from jfed.availability.stragglers import per_client, present
from jfed.core import Algorithm, Cohort, Tree

Duration = Callable[[jax.Array, Cohort], jax.Array]
"""`(key, cohort) -> [C] float32`, seconds between setting out and return; 0 in an empty slot."""


def per_step(seconds: Any) -> Duration:
    """A client takes so long for each of its local steps.

    Args:
      seconds: for a step, one number for all clients or [N]; a client past the end takes NaN.

    Raises:
      ValueError: if `seconds` is not finite and at least 0.

    >>> from jfed import core
    >>> population = core.Population((), jnp.array([0, 2]), jnp.array([2, 3]))
    >>> cohort = core.make_cohort(population, jnp.array([1, 0, 9]), steps=lambda size: 10 * size)
    >>> print(per_step([0.5, 0.1])(jax.random.key(0), cohort))
    [ 3. 10.  0.]
    """
    check_each("per_step", "seconds", seconds, "give the time of one local step", low=0)
    return _scaled(seconds, lambda key, cohort: cohort.steps.astype(jnp.float32))


def exponential(mean: Any) -> Duration:
    """A client takes an exponential number of seconds, whatever its work.

    Args:
      mean: seconds, one number for all clients or [N].

    Raises:
      ValueError: if `mean` is not finite and above 0.
    """
    check_each("exponential", "mean", mean, "1 makes it the unit of time", low=0, exclude_low=True)
    return _scaled(mean, per_client(lambda key: jax.random.exponential(key, dtype=jnp.float32)))


def half_normal(scale: Any) -> Duration:
    """A client takes `|N(0, scale^2)|` seconds, whatever its work (Nguyen et al. 2022, arXiv:2106.06639).

    Args:
      scale: seconds, one number for all clients or [N]; the mean is `sqrt(2 / pi)` times it.

    Raises:
      ValueError: if `scale` is not finite and above 0.
    """
    check_each("half_normal", "scale", scale, "1 makes it the unit of time", low=0, exclude_low=True)
    return _scaled(scale, per_client(lambda key: jnp.abs(jax.random.normal(key, dtype=jnp.float32))))


def lognormal(median: Any, sigma: float) -> Duration:
    """A client takes `median * exp(N(0, sigma^2))` seconds, whatever its work: most are alike, a few very slow.

    Args:
      median: seconds, one number for all clients or [N].
      sigma: standard deviation of the logarithm, at least 0; 0 is always the median.

    Raises:
      ValueError: if `median` is not finite and above 0, or `sigma` not finite and at least 0.
    """
    check_each("lognormal", "median", median, "1 makes it the unit of time", low=0, exclude_low=True)
    _validate.at_least_zero("lognormal", "sigma", sigma, "1 is heavy-tailed")
    return _scaled(median, per_client(lambda key: jnp.exp(sigma * jax.random.normal(key, dtype=jnp.float32))))


def in_turn(*durations: Duration) -> Duration:
    """One after the other: training, then sending.

    Raises:
      ValueError: if there is no duration.

    >>> slow_line = in_turn(per_step(0.01), lognormal(2.0, sigma=0.5))
    """
    if not durations:
        raise ValueError("in_turn(): there is no duration; give at least one.")

    def duration(key: jax.Array, cohort: Cohort) -> jax.Array:
        return sum(one(jax.random.fold_in(key, i), cohort) for i, one in enumerate(durations))

    return duration


def timed(algorithm: Algorithm, duration: Duration) -> Algorithm:
    """The same method, whose metrics also tell `"seconds"`: the longest duration among those who take part.

    A synchronous round lasts as long as its slowest client; if nobody takes part it lasts 0 seconds.
    Those that a sampler let drop out are not waited for; one whose update turns out not to be finite is.

    Args:
      algorithm: a synchronous method.
      duration: how long each client takes, drawn from a stream of the round's key that no client uses.

    Returns:
      An `Algorithm` of the same states, models and other metrics.

    Raises:
      ValueError: in a round, if the method's metrics tell `"seconds"` already, as asynchronous ones do.
    """

    def round_fn(state: Tree, cohort: Cohort, key: jax.Array) -> tuple[Tree, dict]:
        state, metrics = algorithm.round(state, cohort, key)
        if "seconds" in metrics:
            raise ValueError("timed(algorithm): its metrics tell seconds already; give the duration to the method.")
        seconds = duration(jax.random.fold_in(key, _streams.STOPWATCH), cohort)
        return state, metrics | {"seconds": jnp.max(jnp.where(present(cohort), seconds, 0.0))}

    return algorithm._replace(round=round_fn)


def _scaled(scale: Any, unit: Duration) -> Duration:
    def duration(key: jax.Array, cohort: Cohort) -> jax.Array:
        seconds = of_client(scale, cohort.ids) * unit(key, cohort)
        return jnp.where(cohort.size > 0, seconds, 0.0)

    return duration
