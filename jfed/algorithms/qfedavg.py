"""q-FedAvg: a client counts the more, the higher its loss, so that accuracy is spread more evenly.

The objective is `sum_k p_k / (q + 1) F_k(w)^(q + 1)` (Li et al. 2020, arXiv:1905.10497, Algorithm 2). Each
client's change is scaled by `F_k^q` and the step by an upper bound of the local Lipschitz constant, so
that no rate has to be tuned anew for each q.

Letters of the paper: q, L Lipschitz constant, F_k loss of client k at the global model w, Delta_k, h_k.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.algorithms._work import scaled, specialised, whole_of
from jfed.core import Algorithm, ClientWork

_TINY = 1e-10  # added to a loss before it is raised to a negative power, as the authors' code does


def qfedavg(work: ClientWork, *, q: float, learning_rate: float, **options) -> Algorithm:
    """FedAvg reweighted by `F_k^q`; `q=0` is FedAvg with the cohort's weights.

    The paper draws clients by size and weights them alike, which is `sampling.by_size`; with any other
    sampler its weights are the p_k.

    Args:
      work: `local.sgd(...)`; with one full-batch step it is q-FedSGD, Algorithm 1.
      q: how much fairness counts, at least 0.
      learning_rate: 1 / L; the paper takes the rate of the clients' optimizer, tuned at q = 0.
      **options: those of `fedavg`.

    Raises:
      ValueError: if `q` is negative, `learning_rate` is not above 0, or the work does not say what its loss is.
    """
    _validate.at_least_zero("qfedavg", "q", q, "0 is FedAvg, 1 is a good start")
    _validate.positive("qfedavg", "learning_rate", learning_rate, "take the clients' rate")
    whole = whole_of("qfedavg", work)
    lipschitz = 1.0 / learning_rate

    def finish_fn(shared, client, carry):
        change, added = work.finish(shared, client, carry)  # w - w_k
        sums = whole(shared, client, shared.params)
        loss = sums.loss / jnp.maximum(sums.examples, 1.0) + _TINY
        square = sum(jnp.vdot(x, x) for x in jax.tree.leaves(change))
        h = q * loss ** (q - 1) * (lipschitz**2 * square) + lipschitz * loss**q
        return {"delta": scaled(loss**q * lipschitz, change), "h": h}, added

    def update_fn(mean, state, params=None):
        del params
        # 0 only where all losses are, or their powers too small for a float: then nobody counts.
        return scaled(-1.0 / jnp.where(mean["h"] > 0, mean["h"], 1.0), mean["delta"]), state

    return specialised(
        "qfedavg",
        work._replace(finish=finish_fn),
        options,
        parts=("delta",),
        server=optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn),
        message=lambda params: {"delta": params, "h": jnp.zeros(())},
    )
