"""Builders keep every row where it belongs and refuse what would go wrong later."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfed import data
from jfed.core import Population
from jfed.data._checks import check, check_labels, leaf_named, numpy_generator, owned_rows
from jfed.data.population import by_owner, client, from_clients, owner, population, split

SIZE = [3, 1, 4]
ROWS = {"x": np.arange(16.0, dtype=np.float32).reshape(8, 2), "y": np.arange(8)}


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda p, q: p.dtype == q.dtype and np.array_equal(p, q), a, b))


def test_all_builders_agree_on_one_population():
    first = population(ROWS, SIZE)
    parts = [jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], ROWS) for a, b in [(0, 3), (3, 4), (4, 8)]]
    assert same(first, from_clients(parts))
    assert same(first, by_owner(ROWS, np.repeat(np.arange(3), SIZE)))


def test_leaves_are_jax_arrays_and_offsets_int32():
    built = population(ROWS, SIZE)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(built))
    assert built.start.dtype == built.size.dtype == jnp.int32
    assert built.start.tolist() == [0, 3, 4]


def test_a_bare_array_is_a_tree_of_examples():
    assert client(population(np.arange(3), [1, 2]), 1).tolist() == [1, 2]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12).filter(lambda owners: max(owners) >= 0))
def test_by_owner_gives_each_client_its_rows_in_order(owners):
    built = by_owner(np.arange(len(owners)), np.array(owners), num_clients=4, allow_empty=True)
    for i in range(4):
        assert client(built, i).tolist() == [row for row, who in enumerate(owners) if who == i]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_owner_undoes_by_owner(sizes):
    who = np.repeat(np.arange(len(sizes)), sizes)
    built = population(np.arange(len(who)), sizes, allow_empty=True)
    np.testing.assert_array_equal(owner(built), who)


def test_a_row_nobody_owns_has_owner_minus_one():
    assert owner(Population(jnp.arange(4), jnp.array([1]), jnp.array([2]))).tolist() == [-1, 0, 0, -1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_deals_every_row_once_and_every_client_of_two_both_parts(sizes, fraction, seed):
    sizes = [*sizes, 2]
    whole = population(np.arange(sum(sizes)), sizes, allow_empty=True)
    train, test = split(whole, fraction, key=jax.random.key(seed))
    for i, size in enumerate(sizes):
        a, b = client(train, i).tolist(), client(test, i).tolist()
        assert sorted(a + b) == client(whole, i).tolist()
        assert a == sorted(a) and b == sorted(b)
        assert len(a) >= min(size, 1)
        assert (len(b) >= 1) == (size >= 2)


def test_split_keeps_the_fraction_to_the_row():
    train, test = split(population(np.arange(150), [100, 50]), 0.29, key=jax.random.key(0))
    assert train.size.tolist() == [29, 14] and test.size.tolist() == [71, 36]


def test_split_depends_on_the_key_and_on_nothing_else():
    whole = population(np.arange(100), [50, 50])
    one, again, other = (split(whole, 0.5, key=jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert same(one, again) and not same(one, other)


def test_split_chooses_rows_evenly():
    whole = population(np.arange(10), [10])
    train = [client(split(whole, 0.5, key=jax.random.key(seed))[0], 0) for seed in range(200)]
    times = np.bincount(np.concatenate(train), minlength=10)
    assert np.all(np.abs(times - 100) < 4 * np.sqrt(200 * 0.25))  # binomial(200, 1/2), four deviations


def test_labels_of_sequences_may_be_padded_with_minus_one():
    check_labels(np.array([[0, 2, -1]]), 3)


@pytest.mark.parametrize("label", ["y", "digit"])
def test_builders_told_of_the_classes_take_labels_in_range_and_refuse_others(label):
    rows = {"x": ROWS["x"], label: ROWS["y"]}
    parts = [jax.tree.map(lambda leaf, a=a: leaf[a : a + 4], rows) for a in (0, 4)]
    builders = {
        "population": lambda **told: population(rows, SIZE, **told),
        "from_clients": lambda **told: from_clients(parts, **told),
        "by_owner": lambda **told: by_owner(rows, [0, 1] * 4, **told),
    }
    for name, build in builders.items():
        assert same(build(num_classes=8, label=label), build())
        with pytest.raises(ValueError, match=rf"{name}\(num_classes=7\): label 7 at row 7 is outside \[0, 7\)"):
            build(num_classes=7, label=label)
        with pytest.raises(ValueError, match=rf"{name}\(label='z'\): no leaf 'z'"):
            build(num_classes=8, label="z")


def test_by_owner_numbers_bad_rows_as_they_were_given_and_spares_those_left_out():
    rows = {"x": np.array([0.0, np.nan, 1.0]), "y": np.array([0, -1, 5])}
    taken = by_owner(rows, [1, -1, 0], num_classes=6)
    assert taken.examples["y"].tolist() == [5, 0]
    with pytest.raises(ValueError, match="label 5 at row 2"):
        by_owner(rows, [1, -1, 0], num_classes=5)
    with pytest.raises(ValueError, match="first in row 1"):
        by_owner(rows, [1, 0, 0])


def test_builders_allow_padding_in_sequences_but_no_image_without_a_label():
    population({"y": np.array([[0, -1], [1, 2]])}, [1, 1], num_classes=3)
    with pytest.raises(ValueError, match="label -1 at row 1"):
        population({"y": np.array([0, -1])}, [1, 1], num_classes=3)


def test_a_population_made_here_passes_its_check():
    check(population(ROWS, SIZE), num_classes=8)


def test_an_empty_client_is_allowed_when_asked_for():
    check(population(np.arange(2), [0, 2, 0], allow_empty=True), allow_empty=True)


def by_hand(start, size, examples=None):
    return Population(np.arange(4) if examples is None else examples, np.array(start), np.array(size))


BAD = {
    "lengths": (lambda: population({"x": np.ones(3), "y": np.ones(2)}, [3]), r"leaves differ.*\['x'\] has 3"),
    "empty": (lambda: population(np.ones(3), [3, 0]), r"population: client 1 has no rows.*min_size=1.*allow_empty"),
    "empty by owner": (lambda: by_owner(np.ones(2), [0, 0], num_clients=2), "by_owner: client 1 has no rows"),
    "empty client": (lambda: from_clients([np.ones(1), np.ones(0)]), "from_clients: client 1 has no rows"),
    "nan": (lambda: population({"x": np.array([[0, 1], [np.nan, 2]])}, [2]), r"leaf \['x'\] .* first in row 1"),
    "infinity": (lambda: population(np.array([1.0, 0.0, np.inf]), [3]), "leaf examples .* first in row 2"),
    "bfloat16": (lambda: population(jnp.array([1, jnp.nan], jnp.bfloat16), [2]), "NaN or an infinity"),
    "overflow": (lambda: population(np.array([1e300]), [1]), "as float32 holds a NaN or an infinity"),
    "wraps": (lambda: population(np.array([2**40]), [1]), "int64 values beyond int32"),
    "strings": (lambda: population(np.array(["a"]), [1]), "not numbers; encode"),
    "no leaves": (lambda: population({}, [1]), "a tree of arrays"),
    "scalar": (lambda: population({"x": 1.0}, [1]), "a tree of arrays"),
    "sum": (lambda: population(np.ones(3), [1, 1]), "sizes sum to 2 but there are 3 rows"),
    "negative": (lambda: population(np.ones(3), [4, -1]), "client 1 has -1 rows"),
    "no clients": (lambda: population(np.ones(0), np.ones(0, int)), "size must be integers"),
    "float size": (lambda: population(np.ones(2), [1.0, 1.0]), "size must be integers"),
    "too many": (lambda: population(np.broadcast_to(np.int8(0), (2**31,)), [2**31]), "more than int32 can count"),
    "nobody": (lambda: from_clients([]), "there must be a client"),
    "structure": (lambda: from_clients([{"x": np.ones(1)}, {"z": np.ones(1)}]), r"clients\[1\].*same leaves"),
    "inner lengths": (
        lambda: from_clients([{"x": np.ones(1), "y": np.ones(2)}]),
        r"from_clients\(clients\[0\]\).*leaves differ",
    ),
    "trailing shape": (lambda: from_clients([np.ones((1, 2)), np.ones((1, 3))]), r"clients\[1\].*one shape and dtype"),
    "dtype": (lambda: from_clients([np.ones(1), np.ones(1, int)]), "one shape and dtype"),
    "owner shape": (lambda: by_owner(np.ones(3), [0, 1]), r"shape \[3\], one a row"),
    "owner dtype": (lambda: by_owner(np.ones(2), [0.0, 1.0]), "must be integers"),
    "owner high": (lambda: by_owner(np.ones(2), [0, 2], num_clients=2), r"owner=2 at row 1.*\[0, 2\)"),
    "owner low": (lambda: by_owner(np.ones(2), [-2, 0]), "owner=-2 at row 0"),
    "nobody owns": (lambda: by_owner(np.ones(2), [-1, -1]), "every row is left out"),
    "num_clients": (lambda: by_owner(np.ones(1), [0], num_clients=0), "at least 1"),
    "fraction": (lambda: split(population(np.ones(2), [2]), 1.0, key=jax.random.key(0)), r"\(0, 1\).*train on"),
    "nothing to split": (lambda: split(population(np.ones(1), [1]), 0.5, key=jax.random.key(0)), "no client has two"),
    "split key": (lambda: split(population(np.ones(2), [2]), 0.5, key=0), r"split\(key=0\).*jax.random.key\(0\)"),
    "which client": (lambda: client(population(np.ones(1), [1]), 1), r"client\(i=1\)"),
    "past the end": (lambda: check(by_hand([0, 2], [2, 3])), r"client 1 owns rows \[2, 5\) of 4"),
    "before the start": (lambda: check(by_hand([-1], [2])), r"client 0 owns rows \[-1, 1\)"),
    "past, measured": (lambda: owned_rows("skew", by_hand([3], [2])), r"skew\(population\): client 0"),
    "check empty": (lambda: check(by_hand([0, 2], [2, 0])), "check: client 1 has no rows"),
    "check nan": (lambda: check(by_hand([0], [1], np.array([np.nan]))), "NaN"),
    "check label": (lambda: check(population(ROWS, SIZE), num_classes=7), "label 7 at row 7"),
    "check leaf": (lambda: check(population(ROWS, SIZE), num_classes=7, label="t"), r"no leaf 't'.*\['x', 'y'\]"),
    "not a dict": (lambda: leaf_named("f(leaf='x')", np.ones(1), "x"), "not a dict"),
    "two owners": (lambda: owner(by_hand([0, 1], [2, 2])), "row 1 has more than one owner"),
    "label high": (lambda: check_labels(np.array([0, 3]), 3), r"label 3 at row 1 is outside \[0, 3\)"),
    "label low": (lambda: check_labels(np.array([0, -1]), 3), "label -1 at row 1"),
    "label of a sequence": (lambda: check_labels(np.array([[0, -2]]), 3), "label -2 at row 0.*-1 aside"),
    "label without rows": (lambda: check_labels(np.array(1), 3), r"labels must be integers \[E, ...\]"),
    "label dtype": (lambda: check_labels(np.array([0.5]), 3), "labels must be integers"),
    "classes": (lambda: check_labels(np.array([0]), 0), "count the model's logits"),
    "old key": (lambda: numpy_generator("f", jnp.zeros(2, jnp.uint32)), "new-style key"),
    "many keys": (lambda: numpy_generator("f", jax.random.split(jax.random.key(0))), "a single new-style key"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_what_is_wrong_and_the_cure(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()


def test_a_key_inside_jit_is_refused():
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda key: numpy_generator("f", key).random())(jax.random.key(0))


def test_the_package_hands_on_the_builders_and_not_their_module():
    assert data.population is population and data.by_owner is by_owner


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        data.nothing  # noqa: B018


def test_the_package_hands_on_each_reader_and_set_from_the_module_that_defines_it():
    for name, module in data._LAZY.items():
        if callable(getattr(data, name)):
            assert getattr(data, name).__module__ == f"jfed.data.{module}"
    assert len(data.HEART_FEATURES) == 32
    with pytest.raises(AttributeError):
        data.sets.heart  # noqa: B018
    with pytest.raises(AttributeError):
        data.readers.read_leaf  # noqa: B018


def test_importing_the_package_loads_no_reader_and_starts_no_backend():
    code = (
        "import sys, jfed.data, jax\n"
        "lazy = {'jfed.data.' + module for module in jfed.data._LAZY.values()}\n"
        "heavy = (lazy | {'h5py', 'matplotlib'}) & set(sys.modules)\n"
        "from jax._src import xla_bridge\n"
        "assert not heavy and not xla_bridge._backends, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", data.__all__)
def test_every_name_the_package_lists_is_there(name):
    assert getattr(data, name) is not None and name in dir(data)
