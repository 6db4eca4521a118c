"""Per-FedAvg: a model from which one local step leads to a good one for each client.

Clients descend the meta-loss `F_i(w) = f_i(w - alpha grad f_i(w))` (Fallah et al. 2020, arXiv:2002.07948,
Algorithm 1), whose gradient is `(I - alpha H f_i(w)) grad f_i(w - alpha grad f_i(w))`. The three
functions differ in what they do about the Hessian. The model is to be judged after a local step:
`run.evaluate_adapted`.

Each local step takes three batches of the epoch's order, its own and the two that follow: D for the
inner gradient, D' for the outer one, D'' for the Hessian. A client of a single batch has all three
alike, and descends its meta-loss exactly. With `local.full_batch` a batch is a chunk: choose one that holds a
client whole.

Letters of the paper: f_i loss of client i, alpha the rate of the inner step, D, D', D'', delta.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jfed import _validate
from jfed.algorithms._work import remade, scaled
from jfed.algorithms.federated import federated
from jfed.core import Algorithm, ClientWork, Tree
from jfed.local.gradients import mean_of


def perfedavg(work: ClientWork, *, alpha: float, **options) -> Algorithm:
    """With the Hessian itself, by the derivative of the gradient along a direction.

    Args:
      work: `local.sgd(...)`; its optimizer, with the rate that the paper calls beta, descends the meta-loss.
      alpha: rate of the inner step.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: if `alpha` is not above 0, or the work cannot be remade.
    """
    _check("perfedavg", alpha)

    def product(at: Callable, w: Tree, v: Tree) -> Tree:
        # In reverse: the kit's convolutions have no forward derivative.
        return jax.grad(lambda w: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, at(w), v))))(w)

    return _meta("perfedavg", work, alpha, product, options)


def perfedavg_fo(work: ClientWork, *, alpha: float, **options) -> Algorithm:
    """First-order MAML: the Hessian left out. Arguments and errors are those of `perfedavg`."""
    _check("perfedavg_fo", alpha)
    return _meta("perfedavg_fo", work, alpha, None, options)


def perfedavg_hf(work: ClientWork, *, alpha: float, delta: float = 1e-3, **options) -> Algorithm:
    """Hessian-free MAML: the Hessian's product by a difference of two gradients.

    Args:
      work: as in `perfedavg`.
      alpha: rate of the inner step.
      delta: the two are taken delta times the direction on either side of the model.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: if `alpha` or `delta` is not above 0, or the work cannot be remade.
    """
    _check("perfedavg_hf", alpha)
    _validate.positive("perfedavg_hf", "delta", delta, "0.001 is usual")

    def product(at: Callable, w: Tree, v: Tree) -> Tree:
        ahead = at(jax.tree.map(lambda w, v: w + delta * v, w, v))
        behind = at(jax.tree.map(lambda w, v: w - delta * v, w, v))
        return jax.tree.map(lambda a, b: (a - b) / (2 * delta), ahead, behind)

    return _meta("perfedavg_hf", work, alpha, product, options)


def _check(where: str, alpha: float) -> None:
    _validate.positive(where, "alpha", alpha, "0.01 is usual")


def _meta(where: str, work: ClientWork, alpha: float, product: Callable | None, options: dict) -> Algorithm:
    def change(gradient):
        def gradient_fn(shared, client, params, batch):
            def at(params, ahead):
                return mean_of(gradient(shared, client, params, lambda k: batch(ahead + k)))

            met = gradient(shared, client, params, batch)  # D
            inner = jax.tree.map(lambda w, g: w - (alpha * g).astype(w.dtype), params, mean_of(met))
            outer = at(inner, 1)  # D'
            if product is not None:
                curved = product(lambda params: at(params, 2), params, outer)  # D''
                outer = jax.tree.map(lambda g, h: g - (alpha * h).astype(g.dtype), outer, curved)
            return met._replace(gradient=scaled(met.examples, outer))

        return gradient_fn

    return federated(remade(where, work, gradient=change), **options)
