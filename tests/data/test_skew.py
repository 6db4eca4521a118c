"""Measures of skew against a computation by hand and against their known extremes."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfed.core import Population
from jfed.data import partition
from jfed.data.population import by_owner, population
from jfed.data.skew import skew, table

# Clients {0, 0}, {0, 1}, {}, {1, 1, 2, 2}: the population has labels 0, 1, 2 in shares 3/8, 3/8, 2/8.
HAND = population({"y": np.array([0, 0, 0, 1, 1, 1, 2, 2])}, [2, 2, 0, 4], allow_empty=True)


def test_values_computed_by_hand():
    found = skew(HAND, num_classes=3)
    np.testing.assert_array_equal(found.size, [2, 2, 0, 4])
    np.testing.assert_array_equal(found.classes, [1, 2, 0, 2])
    np.testing.assert_allclose(found.entropy, [0, 1, 0, 1])
    np.testing.assert_allclose(found.distance, [10 / 8, 4 / 8, 0, 6 / 8])
    assert found.mean_entropy == pytest.approx(6 / 8)
    assert found.mean_distance == pytest.approx((2 * 10 + 2 * 4 + 4 * 6) / 64)
    assert found.gini == pytest.approx(12 / 32)  # (-3*0 - 1*2 + 1*2 + 3*4) / (4 * 8)


def test_one_class_a_client_is_the_furthest_the_labels_can_be():
    found = skew(population({"y": np.repeat(np.arange(10), 5)}, [5] * 10), num_classes=10)
    np.testing.assert_allclose(found.distance, 2 * 0.9)  # the 1.8 a federated 1-class split of 10 classes has
    np.testing.assert_array_equal(found.entropy, 0)


def test_clients_alike_have_no_distance_and_full_entropy():
    found = skew(population({"y": np.tile(np.arange(4), 3)}, [4] * 3), num_classes=4)
    np.testing.assert_allclose(found.distance, 0, atol=1e-12)
    np.testing.assert_allclose(found.entropy, 2)
    assert found.gini == 0


def test_entropy_falls_and_distance_grows_as_alpha_shrinks():
    labels = np.arange(5000) % 10
    found = [
        skew(
            by_owner({"y": labels}, partition.dirichlet(jax.random.key(0), labels, num_clients=20, alpha=alpha)),
            num_classes=10,
        )
        for alpha in (100.0, 1.0, 0.05)
    ]
    assert found[0].mean_entropy > found[1].mean_entropy > found[2].mean_entropy
    assert found[0].mean_distance < found[1].mean_distance < found[2].mean_distance


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=6).filter(any))
def test_measures_stay_within_their_bounds(clients):
    flat = np.array([y for one in clients for y in one])
    found = skew(population({"y": flat}, [len(c) for c in clients], allow_empty=True), num_classes=5)
    assert np.all((found.entropy >= 0) & (found.entropy <= np.log2(5) + 1e-9))
    assert np.all((found.distance >= 0) & (found.distance <= 2))
    assert 0 <= found.gini < 1
    assert found.mean_entropy <= found.entropy.max() + 1e-9 and found.mean_distance <= found.distance.max() + 1e-9


def test_order_of_clients_and_rows_does_not_matter():
    turned = Population(HAND.examples, HAND.start[::-1], HAND.size[::-1])
    one, other = skew(HAND, num_classes=3), skew(turned, num_classes=3)
    np.testing.assert_array_equal(one.distance, other.distance[::-1])
    assert one.gini == other.gini and one.mean_entropy == pytest.approx(other.mean_entropy)


def test_padding_of_sequences_is_not_counted():
    padded = population({"y": np.array([[0, 1, -1], [0, -1, -1], [1, 1, 1]])}, [2, 1])
    flat = population({"y": np.array([0, 1, 0, 1, 1, 1])}, [3, 3])
    one, other = skew(padded, num_classes=2), skew(flat, num_classes=2)
    np.testing.assert_array_equal(one.distance, other.distance)
    assert one.mean_entropy == other.mean_entropy


def test_rows_nobody_owns_are_not_counted():
    part = Population({"y": np.array([5, 0, 1, 5])}, np.array([1]), np.array([2]))
    assert skew(part, num_classes=6).entropy.tolist() == [1.0]


def test_the_table_shows_the_measures_and_the_empty_clients():
    text = table(skew(HAND, num_classes=3))
    assert "4 clients (1 empty), 8 examples, Gini coefficient of sizes 0.375" in text
    row = next(line for line in text.splitlines() if line.startswith("label distance"))
    assert row.split()[2:] == ["0.500", "0.750", "1.250", "0.812"]


def test_the_table_of_nobody_has_sizes_only():
    nobody = Population({"y": np.array([0])}, np.array([0]), np.array([0]))
    text = table(skew(nobody, num_classes=1))
    assert "1 clients (1 empty), 0 examples" in text and "entropy, bits" not in text


def test_labels_out_of_range_and_missing_leaves_are_errors():
    with pytest.raises(ValueError, match="label 2 at row 6"):
        skew(HAND, num_classes=2)
    with pytest.raises(ValueError, match=r"skew\(label='t'\): no leaf 't'"):
        skew(HAND, num_classes=3, label="t")
