"""Causal attention whose keys and values go round a ring of devices, by a softmax that is accumulated on the way.

Forward, each device keeps of every query the largest score so far, the sum of exponentials, and what these weigh.
Backward, blocks are made anew from the logarithm of that sum, and queries go round.

Source: Liu et al. 2023 (arXiv:2310.01889), rings; Milakov and Gimelshein 2018 (arXiv:1805.02867), online softmax; Dao
2023 (arXiv:2307.08691), the backward pass.

Letters: b examples, s devices, t tokens of each, N heads of D numbers.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jfed._axis import permute
from jfed.core import Tree
from jfed.parallel.conjugate import index, size


class _Part(NamedTuple):
    """Which queries of one device meet which keys of another, in halves of what a device has."""

    queries: tuple[int, int]
    keys: tuple[int, int]


class _Layout(NamedTuple):
    """What of two devices' tokens meets; the tokens of each are in order."""

    earlier: _Part | None  # keys of an earlier device
    later: _Part | None  # keys of a later device


class _Seen(NamedTuple):
    """The softmax of scores so far, and what it weighs."""

    sum: jax.Array  # [b, N, t, D] float32, of values times weights
    weight: jax.Array  # [b, N, t] float32, the sum of exp(score - top)
    top: jax.Array  # [b, N, t] float32, the largest score


_ALL = _Part((0, 2), (0, 2))
CONSECUTIVE = _Layout(_ALL, None)
ZIGZAG = _Layout(_Part((0, 2), (0, 1)), _Part((1, 2), (0, 2)))


def by_heads(q, k, v, axis_name, layout):
    """`_attention` of arrays [b, t, N, D]."""
    out = _attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), axis_name, layout)
    return jnp.swapaxes(out, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, axis_name, layout):
    return _forward(q, k, v, axis_name, layout)[0]


def _forward(q, k, v, axis_name, layout):
    s, i = size(axis_name), index(axis_name)

    def visit(j, held, seen):
        return lax.cond(j <= i, _attend(layout.earlier), _attend(layout.later), seen, q, *held)

    nothing = jnp.zeros(q.shape, jnp.float32)
    seen = _Seen(nothing, nothing[..., 0], jnp.full_like(nothing[..., 0], -jnp.inf))
    seen = _attend(_ALL, _causal(q.shape[2]))(seen, q, k, v)
    if s > 1:
        seen = _around(visit, (k, v), seen, axis_name)
    out = (seen.sum / seen.weight[..., None]).astype(q.dtype)
    return out, (q, k, v, out, seen.top + jnp.log(seen.weight))


def _backward(axis_name, layout, kept, g):
    q, k, v, out, logsumexp = kept
    s, i = size(axis_name), index(axis_name)
    along = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    moving = q, g, logsumexp, along

    def visit(j, held, gradients):
        dq, dk, dv = gradients
        came = _sent(dq, axis_name)  # on its way while the block is used
        of_q, of_k, of_v = lax.cond(j > i, _gradients(layout.earlier), _gradients(layout.later), *held, k, v)
        return came + of_q, dk + of_k, dv + of_v

    gradients = _gradients(_ALL, _causal(q.shape[2]))(*moving, k, v)
    if s > 1:
        dq, dk, dv = _around(visit, moving, gradients, axis_name)
        gradients = _sent(dq.astype(q.dtype), axis_name), dk, dv
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, (q, k, v), strict=True))


_attention.defvjp(_forward, _backward)


def _around(visit: Callable, moving: Tree, carry: Tree, axis_name: str) -> Tree:
    """`carry` after `visit(j, what the device j before this one held, carry)` for j = 1 to s - 1."""
    s = lax.axis_size(axis_name)

    def hop(state, j):
        held, carry = state
        ahead = _sent(held, axis_name)
        return (ahead, visit(j, held, carry)), None

    (held, carry), _ = lax.scan(hop, (_sent(moving, axis_name), carry), jnp.arange(1, s - 1))
    return visit(jnp.int32(s - 1), held, carry)


def _sent(tree: Tree, axis_name: str) -> Tree:
    """What the device before this one has."""
    s = lax.axis_size(axis_name)
    pairs = [(i, (i + 1) % s) for i in range(s)]
    return jax.tree.map(lambda x: permute(x, axis_name, pairs), tree)


def _attend(part: _Part | None, mask: jax.Array | None = None) -> Callable:
    """`(seen, q, k, v) -> seen`."""

    def f(seen, q, k, v):
        rows, columns = _within(part.queries, q), _within(part.keys, k)
        before = _Seen(*(x[:, :, rows] for x in seen))
        scores = _scores(q[:, :, rows], k[:, :, columns], mask)
        top = jnp.maximum(before.top, scores.max(-1))
        weights, shrink = jnp.exp(scores - top[..., None]), jnp.exp(before.top - top)
        values = _product("bnqk,bnkd->bnqd", weights.astype(v.dtype), v[:, :, columns])
        now = _Seen(before.sum * shrink[..., None] + values, before.weight * shrink + weights.sum(-1), top)
        return _Seen(*(lax.dynamic_update_slice_in_dim(x, y, rows.start, 2) for x, y in zip(seen, now, strict=True)))

    return (lambda seen, q, k, v: seen) if part is None else f


def _gradients(part: _Part | None, mask: jax.Array | None = None) -> Callable:
    """`(q, g, logsumexp, along, k, v) -> gradients of q, k, v`, each [b, N, t, D] float32."""

    def f(q, g, logsumexp, along, k, v):
        rows, columns = _within(part.queries, q), _within(part.keys, k)
        filled = functools.partial(_filled, t=q.shape[2])
        q, g, k, v = q[:, :, rows], g[:, :, rows], k[:, :, columns], v[:, :, columns]
        weights = jnp.exp(_scores(q, k, mask) - logsumexp[:, :, rows, None])
        of_weights = _product("bnqd,bnkd->bnqk", g, v)
        of_scores = (weights * (of_weights - along[:, :, rows, None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
        return (
            filled(_product("bnqk,bnkd->bnqd", of_scores, k), rows),
            filled(_product("bnqk,bnqd->bnkd", of_scores, q), columns),
            filled(_product("bnqk,bnqd->bnkd", weights.astype(g.dtype), g), columns),
        )

    def none(q, g, logsumexp, along, k, v):
        return tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))

    return none if part is None else f


def _scores(q, k, mask):
    """[b, N, queries, keys] float32."""
    scores = _product("bnqd,bnkd->bnqk", q, k) / math.sqrt(q.shape[-1])
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _causal(t: int) -> jax.Array:
    """[1, 1, t, t] bool: a token sees itself and those before."""
    return jnp.tril(jnp.ones((1, 1, t, t), bool))


def _product(spec, x, y):
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _within(halves: tuple[int, int], x: jax.Array) -> slice:
    """Of the tokens of x [b, N, t, D]."""
    return slice(*(half * x.shape[2] // 2 for half in halves))


def _filled(x: jax.Array, where: slice, t: int) -> jax.Array:
    """[b, N, t, D] with x at some tokens, and zeros."""
    return jnp.pad(x, ((0, 0), (0, 0), (where.start, t - where.stop), (0, 0)))
