"""What the image models promise beyond the battery in test_model.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import models

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics


def test_logistic_regression_is_an_affine_map_of_the_flattened_input():
    model = models.logistic_regression(12, 5)
    params = model.init(jax.random.key(0))
    (layer,) = params.values()
    x = jax.random.normal(jax.random.key(1), (4, 2, 3, 2))
    expected = x.reshape(4, 12) @ (layer["kernel"] + 0.0) + (layer["bias"] + 3.0)[None]
    shifted = {name: {**layer, "bias": layer["bias"] + 3.0} for name in params}
    np.testing.assert_allclose(model.apply(shifted, x), expected, rtol=1e-5, atol=1e-5)


def test_biases_start_at_zero_and_kernels_with_lecun_variance():
    params = models.two_nn().init(jax.random.key(0))
    for layer, inputs in zip(params.values(), (784, 200, 200), strict=True):
        assert not layer["bias"].any()
        # Four standard deviations of a variance estimated from the 2,000 draws of the smallest layer, 4 sqrt(2/2000).
        np.testing.assert_allclose(inputs * np.var(layer["kernel"]), 1.0, rtol=0.13)


def test_lenet_gn_takes_colour_images_of_any_size_and_has_the_parameters_counted_by_hand():
    model = models.lenet_gn((32, 32, 3), 20)
    params = jax.eval_shape(model.init, jax.random.key(0))
    convolutions = 25 * 3 * 16 + 25 * 16 * 32 + 3 * (16 + 32)  # and a bias, a scale and an offset a channel
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == convolutions + (8 * 8 * 32 + 1) * 64 + 65 * 20
    assert jax.eval_shape(model.apply, params, jnp.ones((2, 32, 32, 3))).shape == (2, 20)


def test_lenet_gn_ignores_the_contrast_of_an_image():
    # GroupNorm divides by the spread of a group: scaling an image leaves its logits as they were.
    model = models.lenet_gn()
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(params, 5.0 * x), apply(params, x), rtol=1e-3, atol=1e-3)


def test_fedavg_cnn_learns_four_images_by_heart():
    model = models.fedavg_cnn()
    batch = {"x": jax.random.normal(jax.random.key(1), (4, 28, 28, 1)), "y": jnp.array([3, 1, 4, 1])}
    loss, optimizer = models.cross_entropy(model), optax.sgd(0.01)

    @jax.jit
    def train(key):
        params = model.init(key)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(p, batch).mean())(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=15)
        return models.metrics(model)(params, batch)["accuracy"][0]

    assert train(jax.random.key(0)).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.two_nn(num_features=0), r"two_nn\(num_features=0\).*product of an example's shape"),
        (lambda: models.fedavg_cnn(num_classes=1.5), r"fedavg_cnn\(num_classes=1.5\).*number of labels"),
        (lambda: models.lenet_gn((3, 28, 1)), r"lenet_gn\(image_shape=\(3, 28, 1\)\).*use two_nn"),
    ],
)
def test_impossible_sizes_are_refused_with_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()
