"""FedAsync: every model that returns is mixed in at once (Xie et al. 2019, arXiv:1903.03934, Algorithm 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.algorithms.fedbuff import asynchronous
from jfed.availability import Duration
from jfed.core import Algorithm, ClientWork


def fedasync(
    work: ClientWork,
    *,
    concurrency: int,
    mixing: float,
    duration: Duration,
    staleness: Callable[[jax.Array], jax.Array] = lambda age: (1.0 + age) ** -0.5,
    **options,
) -> Algorithm:
    """Every model returned is mixed in at once: `x <- (1 - alpha_t) x + alpha_t x_new`, `alpha_t = alpha s(age)`.

    The paper's clients train with a proximal term: `optax.chain(local.proximal(rho), optax.sgd(...))`.
    Metrics and the meaning of a cohort are as in `fedbuff`.

    Args:
      work: usually `local.sgd(...)`.
      concurrency: clients out at once, M.
      mixing: alpha, in (0, 1].
      duration: how long each client is away.
      staleness: s; by default the paper's polynomial with a = 0.5.
      **options: `uplink`, `client_map` and `num_clients` of `federated`.

    Raises:
      ValueError: if `concurrency` is not a whole number of at least 1, or `mixing` not in (0, 1].
    """
    _validate.positive("fedasync", "mixing", mixing, "0.6 is usual")
    _validate.within("fedasync", "mixing", mixing, 0.0, 1.0, "0.6 is usual")

    def model_of(params, change):
        return jax.tree.map(jnp.subtract, params, change)

    server = optax.sgd(mixing)
    return asynchronous("fedasync", work, concurrency, 1, duration, server, staleness, options, model_of, model_of)
