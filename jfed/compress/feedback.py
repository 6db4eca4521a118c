"""Error feedback: what a compressor leaves out is kept and sent later.

Letters of the papers: e the residual, C the compressor, g a gradient or update.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.compress.message import decode, nodes
from jfed.core import Tree


class FeedbackState(NamedTuple):
    """Per sender."""

    residual: Tree  # as params, at least float32: what was not sent yet
    compressor: Tree  # state of the compressor


def error_feedback(
    compressor: optax.GradientTransformation, *, refuse: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Sends C(g + e) and keeps e' = g + e - C(g + e) (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).

    The paper feeds back steps, with the learning rate in them: where the rate changes, put
    `optax.scale_by_learning_rate` before it and nothing after `decoded()`. With a constant rate the order does not
    matter.

    Guarantees:
      * Telescoping: what was sent so far, plus the residual, is the sum of all inputs.
      * An input that is not finite is sent, and leaves the residual as it was.

    Args:
      compressor: one, or an `optax.chain` of several.
      refuse: whether to refuse what is no contraction, around which the residual may grow without bound.

    Raises:
      ValueError: at `update`, when traced, if the compressor compresses nothing, or is no contraction and `refuse`.

    >>> from jfed import compress
    >>> half = error_feedback(compress.top_k(0.5))
    >>> message, state = half.update(jnp.array([2.0, -3.0]), half.init(jnp.zeros(2)))
    >>> print(decode(message), state.residual)
    [ 0. -3.] [2. 0.]
    """
    compressor = optax.with_extra_args_support(compressor)

    def init_fn(params: Tree) -> FeedbackState:
        return FeedbackState(_zeros(params), compressor.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        whole = jax.tree.map(jnp.add, updates, state.residual)
        message, inner = compressor.update(whole, state.compressor, params, **extra_args)
        _check("error_feedback", message, refuse)
        return message, FeedbackState(_left(whole, decode(message), state.residual), inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class EF21State(NamedTuple):
    """Per sender."""

    known: Tree  # as params, at least float32: what the server believes this sender's gradient to be
    compressor: Tree  # state of the compressor


def ef21(compressor: optax.GradientTransformation, *, refuse: bool = True) -> optax.GradientTransformationExtraArgs:
    """EF21: sends C(g - known), and both sides add it to what is known (Richtarik et al. 2021, arXiv:2106.05203).

    What the server wants is the sum of all messages so far: put `ef21_server` before its optimizer. A gradient that is
    not finite stays in that sum: drop it before, with `optax.apply_if_finite` or, in `federated`, by itself.

    Args:
      compressor: one, or an `optax.chain` of several.
      refuse: whether to refuse what is no contraction.

    Raises:
      ValueError: at `update`, as `error_feedback`.
    """
    compressor = optax.with_extra_args_support(compressor)

    def init_fn(params: Tree) -> EF21State:
        return EF21State(_zeros(params), compressor.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        change = jax.tree.map(jnp.subtract, updates, state.known)
        message, inner = compressor.update(change, state.compressor, params, **extra_args)
        _check("ef21", message, refuse)
        known = jax.tree.map(lambda k, m: (k + m).astype(k.dtype), state.known, decode(message))
        return message, EF21State(known, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ef21_server(total_weight: float | None = None) -> optax.GradientTransformationExtraArgs:
    """The server's side of `ef21`: the mean over all senders of what is known of them.

    Args:
      total_weight: of all clients, present or not. By default all report every round; with fewer, the mean of those
        that did counts for their share, so it takes the extra argument `weight`, the sum of theirs.

    Raises:
      ValueError: if `total_weight` is not above 0.
    """
    if total_weight is not None:
        _validate.positive("ef21_server", "total_weight", total_weight, "it is the sum of all clients' weights")

    def update_fn(updates, state, params=None, *, weight=None, **extra_args):
        del params, extra_args
        if total_weight is not None and weight is None:
            raise ValueError(
                "ef21_server(total_weight=...).update(weight=None): pass weight=, the sum of who reported."
            )
        share = 1.0 if total_weight is None else weight / total_weight
        known = jax.tree.map(lambda k, u: (k + share * u).astype(k.dtype), state, updates)
        return known, known

    return optax.GradientTransformationExtraArgs(_zeros, update_fn)


class MomentumState(NamedTuple):
    """Per sender."""

    velocity: Tree  # as params, at least float32: u
    residual: Tree  # as params, at least float32: v
    compressor: Tree  # state of the compressor


def momentum_correction(
    compressor: optax.GradientTransformation, *, momentum: float = 0.9, refuse: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Deep gradient compression: momentum kept by the sender, with error feedback (Lin et al. 2018, arXiv:1712.01887).

    u = momentum u + g; v = v + u; sends C(v). Where something was sent, v keeps what was left out and u starts again
    (momentum factor masking, sections 3.1 and 3.2). The receiver then uses plain SGD. With `top_k` v is 0 where it was
    sent, as in the paper. Clip before it: `optax.chain(optax.clip_by_global_norm(...), momentum_correction(...))`.

    The paper's senders, n of them, clip to n^(-1/2) of the norm that one would. A compressor that leaves nothing at
    zero, such as `scaled_sign`, sends everything, so that u starts again everywhere and there is no momentum.

    Args:
      compressor: `top_k` in the paper.
      momentum: in [0, 1]; 0 is `error_feedback`.
      refuse: whether to refuse what is no contraction.

    Raises:
      ValueError: if `momentum` is out of range; at `update`, as `error_feedback`.
    """
    _validate.within("momentum_correction", "momentum", momentum, 0, 1, "0.9 is usual")
    compressor = optax.with_extra_args_support(compressor)

    def init_fn(params: Tree) -> MomentumState:
        return MomentumState(_zeros(params), _zeros(params), compressor.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        u = jax.tree.map(lambda u, g: momentum * u + g, state.velocity, updates)
        v = jax.tree.map(jnp.add, state.residual, u)
        message, inner = compressor.update(v, state.compressor, params, **extra_args)
        _check("momentum_correction", message, refuse)
        sent = decode(message)
        u = jax.tree.map(lambda u, s, old: jnp.where(jnp.isfinite(u), jnp.where(s != 0, 0, u), old), u, sent, state[0])
        return message, MomentumState(u, _left(v, sent, state.residual), inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zeros(params: Tree) -> Tree:
    """Zeros as params are; of less than float32 a sum of many small numbers would stop growing."""
    return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), _at_least_float32(p)), params)


def _at_least_float32(p: jax.Array) -> jnp.dtype:
    dtype = jnp.result_type(p)
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _left(whole: Tree, sent: Tree, before: Tree) -> Tree:
    """What was not sent, and what was left before where that is not finite."""

    def one(whole, sent, before):
        left = whole - sent
        return jnp.where(jnp.isfinite(left), left, before)

    return jax.tree.map(one, whole, sent, before)


def _check(where: str, message: Tree, refuse: bool) -> None:
    found = [node for node in nodes(message) if node.decoder.name != "over_tree"]
    if not found:
        raise ValueError(f"{where}(...): what it is around compresses nothing; give it a link of jfed.compress.")
    for node in found:
        if refuse and not node.decoder.contraction:
            raise ValueError(
                f"{where}(...): {node.decoder.name} is no contraction for arrays of this size, and what it leaves out "
                "may grow without bound; take what leaves less out, such as scaled_sign, rounding='nearest', "
                "method='exact' or smaller blocks, or pass refuse=False."
            )
