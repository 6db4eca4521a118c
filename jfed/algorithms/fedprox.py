"""FedProx: clients are held near the global model, and their partial work counts.

Each local step descends `F_k(w) + mu / 2 |w - w_t|^2` (Li et al. 2020, arXiv:1812.06127, Algorithm 2).
How much work a straggler completes is the cohort's `steps` (`jfed.availability.partial_work`); FedAvg as
the paper compares it drops stragglers instead (`jfed.availability.drop`).

Letters of the paper: w_t global model, F_k loss of client k, mu.
"""

import optax

from jfed.algorithms._work import remade
from jfed.algorithms.federated import federated
from jfed.core import Algorithm, ClientWork
from jfed.local import proximal


def fedprox(work: ClientWork, *, mu: float, **options) -> Algorithm:
    """FedAvg with a proximal term in every local step; `mu=0` is FedAvg.

    Args:
      work: `local.sgd(...)` or `local.full_batch(...)`.
      mu: strength of the pull to the global model; the paper tunes it in {0.001, 0.01, 0.1, 1}.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: if `mu` is negative or not finite, or the work cannot be remade.
    """
    pulled = remade("fedprox", work, optimizer=lambda optimizer: optax.chain(proximal(mu), optimizer))
    return federated(pulled, **options)
