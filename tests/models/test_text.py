"""What the sequence models promise beyond the battery in test_model.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed import models
from jfed.models.recurrent import gru_cell, lookup, lstm_cell, recur

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

CAUSAL = {
    "char_lstm": models.char_lstm(7, embedding=3, hidden=4),
    "char_gru": models.char_gru(7, embedding=3, hidden=4, layers=2),
    "transformer": models.transformer(7, width=8, layers=2, heads=2, context=6),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_token_changes_its_own_logits_and_none_before(name):
    model = CAUSAL[name]
    params, apply = jax.jit(model.init)(jax.random.key(0)), jax.jit(model.apply)
    x = jax.random.randint(jax.random.key(1), (1, 6), 0, 7)
    before = apply(params, x)
    for t in range(6):
        after = apply(params, x.at[0, t].set((x[0, t] + 1) % 7))
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        # and what follows does change: the model has a memory
        assert np.all(np.abs(after[0, t:] - before[0, t:]).max(axis=1) > 1e-7)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_token_past_the_vocabulary_gives_nan_in_its_sequence_alone(name):
    model = CAUSAL[name]
    x = jnp.array([[1, 2, 7, 3, 4, 5], [1, 2, 3, 4, 5, 6]])
    out = jax.jit(model.apply)(jax.jit(model.init)(jax.random.key(0)), x)
    assert np.isnan(out[0, 2]).all() and np.isfinite(out[1]).all()


def sigmoid(a):
    return 1.0 / (1.0 + np.exp(-a))


def lstm_by_hand(u, w):
    h = c = np.zeros((u.shape[1], w.shape[0]))
    for u_t in u:
        i, f, g, o = np.split(u_t + h @ w, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield h


def gru_by_hand(u, w):
    h = np.zeros((u.shape[1], w.shape[0]))
    for u_t in u:
        (r, z, n), (r_h, z_h, n_h) = np.split(u_t, 3, axis=1), np.split(h @ w, 3, axis=1)
        z = sigmoid(z + z_h)
        h = (1 - z) * np.tanh(n + sigmoid(r + r_h) * n_h) + z * h
        yield h


CELLS = {"lstm": (lstm_cell, 4, 2, lstm_by_hand), "gru": (gru_cell, 3, 1, gru_by_hand)}


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrent_layer_equals_its_equations_written_out(name):
    cell, gates, states, by_hand = CELLS[name]
    u, w = jax.random.normal(jax.random.key(0), (5, 2, gates * 3)), jax.random.normal(jax.random.key(1), (3, gates * 3))
    h = recur(cell, u, w, (jnp.zeros((2, 3)),) * states)
    np.testing.assert_allclose(h, np.stack(list(by_hand(np.asarray(u), np.asarray(w)))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_recur_has_the_first_and_second_derivatives_of_the_plain_loop(name):
    cell, gates, states, _ = CELLS[name]

    def plain(cell, u, w, state):
        def step(state, u_t):
            state = cell(u_t, state[0] @ w, state)
            return state, state[0]

        return jax.lax.scan(step, state, u)[1]

    def derivatives(run):
        def value(*args):
            return jnp.sum(jnp.sin(run(cell, *args)))

        def slope(args, directions):
            grads = jax.grad(value, (0, 1, 2))(*args)
            return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grads, directions)), strict=True))

        return lambda args, directions: (jax.grad(value, (0, 1, 2))(*args), jax.grad(slope)(args, directions))

    def draw(key):
        a, b, c = jax.random.split(key, 3)
        state = tuple(jax.random.normal(k, (2, 3)) for k in jax.random.split(c, states))
        return jax.random.normal(a, (5, 2, gates * 3)), jax.random.normal(b, (3, gates * 3)), state

    args, directions = draw(jax.random.key(0)), draw(jax.random.key(1))
    ours, theirs = (jax.jit(derivatives(run))(args, directions) for run in (recur, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_lookup_has_the_gradients_of_a_gather_and_tells_of_a_token_past_the_end():
    table, weight = jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (2, 4, 3))
    token = jnp.array([[0, 4, 4, 1], [3, 3, 0, 4]])
    ours = jax.grad(lambda t: jnp.sum(jnp.sin(lookup(t, token)) * weight))(table)
    theirs = jax.grad(lambda t: jnp.sum(jnp.sin(t[token]) * weight))(table)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert jnp.all(jnp.isnan(lookup(table, jnp.array([5]))))


def test_long_and_short_batches_of_text_go_two_ways_to_one_result():
    model = models.char_lstm(20, hidden=4, layers=2)  # 24 positions multiply the table first, 12 do not
    params, x = model.init(jax.random.key(0)), jax.random.randint(jax.random.key(1), (4, 6), 0, 20)

    def gradient(x):
        return jax.grad(lambda params: jnp.sum(jnp.sin(model.apply(params, x))))(params)

    whole, halves = gradient(x), [gradient(half) for half in (x[:2], x[2:])]
    jax.tree.map(lambda w, a, b: np.testing.assert_allclose(w, a + b, rtol=1e-4, atol=1e-5), whole, *halves)


def test_dropout_in_the_transformer_needs_a_key():
    model = models.transformer(7, width=8, layers=1, heads=2, context=6, dropout=0.5)
    params, x, apply = jax.jit(model.init)(jax.random.key(0)), jnp.ones((1, 6), jnp.int32), jax.jit(model.apply)
    a, b, none = apply(params, x, jax.random.key(1)), apply(params, x, jax.random.key(2)), apply(params, x)
    assert not np.allclose(a, b) and not np.allclose(a, none)


def test_a_sequence_longer_than_the_context_is_refused_with_the_cure():
    model = CAUSAL["transformer"]
    with pytest.raises(ValueError, match=r"transformer\(context=6\).*7 tokens.*longer context"):
        model.apply(jax.jit(model.init)(jax.random.key(0)), jnp.ones((1, 7), jnp.int32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.char_lstm(0), r"char_lstm\(vocabulary_size=0\)"),
        (lambda: models.char_gru(9, layers=0), r"char_gru\(layers=0\)"),
        (lambda: models.transformer(9, width=10, layers=1, heads=4, context=8), r"multiple of heads=4; use width=12"),
        (lambda: models.transformer(9, width=8, layers=1, heads=4, context=8, dropout=2.0), r"dropout must lie in"),
    ],
)
def test_impossible_sizes_are_refused_with_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()
