"""Corrections of old gradients; within a run they are held against plain Python in `test_asynchronous.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed.parallel.corrections import adaptive_delay_compensation, delay_compensation, per_age, scale_by_age

STALE = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
NOW = {"a": jnp.array([1.5, -1.0]), "b": jnp.array(-0.5)}


def test_compensation_by_the_true_curvature_gives_the_gradient_of_today():
    h, w_stale, w = 3.0, jnp.array(2.0), jnp.array(-1.0)  # of a quadratic
    correct = delay_compensation(1 / (h * 2.0**2))  # so that lambda g g = h
    corrected, _ = correct.update(h * w_stale, correct.init(w), w, stale=w_stale, age=jnp.array(5))
    assert corrected == pytest.approx(h * -1.0)


@pytest.mark.parametrize(
    "correct", [delay_compensation(0.7), adaptive_delay_compensation(0.7), scale_by_age()], ids=["c", "a", "age"]
)
def test_a_fresh_gradient_stays_as_it_is(correct):
    corrected, _ = correct.update(STALE, correct.init(NOW), NOW, stale=NOW, age=jnp.array(0))
    for name in STALE:
        np.testing.assert_array_equal(corrected[name], STALE[name])


def test_adaptive_compensation_is_the_constant_one_with_lambda_over_the_root_mean_square():
    correct = adaptive_delay_compensation(0.7, decay=0.9, eps=1e-3)
    state, v = correct.init(NOW), 0.0
    for scale in (1.0, -3.0):
        gradient = {name: scale * x for name, x in STALE.items()}
        corrected, state = correct.update(gradient, state, NOW, stale=STALE, age=jnp.array(1))
        g = np.asarray(gradient["a"], float)
        v = 0.9 * v + 0.1 * g * g
        expected = g + 0.7 / np.sqrt(v + 1e-3) * g * g * np.asarray(NOW["a"] - STALE["a"])
        np.testing.assert_allclose(corrected["a"], expected, rtol=1e-5)


@pytest.mark.parametrize("correct", [delay_compensation, adaptive_delay_compensation])
def test_a_traced_strength_is_that_of_a_number_in_any_dtype(correct):
    def corrected(strength, state=None):
        one = correct(strength)
        state = one.init(now) if state is None else state
        return one.update(gradient, state, now, stale=stale)

    def small(values):
        return jnp.array(values, jnp.bfloat16)

    gradient, now, stale = small([1.5, -2.0]), small([1.0, 3.0]), small([0.5, 1.0])
    alone, traced = corrected(0.7), jax.jit(corrected)(0.7)
    assert jax.tree.structure(alone) == jax.tree.structure(traced)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(traced), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=2e-2)


@pytest.mark.parametrize("correct", [delay_compensation(0.5), adaptive_delay_compensation(0.5, decay=0.0, eps=1e-12)])
def test_turning_complex_numbers_turns_what_is_corrected(correct):
    gradient, now, stale = jnp.array([1.0 + 2j]), jnp.array([2.0 + 1j]), jnp.array([1.0 + 1j])
    one, _ = correct.update(gradient, correct.init(now), now, stale=stale)
    turned, _ = correct.update(1j * gradient, correct.init(now), 1j * now, stale=1j * stale)
    np.testing.assert_allclose(turned, 1j * one, rtol=1e-5)


def test_corrections_chain_with_what_knows_nothing_of_staleness():
    correct = optax.chain(optax.scale(2.0), scale_by_age(lambda age: per_age(age) ** 2))
    corrected, _ = correct.update(STALE, correct.init(NOW), NOW, stale=STALE, age=jnp.array(4))
    np.testing.assert_allclose(corrected["a"], STALE["a"] / 8)


CALLS = {
    "delay_compensation(strength=-1": lambda: delay_compensation(-1),
    "adaptive_delay_compensation(strength=inf": lambda: adaptive_delay_compensation(float("inf")),
    "decay=2": lambda: adaptive_delay_compensation(1.0, decay=2),
    "eps=0": lambda: adaptive_delay_compensation(1.0, eps=0),
}


@pytest.mark.parametrize("words", CALLS)
def test_bad_input_is_an_error_of_one_line(words):
    with pytest.raises(ValueError) as error:
        CALLS[words]()
    assert words in str(error.value) and "\n" not in str(error.value)
