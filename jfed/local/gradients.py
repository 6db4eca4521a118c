"""Which examples a local step meets, and the sums it forms over them.

A method that changes what clients descend, rather than how, hands `ClientWork.remake` a function from
one `Gradient` to another.

Letters: n examples of the client, B batch size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed import tree
from jfed.core import Cohort, Shared, Tree

Loss = Callable[[Tree, Tree, jax.Array], jax.Array]
"""`(params, batch, key) -> [B]`."""


class Batch(NamedTuple):
    """Examples of one client."""

    examples: Tree  # leaves [B, ...]
    real: jax.Array  # [B] bool; rows that are not real repeat one that is
    key: jax.Array  # for whatever the loss draws


class Sums(NamedTuple):
    """Sums over real examples."""

    gradient: Tree  # of the per-example gradients
    loss: jax.Array  # [] float32
    examples: jax.Array  # [] float32


Gradient = Callable[[Shared, Cohort, Tree, Callable[[int], Batch]], Sums]
"""`(shared, client, params, batch) -> Sums`; `batch(0)` are the step's own examples, `batch(k)` those k steps ahead,
the epoch starting over after its last."""


def of_loss(loss: Loss) -> Gradient:
    """The gradient of a loss over the step's own examples."""

    def gradient_fn(shared: Shared, client: Cohort, params: Tree, batch: Callable[[int], Batch]) -> Sums:
        del shared, client
        examples, real, key = batch(0)

        def total(params):
            values = loss(params, examples, key)
            if getattr(values, "shape", None) != real.shape:
                raise ValueError(
                    f"loss returned {values} for a batch of {real.shape[0]}: "
                    f"it must return one value an example, shape {real.shape}; leave out the mean over the batch."
                )
            return jnp.sum(jnp.where(real, values, 0.0), dtype=jnp.float32)

        for path, leaf in jax.tree.leaves_with_path(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)} and cannot be trained; "
                    "params must be floating, so keep counters and the like elsewhere."
                )
        value, gradient = jax.value_and_grad(total)(params)
        return Sums(gradient, value, jnp.sum(real, dtype=jnp.float32))

    return gradient_fn


def mean_of(sums: Sums) -> Tree:
    """The mean gradient; 0 over no example."""
    share = 1.0 / jnp.maximum(sums.examples, 1.0)
    return jax.tree.map(lambda g: (g * share).astype(g.dtype), sums.gradient)


def wide(x: jax.Array) -> jax.Array:
    """In float32 or better: in half precision a long sum would stall."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def whole(gradient: Gradient, batch_size: int) -> Callable[[Shared, Cohort, Tree], Sums]:
    """`(shared, client, params) -> Sums` over all of a client's examples, a batch at a time, in float32 or better."""

    def sums_fn(shared: Shared, client: Cohort, params: Tree) -> Sums:
        key = jax.random.fold_in(jax.random.fold_in(shared.key, client.ids), 2**31 - 1)  # past any local step

        def chunk(t: jax.Array) -> Sums:
            row, real = client_rows(client, t, batch_size)
            batch = Batch(tree.take(shared.examples, row), real, jax.random.fold_in(key, t))
            sums = gradient(shared, client, params, lambda ahead: batch)
            return sums._replace(gradient=jax.tree.map(wide, sums.gradient))

        nothing = tree.zeros(jax.eval_shape(chunk, jnp.int32(0)))
        chunks = num_batches(client.size, batch_size)
        return jax.lax.fori_loop(0, chunks, lambda t, sums: jax.tree.map(jnp.add, sums, chunk(t)), nothing)

    return sums_fn


def client_rows(client: Cohort, batch: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Rows of a client's `batch`-th run of examples in stored order.

    Returns:
      `(row, real)`: [B] int32 rows of the cohort's examples, and [B] bool, False past the client's end
      (where `row` repeats a row of the client).
    """
    place, real = places(client.size, batch, batch_size)
    return client.start + place, real


def num_batches(size: jax.Array, batch_size: int) -> jax.Array:
    """ceil(size / batch_size), and 1 for a client without examples: it divides."""
    return jnp.maximum(-(-size // batch_size), 1)


def places(size: jax.Array, batch: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Places [B] of a batch in an order of `size` examples, and which of them there are."""
    place = batch * batch_size + jnp.arange(batch_size)
    return jnp.minimum(place, jnp.maximum(size, 1) - 1), place < size
