"""FedAvg, FedSGD and FedAvgM: the mean of what clients send, descended by plain SGD (McMahan et al. 2017)."""

import optax

from jfed import _validate
from jfed.algorithms._work import specialised
from jfed.core import Algorithm, ClientWork


def fedavg(work: ClientWork, **options) -> Algorithm:
    """FedAvg: the new model is the mean of the clients' models, weighted by n_k (McMahan et al. 2017).

    Args:
      work: usually `local.sgd(...)`.
      **options: `uplink`, `aggregator`, `client_map` and `num_clients` of `federated`.
    """
    return specialised("fedavg", work, options, server=optax.sgd(1.0))


def fedsgd(work: ClientWork, *, learning_rate: float, **options) -> Algorithm:
    """FedSGD: one step along the mean gradient of the cohort's examples (McMahan et al. 2017, section 2).

    Args:
      work: `local.gradient(loss)`.
      learning_rate: eta, on the server.
      **options: those of `fedavg`.

    Raises:
      ValueError: if `learning_rate` is not above 0.
    """
    _validate.positive("fedsgd", "learning_rate", learning_rate, "a good start is 0.1")
    return specialised("fedsgd", work, options, server=optax.sgd(learning_rate))


def fedavgm(work: ClientWork, *, learning_rate: float = 1.0, momentum: float = 0.9, **options) -> Algorithm:
    """FedAvgM: momentum on the server, `v <- beta v + Delta`, `w <- w - eta v` (Hsu et al. 2019, arXiv:1909.06335).

    Args:
      work: usually `local.sgd(...)`.
      learning_rate: eta, on the server.
      momentum: beta, in [0, 1].
      **options: those of `fedavg`.

    Raises:
      ValueError: if `learning_rate` is not above 0, or `momentum` not in [0, 1].
    """
    _validate.positive("fedavgm", "learning_rate", learning_rate, "1.0 is FedAvg's")
    _validate.within("fedavgm", "momentum", momentum, 0.0, 1.0, "0.9 is usual")
    return specialised("fedavgm", work, options, server=optax.sgd(learning_rate, momentum=momentum))
