"""Winograd's convolution against the sum it stands for, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.models import conv2d, winograd

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics


def direct(x, kernel):
    """The convolution and nothing else, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    r = kernel.shape[0]
    high, wide = x.shape[1] + 1 - r, x.shape[2] + 1 - r
    return sum(x[:, i : i + high, j : j + wide] @ kernel[i, j] for i in range(r) for j in range(r))


def direct_weights(x, dy):
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    r, (high, wide) = x.shape[1] + 1 - dy.shape[1], dy.shape[1:3]
    rows = [[np.einsum("bhwi,bhwo->io", x[:, i : i + high, j : j + wide], dy) for j in range(r)] for i in range(r)]
    return np.array(rows)


def draw(r, images, high, wide, inputs=8, outputs=6):
    a, b, c = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(a, (images, high, wide, inputs)), jax.random.normal(b, (r, r, inputs, outputs))
    return x, kernel, jax.random.normal(c, (images, high + 1 - r, wide + 1 - r, outputs))


@pytest.mark.parametrize("r", winograd.POINTS)
def test_the_matrices_multiply_polynomials_exactly(r):
    data, kernel, output = winograd.matrices(r)
    x, k = np.random.default_rng(0).normal(size=r + 1), np.random.default_rng(1).normal(size=r)
    np.testing.assert_allclose(output @ ((kernel @ k) * (data @ x)), np.correlate(x, k), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", winograd.POINTS)
@pytest.mark.parametrize(
    ("images", "high", "wide", "inputs", "outputs", "block"),
    [(2, 8, 9, 8, 6, None), (1, 7, 6, 8, 6, None), (7, 6, 6, 8, 6, 3), (40, 14, 14, 32, 64, 16)],
)
def test_errors_are_within_a_hundred_thousandth_of_the_largest_entry(
    r, images, high, wide, inputs, outputs, block, monkeypatch
):
    x, kernel, dy = draw(r, images, high, wide, inputs, outputs)
    if block is not None:  # a few images at a time, the last time fewer
        each = winograd._tile_bytes(r, *dy.shape[1:3], inputs + outputs, x.dtype)
        monkeypatch.setattr(winograd, "BLOCK", block * each)
    for got, exact in (
        (jax.jit(winograd.forward)(x, kernel), direct(x, kernel)),
        (jax.jit(winograd.weights)(x, dy), direct_weights(x, dy)),
    ):
        assert got.shape == exact.shape
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.slow
@pytest.mark.parametrize(("r", "padding"), [(3, "VALID"), (5, "SAME"), (3, ((0, 2), (3, 1)))])
def test_conv2d_between_many_channels_takes_it_and_has_the_derivatives_of_lax(r, padding):
    x, kernel, _ = draw(r, 2, 7, 6, inputs=32, outputs=32)

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def derivatives(conv):
        def value(x, kernel):
            return jnp.mean(jnp.sin(0.05 * conv(x, kernel)))

        def slope(x, kernel):
            dx, dk = jax.grad(value, (0, 1))(x, kernel)
            return jnp.vdot(dx, jnp.cos(x)) + jnp.vdot(dk, jnp.cos(kernel))

        return jax.jit(lambda x, kernel: (value(x, kernel), jax.grad(slope, (0, 1))(x, kernel)))

    ours = derivatives(lambda x, kernel: conv2d(x, kernel, padding=padding))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max()),
        ours(x, kernel),
        derivatives(reference)(x, kernel),
    )
    forward = jax.jit(lambda x, kernel: conv2d(x, kernel, padding=padding)).lower(x, kernel).as_text()
    assert "convolution" not in forward and forward.count("dot_general") == (r + 1) ** 2


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_many_clients_have_the_gradients_of_lax(axes):
    x, kernel, _ = draw(3, 2, 6, 5, inputs=32, outputs=32)
    args = tuple(a if axis is None else jnp.stack([a, 2 * a, -a]) for a, axis in zip((x, kernel), axes, strict=True))

    def gradients(conv):
        return jax.jit(jax.vmap(jax.grad(lambda x, k: jnp.sum(jnp.sin(0.05 * conv(x, k))), (0, 1)), axes))(*args)

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max()),
        gradients(conv2d),
        gradients(reference),
    )


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
def test_whole_numbers_and_half_precision_are_left_to_the_direct_sum(dtype):
    x, kernel = jnp.ones((1, 6, 6, 32), dtype), jnp.ones((3, 3, 32, 32), dtype)
    text = jax.jit(lambda x, k: conv2d(x, k, padding="VALID")).lower(x, kernel).as_text()
    assert "convolution" in text and "dot_general" not in text


@pytest.mark.parametrize(("images", "side"), [(0, 6), (2, 2)])
def test_without_images_or_outputs_the_result_is_empty(images, side):
    x, kernel = jnp.ones((images, side, side, 32)), jnp.ones((3, 3, 32, 32))
    out = max(side - 2, 0)
    assert conv2d(x, kernel, padding="VALID").shape == (images, out, out, 32)
    assert np.all(np.asarray(jax.grad(lambda k: conv2d(x, k, padding="VALID").sum())(kernel)) == 0)
