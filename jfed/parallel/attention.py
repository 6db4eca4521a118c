"""Causal attention of sequences whose tokens are split over an axis of devices.

    ring        keys and values go round; each device's queries meet them block by block
    zigzag      the same, each device holding an early and a late part of the sequence, so that all work equally
    all to all  tokens are exchanged for heads, of which each device attends with its share over the whole sequence

A ring needs no device to hold a whole sequence, nor any block of scores to be kept: the softmax is accumulated online
by a running maximum and sum, and the backward pass makes each block anew from the logarithm of that sum. There
queries go round with what is needed to differentiate them, since they have one gradient where keys and values have two.
What is sent next is on its way while the block at hand is used. The devices that a causal ring has no use for at a hop
skip it, so the first device of s computes one block and the last s; in zigzag each computes one and s - 1 halves.

Source: Liu et al. 2023 (arXiv:2310.01889), rings; Milakov and Gimelshein 2018 (arXiv:1805.02867), online softmax;
Dao 2023 (arXiv:2307.08691), the backward pass; Brandon et al. 2023 (arXiv:2311.09431), balance; Grattafiori et al. 2024
(arXiv:2407.21783), section 3.3.2, the zigzag; Jacobs et al. 2023 (arXiv:2309.14509), all to all.

Letters: b examples of T tokens, s devices, t = T / s tokens of each, N heads of D numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jfed._axis import permute
from jfed.parallel._ring_softmax import CONSECUTIVE, ZIGZAG, by_heads
from jfed.parallel.conjugate import exchanged, size
from jfed.parallel.layered import divides


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of each token to itself and those before, on one device; no [T, T] array is kept for the gradient.

    Args:
      q: queries [b, T, N, D].
      k: keys [b, T, N, D].
      v: values [b, T, N, D].

    Returns:
      [b, T, N, D] of the dtype of q; scores and sums are float32 whatever that is.

    Raises:
      ValueError: if shapes differ.

    >>> v = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    >>> print(causal_attention(jnp.zeros_like(v), v, v).ravel())  # means of the values so far
    [1. 2. 4.]
    """
    return ring_attention(q, k, v, None)


def ring_attention(q: jax.Array, k: jax.Array, v: jax.Array, axis_name: str | None) -> jax.Array:
    """Causal attention, consecutive tokens on consecutive devices.

    Sent by a device: forward 2 (s - 1) arrays of the size of k; backward 2 s - 1 of that size, s - 1 such arrays of
    float32, and 2 (s - 1) of [b, N, t] float32. Its memory is that of a few [b, N, t, t] of scores.

    Args:
      q: queries [b, t, N, D] of this device's tokens.
      k: keys, as q.
      v: values, as q.
      axis_name: of the s devices; None where there is one.

    Returns:
      [b, t, N, D] of the dtype of q.

    Raises:
      ValueError: if shapes differ.

    >>> v = jnp.array([1.0, 3.0, 8.0]).reshape(3, 1, 1, 1, 1)  # three devices of one token
    >>> f = jax.vmap(lambda v: ring_attention(jnp.zeros_like(v), v, v, "sequence"), axis_name="sequence")
    >>> print(f(v).ravel())
    [1. 2. 4.]
    """
    _check_shapes("ring_attention", q, k, v)
    return by_heads(q, k, v, axis_name, CONSECUTIVE)


