"""FedDyn: each client's objective is regularised so that its optimum agrees with the global one.

A local step descends `L_k(theta) - <g_k, theta> + alpha / 2 |theta - theta_t|^2`, where g_k is the
gradient at which the client last stopped; the server adds what those leave over (Acar et al. 2021,
arXiv:2111.04263, Algorithm 1).

Letters of the paper: theta_t global model, theta_k client's, g_k = grad L_k(theta_k), h, alpha, m clients,
P_t cohort.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.algorithms._work import corrected, equally_weighted, specialised
from jfed.core import Algorithm, ClientWork


def feddyn(work: ClientWork, *, alpha: float, num_clients: int, **options) -> Algorithm:
    """FedAvg with dynamic regularisation.

    Clients weigh alike, whatever the cohort's weights, as in the paper: only so is h what all of them leave over.

    Args:
      work: `local.sgd(...)` or `local.full_batch(...)`.
      alpha: strength of the regulariser; the paper uses 0.001 to 0.1.
      num_clients: clients in the population, m.
      **options: those of `fedavg`.

    Raises:
      ValueError: if `alpha` is not above 0, or the work cannot be remade.
    """
    _validate.positive("feddyn", "alpha", alpha, "0.01 is a good start")

    def term(shared, client, theta):
        return jax.tree.map(lambda x, a, g: alpha * (x - a) - g, theta, shared.params, client.state)

    inner = corrected("feddyn", work, term)

    def finish_fn(shared, client, carry):
        change, added = inner.finish(shared, client, carry)  # theta_t - theta_k
        g_k = jax.tree.map(lambda g, d: (g + alpha * d).astype(g.dtype), client.state, change)
        return (change, g_k), added

    def update_fn(mean, h, params=None, *, reports, **extra_args):
        del params, extra_args
        h = jax.tree.map(lambda h, d: (h + alpha * reports / num_clients * d).astype(h.dtype), h, mean)
        return jax.tree.map(lambda d, h: (-d - h / alpha).astype(d.dtype), mean, h), h

    return equally_weighted(
        specialised(
            "feddyn",
            inner._replace(finish=finish_fn),
            options,
            server=optax.GradientTransformationExtraArgs(
                lambda params: jax.tree.map(jnp.zeros_like, params), update_fn
            ),
            num_clients=num_clients,
            memory=lambda params: jax.tree.map(jnp.zeros_like, params),
        )
    )
