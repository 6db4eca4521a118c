"""Losses and metrics are exact for each example, padding and wrong labels included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed.models import Model, cross_entropy, from_pair, metrics, squared_error

IDENTITY = from_pair(lambda key: (), lambda params, x: x)  # logits are the input
SCALED = from_pair(lambda key: 1.0, lambda params, x: params * x)
LOGITS = jax.random.normal(jax.random.key(0), (4, 5, 6))  # B = 4, T = 5, V = 6
LABELS = jnp.array([[0, 1, 2, 3, 4], [5, -1, 0, -1, 2], [-1, -1, 3, -1, -1], [-1] * 5])


def test_cross_entropy_of_images_is_that_of_optax():
    batch = {"x": LOGITS[:, 0], "y": jnp.array([0, 5, 2, 3])}
    expected = optax.softmax_cross_entropy_with_integer_labels(batch["x"], batch["y"])
    np.testing.assert_allclose(cross_entropy(IDENTITY)((), batch), expected, rtol=1e-6)


def test_a_sequence_has_the_mean_over_its_valid_positions_and_none_gives_zero():
    loss = cross_entropy(IDENTITY)((), {"x": LOGITS, "y": LABELS})
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))
    for b in range(4):
        valid = [-log_p[b, t, y] for t, y in enumerate(LABELS[b].tolist()) if y >= 0]
        np.testing.assert_allclose(loss[b], np.mean(valid) if valid else 0.0, rtol=1e-5)


def test_padding_has_no_gradient():
    grad = jax.grad(lambda x: cross_entropy(IDENTITY)((), {"x": x, "y": LABELS}).sum())(LOGITS)
    np.testing.assert_array_equal(np.abs(grad).sum(axis=2) > 0, LABELS >= 0)


@pytest.mark.parametrize("wrong", [6, 600, -2])
def test_a_label_out_of_range_is_nan_in_its_example_alone_and_in_the_gradient(wrong):
    batch = {"x": LOGITS[:, 0], "y": jnp.array([0, wrong, 2, 3])}
    loss = jax.jit(cross_entropy(SCALED))(1.0, batch)
    assert np.isnan(loss).tolist() == [False, True, False, False]
    assert np.isnan(jax.grad(lambda p: cross_entropy(SCALED)(p, batch).sum())(1.0))
    for total, count in metrics(SCALED)(1.0, batch).values():
        assert np.isnan(total).tolist() == [False, True, False, False]
        assert count.tolist() == [1.0] * 4


def test_totals_over_counts_are_the_mean_over_all_predictions_of_any_split():
    fn = jax.jit(metrics(IDENTITY))
    whole = fn((), {"x": LOGITS, "y": LABELS})
    parts = [fn((), {"x": LOGITS[i : i + 2], "y": LABELS[i : i + 2]}) for i in (0, 2)]
    valid = np.asarray(LABELS) >= 0
    hits = (np.argmax(LOGITS, axis=2) == LABELS)[valid]
    nll = optax.softmax_cross_entropy_with_integer_labels(LOGITS, jnp.maximum(LABELS, 0))[valid]
    for name, expected in (("accuracy", hits.mean()), ("loss", nll.mean())):
        total, count = whole[name]
        assert total.shape == count.shape == (4,) and count.tolist() == [5.0, 3.0, 1.0, 0.0]
        np.testing.assert_allclose(total.sum() / count.sum(), expected, rtol=1e-5)
        totals, counts = (sum(part[name][i].sum() for part in parts) for i in (0, 1))
        np.testing.assert_allclose(totals / counts, expected, rtol=1e-5)


def test_loss_hands_its_key_to_the_model_and_metrics_never_do():
    noisy = Model(lambda key: (), lambda params, x, key=None: x if key is None else x + jax.random.normal(key, x.shape))
    batch = {"x": LOGITS[:, 0], "y": jnp.array([0, 5, 2, 3])}
    a, b = (cross_entropy(noisy)((), batch, jax.random.key(seed)) for seed in (1, 2))
    assert not np.allclose(a, b)
    plain = cross_entropy(noisy)((), batch)
    np.testing.assert_allclose(plain, metrics(noisy)((), batch)["loss"][0])


def test_losses_are_float32_whatever_the_model_computes_in():
    batch = {"x": LOGITS[:, 0].astype(jnp.bfloat16), "y": jnp.array([0, 5, 2, 3], jnp.int8)}
    assert cross_entropy(IDENTITY)((), batch).dtype == jnp.float32
    assert squared_error(IDENTITY)((), {**batch, "y": batch["x"]}).dtype == jnp.float32


def test_squared_error_is_the_mean_over_an_examples_outputs():
    y = jax.random.normal(jax.random.key(1), LOGITS.shape)
    expected = np.mean((np.asarray(LOGITS) - np.asarray(y)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(squared_error(IDENTITY)((), {"x": LOGITS, "y": y}), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (cross_entropy, jnp.zeros((4, 6)), r"cross_entropy\(y of shape \(4, 6\)\).*one integer label a prediction"),
        (metrics, jnp.zeros(4), r"metrics\(y of dtype float32\).*use squared_error"),
        (squared_error, jnp.zeros(4), r"squared_error\(y of shape \(4,\)\).*reshape y"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_the_cure(loss, y, message):
    with pytest.raises(ValueError, match=message):
        loss(IDENTITY)((), {"x": LOGITS[:, 0], "y": y})
