"""Agnostic federated learning: the best model for the worst mixture of the clients.

`min_w max_lambda sum_k lambda_k F_k(w)`, lambda in the simplex: the model descends the mixture's
gradient while the mixture ascends the losses (Mohri et al. 2019, arXiv:1902.00146, Algorithm 1,
Stochastic-AFL).

Letters of the paper: lambda mixture, w model, gamma_w and gamma_lambda rates.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.algorithms._work import equally_weighted, scaled, specialised, whole_of
from jfed.algorithms.federated import FederatedState
from jfed.core import Algorithm, ClientWork, Cohort


def afl(work: ClientWork, *, learning_rate: float, num_clients: int, **options) -> Algorithm:
    """Descends the losses of the clients weighted by a mixture that ascends them.

    The paper's step is one gradient, `local.gradient` with `server=optax.sgd(gamma_w)`; with local training
    in its place the mixture weights the clients' changes. Every present client counts alike in the
    ascent, whatever its weight in the cohort; the mixture starts uniform. With a part of the clients a
    round the mixture is normalised over those; its projection moves the shares of the absent as well.

    Args:
      work: `local.gradient(...)` or `local.sgd(...)`.
      learning_rate: gamma_lambda, of the mixture.
      num_clients: clients in the population, N.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: if `learning_rate` is not above 0, or the work does not say what its loss is.
    """
    _validate.at_least_one("afl", "num_clients", num_clients, "it is the number of clients in the population")
    _validate.positive("afl", "learning_rate", learning_rate, "0.1 is a good start")
    whole = whole_of("afl", work)
    server = optax.with_extra_args_support(options.pop("server", None) or optax.sgd(1.0))

    def finish_fn(shared, client, carry):
        change, added = work.finish(shared, client, carry)
        sums = whole(shared, client, shared.params)
        ascended = client.state + learning_rate * sums.loss / jnp.maximum(sums.examples, 1.0)
        return ({"delta": scaled(client.state, change), "share": client.state}, ascended), added

    def update_fn(mean, state, params=None, **extra_args):
        share = jnp.where(mean["share"] > 0, mean["share"], 1.0)
        return server.update(scaled(1.0 / share, mean["delta"]), state, params, **extra_args)

    inner = equally_weighted(
        specialised(
            "afl",
            work._replace(finish=finish_fn),
            options,
            parts=("delta",),
            server=optax.GradientTransformationExtraArgs(server.init, update_fn),
            num_clients=num_clients,
            memory=lambda params: jnp.full((), 1.0 / num_clients),
            message=lambda params: {"delta": params, "share": jnp.zeros(())},
        )
    )

    def round_fn(state: FederatedState, cohort: Cohort, key: jax.Array) -> tuple[FederatedState, dict]:
        state, metrics = inner.round(state, cohort, key)
        return state._replace(memory=project(state.memory)), metrics

    return inner._replace(round=round_fn)


def project(v: jax.Array) -> jax.Array:
    """The nearest point of the probability simplex (Duchi et al. 2008, Figure 1).

    >>> print(project(jnp.array([0.5, 1.0, -1.0])))
    [0.25 0.75 0.  ]
    """
    falling = jnp.sort(v, descending=True)
    excess = (jnp.cumsum(falling) - 1.0) / jnp.arange(1, v.size + 1)
    last = jnp.sum(falling > excess) - 1
    return jnp.maximum(v - excess[last], 0.0)
