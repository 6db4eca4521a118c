"""Laws every partitioner keeps, and what is particular to each."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jfed.data import partition
from jfed.data.population import by_owner

# A new partitioner joins by one row: (key, labels, num_clients, min_size) -> owner; whether it takes min_size.
PARTITIONERS = {
    "iid": (lambda k, y, n, m: partition.iid(k, len(y), num_clients=n), False),
    "shards": (lambda k, y, n, m: partition.shards(k, y, num_clients=n, shards_per_client=1), False),
    "similarity": (lambda k, y, n, m: partition.similarity(k, y, num_clients=n, similarity=0.3), False),
    "classes": (
        lambda k, y, n, m: partition.classes(
            k, y, num_clients=n, classes_per_client=max(-(-np.unique(y).size // max(n, 1)), 1)
        ),
        False,
    ),
    "dirichlet": (lambda k, y, n, m: partition.dirichlet(k, y, num_clients=n, alpha=0.5, min_size=m), True),
    "dirichlet 1e-8": (lambda k, y, n, m: partition.dirichlet(k, y, num_clients=n, alpha=1e-8, min_size=m), True),
    "dirichlet 1e8": (lambda k, y, n, m: partition.dirichlet(k, y, num_clients=n, alpha=1e8, min_size=m), True),
    "dirichlet tiny": (lambda k, y, n, m: partition.dirichlet(k, y, num_clients=n, alpha=5e-324, min_size=m), True),
    "dirichlet huge": (lambda k, y, n, m: partition.dirichlet(k, y, num_clients=n, alpha=1e308, min_size=m), True),
    "lognormal": (
        lambda k, y, n, m: partition.quantity_lognormal(k, len(y), num_clients=n, sigma=2.0, min_size=m),
        True,
    ),
    "lognormal huge": (
        lambda k, y, n, m: partition.quantity_lognormal(k, len(y), num_clients=n, sigma=1e308, min_size=m),
        True,
    ),
    "power law": (
        lambda k, y, n, m: partition.quantity_power_law(k, len(y), num_clients=n, exponent=1.5, min_size=m),
        True,
    ),
    "power law huge": (
        lambda k, y, n, m: partition.quantity_power_law(k, len(y), num_clients=n, exponent=1e308, min_size=m),
        True,
    ),
}
RANDOM = [name for name in PARTITIONERS if name != "dirichlet huge"]
every = pytest.mark.parametrize("name", PARTITIONERS)


@every
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([-7, 0, 1, 2, 900]), min_size=1, max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)
def test_every_row_has_one_owner_and_every_client_its_least_size(name, labels, clients, least, seed):
    run, has_min_size = PARTITIONERS[name]
    num_clients = 1 + int(clients * (len(labels) - 1))
    min_size = int(least * (len(labels) // num_clients)) if has_min_size else 1
    owner = run(jax.random.key(seed), np.array(labels), num_clients, min_size)
    assert owner.shape == (len(labels),) and owner.dtype == np.int32
    assert owner.min() >= 0 and owner.max() < num_clients
    assert np.bincount(owner, minlength=num_clients).min() >= min_size


@every
@pytest.mark.parametrize("num_clients", [1, 30])
@pytest.mark.parametrize("classes", [1, 30])
def test_it_ends_with_one_client_or_one_a_row_and_one_class_or_one_a_row(name, num_clients, classes):
    owner = PARTITIONERS[name][0](jax.random.key(1), np.arange(30) % classes, num_clients, 1)
    assert np.all(np.bincount(owner, minlength=num_clients) == 30 // num_clients)


@every
def test_the_same_key_gives_the_same_partition(name):
    run, labels = PARTITIONERS[name][0], np.arange(200) % 5
    np.testing.assert_array_equal(run(jax.random.key(3), labels, 7, 1), run(jax.random.key(3), labels, 7, 1))


@every
def test_another_key_gives_another_partition(name):
    run, labels = PARTITIONERS[name][0], np.arange(200) % 5
    assert np.any(run(jax.random.key(3), labels, 7, 1) != run(jax.random.key(4), labels, 7, 1))


@every
def test_its_owners_build_a_population(name):
    labels = np.arange(60) % 5
    built = by_owner({"y": labels}, PARTITIONERS[name][0](jax.random.key(0), labels, 6, 1), num_clients=6)
    assert int(built.size.sum()) == 60 and int(built.size.min()) >= 1


@every
def test_more_clients_than_rows_is_an_error(name):
    with pytest.raises(ValueError, match=r"num_clients=31\).*more than the 30 rows.*use fewer clients"):
        PARTITIONERS[name][0](jax.random.key(0), np.zeros(30, int), 31, 1)


@every
def test_no_rows_and_no_clients_are_errors(name):
    with pytest.raises(ValueError, match="num_examples must be a whole number of at least 1"):
        PARTITIONERS[name][0](jax.random.key(0), np.zeros(0, int), 1, 1)
    with pytest.raises(ValueError, match="num_clients must be a whole number of at least 1"):
        PARTITIONERS[name][0](jax.random.key(0), np.zeros(3, int), 0, 1)


@every
def test_a_number_is_no_key(name):
    with pytest.raises(ValueError, match=r"key=0\): key must be a single new-style key"):
        PARTITIONERS[name][0](0, np.zeros(3, int), 1, 1)


@pytest.mark.parametrize("name", [name for name, row in PARTITIONERS.items() if row[1]])
def test_a_least_size_that_cannot_be_met_or_read_is_an_error(name):
    with pytest.raises(ValueError, match=r"min_size=4, num_clients=8.*use fewer clients or a smaller min_size"):
        PARTITIONERS[name][0](jax.random.key(0), np.zeros(31, int), 8, 4)
    with pytest.raises(ValueError, match="min_size must be a whole number of at least 0"):
        PARTITIONERS[name][0](jax.random.key(0), np.zeros(31, int), 8, -1)


# iid


def test_iid_sizes_differ_by_at_most_one():
    size = np.bincount(partition.iid(jax.random.key(0), 103, num_clients=10))
    assert sorted(size) == [10] * 7 + [11] * 3


# shards


def test_shards_of_even_classes_give_each_client_no_more_labels_than_shards():
    labels = np.arange(1000) % 10
    owner = partition.shards(jax.random.key(0), labels, num_clients=50, shards_per_client=2)
    assert np.all(np.bincount(owner) == 20)
    assert max(np.unique(labels[owner == i]).size for i in range(50)) == 2


def test_a_shard_of_uneven_classes_holds_at_most_two_labels():
    labels = np.repeat(np.arange(10), [37, 41, 29, 50, 33, 31, 45, 38, 40, 27])  # 371 rows, shards of 26 or 27
    owner = partition.shards(jax.random.key(0), labels, num_clients=7, shards_per_client=2)
    assert max(np.unique(labels[owner == i]).size for i in range(7)) <= 4
    assert np.ptp(np.bincount(owner)) <= 2


def test_one_client_a_shard_is_the_sorted_order_cut():
    labels = np.array([2, 0, 1, 0, 2, 1])
    owner = partition.shards(jax.random.key(0), labels, num_clients=3, shards_per_client=1)
    assert owner[0] == owner[4] and owner[1] == owner[3] and owner[2] == owner[5] and len(set(owner)) == 3


# similarity


def test_similarity_one_is_iid_and_zero_is_the_sorted_order_cut():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 50))
    owner = partition.similarity(jax.random.key(0), labels, num_clients=8, similarity=0.0)
    assert [set(labels[owner == i]) for i in range(8)] == [{i // 2} for i in range(8)]
    owner = partition.similarity(jax.random.key(0), labels, num_clients=2, similarity=1.0)
    assert stats.chisquare(np.bincount(labels[owner == 0])).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.98, 1.0])
@pytest.mark.parametrize("num_clients", [1, 7, 99, 103])
def test_similarity_gives_equal_sizes_whatever_the_numbers(num_clients, share):
    labels = np.arange(103) % 5
    owner = partition.similarity(jax.random.key(0), labels, num_clients=num_clients, similarity=share)
    assert np.ptp(np.bincount(owner, minlength=num_clients)) <= 1


def test_similarity_deals_its_share_of_each_client_at_random():
    labels = np.repeat(np.arange(10), 10_000)
    owner = partition.similarity(jax.random.key(1), labels, num_clients=10, similarity=0.2)
    table = np.bincount(owner * 10 + labels, minlength=100).reshape(10, 10)
    # Client i has its stretch of the sorted rest, nearly all of label i, and two thousand rows of any label.
    away = table[~np.eye(10, dtype=bool)]
    assert np.all(np.abs(away - 200) < 4 * np.sqrt(200) + 100)  # a stretch may reach 100 rows into the next label
    assert np.all(np.abs(np.diag(table) - 8200) < 4 * np.sqrt(200) + 200)


def test_which_rows_similarity_deals_at_random_depends_on_no_label():
    labels = np.repeat(np.arange(2), [1000, 9000])
    owner = partition.similarity(jax.random.key(2), labels, num_clients=10, similarity=0.5)
    rare = np.bincount(owner[labels == 0], minlength=10)
    assert abs(rare[1:].sum() - 450) < 4 * np.sqrt(500 * 0.5 * 0.9)  # half of the rare rows, nine tenths of those


@pytest.mark.parametrize("share", [-0.1, 1.1, np.nan])
def test_similarity_refuses_what_is_no_share(share):
    with pytest.raises(ValueError, match=r"similarity\(similarity=.*must lie in \[0.0, 1.0\]"):
        partition.similarity(jax.random.key(0), np.zeros(3, int), num_clients=1, similarity=share)


# classes


@pytest.mark.parametrize("k", [1, 2, 3, 10])
@pytest.mark.parametrize("num_clients", [10, 37, 100])
def test_every_client_has_exactly_k_classes_and_owners_share_a_class_equally(k, num_clients):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), np.arange(1, 11) * 100))
    owner = partition.classes(jax.random.key(k), labels, num_clients=num_clients, classes_per_client=k)
    table = np.bincount(owner * 10 + labels, minlength=10 * num_clients).reshape(num_clients, 10)
    assert np.all((table > 0).sum(1) == k) and table.sum() == len(labels)
    for column in table.T:
        assert column.any() and np.ptp(column[column > 0]) <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 8), st.integers(0, 99))
def test_clients_never_have_more_classes_than_asked_for_nor_none(counts, num_clients, k, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    possible = k <= len(counts) <= num_clients * k and num_clients <= len(labels)
    if not possible:
        with pytest.raises(ValueError, match=r"classes\("):
            partition.classes(jax.random.key(seed), labels, num_clients=num_clients, classes_per_client=k)
        return
    owner = partition.classes(jax.random.key(seed), labels, num_clients=num_clients, classes_per_client=k)
    table = np.bincount(owner * len(counts) + labels, minlength=num_clients * len(counts)).reshape(num_clients, -1)
    held = (table > 0).sum(1)
    enough = np.minimum(counts, num_clients).sum() >= num_clients * k
    assert held.min() >= 1 and held.max() <= k and np.ptp(held) <= 1 and (not enough or held.min() == k)


def test_classes_favour_no_client_no_label_and_no_pair():
    labels = np.repeat(np.arange(5), 100)
    held = np.zeros((10, 5))
    pairs = np.zeros((5, 5))
    for seed in range(400):
        owner = partition.classes(jax.random.key(seed), labels, num_clients=10, classes_per_client=2)
        has = np.zeros((10, 5))
        has[owner, labels] = 1
        held += has
        pairs += has.T @ has
    # A client holds a label with probability 2/5, two given labels with 1/10.
    assert np.all(np.abs(held - 160) < 4 * np.sqrt(400 * 0.4 * 0.6))
    assert np.all(np.abs(pairs[~np.eye(5, dtype=bool)] - 400) < 4 * np.sqrt(4000 * 0.1 * 0.9) * np.sqrt(10))
    assert (
        len(
            {
                tuple(np.bincount(partition.classes(jax.random.key(s), labels, num_clients=10, classes_per_client=2)))
                for s in range(5)
            }
        )
        > 1
    )


def test_a_class_of_few_rows_has_no_more_owners_than_rows():
    labels = np.repeat([0, 1], [3, 997])
    owner = partition.classes(jax.random.key(0), labels, num_clients=20, classes_per_client=1)
    assert set(np.bincount(owner[labels == 0])) <= {0, 1} and np.bincount(owner, minlength=20).min() >= 1


def test_too_many_or_too_few_classes_are_errors():
    labels = np.arange(30) % 3
    with pytest.raises(ValueError, match=r"classes\(classes_per_client=4\): there are only 3 labels; ask for fewer"):
        partition.classes(jax.random.key(0), labels, num_clients=5, classes_per_client=4)
    with pytest.raises(ValueError, match=r"num_clients=2, classes_per_client=1\): 3 labels need as many owners"):
        partition.classes(jax.random.key(0), labels, num_clients=2, classes_per_client=1)
    with pytest.raises(ValueError, match=r"classes\(classes_per_client=0\)"):
        partition.classes(jax.random.key(0), labels, num_clients=5, classes_per_client=0)


# dirichlet


def shares_of(alpha, clients=10, classes=400, rows=200, seed=0):
    """[classes, clients] share of each class that each client got, with no repair."""
    labels = np.repeat(np.arange(classes), rows)
    owner = partition.dirichlet(jax.random.key(seed), labels, num_clients=clients, alpha=alpha, min_size=0)
    return np.bincount(labels * clients + owner, minlength=classes * clients).reshape(classes, clients) / rows


def deviations(shares, alpha):
    """Standard errors between the mean of sum p^2 and its expectation (alpha + 1) / (N alpha + 1)."""
    found, n = (shares**2).sum(axis=1), shares.shape[1]
    return abs(found.mean() - (alpha + 1) / (n * alpha + 1)) / (found.std() / np.sqrt(len(found)))


@pytest.mark.parametrize("alpha", [0.05, 0.5, 3.0])
def test_dirichlet_shares_have_the_second_moment_of_their_alpha_and_no_other(alpha):
    shares = shares_of(alpha)
    assert deviations(shares, alpha) < 4
    assert deviations(shares, 1.5 * alpha) > 4 and deviations(shares, alpha / 1.5) > 4


def test_dirichlet_favours_no_client():
    shares = shares_of(0.5, seed=1)
    error = shares.std(axis=0) / np.sqrt(len(shares))
    assert np.all(np.abs(shares.mean(axis=0) - 0.1) < 4 * error)


def test_dirichlet_favours_no_client_even_where_a_class_has_fewer_rows_than_clients():
    shares = shares_of(1e8, clients=10, classes=2000, rows=3, seed=2)
    assert np.all(np.abs(shares.mean(axis=0) - 0.1) < 4 * shares.std(axis=0) / np.sqrt(len(shares)))


def test_dirichlet_with_a_large_alpha_is_iid_to_the_row():
    assert np.abs(shares_of(1e8, classes=10) * 200 - 20).max() <= 1


@pytest.mark.parametrize("alpha", [1e-3, 1e-8, 5e-324])
def test_dirichlet_with_a_tiny_alpha_gives_a_class_to_one_client(alpha):
    shares = shares_of(alpha, classes=100)
    assert np.mean(shares.max(axis=1) > 0.99) >= 0.95
    assert np.unique(shares.argmax(axis=1)).size == 10  # not always the same client


def test_dirichlet_repair_takes_from_the_largest_only():
    labels = np.zeros(100, int)
    free, bound = (
        np.bincount(partition.dirichlet(jax.random.key(5), labels, num_clients=5, alpha=0.3, min_size=m), minlength=5)
        for m in (0, 10)
    )
    level = bound[free > bound]
    assert free.min() < 10 and bound.min() == 10 and bound.sum() == 100
    assert np.ptp(level) <= 1 and np.all(bound[free <= bound] <= level.max())
    assert np.all((bound == free) | (free > bound) | (bound == 10))


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.inf, np.nan])
def test_dirichlet_refuses_an_alpha_that_is_not_finite_and_positive(alpha):
    with pytest.raises(ValueError, match=r"dirichlet\(alpha=.*must be a finite number above 0; 0.5 is usual"):
        partition.dirichlet(jax.random.key(0), np.zeros(3, int), num_clients=1, alpha=alpha)


@pytest.mark.parametrize("labels", [np.zeros((3, 1), int), np.zeros(3), np.array(["a"])])
def test_labels_that_are_not_a_row_of_integers_are_refused(labels):
    for run in (PARTITIONERS[name][0] for name in ("dirichlet", "shards", "similarity", "classes")):
        with pytest.raises(ValueError, match=r"labels must be integers of shape \[E\]; number other kinds"):
            run(jax.random.key(0), labels, 1, 1)


def test_shards_refuses_no_shards():
    with pytest.raises(ValueError, match=r"shards\(shards_per_client=0\)"):
        partition.shards(jax.random.key(0), np.zeros(3, int), num_clients=1, shards_per_client=0)


# sizes


def test_lognormal_sizes_have_the_spread_of_their_sigma_and_no_other():
    owner = partition.quantity_lognormal(jax.random.key(0), 2_000_000, num_clients=1000, sigma=0.5)
    spread = np.log(np.bincount(owner)).std()
    assert abs(spread - 0.5) < 4 * 0.5 / np.sqrt(2 * 1000)  # standard error of a standard deviation


def test_power_law_sizes_fall_by_their_exponent():
    owner = partition.quantity_power_law(jax.random.key(0), 1_000_000, num_clients=50, exponent=1.2)
    size = np.sort(np.bincount(owner))[::-1]
    slope = np.polyfit(np.log(np.arange(1, 51)), np.log(size), 1)[0]
    assert slope == pytest.approx(-1.2, abs=1e-3)


def test_quantity_skew_leaves_labels_alike():
    labels = np.arange(20_000) % 2
    owner = partition.quantity_lognormal(jax.random.key(0), 20_000, num_clients=10, sigma=1.0)
    size = np.bincount(owner)
    ones = np.bincount(owner, labels)
    assert np.all(np.abs(ones - size / 2) < 4 * np.sqrt(size / 4))


@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan])
def test_a_spread_that_is_negative_or_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=r"quantity_lognormal\(sigma=.*finite number of at least 0"):
        partition.quantity_lognormal(jax.random.key(0), 3, num_clients=1, sigma=value)
    with pytest.raises(ValueError, match=r"quantity_power_law\(exponent=.*finite number of at least 0"):
        partition.quantity_power_law(jax.random.key(0), 3, num_clients=1, exponent=value)


# natural


@pytest.mark.parametrize("kind", [list, np.array, lambda ids: np.array(ids, object), iter])
def test_natural_numbers_ids_in_the_order_in_which_they_appear(kind):
    owner, names = partition.natural(kind(["w9", "w1", "w9", "w5", "w1"]))
    assert owner.tolist() == [0, 1, 0, 2, 1] and owner.dtype == np.int32
    assert names == ["w9", "w1", "w5"]


def test_natural_takes_ids_of_mixed_kinds():
    assert partition.natural([(1, "a"), 1, (1, "a")])[1] == [(1, "a"), 1]


def test_natural_refuses_a_matrix_of_ids():
    with pytest.raises(ValueError, match=r"ids must have shape \[E\]"):
        partition.natural(np.zeros((2, 2), int))
