"""SCAFFOLD: each client corrects its drift by what it knows of its own gradient and of everybody's.

A local step descends `g_i(y) - c_i + c`; the control variates c_i and c are estimates of the client's
and of the global gradient (Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1, option II).

Letters of the paper: x global model, y_i client's model, c and c_i control variates, K local steps,
eta_l local and eta_g global rate, S cohort, N clients.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import tree
from jfed.algorithms._work import corrected, equally_weighted, measured, specialised
from jfed.core import Algorithm, ClientWork


def scaffold(
    work: ClientWork, *, num_clients: int, server: optax.GradientTransformation | None = None, **options
) -> Algorithm:
    """FedAvg with control variates, `c_i <- c_i - c + (x - y_i) / (K eta_l)`.

    `K eta_l` is measured (`_work.measured`), so clients may stop early and rates may decay; with momentum
    it is the length of the path. Clients send the change of c_i, not c_i, and weigh alike, whatever the
    cohort's weights, as in the paper: only so does c stay the mean of all c_i. A client drawn twice in a round would
    count twice in c and once in its own. What everybody is sent doubles, and what clients send.

    Args:
      work: `local.sgd(...)` or `local.full_batch(...)` with an optimizer linear in each number's gradients.
      num_clients: clients in the population, N.
      server: the server optimizer; by default `optax.sgd(1.0)`, eta_g = 1.
      **options: those of `fedavg`.

    Raises:
      ValueError: if the work cannot be remade.
    """
    server = optax.with_extra_args_support(optax.sgd(1.0) if server is None else server)
    inner = measured(
        "scaffold",
        corrected("scaffold", work, lambda shared, client, y: jax.tree.map(jnp.subtract, shared.extra, client.state)),
    )

    def finish_fn(shared, client, carry):
        (change, length), added = inner.finish(shared, client, carry)  # x - y_i, K eta_l

        def new(c_i, c, d):
            return (c_i - c + d / jnp.where(length > 0, length, 1.0)).astype(c_i.dtype)

        c_i = jax.tree.map(new, client.state, shared.extra, change)
        c_i = tree.select(length > 0, c_i, client.state)
        return ({"model": change, "control": jax.tree.map(jnp.subtract, c_i, client.state)}, c_i), added

    def update_fn(mean, state, params=None, *, reports, **extra_args):
        updates, inner_state = server.update(mean["model"], state["server"], params, reports=reports, **extra_args)
        c = jax.tree.map(lambda c, d: (c + reports / num_clients * d).astype(c.dtype), state["c"], mean["control"])
        return updates, {"server": inner_state, "c": c}

    def init_fn(params):
        return {"server": server.init(params), "c": jax.tree.map(jnp.zeros_like, params)}

    return equally_weighted(
        specialised(
            "scaffold",
            inner._replace(finish=finish_fn),
            options,
            parts=("model", "control"),
            server=optax.GradientTransformationExtraArgs(init_fn, update_fn),
            num_clients=num_clients,
            memory=lambda params: jax.tree.map(jnp.zeros_like, params),
            message=lambda params: {"model": params, "control": params},
            broadcast=lambda state, shared, clients: state["c"],
        )
    )
