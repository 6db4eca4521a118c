"""Adaptive server optimizers: FedAdagrad, FedAdam and FedYogi.

The mean pseudo-gradient of a federated round is descended with a step size of each coordinate's own
(Reddi et al. 2021, arXiv:2003.00295, Algorithm 2).

Letters: x the global model, Delta the pseudo-gradient, m and v its moments, eta, b1, b2, tau.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.algorithms._work import specialised
from jfed.core import Algorithm, ClientWork


def fedadagrad(work: ClientWork, *, learning_rate: float, tau: float = 1e-3, **options) -> Algorithm:
    """FedAdagrad: `v <- v + Delta^2` (Reddi et al. 2021, Algorithm 2, with b1 = 0 as in the paper's runs).

    Args:
      work: usually `local.sgd(...)`.
      learning_rate: eta, on the server.
      tau: adaptivity; the smaller, the more adaptive.
      **options: those of `fedavg`.

    Raises:
      ValueError: if `learning_rate` or `tau` is not above 0.
    """
    return _adaptive("fedadagrad", work, lambda v, d2: v + d2, learning_rate, 0.0, 0.0, tau, options)


def fedadam(
    work: ClientWork, *, learning_rate: float, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3, **options
) -> Algorithm:
    """FedAdam: `v <- b2 v + (1 - b2) Delta^2` (Reddi et al. 2021, Algorithm 2).

    Args:
      work: usually `local.sgd(...)`.
      learning_rate: eta, on the server.
      b1: decay of the first moment, in [0, 1].
      b2: decay of the second moment, in [0, 1].
      tau: adaptivity; the smaller, the more adaptive.
      **options: those of `fedavg`.

    Raises:
      ValueError: if `learning_rate` or `tau` is not above 0, or `b1` or `b2` not in [0, 1].
    """
    return _adaptive("fedadam", work, lambda v, d2: b2 * v + (1 - b2) * d2, learning_rate, b1, b2, tau, options)


def fedyogi(
    work: ClientWork, *, learning_rate: float, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3, **options
) -> Algorithm:
    """FedYogi: `v <- v - (1 - b2) Delta^2 sign(v - Delta^2)` (Reddi et al. 2021, Algorithm 2).

    Arguments and errors are those of `fedadam`.
    """

    def second_moment(v, d2):
        return v - (1 - b2) * d2 * jnp.sign(v - d2)

    return _adaptive("fedyogi", work, second_moment, learning_rate, b1, b2, tau, options)


def _adaptive(
    name: str,
    work: ClientWork,
    second_moment: Callable,
    learning_rate: float,
    b1: float,
    b2: float,
    tau: float,
    options: dict,
) -> Algorithm:
    """Algorithm 2 of Reddi et al. 2021: `m <- b1 m + (1 - b1) Delta`, `x <- x - eta m / (sqrt(v) + tau)`.

    There is no bias correction. Three differences from the page: Delta there is the clients' change,
    here its negative; its mean there is uniform, here weighted; and v there starts from at least
    tau^2, here from 0, as in the authors' runs.
    """
    _validate.positive(name, "learning_rate", learning_rate, "a good start is 0.01")
    _validate.positive(name, "tau", tau, "the paper's runs use 1e-5 to 1e-1")
    _validate.within(name, "b1", b1, 0.0, 1.0, "0.9 is usual")
    _validate.within(name, "b2", b2, 0.0, 1.0, "0.99 is usual")

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"m": zeros, "v": zeros}

    def update_fn(delta, state, params=None):
        del params
        m = jax.tree.map(lambda m, d: (b1 * m + (1 - b1) * d).astype(m.dtype), state["m"], delta)
        v = jax.tree.map(lambda v, d: second_moment(v, d * d).astype(v.dtype), state["v"], delta)
        updates = jax.tree.map(lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau), m, v)
        return updates, {"m": m, "v": v}

    return specialised(name, work, options, server=optax.GradientTransformation(init_fn, update_fn))
