"""Ditto: beside the global model each client trains one of its own, held near the global one.

Client k's model solves `min_v F_k(v) + lambda / 2 |v - w|^2`, a local step of it for each local step of
FedAvg (Li et al. 2021, arXiv:2012.04221, Algorithm 1 with s = the local steps).

Letters of the paper: w global model, v_k client k's own, lambda.
"""

from typing import NamedTuple

import optax

from jfed import _validate, tree
from jfed.algorithms._work import remade, same, specialised
from jfed.core import Algorithm, ClientWork, Tree
from jfed.local import proximal


class _Carry(NamedTuple):
    model: Tree  # carry of FedAvg's work
    personal: Tree  # carry of the work on v_k


def ditto(work: ClientWork, *, strength: float, num_clients: int, **options) -> Algorithm:
    """FedAvg, unchanged, and personal models trained on the same batches.

    With `strength=0` each client's own model is trained as if alone. A client's model starts as the
    global one does.

    Args:
      work: `local.sgd(...)` or `local.full_batch(...)`, for both models.
      strength: lambda, of the pull to the global model; the paper tunes it in {0.05, 0.1, 0.2, 1, 2}.
      num_clients: clients in the population, N.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: if `strength` is negative or not finite, or the work cannot be remade.
    """
    _validate.at_least_zero("ditto", "strength", strength, "0 trains alone, 0.1 to 1 are usual")
    own = remade("ditto", work, optimizer=lambda optimizer: optax.chain(proximal(strength), optimizer))

    def start_fn(shared, client):
        return _Carry(work.start(shared, client), own.start(shared._replace(params=client.state), client))

    def step_fn(shared, client, carry, t):
        return _Carry(work.step(shared, client, carry.model, t), own.step(shared, client, carry.personal, t))

    def finish_fn(shared, client, carry):
        kept, added = work.finish(shared, client, carry.model)
        return (kept, carry.personal.params), added

    inner = specialised(
        "ditto",
        work._replace(start=start_fn, step=step_fn, finish=finish_fn),
        options,
        num_clients=num_clients,
        memory=same,
    )
    return inner._replace(personal=lambda state, i: tree.take(state.memory, i))
