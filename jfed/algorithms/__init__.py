"""Methods: one file each."""

from jfed.algorithms.adaptive import fedadagrad, fedadam, fedyogi
from jfed.algorithms.federated import FederatedState, fedavg, fedavgm, federated, fedsgd

__all__ = [
    "FederatedState",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "federated",
    "fedsgd",
    "fedyogi",
]
