"""1-bit Adam: Adam whose momentum travels at one bit a number (Tang et al. 2021, arXiv:2102.02888, Algorithm 1).

Adam is not linear in the gradient, so error feedback cannot make up for compressed ones. But its variance hardly
changes after a while: it is measured without compression at first, and then frozen. What is left is momentum, which is
linear, and is compressed with error feedback twice, by each worker and as the mean of all.

There is no server: as in a two-shot all-reduce, every worker is the server of one chunk of the model.

Letters of the paper: m the momentum, v the variance, delta a compression error. n workers, d numbers of the model,
c = ceil(d / n) of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from jfed import _validate
from jfed._axis import cut, differing, uncut
from jfed.compress._wire import added, exchange, gather, hop_key, hop_round, own_key
from jfed.compress.feedback import FeedbackState, error_feedback
from jfed.compress.message import decode
from jfed.compress.sign import scaled_sign
from jfed.core import Tree


class OneBitAdamState(NamedTuple):
    """Per worker; errors are its own, all else is the same for all."""

    count: jax.Array  # [] int32, steps so far
    mu: Tree  # as params, float32: m
    nu: Tree  # as params, float32: v, frozen after the warm-up
    worker: FeedbackState  # residual [n, c]: what this worker has not sent yet, of each chunk
    server: FeedbackState  # residual [c]: what it has not sent yet of the means of its own chunk


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    warmup: int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    axis_name: str | None = None,
    compressor: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam of the mean gradient for `warmup` steps; then v is frozen, and workers send their compressed momentum.

    Both `init` and `update` are called by every worker, inside `jfed.mesh.shard_map` or `vmap(axis_name=)`. A worker
    hands in its own gradient, and all get the same update.

    Guarantees:
      * The first `warmup` steps are those of `optax.adam`, given the mean of gradients.
      * Moments are corrected for starting from zero, which paper and DeepSpeed leave out: a variance frozen after a few
        hundred steps would be too small for ever, and steps too long. So v keeps the correction of its last step.
      * Both errors telescope: the sum of what was sent, plus the residual, is the sum of what was to be sent.
      * A number whose gradient was 0 all through the warm-up stays where it is: one bit has no 0 to send for it, and
        with v = 0 its step would have no bound. DeepSpeed asks for a mask of such numbers.

    On the wire: 32 d bits a step at first, as any all-reduce; then those of `two_shot`, with signs
    2 (n - 1) (c + 32) bits.

    Args:
      learning_rate: a number, or a schedule of optax.
      warmup: steps without compression, until the variance has settled.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the variance, in [0, 1).
      eps: added to sqrt(v).
      axis_name: of the workers; None is one worker alone, which compresses all the same.
      compressor: a contraction, by default `scaled_sign()`; those that draw need `key=` at `update`, the same for all
        workers and a new one each step. Its scale is |m|_1 / d; the paper's, |m|_2 / sqrt(d), is no contraction.

    Raises:
      ValueError: if a number is out of range; at `init`, if there is no such axis; at `update`, as `error_feedback`.

    >>> adam = one_bit_adam(0.1, warmup=1, axis_name="workers")
    >>> def step(gradient):
    ...     return adam.update(gradient, adam.init(jnp.zeros(2)))[0]
    >>> jax.vmap(step, axis_name="workers")(jnp.array([[1.0, -3.0], [3.0, 1.0]])).round(3)
    Array([[-0.1,  0.1],
           [-0.1,  0.1]], dtype=float32)
    """
    _validate.at_least_one("one_bit_adam", "warmup", warmup, "a fifth of all steps is a start")
    for name, decay in (("b1", b1), ("b2", b2)):
        if _validate.is_concrete(decay) and not 0 <= decay < 1:
            raise ValueError(f"one_bit_adam({name}={decay!r}): {name} must lie in [0, 1); 0.9 and 0.999 are usual.")
    _validate.at_least_zero("one_bit_adam", "eps", eps, "1e-8 is usual")
    feedback = error_feedback(scaled_sign() if compressor is None else compressor)

    def init_fn(params: Tree) -> OneBitAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        chunks = cut(ravel_pytree(zeros)[0], _workers(axis_name))
        return OneBitAdamState(
            jnp.zeros((), jnp.int32), zeros, zeros, jax.vmap(feedback.init)(chunks), feedback.init(chunks[0])
        )

    def measured(g: Tree, state: OneBitAdamState, key):
        """Adam's moments of the mean gradient."""
        del key
        g = g if axis_name is None else lax.pmean(g, axis_name)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, g)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, g)
        return mu, nu, state.worker, state.server

    def sent(g: Tree, state: OneBitAdamState, key):
        """The compression stage: m of the messages that everybody got, and what they left out."""
        m, tree_of = ravel_pytree(jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, g))
        n = _workers(axis_name)
        keys = None if key is None else jax.random.split(hop_key(key, 0), n)

        def feed(x, errors, key, hop):
            return feedback.update(x, errors, key=key, round=hop_round(state.count, hop))

        messages, worker = jax.vmap(lambda x, e, k: feed(x, e, k, 0))(cut(m, n), state.worker, keys)
        if axis_name is None:
            mean = decode(jax.tree.map(lambda x: x[0], messages))
        else:
            mean = added(exchange(messages, axis_name), axis_name) / n
        message, server = feed(mean, state.server, hop_key(key, 1), 1)
        all_chunks = jax.tree.map(lambda x: x[None], message) if axis_name is None else gather(message, axis_name)
        m = tree_of(uncut(jax.vmap(decode)(all_chunks), m.size))
        return jax.tree.map(lambda m, v: jnp.where(v > 0, m, 0), m, state.nu), state.nu, worker, server

    def typed(branch):  # as one stage has the same on all workers what the other has not
        return branch if axis_name is None else lambda *args: differing(branch(*args), axis_name)

    def update_fn(updates, state, params=None, *, key=None, **extra_args):
        del params, extra_args
        g = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        key = key if axis_name is None else own_key(key, axis_name)
        mu, nu, worker, server = lax.cond(state.count < warmup, typed(measured), typed(sent), g, state, key)
        count = optax.safe_increment(state.count)
        m_scale, v_scale = 1 - b1**count, 1 - b2 ** jnp.minimum(count, warmup)
        step = jax.tree.map(
            lambda m, v, u: (m / m_scale / (jnp.sqrt(v / v_scale) + eps)).astype(u.dtype), mu, nu, updates
        )
        return step, OneBitAdamState(count, mu, nu, worker, server)

    return optax.chain(
        optax.GradientTransformationExtraArgs(init_fn, update_fn), optax.scale_by_learning_rate(learning_rate)
    )


def _workers(axis_name: str | None) -> int:
    try:
        return 1 if axis_name is None else lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"one_bit_adam(axis_name={axis_name!r}): there is no such axis here; call init and update inside "
            "shard_map or vmap over it."
        ) from None
