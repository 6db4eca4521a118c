"""The kit's max pool against that of `jax.lax`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.models import max_pool


@pytest.mark.parametrize("side", [6, 7])
def test_max_pool_equals_reduce_window_with_gradient_and_drops_what_is_left_over(side):
    x = jax.random.normal(jax.random.key(0), (2, side, side + 1, 3))

    def theirs(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    ours, theirs = (jax.jit(jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)))))(x) for f in (max_pool, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("value", [1.0, jnp.nan])
def test_of_equal_values_in_a_pool_the_first_takes_the_gradient_and_nan_stays_nan(value):
    x = jnp.array([[0.0, value], [value, value]]).reshape(1, 2, 2, 1)
    out, grad = jax.value_and_grad(lambda x: max_pool(x).sum())(x)
    np.testing.assert_array_equal(out, value)
    np.testing.assert_array_equal(grad.ravel(), [0.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("window", [0, -2, 2.0])
def test_a_pool_whose_window_is_not_a_whole_number_of_at_least_1_is_refused_with_the_cure(window):
    with pytest.raises(ValueError, match=rf"max_pool\(window={window}\): .* at least 1; 2 is usual"):
        max_pool(jnp.ones((1, 4, 4, 1)), window)


def test_every_window_and_mode():
    x = jax.random.normal(jax.random.key(0), (1, 7, 6, 2))

    def f(x):
        return jnp.sum(jnp.sin(max_pool(x, 3)))

    gradient = jax.grad(f)(x)
    assert np.count_nonzero(gradient) == 2 * 2 * 2
    np.testing.assert_allclose(jax.jacfwd(f)(x), gradient, rtol=1e-6)
    largest = x[:, :6].reshape(1, 2, 3, 2, 3, 2).max((2, 4))
    curvature = jnp.einsum("bhwcbhwc->bhwc", jax.hessian(f)(x))
    np.testing.assert_allclose(np.sort(curvature[curvature != 0]), np.sort(-jnp.sin(largest).ravel()), rtol=1e-6)
