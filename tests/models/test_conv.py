"""The kit's convolution against those of `jax.lax` and flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jfed.models import conv, conv2d
from jfed.models.modules import Conv

CASES = [  # kernel, padding, strides
    ((3, 3), "SAME", (1, 1)),
    ((2, 4), "SAME", (1, 1)),
    ((5, 2), "VALID", (1, 1)),
    ((1, 1), "VALID", (1, 1)),
    ((3, 2), ((2, 0), (1, 5)), (1, 1)),
    ((2, 2), ((3, 1), (0, 2)), (1, 1)),  # padding past the kernel: the gradient pads by less than nothing
    ((3, 3), "SAME", (2, 2)),  # a side divided and a side with one left over
    ((2, 3), "VALID", (3, 1)),
    ((1, 1), "SAME", (2, 3)),  # rows between the strides that nothing sees
    ((3, 2), ((0, 2), (1, 3)), (2, 3)),
]


def reference(x, kernel, *, padding, strides=(1, 1)):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def total(conv, x, kernel):
    return jnp.sum(jnp.sin(conv(x, kernel, padding="SAME")))


def inputs(kernel_size, leading=(), channels=6):
    a, b, c, d = jax.random.split(jax.random.key(0), 4)
    x_shape, k_shape = (*leading, 2, 6, 7, channels), (*leading, *kernel_size, channels, 4)
    return tuple(jax.random.normal(k, s) for k, s in zip((a, b, c, d), (x_shape, k_shape) * 2, strict=True))


def close(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-4), a, b)


def derivatives(conv, padding, strides=(1, 1)):
    """Value, gradient, and gradient of the gradient's product with (v, w), at (x, kernel)."""

    def value(x, k):
        return jnp.sum(jnp.sin(conv(x, k, padding=padding, strides=strides)))

    def slope(x, k, v, w):
        dx, dk = jax.grad(value, (0, 1))(x, k)
        return jnp.vdot(dx, v) + jnp.vdot(dk, w)

    return lambda x, k, v, w: (value(x, k), jax.grad(value, (0, 1))(x, k), jax.grad(slope, (0, 1))(x, k, v, w))


@pytest.mark.parametrize(
    ("kernel_size", "padding", "strides", "channels"),
    [(*case, 6) for case in CASES] + [(*CASES[i], 1) for i in (0, 2, 9)],  # from one channel by patches
)
def test_conv2d_equals_lax_with_first_and_second_derivatives(kernel_size, padding, strides, channels):
    args = inputs(kernel_size, channels=channels)
    close(*(jax.jit(derivatives(f, padding, strides))(*args) for f in (conv2d, reference)))


@pytest.mark.slow
@pytest.mark.parametrize(("kernel_size", "padding", "strides"), CASES)
def test_the_lowerings_of_all_backends_agree(kernel_size, padding, strides):
    x, kernel, *_ = inputs(kernel_size)
    image = x.shape[1:3]
    window = conv._Window(image, kernel_size, strides, conv._pairs(padding, image, kernel_size, strides))
    dy = reference(x, kernel, padding=padding, strides=strides)

    @jax.jit
    def every():
        return (
            [conv._convolve(x, kernel, window), conv._matmul_forward(x, kernel, window)],
            [f(dy, kernel, window) for f in (conv._input_convolution, conv._matmul_input, conv._cpu_input)],
            [f(x, dy, window) for f in (conv._weights_convolution, conv._matmul_weights, conv._cpu_weights)],
        )

    for first, *others in every():
        for other in others:
            close(other, first)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_gradient_with_one_kernel_per_client_lowers_to_matrix_products_on_an_accelerator(platform):
    x, kernel, *_ = inputs((3, 3), (4,))
    grads = jax.jit(jax.vmap(jax.grad(functools.partial(total, conv2d), (0, 1))))
    text = grads.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" in text and "stablehlo.convolution" not in text
    alone = jax.jit(jax.grad(functools.partial(total, conv2d), (0, 1))).trace(x[0], kernel[0])
    assert alone.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution") == 3


