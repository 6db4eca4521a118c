"""Local training: epochs of mini-batches, full batches, or a gradient and no training.

Local training is McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1, ClientUpdate, except that the
paper splits a client's examples into batches once, and here every epoch splits them anew.

Letters: n examples of the client, B batch size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, shuffle, tree
from jfed._fusion import after
from jfed.core import ClientWork, Cohort, Shared, Tree
from jfed.local.gradients import Batch, Gradient, Loss, Sums, client_rows, num_batches, of_loss, places, whole


class Carry(NamedTuple):
    """A client in the middle of its round."""

    params: Tree  # the client's model
    optimizer: Tree  # state of the client optimizer
    order: Tree  # words of the order of its examples, see `jfed.shuffle`; () where they come as stored
    so_far: Sums | tuple  # over the pass under way, in float32 or better; () where every step ends with an update
    loss: jax.Array  # [] float32, sum of the per-example losses met
    examples: jax.Array  # [] float32, how many there were


def sgd(loss: Loss, optimizer: optax.GradientTransformation, *, batch_size: int, epochs: int = 1) -> ClientWork:
    """Epochs of mini-batch training with any optax optimizer.

    Each epoch visits every example once in a new random order; the last batch of an epoch holds
    what is left over and its gradient is the mean over just those. A client does
    `epochs * ceil(n / B)` local steps.

    Args:
      loss: `(params, batch, key) -> [B]`.
      optimizer: the client optimizer; its state starts anew each round. `jfed.local.links` tells the
        extra arguments it may take.
      batch_size: examples a local step, B.
      epochs: passes over the client's examples.

    Raises:
      ValueError: if `batch_size` or `epochs` is not a whole number of at least 1.

    >>> work = sgd(lambda w, x, key: (w - x) ** 2, optax.sgd(0.1), batch_size=2, epochs=3)
    >>> print(work.steps(jnp.array([4, 5])))
    [6 9]
    """
    _validate.at_least_one("sgd", "batch_size", batch_size, "10 is FedAvg's choice; full_batch uses every example")
    _validate.at_least_one("sgd", "epochs", epochs, "a straggler does less by its cohort's `steps`")
    return _sgd(of_loss(loss), optimizer, batch_size, epochs)


def _sgd(gradient: Gradient, optimizer: optax.GradientTransformation, batch_size: int, epochs: int) -> ClientWork:
    optimizer = optax.with_extra_args_support(optimizer)

    def key_of(shared: Shared, client: Cohort) -> jax.Array:
        return jax.random.fold_in(shared.key, client.ids)

    def start_fn(shared: Shared, client: Cohort) -> Carry:
        # Drawn once a client: drawing in every step would cost a small model more than its training.
        return _start(optimizer, shared)._replace(order=shuffle.draw(key_of(shared, client)))

    def step_fn(shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
        batches = num_batches(client.size, batch_size)
        epoch = t // batches

        def batch(ahead: int) -> Batch:
            place, real = places(client.size, (t + ahead) % batches, batch_size)
            row = client.start + shuffle.position(carry.order, place, client.size, epoch=epoch)
            key = _ahead(jax.random.fold_in(key_of(shared, client), t), ahead)
            return Batch(tree.take(shared.examples, row), real, key)

        met = gradient(shared, client, carry.params, batch)
        carry = carry._replace(loss=carry.loss + met.loss, examples=carry.examples + met.examples)
        return _descend(optimizer, shared, client, carry, met, epoch)

    return ClientWork(
        steps=lambda size: epochs * num_batches(size, batch_size),
        start=start_fn,
        step=step_fn,
        finish=_finish,
        remake=lambda change: _sgd(*change(gradient, optimizer), batch_size, epochs),
        whole=whole(gradient, batch_size),
    )


def full_batch(
    loss: Loss, optimizer: optax.GradientTransformation, *, epochs: int = 1, chunk_size: int = 64
) -> ClientWork:
    """Full-batch training (B = infinity): one optimizer step a pass over the client's examples.

    The gradient is summed over chunks, so memory does not grow with the client; a client does
    `epochs * ceil(n / chunk_size)` local steps, and one stopped in the middle of a pass keeps the
    passes it completed.

    Args:
      loss: `(params, batch, key) -> [B]`.
      optimizer: the client optimizer; its state starts anew each round. `jfed.local.links` tells the
        extra arguments it may take.
      epochs: optimizer steps.
      chunk_size: examples at once; it does not change the result of a loss that draws nothing.

    Raises:
      ValueError: if `epochs` or `chunk_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("full_batch", "epochs", epochs, "a straggler does less by its cohort's `steps`")
    _validate.at_least_one("full_batch", "chunk_size", chunk_size, "a good start is 64")
    return _full_batch(of_loss(loss), optimizer, epochs, chunk_size)


def _full_batch(
    gradient: Gradient, optimizer: optax.GradientTransformation, epochs: int, chunk_size: int
) -> ClientWork:
    optimizer = optax.with_extra_args_support(optimizer)

    def step_fn(shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
        chunks = num_batches(client.size, chunk_size)
        carry = _add_chunk(gradient, chunk_size, shared, client, carry, t)

        def end_of_pass(carry):
            carry = _descend(optimizer, shared, client, carry, carry.so_far, t // chunks)
            return carry._replace(so_far=_nothing(shared))

        return jax.lax.cond((t + 1) % chunks == 0, end_of_pass, lambda c: c, carry)

    return ClientWork(
        steps=lambda size: epochs * num_batches(size, chunk_size),
        start=lambda shared, client: _start(optimizer, shared)._replace(so_far=_nothing(shared)),
        step=step_fn,
        finish=_finish,
        remake=lambda change: _full_batch(*change(gradient, optimizer), epochs, chunk_size),
        whole=whole(gradient, chunk_size),
    )


def gradient(loss: Loss, *, chunk_size: int = 64) -> ClientWork:
    """The mean gradient over all the client's examples at the global model, and no training.

    What it keeps is the gradient itself (FederatedSGD). One stopped early averages what it saw.

    Args:
      loss: `(params, batch, key) -> [B]`.
      chunk_size: examples at once; it does not change the result of a loss that draws nothing.

    Raises:
      ValueError: if `chunk_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("gradient", "chunk_size", chunk_size, "a good start is 64")
    sums = of_loss(loss)

    def step_fn(shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
        # A cohort built with another work's steps may ask for more than one pass.
        once = client._replace(size=jnp.where(t < num_batches(client.size, chunk_size), client.size, 0))
        return _add_chunk(sums, chunk_size, shared, once, carry, t)

    def finish_fn(shared: Shared, client: Cohort, carry: Carry) -> tuple[Tree, Tree]:
        mean = _mean(carry.so_far, shared.params)
        return mean, {"loss": carry.loss, "examples": carry.examples}

    return ClientWork(
        steps=lambda size: num_batches(size, chunk_size),
        start=lambda shared, client: Carry(shared.params, (), (), _nothing(shared), jnp.zeros(()), jnp.zeros(())),
        step=step_fn,
        finish=finish_fn,
        whole=whole(sums, chunk_size),
    )


def stochastic_gradient(loss: Loss, *, batch_size: int) -> ClientWork:
    """The mean gradient at the model over examples drawn without replacement, and no training: one step a round.

    What it keeps is the gradient itself, for whoever descends it: a server, or a peer with an optimizer of its own that
    stays from round to round. A client of fewer than B examples takes all. Asked for more steps, it averages over as
    many batches, which are an epoch's.

    Args:
      loss: `(params, batch, key) -> [B]`.
      batch_size: examples, B.

    Raises:
      ValueError: if `batch_size` is not a whole number of at least 1.

    >>> work = stochastic_gradient(lambda w, x, key: (w - x) ** 2, batch_size=2)
    >>> print(work.steps(jnp.array([4, 5, 0])))
    [1 1 1]
    """
    _validate.at_least_one("stochastic_gradient", "batch_size", batch_size, "32 is usual; gradient uses every example")
    sums = of_loss(loss)

    def start_fn(shared: Shared, client: Cohort) -> Carry:
        order = shuffle.draw(jax.random.fold_in(shared.key, client.ids))
        return Carry(shared.params, (), order, _nothing(shared), jnp.zeros(()), jnp.zeros(()))

    def step_fn(shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
        batches = num_batches(client.size, batch_size)
        place, real = places(client.size, t % batches, batch_size)
        row = client.start + shuffle.position(carry.order, place, client.size, epoch=t // batches)
        key = jax.random.fold_in(jax.random.fold_in(shared.key, client.ids), t)
        batch = Batch(tree.take(shared.examples, row), real, key)
        met = sums(shared, client, carry.params, lambda ahead: batch)
        return carry._replace(
            so_far=jax.tree.map(jnp.add, carry.so_far, met),
            loss=carry.loss + met.loss,
            examples=carry.examples + met.examples,
        )

    def finish_fn(shared: Shared, client: Cohort, carry: Carry) -> tuple[Tree, Tree]:
        return _mean(carry.so_far, shared.params), {"loss": carry.loss, "examples": carry.examples}

    return ClientWork(
        steps=lambda size: jnp.ones_like(jnp.asarray(size)),
        start=start_fn,
        step=step_fn,
        finish=finish_fn,
        whole=whole(sums, batch_size),
    )


def _ahead(key: jax.Array, steps: int) -> jax.Array:
    return jax.random.fold_in(key, steps) if steps else key


def _add_chunk(
    gradient: Gradient, chunk_size: int, shared: Shared, client: Cohort, carry: Carry, t: jax.Array
) -> Carry:
    key = jax.random.fold_in(jax.random.fold_in(shared.key, client.ids), t)

    def chunk(ahead: int) -> Batch:
        row, real = client_rows(client, (t + ahead) % num_batches(client.size, chunk_size), chunk_size)
        return Batch(tree.take(shared.examples, row), real, _ahead(key, ahead))

    met = gradient(shared, client, carry.params, chunk)
    return carry._replace(
        so_far=jax.tree.map(jnp.add, carry.so_far, met),
        loss=carry.loss + met.loss,
        examples=carry.examples + met.examples,
    )


def _nothing(shared: Shared) -> Sums:
    """An empty sum. In half precision a long one would stall: sums are kept in float32 or better."""
    wide = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), shared.params)
    return Sums(wide, jnp.zeros(()), jnp.zeros(()))


def _mean(summed: Sums, params: Tree) -> Tree:
    """Mean gradient in the dtypes of `params`; 0 over no example, so that nothing is NaN even if unused."""
    share = 1.0 / jnp.maximum(summed.examples, 1.0)  # a division for each parameter would take as long as its update
    share = after(share, summed.gradient)  # by then all have read the params, which the update may overwrite
    return jax.tree.map(lambda g, p: (g * share).astype(p.dtype), summed.gradient, params)


def _start(optimizer: optax.GradientTransformationExtraArgs, shared: Shared) -> Carry:
    return Carry(shared.params, optimizer.init(shared.params), (), (), jnp.zeros(()), jnp.zeros(()))


def _descend(
    optimizer: optax.GradientTransformationExtraArgs,
    shared: Shared,
    client: Cohort,
    carry: Carry,
    met: Sums,
    epoch: jax.Array,
) -> Carry:
    """One step of the client optimizer along the mean of what was met."""
    updates, state = optimizer.update(
        _mean(met, carry.params),
        carry.optimizer,
        carry.params,
        anchor=shared.params,
        round=shared.round,
        epoch=epoch,
        value=met.loss / jnp.maximum(met.examples, 1.0),
        extra=shared.extra,
        memory=client.state,
    )
    return carry._replace(params=optax.apply_updates(carry.params, updates), optimizer=state)


def _finish(shared: Shared, client: Cohort, carry: Carry) -> tuple[Tree, Tree]:
    pseudo_gradient = jax.tree.map(jnp.subtract, shared.params, carry.params)
    return pseudo_gradient, {"loss": carry.loss, "examples": carry.examples}
