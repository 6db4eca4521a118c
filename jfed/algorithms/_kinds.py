"""What FedMD and FedDF share: clients whose models are of several kinds, and training on public examples.

Letters: N clients, K kinds of model, P public examples, S of them used in a round.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _streams, _validate
from jfed.core import Algorithm, ClientWork, Cohort, Traffic, Tree


class Kind(NamedTuple):
    """One kind of model, and how a client trains it."""

    apply: Callable  # (params, x [B, ...]) -> scores [B, classes]
    work: ClientWork  # training on the client's own examples


class ByKind(NamedTuple):
    """State of a method whose clients have models of several kinds."""

    kinds: tuple  # a FederatedState for each


def init_of(inner: list[Algorithm]) -> Callable:
    """`(a tuple of params, one for each kind) -> ByKind`."""

    def init_fn(params: tuple) -> ByKind:
        return ByKind(tuple(algorithm.init(p) for algorithm, p in zip(inner, params, strict=True)))

    return init_fn


def only(cohort: Cohort, kind_of: np.ndarray, kind: int) -> Cohort:
    """The cohort with all but one kind absent."""
    here = jnp.take(jnp.asarray(kind_of), cohort.ids, mode="fill", fill_value=-1) == kind
    return cohort._replace(
        steps=jnp.where(here, cohort.steps, 0),
        weight=jnp.where(here, cohort.weight, 0.0),
        size=jnp.where(here, cohort.size, 0),
    )


def public_rows(key: jax.Array, public: jax.Array, count: int) -> jax.Array:
    """The round's public examples: [S] int32."""
    key = jax.random.fold_in(key, _streams.PUBLIC)
    return jax.random.choice(key, public.shape[0], (count,), replace=False).astype(jnp.int32)


def train(loss: Callable, optimizer, params: Tree, key, x, target, epochs: int, batch: int) -> Tree:
    """Epochs of an optimizer over `(x, target)`, in a new order each."""
    optimizer = optax.with_extra_args_support(optimizer)
    steps = x.shape[0] // batch

    def step(carry, rows):
        params, state = carry
        gradient = jax.grad(loss)(params, x[rows], target[rows])
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, x.shape[0]).reshape(steps, batch)
        return jax.lax.scan(step, carry, order)

    (params, _), _ = jax.lax.scan(epoch, (params, optimizer.init(params)), jax.random.split(key, epochs))
    return params


def together(metrics: list[dict]) -> dict:
    """A round's metrics over all kinds: the loss is the mean by reports."""
    total = {name: sum(m[name] for m in metrics) for name in ("reports", "dropped", "steps")}
    reports = jnp.stack([m["reports"] for m in metrics])
    losses = jnp.stack([m["loss"] for m in metrics])
    present = reports > 0
    present &= jnp.isfinite(losses)
    loss = jnp.sum(jnp.where(present, reports * losses, 0.0)) / jnp.maximum(jnp.sum(jnp.where(present, reports, 0)), 1)
    kinds = [m["traffic"] for m in metrics]  # a client is of one kind, and 0 in the others
    traffic = Traffic(kinds[0].ids, up=sum(t.up for t in kinds), down=sum(t.down for t in kinds))
    return {"loss": jnp.where(jnp.any(present), loss, jnp.nan), **total, "traffic": traffic}


def check(
    where: str, kinds: Sequence[Kind], kind_of, public: jax.Array, size: int, epochs: int, batch: int
) -> np.ndarray:
    """The kinds [N] of the clients, as numpy; a `ValueError` if a setting of `where` cannot be."""
    kind_of, count = np.asarray(kind_of), len(kinds)
    known = np.issubdtype(kind_of.dtype, np.integer) and np.all((kind_of >= 0) & (kind_of < count))
    if kind_of.ndim != 1 or not known or set(kind_of.tolist()) != set(range(count)):
        raise ValueError(
            f"{where}(kind_of={kind_of}): one number in [0, {count}) for each client, and a client of each kind."
        )
    _validate.at_least_one(where, "public_size", size, "5000 is usual")
    _validate.at_least_one(where, "batch", batch, "64 is usual")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"{where}(epochs={epochs!r}): passes over public examples, a whole number of at least 0.")
    if size > public.shape[0] or size % batch:
        raise ValueError(
            f"{where}(public_size={size}): at most the {public.shape[0]} public examples there are, and a multiple of "
            f"the batch, {batch}."
        )
    return kind_of
