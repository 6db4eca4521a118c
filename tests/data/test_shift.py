"""Shift changes inputs, or labels, as its paper says, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed.core import Population
from jfed.data import shift
from jfed.data.population import client, population

FLAT = population({"x": np.zeros((4000, 3), np.float32), "y": np.arange(4000)}, [1000] * 4)
IMAGES = population({"x": np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2), "y": np.arange(6)}, [1] * 6)


def test_noise_of_the_ith_of_n_clients_has_variance_sigma_i_over_n():
    noisy = shift.noise(jax.random.key(0), FLAT, sigma=0.4)
    for i in range(4):
        variance = float(np.var(client(noisy, i)["x"]))
        expected = 0.4 * (i + 1) / 4
        error = 4 * expected * np.sqrt(2 / 3000)  # four standard errors of a variance of 3000 normals
        assert abs(variance - expected) < error
        assert abs(variance - expected**2) > error  # not sigma read as a standard deviation


def test_noise_of_sigma_zero_changes_nothing():
    np.testing.assert_array_equal(shift.noise(jax.random.key(0), FLAT, sigma=0.0).examples["x"], FLAT.examples["x"])


def test_noise_leaves_labels_and_owners_alone():
    noisy = shift.noise(jax.random.key(0), FLAT, sigma=1.0)
    assert noisy.examples["y"] is FLAT.examples["y"]
    assert noisy.start is FLAT.start and noisy.size is FLAT.size
    assert noisy.examples["x"].dtype == jnp.float32


def test_noise_depends_on_the_key():
    one, again, other = (shift.noise(jax.random.key(seed), FLAT, sigma=1.0).examples["x"] for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_noise_spares_rows_nobody_owns():
    part = Population({"x": jnp.zeros((4, 2))}, jnp.array([1]), jnp.array([2]))
    changed = np.any(np.asarray(shift.noise(jax.random.key(0), part, sigma=1.0).examples["x"]) != 0, axis=1)
    assert changed.tolist() == [False, True, True, False]


def test_rotate_turns_client_i_by_i_quarter_turns():
    turned = shift.rotate(IMAGES)
    for i in range(6):
        expected = np.rot90(client(IMAGES, i)["x"], i % 4, axes=(1, 2))
        np.testing.assert_array_equal(client(turned, i)["x"], expected)


def test_rotate_four_times_is_no_turn():
    turned = IMAGES
    for _ in range(4):
        turned = shift.rotate(turned)
    np.testing.assert_array_equal(turned.examples["x"], IMAGES.examples["x"])


def test_rotate_turns_each_channel_alike():
    x = np.asarray(IMAGES.examples["x"])
    coloured = IMAGES._replace(examples={"x": jnp.stack([x, x + 100], axis=-1)})
    turned = shift.rotate(coloured).examples["x"]
    np.testing.assert_array_equal(turned[..., 0], shift.rotate(IMAGES).examples["x"])
    np.testing.assert_array_equal(turned[..., 1], turned[..., 0] + 100)


def test_rotate_keeps_the_dtype_and_the_population_it_was_given():
    before = np.array(IMAGES.examples["x"])
    assert shift.rotate(IMAGES).examples["x"].dtype == jnp.uint8
    np.testing.assert_array_equal(IMAGES.examples["x"], before)


LABELLED = population({"x": np.ones((6, 2), np.float32), "y": np.array([0, 1, 2, 3, 2, 1])}, [1, 2, 3])


def test_flipped_labels_are_counted_from_the_other_end_for_the_clients_named_only():
    flipped = shift.flip_labels(LABELLED, np.array([0, 2]), num_classes=4)
    assert flipped.examples["y"].tolist() == [3, 1, 2, 0, 1, 2]
    assert flipped.examples["y"].dtype == LABELLED.examples["y"].dtype
    assert flipped.examples["x"] is LABELLED.examples["x"]


def test_labels_flipped_twice_are_as_before():
    twice = shift.flip_labels(shift.flip_labels(LABELLED, [1], num_classes=4), [1], num_classes=4)
    np.testing.assert_array_equal(twice.examples["y"], LABELLED.examples["y"])


def test_flipping_spares_padding_and_rows_nobody_owns():
    y = jnp.array([[0, -1], [1, 2], [0, -1]])
    flipped = shift.flip_labels(Population({"y": y}, jnp.array([1]), jnp.array([2])), [0], num_classes=3)
    assert flipped.examples["y"].tolist() == [[0, -1], [1, 0], [2, -1]]


def test_flipping_nobodys_labels_changes_nothing():
    np.testing.assert_array_equal(shift.flip_labels(LABELLED, [], num_classes=4).examples["y"], LABELLED.examples["y"])


KEY = jax.random.key(0)
BAD = {
    "a client that is not": (lambda: shift.flip_labels(LABELLED, [3], num_classes=4), r"by integers in \[0, 3\)"),
    "label beyond the classes": (lambda: shift.flip_labels(LABELLED, [0], num_classes=3), "label 3 at row 3"),
    "label leaf": (lambda: shift.flip_labels(LABELLED, [0], num_classes=4, leaf="z"), "no leaf 'z'"),
    "negative": (lambda: shift.noise(KEY, FLAT, sigma=-1.0), r"noise\(sigma=-1.0\).*at least 0"),
    "nan": (lambda: shift.noise(KEY, FLAT, sigma=float("nan")), "finite"),
    "leaf": (lambda: shift.noise(KEY, FLAT, sigma=1.0, leaf="z"), "no leaf 'z'"),
    "integers": (lambda: shift.noise(KEY, IMAGES, sigma=1.0), "uint8 cannot hold noise; scale it"),
    "key": (lambda: shift.noise(0, FLAT, sigma=1.0), "new-style key"),
    "rotate leaf": (lambda: shift.rotate(IMAGES, leaf="z"), "no leaf 'z'"),
    "flat images": (lambda: shift.rotate(FLAT), "reshape rows into square images"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_what_is_wrong_and_the_cure(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()
