"""APFL: each client's model is a mixture of the global model and one of its own.

The own part v_i is trained by the loss of the mixture `alpha v_i + (1 - alpha) w_i`, the local version
w_i of the global model by its own loss, on the same batches (Deng et al. 2020, arXiv:2003.13461,
Algorithm 1); alpha may be learned, down the gradient of that loss in it.

Letters of the paper: w_i local version of the global model w, v_i own part, alpha_i mixing weight.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.algorithms._work import remade, side_by_side, specialised
from jfed.core import Algorithm, ClientWork, Tree


def apfl(work: ClientWork, *, alpha: float, num_clients: int, alpha_learning_rate: float = 0.0, **options) -> Algorithm:
    """FedAvg, unchanged, and personal mixtures; a client's own part starts as the global model does.

    Args:
      work: `local.sgd(...)` or `local.full_batch(...)`.
      alpha: weight of the own part, in [0, 1], at the start; 0 is FedAvg, 1 training alone.
      num_clients: clients in the population, N.
      alpha_learning_rate: rate of the weight's own gradient steps; 0 leaves it as it is.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: if `alpha` is not in [0, 1], `alpha_learning_rate` is negative, or the work cannot be remade.
    """
    _validate.within("apfl", "alpha", alpha, 0.0, 1.0, "0.5 is a good start")
    _validate.at_least_zero("apfl", "alpha_learning_rate", alpha_learning_rate, "0 leaves alpha as it is")

    def update_alpha(slope, state, alpha=None):
        return clipped(alpha - alpha_learning_rate * slope) - alpha, state

    within_bounds = optax.GradientTransformation(lambda alpha: optax.EmptyState(), update_alpha)

    def change_gradient(gradient):
        def gradient_fn(shared, client, params, batch):
            shared = shared._replace(params=shared.params["w"])
            met = gradient(shared, client, params["w"], batch)
            at_mixture = gradient(shared, client, mix(params["alpha"], params["v"], params["w"]), batch).gradient
            slopes = jax.tree.map(lambda v, w, g: jnp.vdot(v - w, g), params["v"], params["w"], at_mixture)
            slope = sum(jax.tree.leaves(slopes)).astype(jnp.float32)
            own = jax.tree.map(lambda g: (params["alpha"] * g).astype(g.dtype), at_mixture)
            return met._replace(gradient={"w": met.gradient, "v": own, "alpha": slope})

        return gradient_fn

    inner = remade(
        "apfl",
        work,
        gradient=change_gradient,
        optimizer=lambda optimizer: side_by_side(w=optimizer, v=optimizer, alpha=within_bounds),
    )

    def beside(shared, client):
        return shared._replace(params={"w": shared.params, **client.state})

    def finish_fn(shared, client, carry):
        kept, added = inner.finish(beside(shared, client), client, carry)
        return (kept["w"], {"v": carry.params["v"], "alpha": carry.params["alpha"]}), added

    whole_round = specialised(
        "apfl",
        inner._replace(
            start=lambda shared, client: inner.start(beside(shared, client), client),
            step=lambda shared, client, carry, t: inner.step(beside(shared, client), client, carry, t),
            finish=finish_fn,
        ),
        options,
        num_clients=num_clients,
        memory=lambda params: {"v": params, "alpha": jnp.asarray(alpha, jnp.float32)},
    )

    def personal(state, i):
        own = tree.take(state.memory, i)
        return mix(own["alpha"], own["v"], state.params)

    return whole_round._replace(personal=personal)


def clipped(alpha: jax.Array) -> jax.Array:
    """Into [0, 1]."""
    return jnp.clip(alpha, 0.0, 1.0)


def mix(alpha: jax.Array, v: Tree, w: Tree) -> Tree:
    """`alpha v + (1 - alpha) w`."""
    return jax.tree.map(lambda v, w: (alpha * v + (1 - alpha) * w).astype(w.dtype), v, w)
