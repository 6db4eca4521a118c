"""Recurrent layers whose large matrix products stay outside the loop over time.

A step of an LSTM or GRU is `cell(u_t, h @ w, state)`, elementwise but for the product `h @ w`; the
products with the inputs, `u`, do not depend on the state and are one matmul before the loop. The same is
done backwards: differentiating the loop would add an [H, G] matrix to its carry at every step, where
here the loop only emits the cotangents of `h @ w`, and the gradient of `w` is one matmul after it.

Letters: B sequences of T steps, H units, G = 4 H (LSTM) or 3 H (GRU) gate inputs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


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
    i, f, g, o = jnp.split(u + hw, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


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
    (r_u, z_u, n_u), (r_h, z_h, n_h) = jnp.split(u, 3, axis=-1), jnp.split(hw, 3, axis=-1)
    z = jax.nn.sigmoid(z_u + z_h)
    n = jnp.tanh(n_u + jax.nn.sigmoid(r_u + r_h) * n_h)
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
    return _recur(cell, u, w, state)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(cell: Callable, u: jax.Array, w: jax.Array, state: tuple) -> tuple:
    def step(state: tuple, u_t: jax.Array) -> tuple[tuple, tuple]:
        state = cell(u_t, state[0] @ w, state)
        return state, state

    return jax.lax.scan(step, state, u)[1]


def _recur_fwd(cell: Callable, u: jax.Array, w: jax.Array, state: tuple) -> tuple[tuple, tuple]:
    states = _recur(cell, u, w, state)
    return states, (u, w, state, states)


def _recur_bwd(cell: Callable, residuals: tuple, d_states: tuple) -> tuple:
    u, w, state, states = residuals
    before = jax.tree.map(lambda s, all_s: jnp.concatenate([s[None], all_s[:-1]]), state, states)
    hw = before[0] @ w  # all steps in one product, in place of saving them

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        u_t, hw_t, before_t, d_state_t = inputs
        _, pull = jax.vjp(cell, u_t, hw_t, before_t)
        d_u, d_hw, d_before = pull(jax.tree.map(jnp.add, carry, d_state_t))
        return (d_before[0] + d_hw @ w.T, *d_before[1:]), (d_u, d_hw)

    d_state, (d_u, d_hw) = jax.lax.scan(
        step, jax.tree.map(jnp.zeros_like, state), (u, hw, before, d_states), reverse=True
    )
    return d_u, jnp.einsum("tbh,tbg->hg", before[0], d_hw), d_state


_recur.defvjp(_recur_fwd, _recur_bwd)
