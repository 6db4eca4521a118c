"""What one client does between receiving the model and sending its update back.

Each factory returns a `ClientWork` whose `finish` keeps the client's pseudo-gradient
`params - new_params` and adds `{"loss", "examples"}`: the sum of the per-example losses met in
training, and how many there were. A loss is `loss(params, batch, key) -> [B]`, one value an
example, so that short batches are weighted exactly; it must not mix the examples of a batch.

Local training is McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1, ClientUpdate, except that the
paper splits a client's examples into batches once, and here every epoch splits them anew.

Letters: n examples of the client, B batch size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, shuffle, tree
from jfed._fusion import after
from jfed.core import ClientWork, Cohort, Shared, Tree

Loss = Callable[[Tree, Tree, jax.Array], jax.Array]


class Pass(NamedTuple):
    """Sums over the examples met in the pass under way."""

    gradient: Tree  # of the per-example gradients; at least float32
    loss: jax.Array  # [] float32
    examples: jax.Array  # [] float32


class Carry(NamedTuple):
    """A client in the middle of its round."""

    params: Tree  # the client's model
    optimizer: Tree  # state of the client optimizer
    order: Tree  # words of the order of its examples, see `jfed.shuffle`; () where they come as stored
    so_far: Pass | tuple  # () where every step ends with an update
    loss: jax.Array  # [] float32, sum of the per-example losses met
    examples: jax.Array  # [] float32, how many there were


def sgd(loss: Loss, optimizer: optax.GradientTransformation, *, batch_size: int, epochs: int = 1) -> ClientWork:
    """Epochs of mini-batch training with any optax optimizer.

    Each epoch visits every example once in a new random order; the last batch of an epoch holds
    what is left over and its gradient is the mean over just those. A client does
    `epochs * ceil(n / B)` local steps.

    The optimizer may take the extra arguments `anchor` (the round's global params), `round`
    (rounds completed before this one) and `value` (the batch loss).

    Args:
      loss: `(params, batch, key) -> [B]`.
      optimizer: the client optimizer; its state starts anew each round.
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
    optimizer = optax.with_extra_args_support(optimizer)

    def key_of(shared: Shared, client: Cohort) -> jax.Array:
        return jax.random.fold_in(shared.key, client.ids)

    def start_fn(shared: Shared, client: Cohort) -> Carry:
        # Drawn once a client: drawing in every step would cost a small model more than its training.
        return _start(optimizer, shared)._replace(order=shuffle.draw(key_of(shared, client)))

    def step_fn(shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
        batches = _batches(client.size, batch_size)
        place, real = _places(client.size, t % batches, batch_size)
        row = client.start + shuffle.position(carry.order, place, client.size, epoch=t // batches)
        batch = tree.take(shared.examples, row)

        loss_key = jax.random.fold_in(key_of(shared, client), t)
        met = _sums(loss, carry.params, batch, real, loss_key)
        carry = carry._replace(loss=carry.loss + met.loss, examples=carry.examples + met.examples)
        return _descend(optimizer, shared, carry, met)

    return ClientWork(
        steps=lambda size: epochs * _batches(size, batch_size),
        start=start_fn,
        step=step_fn,
        finish=_finish,
    )


def full_batch(
    loss: Loss, optimizer: optax.GradientTransformation, *, epochs: int = 1, chunk_size: int = 64
) -> ClientWork:
    """Full-batch training (B = infinity): one optimizer step a pass over the client's examples.

    The gradient is summed over chunks, so memory does not grow with the client; a client does
    `epochs * ceil(n / chunk_size)` local steps, and one stopped in the middle of a pass keeps the
    passes it completed. The optimizer may take the extra arguments that `sgd` names.

    Args:
      loss: `(params, batch, key) -> [B]`.
      optimizer: the client optimizer; its state starts anew each round.
      epochs: optimizer steps.
      chunk_size: examples at once; it does not change the result of a loss that draws nothing.

    Raises:
      ValueError: if `epochs` or `chunk_size` is not a whole number of at least 1.
    """
    _validate.at_least_one("full_batch", "epochs", epochs, "a straggler does less by its cohort's `steps`")
    _validate.at_least_one("full_batch", "chunk_size", chunk_size, "a good start is 64")
    optimizer = optax.with_extra_args_support(optimizer)

    def step_fn(shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
        carry = _add_chunk(loss, chunk_size, shared, client, carry, t)

        def end_of_pass(carry):
            return _descend(optimizer, shared, carry, carry.so_far)._replace(so_far=_nothing(shared))

        return jax.lax.cond((t + 1) % _batches(client.size, chunk_size) == 0, end_of_pass, lambda c: c, carry)

    return ClientWork(
        steps=lambda size: epochs * _batches(size, chunk_size),
        start=lambda shared, client: _start(optimizer, shared)._replace(so_far=_nothing(shared)),
        step=step_fn,
        finish=_finish,
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

    def step_fn(shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
        # A cohort built with another work's steps may ask for more than one pass.
        once = client._replace(size=jnp.where(t < _batches(client.size, chunk_size), client.size, 0))
        return _add_chunk(loss, chunk_size, shared, once, carry, t)

    def finish_fn(shared: Shared, client: Cohort, carry: Carry) -> tuple[Tree, Tree]:
        mean = _mean(carry.so_far, shared.params)
        return mean, {"loss": carry.loss, "examples": carry.examples}

    return ClientWork(
        steps=lambda size: _batches(size, chunk_size),
        start=lambda shared, client: Carry(shared.params, (), (), _nothing(shared), jnp.zeros(()), jnp.zeros(())),
        step=step_fn,
        finish=finish_fn,
    )


def scale_by_round(factor: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Multiplies a client's steps by `factor(round)`: a learning rate that decays over rounds.

    >>> halve = optax.chain(optax.sgd(1.0), scale_by_round(lambda r: 0.5**r))
    >>> print(halve.update(jnp.array(8.0), halve.init(jnp.array(0.0)), round=2)[0])
    -2.0
    """

    def update_fn(updates, state, params=None, *, round, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: (u * factor(round)).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def client_rows(client: Cohort, batch: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Rows of a client's `batch`-th run of examples in stored order.

    Returns:
      `(row, real)`: [B] int32 rows of the cohort's examples, and [B] bool, False past the client's end
      (where `row` repeats a row of the client).
    """
    place, real = _places(client.size, batch, batch_size)
    return client.start + place, real


def _batches(size: jax.Array, batch_size: int) -> jax.Array:
    """ceil(size / batch_size), and 1 for a client without examples: it divides."""
    return jnp.maximum(-(-size // batch_size), 1)


def _places(size: jax.Array, batch: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    place = batch * batch_size + jnp.arange(batch_size)
    return jnp.minimum(place, jnp.maximum(size, 1) - 1), place < size


def _sums(loss: Loss, params: Tree, batch: Tree, real: jax.Array, key: jax.Array) -> Pass:
    """Sums over the real examples of a batch."""

    def total(params):
        values = loss(params, batch, key)
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
    return Pass(gradient, value, jnp.sum(real, dtype=jnp.float32))


def _add_chunk(loss: Loss, chunk_size: int, shared: Shared, client: Cohort, carry: Carry, t: jax.Array) -> Carry:
    key = jax.random.fold_in(jax.random.fold_in(shared.key, client.ids), t)
    row, real = client_rows(client, t % _batches(client.size, chunk_size), chunk_size)
    met = _sums(loss, carry.params, tree.take(shared.examples, row), real, key)
    return carry._replace(
        so_far=jax.tree.map(jnp.add, carry.so_far, met),
        loss=carry.loss + met.loss,
        examples=carry.examples + met.examples,
    )


def _nothing(shared: Shared) -> Pass:
    """An empty sum. In half precision a long one would stall: sums are kept in float32 or better."""
    wide = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), shared.params)
    return Pass(wide, jnp.zeros(()), jnp.zeros(()))


def _mean(summed: Pass, params: Tree) -> Tree:
    """Mean gradient in the dtypes of `params`; 0 over no example, so that nothing is NaN even if unused."""
    share = 1.0 / jnp.maximum(summed.examples, 1.0)  # a division for each parameter would take as long as its update
    share = after(share, summed.gradient)  # by then all have read the params, which the update may overwrite
    return jax.tree.map(lambda g, p: (g * share).astype(p.dtype), summed.gradient, params)


def _start(optimizer: optax.GradientTransformationExtraArgs, shared: Shared) -> Carry:
    return Carry(shared.params, optimizer.init(shared.params), (), (), jnp.zeros(()), jnp.zeros(()))


def _descend(optimizer: optax.GradientTransformationExtraArgs, shared: Shared, carry: Carry, met: Pass) -> Carry:
    """One step of the client optimizer along the mean of what was met."""
    updates, state = optimizer.update(
        _mean(met, carry.params),
        carry.optimizer,
        carry.params,
        anchor=shared.params,
        round=shared.round,
        value=met.loss / jnp.maximum(met.examples, 1.0),
    )
    return carry._replace(params=optax.apply_updates(carry.params, updates), optimizer=state)


def _finish(shared: Shared, client: Cohort, carry: Carry) -> tuple[Tree, Tree]:
    pseudo_gradient = jax.tree.map(jnp.subtract, shared.params, carry.params)
    return pseudo_gradient, {"loss": carry.loss, "examples": carry.examples}
