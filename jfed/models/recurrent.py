"""Recurrent layers whose large matrix products stay outside the loop over time.

A step of an LSTM or GRU is `cell(u_t, h @ w, state)`, elementwise but for the product `h @ w`; the
products with the inputs, `u`, do not depend on the state and are one matmul before the loop. The same is
done backwards: differentiating the loop would add an [H, G] matrix to its carry at every step, where
here the loop only emits the cotangents of `h @ w`, and the gradient of `w` is one matmul after it. Nor do
the derivatives of a cell wait for the loop: they are taken at all steps at once before it.

Letters: B sequences of T steps, V tokens in the vocabulary, H units, G = 4 H (LSTM) or 3 H (GRU) gate inputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def lstm_cell(u: jax.Array, hw: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """One step of an LSTM; `u` and `hw` are [B, 4 H] in the order input, forget, cell, output.

    Args:
      u: the inputs' share of the gates, with bias.
      hw: the state's share, `h @ w`.
      state: `(h, c)`, each [B, H].

    Returns:
      The next `(h, c)`.
    """
    _, c = state
    # sigmoid(x) = (1 + tanh(x / 2)) / 2: all four gates are one tanh, one kernel where there were five.
    scale = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], c.dtype), c.shape[-1]).reshape((1,) * (c.ndim - 1) + (-1,))
    i, f, g, o = jnp.split(jnp.tanh((u + hw) * scale) * scale + (1.0 - scale), 4, axis=-1)
    c = f * c + i * g
    return o * jnp.tanh(c), c


def gru_cell(u: jax.Array, hw: jax.Array, state: tuple[jax.Array]) -> tuple[jax.Array]:
    """One step of a GRU; `u` and `hw` are [B, 3 H] in the order reset, update, candidate.

    The reset gate acts on `h @ w`, not on `h` (cuDNN's form), so that a step is one product.

    Args:
      u: the inputs' share of the gates, with bias.
      hw: the state's share, `h @ w`.
      state: `(h,)`, [B, H].

    Returns:
      The next `(h,)`.
    """
    (h,) = state
    units = h.shape[-1]
    r, z = jnp.split(jax.nn.sigmoid(u[..., : 2 * units] + hw[..., : 2 * units]), 2, axis=-1)
    n = jnp.tanh(u[..., 2 * units :] + r * hw[..., 2 * units :])
    return ((1.0 - z) * n + z * h,)


def recur(cell: Callable, u: jax.Array, w: jax.Array, state: tuple[jax.Array, ...]) -> jax.Array:
    """Runs a cell over time.

    Differentiable in reverse mode, any number of times; forward mode (`jvp`) raises a TypeError.

    Args:
      cell: `(u_t [B, G], h @ w [B, G], state) -> state`, with `state[0]` the output h.
      u: [T, B, G], time first.
      w: [H, G].
      state: the state before the first step, leaves [B, H].

    Returns:
      h after every step, [T, B, H].

    >>> u, w, zeros = jnp.ones((7, 2, 12)), jnp.ones((3, 12)), jnp.zeros((2, 3))
    >>> recur(lstm_cell, u, w, (zeros, zeros)).shape
    (7, 2, 3)
    """
    return _recur(cell, u, w, state)[0][0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(cell: Callable, u: jax.Array, w: jax.Array, state: tuple) -> tuple[tuple, jax.Array]:
    """The states after every step, and `h @ w` before each."""

    def step(state: tuple, u_t: jax.Array) -> tuple[tuple, tuple]:
        hw = state[0] @ w
        state = cell(u_t, hw, state)
        return state, (state, hw)

    return jax.lax.scan(step, state, u)[1]


def _recur_fwd(cell: Callable, u: Any, w: Any, state: tuple) -> tuple[tuple, tuple]:
    u, w, state = u.value, w.value, tuple(s.value for s in state)
    states, hw = _recur(cell, u, w, state)
    return (states, hw), (u, w, state, states, hw)


def _recur_bwd(cell: Callable, residuals: tuple, cotangents: tuple) -> tuple:
    u, w, state, states, hw = residuals
    d_states, further = cotangents
    d_states = tuple(
        jnp.zeros_like(s) if isinstance(d, SymbolicZero) else d for d, s in zip(d_states, states, strict=True)
    )
    # Only a second derivative has cotangents of `h @ w`; adding zeros in every step would cost.
    further = None if isinstance(further, SymbolicZero) else further
    before = jax.tree.map(lambda s, all_s: jnp.concatenate([s[None], all_s[:-1]]), state, states)
    pulls = jax.vmap(lambda *step: jax.vjp(cell, *step)[1])(u, hw, before)
    w_t = jax.lax.optimization_barrier(w.T)  # else a product in the loop may read w against its layout

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        pull, d_state_t, further_t = inputs
        d_u, d_hw, d_before = pull(jax.tree.map(jnp.add, carry, d_state_t))
        d_hw = d_hw if further_t is None else d_hw + further_t
        # An LSTM's are one and the same, and written once.
        return (d_before[0] + d_hw @ w_t, *d_before[1:]), (d_u, None if d_hw is d_u else d_hw)

    start = jax.tree.map(jnp.zeros_like, state)
    d_state, (d_u, d_hw) = jax.lax.scan(step, start, (pulls, d_states, further), reverse=True)
    d_hw = d_u if d_hw is None else d_hw
    return d_u, jnp.einsum("tbh,tbg->hg", before[0], d_hw), d_state


_recur.defvjp(_recur_fwd, _recur_bwd, symbolic_zeros=True)


@jax.custom_vjp
def lookup(table: jax.Array, token: jax.Array) -> jax.Array:
    """Rows of a table, whose gradient is one matmul in place of a scatter, which is slow on CPU.

    Args:
      table: [V, D]; V should be small: the gradient makes a one-hot matrix of the tokens.
      token: int, any shape, in [0, V); one past the end gives NaN.

    Returns:
      `table[token]`, [..., D].
    """
    return jnp.take(table, token, axis=0)


def _lookup_fwd(table: jax.Array, token: jax.Array) -> tuple[jax.Array, tuple]:
    return lookup(table, token), (token, table)


def _lookup_bwd(residuals: tuple, d_rows: jax.Array) -> tuple:
    token, table = residuals
    hot = jax.nn.one_hot(token.reshape(-1), table.shape[0], dtype=d_rows.dtype)
    d_rows = d_rows.reshape(hot.shape[0], table.shape[1])
    return jnp.matmul(hot.T, d_rows, precision=jax.lax.Precision.HIGHEST), None  # as exact as the scatter


lookup.defvjp(_lookup_fwd, _lookup_bwd)
