"""What several methods do to the work of a client."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfed.algorithms.federated import federated
from jfed.core import Algorithm, ClientWork, Cohort, Shared, Tree


def same(x):
    """Changes nothing."""
    return x


def specialised(
    where: str, work: ClientWork, options: dict[str, Any], *, parts: tuple[str, ...] = (), **own: Any
) -> Algorithm:
    """`federated` with what a method itself sets, `own`, and what its caller asks for.

    Of a message that is a dict the caller's uplink sees the entries named in `parts`, each by itself; what else is in
    it, numbers that the server divides by or counts, arrives as it was sent.

    Raises:
      ValueError: if the caller asks for what the method sets.
    """
    for name in sorted(own.keys() & options.keys()):
        raise ValueError(f"{where}({name}=...): {where} decides that itself; leave it out.")
    if parts and options.get("uplink") is not None:
        options = options | {"uplink": _by_part(optax.with_extra_args_support(options["uplink"]), parts)}
    return federated(work, **own, **options)


def _by_part(
    uplink: optax.GradientTransformationExtraArgs, parts: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
    def update_fn(message, state, params=None, *, key, **extra_args):
        coded = {
            name: uplink.update(message[name], state[name], params[name], key=jax.random.fold_in(key, i), **extra_args)
            for i, name in enumerate(parts)
        }
        sent = {name: pair[0] for name, pair in coded.items()}
        return message | sent, {name: pair[1] for name, pair in coded.items()}

    return optax.GradientTransformationExtraArgs(
        lambda message: {name: uplink.init(message[name]) for name in parts}, update_fn
    )


def remade(where: str, work: ClientWork, *, gradient: Callable = same, optimizer: Callable = same) -> ClientWork:
    """The same work with another gradient or client optimizer, each made out of the one it has.

    Raises:
      ValueError: if the work cannot be remade.
    """
    if work.remake is None:
        raise ValueError(
            f"{where}(work): this work does not say how to remake it; make it with local.sgd or local.full_batch, or "
            "give yours a `remake`."
        )
    return work.remake(lambda g, o: (gradient(g), optimizer(o)))


def optimizer_of(where: str, work: ClientWork) -> optax.GradientTransformationExtraArgs:
    """The client optimizer.

    Raises:
      ValueError: if the work cannot be remade.
    """
    found = []
    remade(where, work, optimizer=lambda optimizer: found.append(optimizer) or optimizer)
    return found[0]


def whole_of(where: str, work: ClientWork) -> Callable:
    """`(shared, client, params) -> Sums` over all examples of a client.

    Raises:
      ValueError: if the work does not say.
    """
    if work.whole is None:
        raise ValueError(
            f"{where}(work): this work does not say what its loss over all examples is; make it with jfed.local, or "
            "give yours a `whole`."
        )
    return work.whole


def corrected(where: str, work: ClientWork, term: Callable[[Shared, Cohort, Tree], Tree]) -> ClientWork:
    """The same work, which descends its gradient plus `term(shared, client, params)`."""

    def change(gradient):
        def gradient_fn(shared, client, params, batch):
            met = gradient(shared, client, params, batch)
            added = term(shared, client, params)
            return met._replace(
                gradient=jax.tree.map(lambda g, a: g + (met.examples * a).astype(g.dtype), met.gradient, added)
            )

        return gradient_fn

    return remade(where, work, gradient=change)


def equally_weighted(algorithm: Algorithm) -> Algorithm:
    """The same method, to which every client that is present weighs 1; a weight that is none stays and is dropped."""

    def round_fn(state: Tree, cohort: Cohort, key: jax.Array) -> tuple[Tree, dict]:
        return algorithm.round(state, cohort._replace(weight=jnp.where(cohort.weight > 0, 1.0, cohort.weight)), key)

    return algorithm._replace(round=round_fn)


def measured(where: str, work: ClientWork) -> ClientWork:
    """The same work, which keeps `(pseudo-gradient, length)`.

    The length is how far its optimizer would have gone along a constant gradient of 1. With plain SGD it
    is the learning rate times the local steps; with momentum, a decaying rate or a proximal term, the
    rate times the norm of the vector a_i of Wang et al. 2020 (arXiv:2007.07481). To that end a single
    number is trained beside the model, so the optimizer must act on each number alone, and linearly.
    """

    def change(gradient):
        def gradient_fn(shared, client, params, batch):
            met = gradient(shared._replace(params=shared.params["model"]), client, params["model"], batch)
            return met._replace(gradient={"model": met.gradient, "length": met.examples})

        return gradient_fn

    # Apart, so that a link that looks at all of a tree, as clipping by its norm does, does not see the number.
    both = remade(where, work, gradient=change, optimizer=lambda o: side_by_side(model=o, length=o))

    def beside(shared: Shared) -> Shared:
        return shared._replace(params={"model": shared.params, "length": jnp.zeros(())})

    def finish_fn(shared, client, carry):
        kept, added = both.finish(beside(shared), client, carry)
        return (kept["model"], kept["length"]), added

    return ClientWork(
        work.steps,
        start=lambda shared, client: both.start(beside(shared), client),
        step=lambda shared, client, carry, t: both.step(beside(shared), client, carry, t),
        finish=finish_fn,
    )


def side_by_side(**optimizers: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Descends the parts of a dict of params each with its own optimizer."""
    optimizers = {name: optax.with_extra_args_support(o) for name, o in optimizers.items()}

    def update_fn(updates, state, params=None, *, anchor, **extra_args):
        pairs = {
            name: o.update(updates[name], state[name], params[name], anchor=anchor[name], **extra_args)
            for name, o in optimizers.items()
        }
        return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}

    return optax.GradientTransformationExtraArgs(
        lambda params: {name: o.init(params[name]) for name, o in optimizers.items()}, update_fn
    )


def scaled(by: jax.Array, tree: Tree) -> Tree:
    """Every leaf times a number, in its own dtype."""
    return jax.tree.map(lambda x: (by * x).astype(x.dtype), tree)
