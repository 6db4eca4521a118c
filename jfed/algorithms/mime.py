"""Mime and MimeLite: clients take the steps that the server's optimizer would.

The statistics of the optimizer (momentum, second moments) are the server's: every client applies them in
its local steps and does not change them; the server updates them once a round with the mean gradient at
the global model. Mime also corrects each client's gradient as SVRG does (Karimireddy et al. 2020,
arXiv:2008.03606, Algorithm 1).

Letters of the paper: x global model, y_i client's, s statistics, U and V how an optimizer uses and
updates them, c mean gradient at x.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import tree
from jfed.algorithms._work import optimizer_of, remade, scaled, specialised, whole_of
from jfed.algorithms.federated import FederatedState
from jfed.clients import lanes
from jfed.core import Algorithm, ClientWork, Cohort, Shared
from jfed.local.gradients import mean_of


def mimelite(work: ClientWork, **options) -> Algorithm:
    """The clients' optimizer with the server's statistics; its state lasts from round to round.

    The paper weights clients alike: `sampling.equally_weighted`. An optimizer steps as its own `update` does with the
    server's statistics, which it then leaves as they are. For SGD with momentum b that is the paper's U with a rate
    1 / (1 - b) times as large; Adam's second moment has a share 1 - b2 of the client's own gradient, which the
    paper's has not.

    Args:
      work: `local.sgd(...)` or `local.full_batch(...)`; its optimizer is the base method, such as
        `optax.sgd(0.1, momentum=0.9)`.
      **options: those of `fedavg`.

    Raises:
      ValueError: if the work cannot be remade.
    """
    whole = whole_of("mimelite", work)
    inner, base = _with_statistics("mimelite", work)

    def finish_fn(shared, client, carry):
        change, added = inner.finish(shared, client, carry)
        return {"model": change, "gradient": mean_of(whole(shared, client, shared.params))}, added

    def update_fn(mean, s, x=None, **extra_args):
        return scaled(-1.0, mean["model"]), _advance(base, mean["gradient"], s, x, extra_args)

    return specialised(
        "mimelite",
        inner._replace(finish=finish_fn),
        options,
        parts=("model", "gradient"),
        server=optax.GradientTransformationExtraArgs(base.init, update_fn),
        message=lambda params: {"model": params, "gradient": params},
        broadcast=lambda s, shared, clients: {"s": s},
    )


def mime(work: ClientWork, **options) -> Algorithm:
    """MimeLite with each gradient corrected: `grad f_i(y) - grad f_i(x) + c`, all on one batch.

    The cohort is visited twice a round, first for c. Arguments and errors are those of `mimelite`.
    """
    whole = whole_of("mime", work)
    client_map = options["client_map"] = options.get("client_map") or lanes(16)

    def change(gradient):
        def gradient_fn(shared, client, y, batch):
            here = gradient(shared, client, y, batch)
            there = gradient(shared, client, shared.params, batch)

            def correct(g, g_x, c):
                return (g - g_x + here.examples * c).astype(g.dtype)

            return here._replace(gradient=jax.tree.map(correct, here.gradient, there.gradient, shared.extra["c"]))

        return gradient_fn

    inner, base = _with_statistics("mime", remade("mime", work, gradient=change))

    def finish_first(shared, client, carry):
        sums = whole(shared, client, shared.params)
        sound = tree.all_finite(sums) & (client.weight > 0)
        weight = jnp.where(sound, client.weight, 0.0)
        gradient = jax.tree.map(lambda g: weight * g, mean_of(sums))
        return (), {"c": tree.select(sound, gradient, jax.tree.map(jnp.zeros_like, gradient)), "weight": weight}

    first = ClientWork(
        work.steps, start=lambda shared, client: (), step=lambda shared, client, carry, t: (), finish=finish_first
    )

    def broadcast(s, shared: Shared, clients: Cohort) -> dict:
        _, added = client_map(first, shared, clients._replace(steps=jnp.zeros_like(clients.steps)))
        share = 1.0 / jnp.where(added["weight"] > 0, added["weight"], 1.0)
        return {"s": s, "c": jax.tree.map(lambda c, p: (share * c).astype(p.dtype), added["c"], shared.params)}

    def update_fn(mean, s, x=None, *, extra, **extra_args):
        return scaled(-1.0, mean), _advance(base, extra["c"], s, x, extra_args)

    whole_round = specialised(
        "mime",
        inner,
        options,
        aggregator=None,
        server=optax.GradientTransformationExtraArgs(base.init, update_fn),
        broadcast=broadcast,
    )

    def round_fn(state: FederatedState, cohort: Cohort, key: jax.Array) -> tuple[FederatedState, dict]:
        after, metrics = whole_round.round(state, cohort, key)
        traffic = metrics["traffic"]
        gradient = tree.count_bytes(tree.nbytes(state.params), cohort.weight != 0)  # before c is known
        return after, metrics | {"traffic": traffic._replace(up=traffic.up + gradient)}

    return whole_round._replace(round=round_fn)


def _with_statistics(where: str, work: ClientWork) -> tuple[ClientWork, optax.GradientTransformationExtraArgs]:
    """The work with its optimizer's state taken from `shared.extra["s"]`, and that optimizer."""
    base = optimizer_of(where, work)

    def update_fn(updates, state, params=None, *, extra, **extra_args):
        return base.update(updates, extra["s"], params, extra=extra, **extra_args)[0], state

    frozen = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    return remade(where, work, optimizer=lambda _: frozen), base


def _advance(base: optax.GradientTransformationExtraArgs, c, s, x, extra_args: dict):
    """V: the statistics after one more gradient, as a client's optimizer is called."""
    given = {"anchor": x, "epoch": jnp.int32(0), "value": jnp.zeros(()), "extra": (), "memory": ()}
    return base.update(c, s, x, **extra_args | given)[1]
