"""FedNova: clients that do more local steps do not pull the optimum towards their own.

Each client's change is divided by the length of its own path before averaging, and the mean direction is
followed as far as the clients went on average (Wang et al. 2020, arXiv:2007.07481, equation 6 with
tau_eff = sum_i p_i |a_i|_1).

Letters of the paper: a_i how a client's optimizer accumulates gradients, d_i normalised direction,
tau_eff, p_i weights.
"""

import jax.numpy as jnp
import optax

from jfed.algorithms._work import measured, scaled, specialised
from jfed.core import Algorithm, ClientWork


def fednova(work: ClientWork, *, server: optax.GradientTransformation | None = None, **options) -> Algorithm:
    """FedAvg with normalised averaging; where all clients' paths are equally long it is FedAvg.

    `|a_i|_1`, times the local rate, is measured rather than set in a formula (`_work.measured`): it is right
    for SGD, momentum, decaying rates and, with `local.proximal` in the client optimizer, for FedProx.

    Args:
      work: `local.sgd(...)` or `local.full_batch(...)` with an optimizer linear in each number's gradients.
      server: the server optimizer, which sees `tau_eff sum_i p_i d_i`; by default `optax.sgd(1.0)`.
      **options: those of `fedavg`.

    Raises:
      ValueError: if the work cannot be remade.
    """
    server = optax.with_extra_args_support(optax.sgd(1.0) if server is None else server)
    inner = measured("fednova", work)

    def finish_fn(shared, client, carry):
        (change, length), added = inner.finish(shared, client, carry)
        direction = scaled(1.0 / jnp.where(length > 0, length, 1.0), change)
        return {"direction": direction, "length": length, "moved": (length > 0).astype(jnp.float32)}, added

    def update_fn(mean, state, params=None, **extra_args):
        # Both are means over the clients that took a step; the others have no direction.
        share = 1.0 / jnp.where(mean["moved"] > 0, mean["moved"], 1.0)
        return server.update(scaled(share**2 * mean["length"], mean["direction"]), state, params, **extra_args)

    return specialised(
        "fednova",
        inner._replace(finish=finish_fn),
        options,
        parts=("direction",),
        server=optax.GradientTransformationExtraArgs(server.init, update_fn),
        message=lambda params: {"direction": params, "length": jnp.zeros(()), "moved": jnp.zeros(())},
    )
