"""Methods: one file each."""

from jfed.algorithms.federated import (
    FederatedState,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    federated,
    fedsgd,
    fedyogi,
)

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