def zigzag_attention(q: jax.Array, k: jax.Array, v: jax.Array, axis_name: str | None) -> jax.Array:
    """`ring_attention` with equal work for all devices, s + 1 half blocks in place of up to 2 s.

    Of 2 s parts of the sequence device i attends for parts i and 2 s - 1 - i. They get there and back within this
    function: up to 4 arrays of the size of q more are sent forward, and as many backward.

    Args:
      q: queries [b, t, N, D] of this device's tokens, consecutive as in `ring_attention`.
      k: keys, as q.
      v: values, as q.
      axis_name: of the s devices; None where there is one.

    Returns:
      As `ring_attention`.

    Raises:
      ValueError: if shapes differ, or t is odd.

    >>> v = jnp.array([1.0, 3.0, 8.0, 4.0]).reshape(2, 1, 2, 1, 1)  # two devices of two tokens
    >>> f = jax.vmap(lambda v: zigzag_attention(jnp.zeros_like(v), v, v, "sequence"), axis_name="sequence")
    >>> print(f(v).ravel())
    [1. 2. 4. 4.]
    """
    _check_shapes("zigzag_attention", q, k, v)
    if size(axis_name) == 1:
        return by_heads(q, k, v, None, CONSECUTIVE)
    if q.shape[1] % 2:
        raise ValueError(
            f"zigzag_attention(tokens={q.shape[1]}): each of the {size(axis_name)} devices of axis {axis_name!r} needs "
            f"an even number of tokens; take {2 * size(axis_name)} k tokens in all, or ring_attention."
        )
    dealt = _to_zigzag(jnp.concatenate([q, k, v], axis=-1), axis_name)
    return _from_zigzag(by_heads(*jnp.split(dealt, 3, axis=-1), axis_name, ZIGZAG), axis_name)


def all_to_all_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, axis_name: str | None, attention: Callable = causal_attention
) -> jax.Array:
    """Causal attention, where each device attends over whole sequences with N / s of the heads.

    Sent by a device: 4 arrays of the size of q times (s - 1) / s, forward and backward.

    Args:
      q: queries [b, t, N, D] of this device's tokens, consecutive as in `ring_attention`.
      k: keys, as q.
      v: values, as q.
      axis_name: of the s devices; None where there is one.
      attention: maps q, k, v [b, T, N / s, D] to their attention of that shape, for instance
        `jax.nn.dot_product_attention` with `is_causal=True` and an implementation.

    Returns:
      As `ring_attention`.

    Raises:
      ValueError: if shapes differ, or s does not divide N.

    >>> v = jnp.array([[1.0, 1.0], [3.0, 5.0]]).reshape(2, 1, 1, 2, 1)  # two devices of one token and two heads
    >>> f = lambda v: all_to_all_attention(jnp.zeros_like(v), v, v, "sequence")
    >>> print(jax.vmap(f, axis_name="sequence")(v).reshape(2, 2))
    [[1. 1.]
     [2. 3.]]
    """
    _check_shapes("all_to_all_attention", q, k, v)
    if axis_name is None:
        return attention(q, k, v)
    divides("all_to_all_attention", {axis_name: size(axis_name)}, axis_name, heads_of_a_device=q.shape[2])
    return exchanged(attention(*(exchanged(x, axis_name, 2, 1) for x in (q, k, v))), axis_name, 1, 2)


def _to_zigzag(x: jax.Array, axis_name: str) -> jax.Array:
    """Parts i and 2 s - 1 - i of 2 s, from parts 2 i and 2 i + 1."""
    evens, odds = _destinations(lax.axis_size(axis_name))
    first, second = jnp.split(x, 2, axis=1)
    parts = permute(first, axis_name, evens), permute(second, axis_name, odds)
    return jnp.concatenate(_swapped_on_odd(*parts, axis_name), axis=1)


def _from_zigzag(x: jax.Array, axis_name: str) -> jax.Array:
    """The inverse."""
    parts = _swapped_on_odd(*jnp.split(x, 2, axis=1), axis_name)
    back = ([(j, i) for i, j in pairs] for pairs in _destinations(lax.axis_size(axis_name)))
    return jnp.concatenate([permute(x, axis_name, pairs) for x, pairs in zip(parts, back, strict=True)], axis=1)


def _destinations(s: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Who gets the even and the odd of 2 s parts, of which device i has 2 i and 2 i + 1."""
    evens, odds = ([(i, min(c, 2 * s - 1 - c)) for i, c in enumerate(range(odd, 2 * s, 2))] for odd in (0, 1))
    return evens, odds


def _swapped_on_odd(x, y, axis_name):
    odd = lax.axis_index(axis_name) % 2 == 1
    return lax.select(jnp.broadcast_to(odd, x.shape), y, x), lax.select(jnp.broadcast_to(odd, x.shape), x, y)


def _check_shapes(where, q, k, v):
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"{where}(q={q.shape}, k={k.shape}, v={v.shape}): all must be [examples, tokens, heads, numbers] of one "
            "shape; repeat keys and values that several heads share."
        )
