"""What one client does between receiving the model and sending its update back.

Each factory returns a `ClientWork` whose `finish` keeps the client's pseudo-gradient
`params - new_params` and adds `{"loss", "examples"}`: the sum of the per-example losses met in
training, and how many there were. A loss is `loss(params, batch, key) -> [B]`, one value an
example, so that short batches are weighted exactly; it must not mix the examples of a batch.

    training    epochs of mini-batches, full batches, a gradient alone
    gradients   sums over the examples of a batch, and the changes methods make to them
    links       optax transforms for the client optimizer
"""

from jfed.local.gradients import Batch, Gradient, Loss, Sums, client_rows
from jfed.local.links import add, proximal, scale_by_round
from jfed.local.training import Carry, full_batch, gradient, sgd, stochastic_gradient

__all__ = [
    "Batch",
    "Carry",
    "Gradient",
    "Loss",
    "Sums",
    "add",
    "client_rows",
    "full_batch",
    "gradient",
    "proximal",
    "scale_by_round",
    "sgd",
    "stochastic_gradient",
]
