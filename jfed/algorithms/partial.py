"""Models of which a part never leaves the client: FedPer, FedRep, LG-FedAvg, FedBN.

One mask says which leaves are local. A client keeps those from round to round; the others are trained,
sent and averaged as in FedAvg. The four methods differ in the mask, and FedRep in training the parts
one after the other:

    fedper      the last layers are local     Arivazhagan et al. 2019, arXiv:1912.00818, Algorithms 1 and 2
    fedrep      the same, trained first       Collins et al. 2021, arXiv:2102.07078, Algorithm 1
    lg_fedavg   the first layers are local    Liang et al. 2020, arXiv:2001.01523, Algorithm 1
    fedbn       normalisation is local        Li et al. 2021, arXiv:2102.07623, Algorithm 1
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.algorithms._work import remade, specialised
from jfed.algorithms.federated import FederatedState
from jfed.core import Algorithm, ClientWork, Cohort, Shared, Tree

Mask = Callable[[str], bool]
"""Whether a leaf is local, by its path, such as `"dense/kernel"`."""


def is_normalisation(path: str) -> bool:
    """Whether a path names a normalisation layer.

    >>> is_normalisation("norm1/scale"), is_normalisation("dense/kernel")
    (True, False)
    """
    return "norm" in path.lower()


def partially_local(work: ClientWork, *, is_local: Mask, num_clients: int, **options) -> Algorithm:
    """FedAvg over the leaves that are not local, each client keeping its own of the others.

    `params` of its state is the shared part with the mean of the clients' local parts; `personal` is a
    client's own model. Local leaves cost no bytes.

    Args:
      work: usually `local.sgd(...)`; its carry has a field `params`.
      is_local: whether a leaf is local, by its path, names joined by `/`.
      num_clients: clients in the population, N.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: at `init`, if no leaf is local, or all are.
    """
    return _partially_local("partially_local", work, is_local, num_clients, options)


def _partially_local(
    where: str, work: ClientWork, is_local: Mask, num_clients: int, options: dict[str, Any]
) -> Algorithm:
    def split(params: Tree) -> tuple[Tree, Tree]:
        """`(shared, local)`, each with None for the other's leaves."""
        local = jax.tree.map_with_path(lambda path, _: bool(is_local(tree.name_of(path))), params)
        return (
            jax.tree.map(lambda flag, x: None if flag else x, local, params),
            jax.tree.map(lambda flag, x: x if flag else None, local, params),
        )

    def merged(shared: Shared, own: Tree) -> Shared:
        return shared._replace(params=_merge(shared.params, own))

    def finish_fn(shared: Shared, client: Cohort, carry: Tree) -> tuple[Tree, Tree]:
        kept, added = work.finish(merged(shared, client.state), client, carry)
        return (split(kept)[0], split(carry.params)[1]), added

    inner = specialised(
        where,
        work._replace(
            start=lambda shared, client: work.start(merged(shared, client.state), client),
            step=lambda shared, client, carry, t: work.step(merged(shared, client.state), client, carry, t),
            finish=finish_fn,
        ),
        options,
        num_clients=num_clients,
        memory=lambda params: (),  # set by init
    )

    def init_fn(params: Tree) -> FederatedState:
        shared, own = split(jax.tree.map(jnp.asarray, params))
        if not jax.tree.leaves(shared) or not jax.tree.leaves(own):
            names = [tree.name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
            raise ValueError(
                f"{where}(is_local): it holds for {'all' if jax.tree.leaves(own) else 'none'} of {names}; name some of "
                "them and leave others."
            )
        everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), own)
        return inner.init(shared)._replace(memory=everyone)

    return inner._replace(
        init=init_fn,
        params=lambda state: _merge(state.params, jax.tree.map(lambda x: jnp.mean(x, 0), state.memory)),
        personal=lambda state, i: _merge(state.params, tree.take(state.memory, i)),
    )


def fedper(work: ClientWork, *, is_local: Mask, num_clients: int, **options) -> Algorithm:
    """The personalisation layers, usually the last, are local. Arguments are those of `partially_local`."""
    return _partially_local("fedper", work, is_local, num_clients, options)


def lg_fedavg(work: ClientWork, *, is_local: Mask, num_clients: int, **options) -> Algorithm:
    """The representation, the first layers, is local, and the head shared. Arguments are those of `partially_local`."""
    return _partially_local("lg_fedavg", work, is_local, num_clients, options)


def fedbn(work: ClientWork, *, num_clients: int, is_local: Mask = is_normalisation, **options) -> Algorithm:
    """Normalisation is local, by default every leaf that has `norm` in its path.

    The kit's models normalise by groups or layers, whose scales and offsets are params; running statistics
    of batches, which the paper keeps local too, are not part of a model here. Arguments are those of
    `partially_local`.
    """
    return _partially_local("fedbn", work, is_local, num_clients, options)


def fedrep(work: ClientWork, *, is_local: Mask, head_epochs: int, num_clients: int, **options) -> Algorithm:
    """The local part is trained alone in the first epochs of a round, the shared part alone in the others.

    A client with no step after those epochs, because there are no more or it stopped early, sends no change.

    Args:
      work: `local.sgd(...)` of more than `head_epochs` epochs.
      is_local: whether a leaf is local, by its path.
      head_epochs: epochs for the local part.
      num_clients: clients in the population, N.
      **options: those of `fedavg`, and `server`.

    Raises:
      ValueError: if `head_epochs` is not a whole number of at least 1, or the work cannot be remade; at `init`, if no
        leaf is local, or all are.
    """
    _validate.at_least_one("fedrep", "head_epochs", head_epochs, "10 is usual, with one more for the rest")

    def in_turn(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
        def only(flag: jax.Array, updates: Tree) -> Tree:
            """The part whose turn it is; an optimizer may move the other by momentum."""

            def one(path, u):
                return jnp.where(flag if is_local(tree.name_of(path)) else ~flag, u, jnp.zeros_like(u))

            return jax.tree.map_with_path(one, updates)

        def update_fn(updates, state, params=None, *, epoch, **extra_args):
            heads = epoch < head_epochs
            updates, state = optimizer.update(only(heads, updates), state, params, epoch=epoch, **extra_args)
            return only(heads, updates), state

        return optax.GradientTransformationExtraArgs(optimizer.init, update_fn)

    phased = remade("fedrep", work, optimizer=in_turn)
    return _partially_local("fedrep", phased, is_local, num_clients, options)


def _merge(shared: Tree, own: Tree) -> Tree:
    return jax.tree.map(lambda a, b: b if a is None else a, shared, own, is_leaf=lambda x: x is None)
