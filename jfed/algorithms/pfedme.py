"""pFedMe: the global model descends the Moreau envelopes of the clients' losses.

In each local step a client finds its personal model, `theta = argmin f_i(theta; batch) + lambda / 2
|theta - w|^2`, approximately, by K gradient steps, and moves its local version of the global model
towards it: the envelope's gradient is `lambda (w - theta)` (Dinh et al. 2020, arXiv:2006.08848,
Algorithm 1).

Letters of the paper: w local version of the global model, theta personal model, lambda, K, beta.
"""

import jax
import optax

from jfed import _validate, tree
from jfed.algorithms._work import remade, same, scaled, side_by_side, specialised
from jfed.core import Algorithm, ClientWork
from jfed.local.gradients import mean_of


def pfedme(
    work: ClientWork,
    *,
    strength: float,
    personal_learning_rate: float,
    num_clients: int,
    inner_steps: int = 5,
    beta: float = 1.0,
    **options,
) -> Algorithm:
    """Personal models and their common centre.

    Only the cohort trains. In the paper every client does, and the server averages those it drew: the global model is
    the same, and the personal model of a client never drawn lags behind.

    Args:
      work: `local.sgd(...)`; its optimizer, with the rate that the paper calls eta, descends the envelope.
      strength: lambda; the paper uses 15 to 30, with eta lambda below 1.
      personal_learning_rate: of the K steps that find theta.
      num_clients: clients in the population, N.
      inner_steps: K.
      beta: the new global model is `(1 - beta) w + beta mean w_i`.
      **options: those of `fedavg`.

    Raises:
      ValueError: if `strength`, `personal_learning_rate` or `beta` is not above 0, `inner_steps` is not a whole
        number of at least 1, or the work cannot be remade.
    """
    _validate.positive("pfedme", "strength", strength, "15 is usual")
    _validate.positive("pfedme", "personal_learning_rate", personal_learning_rate, "0.1 is a good start")
    _validate.positive("pfedme", "beta", beta, "1 is plain averaging")
    _validate.at_least_one("pfedme", "inner_steps", inner_steps, "5 is usual")

    def change(gradient):
        def gradient_fn(shared, client, params, batch):
            shared = shared._replace(params=shared.params["w"])
            w, theta = params["w"], params["theta"]
            met = gradient(shared, client, w, batch)

            def inner_step(_, theta):
                slope = mean_of(gradient(shared, client, theta, batch))

                def descend(x, g, w):
                    return (x - personal_learning_rate * (g + strength * (x - w))).astype(x.dtype)

                return jax.tree.map(descend, theta, slope, w)

            new = jax.lax.fori_loop(0, inner_steps, inner_step, theta)
            envelope = jax.tree.map(lambda w, x: strength * (w - x), w, new)
            towards = jax.tree.map(lambda old, new: old - new, theta, new)  # descended with a rate of 1
            return met._replace(gradient=scaled(met.examples, {"w": envelope, "theta": towards}))

        return gradient_fn

    inner = remade(
        "pfedme",
        work,
        gradient=change,
        optimizer=lambda optimizer: side_by_side(w=optimizer, theta=optax.sgd(1.0)),
    )

    def beside(shared):  # theta starts from w, as in the authors' code
        return shared._replace(params={"w": shared.params, "theta": shared.params})

    def finish_fn(shared, client, carry):
        kept, added = inner.finish(beside(shared), client, carry)
        return (kept["w"], carry.params["theta"]), added

    whole_round = specialised(
        "pfedme",
        inner._replace(
            start=lambda shared, client: inner.start(beside(shared), client),
            step=lambda shared, client, carry, t: inner.step(beside(shared), client, carry, t),
            finish=finish_fn,
        ),
        options,
        server=optax.sgd(beta),
        num_clients=num_clients,
        memory=same,
    )
    return whole_round._replace(personal=lambda state, i: tree.take(state.memory, i))