@pytest.mark.parametrize("lead", [1, 3])
def test_vmap_over_clients_equals_lax_with_first_and_second_derivatives(lead):
    args = inputs((3, 2), (lead,))
    close(*(jax.jit(jax.vmap(derivatives(f, "SAME")))(*args) for f in (conv2d, reference)))


@pytest.mark.parametrize("axes", [(0, None), (None, 0)])
def test_vmap_over_one_argument_equals_lax(axes):
    x, kernel, *_ = inputs((3, 3), (3,))
    args = tuple(a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True))

    def grads(conv):
        return jax.jit(jax.vmap(jax.value_and_grad(functools.partial(total, conv), (0, 1)), axes))(*args)

    close(grads(conv2d), grads(reference))


def test_vmap_of_vmap_equals_lax():
    x, kernel, *_ = inputs((2, 2), (2, 3))
    twice = (jax.vmap(jax.vmap(functools.partial(f, padding="SAME"))) for f in (conv2d, reference))
    close(*(jax.jit(f)(x, kernel) for f in twice))


def test_conv2d_equals_lax_inside_scan_checkpoint_and_shard_map():
    x, kernel, *_ = inputs((3, 3), (8,))
    mesh = jax.make_mesh((8,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))

    def descend(conv, kernel, x):
        slope = jax.vmap(jax.grad(jax.checkpoint(functools.partial(total, conv)), 1))
        return jax.lax.scan(lambda k, _: (k - 0.01 * slope(x, k), None), kernel, length=2)[0]

    clients = P("clients")
    sharded = jax.shard_map(functools.partial(descend, conv2d), mesh=mesh, in_specs=clients, out_specs=clients)
    # lax without shard_map: on jax 0.7 the gradient of its convolution has no batching rule inside one.
    close(jax.jit(sharded)(kernel, x), jax.jit(functools.partial(descend, reference))(kernel, x))


def test_no_convolution_is_grouped_on_cpu_however_many_clients():
    x, kernel, *_ = inputs((3, 3), (4,))
    text = jax.jit(jax.vmap(jax.grad(functools.partial(total, conv2d), (0, 1)))).lower(x, kernel).as_text()
    assert "stablehlo.convolution" in text
    assert "feature_group_count = 4" not in text and "batch_group_count = 4" not in text


@pytest.mark.parametrize("padding", ["same", 2, ((1, 1),)])
def test_an_unknown_padding_is_refused_with_the_cure(padding):
    with pytest.raises(ValueError, match=r"conv2d\(padding=.*write \(\(p, p\), \(p, p\)\)"):
        conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), padding=padding)


@pytest.mark.parametrize("strides", [0, (1, 2, 3), (1.0, 1), "2"])
def test_unknown_strides_are_refused_with_the_cure(strides):
    with pytest.raises(ValueError, match=r"conv2d\(strides=.*write 2, or \(2, 1\) for down and across"):
        conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), strides=strides)


def test_unequal_dtypes_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"dtypes must be equal; write x\.astype\(kernel\.dtype\)"):
        conv2d(jnp.ones((1, 4, 4, 1), jnp.bfloat16), jnp.ones((3, 3, 1, 1)))


def test_an_image_without_channels_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"add the channel axis with x\[\.\.\., None\]"):
        conv2d(jnp.ones((1, 4, 4)), jnp.ones((3, 3, 1, 1)))


def test_forward_mode_is_refused_and_reverse_over_reverse_gives_the_hessian_vector_product():
    x, kernel, _, w = inputs((2, 2))
    value, expected = (functools.partial(total, f, x) for f in (conv2d, reference))
    with pytest.raises(TypeError):
        jax.jvp(value, (kernel,), (w,))
    ours = jax.grad(lambda k: jnp.vdot(jax.grad(value)(k), w))(kernel)
    close(ours, jax.jvp(jax.grad(expected), (kernel,), (w,))[1])


@pytest.mark.parametrize("kernel_size", [3, (2, 5)])
def test_conv_layer_equals_that_of_flax_under_the_same_parameter_names(kernel_size):
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    ours, theirs = Conv(3, 4, kernel_size, rngs=nnx.Rngs(0)), nnx.Conv(3, 4, sides, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    assert ours.kernel.shape == theirs.kernel.shape and ours.bias.shape == theirs.bias.shape
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
    close(ours(x), theirs(x))
