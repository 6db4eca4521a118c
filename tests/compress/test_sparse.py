"""Which numbers are kept, where they are said to lie, and that senders of a round agree."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import compress

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics


def sent(link, x, round=0):
    return link.update(x, link.init(x), round=round)[0]


def both(link, x, round=0):
    """Message and what it decodes to, of an array or, along the first axis, of many."""

    def one(x):
        message = sent(link, x, round)
        return message, compress.decode(message)

    x = jnp.asarray(x, jnp.float32)
    return jax.jit(one if x.ndim == 1 else jax.vmap(one))(x)


def numpy_top_k(x, k):
    """Places of the k largest magnitudes, of equal ones those that come first, in their order."""
    return np.sort(np.argsort(-np.abs(x), axis=-1, kind="stable")[..., :k], axis=-1)


def with_ties(count, d, seed=0):
    """Arrays of small whole numbers, from all alike to mostly zeros."""
    rng = np.random.default_rng(seed)
    few = rng.integers(-3, 4, size=(count // 2, d))
    return np.concatenate([few, few * (rng.random(few.shape) < 0.1)]).astype(np.float32)


@pytest.mark.parametrize("d", [1, 32, 33, 1000])
@pytest.mark.parametrize("fraction", [0.004, 0.3, 1.0])
def test_top_k_keeps_what_a_stable_sort_puts_first(d, fraction):
    k = max(1, math.ceil(fraction * d))
    x = with_ties(64, d)
    message, decoded = both(compress.top_k(fraction), x)
    places = numpy_top_k(x, k)
    np.testing.assert_array_equal(message.payload["values"], np.take_along_axis(x, places, 1))
    expected = np.zeros_like(x)
    np.put_along_axis(expected, places, np.take_along_axis(x, places, 1), 1)
    np.testing.assert_array_equal(decoded, expected)


def many(kind, d=70_001):
    """Numbers of which a sample says much, or nothing."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=d)
    few_first = np.where(np.arange(d) < d // 100, 1e3, 1) * x
    made = {
        "normal": x,
        "in order": np.sort(x),
        "largest in front": few_first,
        "few kinds": np.round(x),
        "mostly zeros": np.where(rng.random(d) < 0.02, x, 0),
        "all equal": np.full(d, 0.7),
        "some NaN": np.where(rng.random(d) < 0.001, np.nan, x),
    }
    return made[kind].astype(np.float32)


KINDS = ["normal", "in order", "largest in front", "few kinds", "mostly zeros", "all equal", "some NaN"]


@pytest.mark.parametrize("fraction", [1e-5, 0.01, 0.5])
def test_of_many_numbers_the_same_are_kept_whatever_a_sample_says(fraction):
    x = np.stack([many(kind) for kind in KINDS])
    k = max(1, math.ceil(fraction * x.shape[1]))
    message, decoded = both(compress.top_k(fraction), x)
    places = numpy_top_k(np.nan_to_num(x, nan=np.inf), k)
    np.testing.assert_array_equal(message.payload["values"], np.take_along_axis(x, places, 1))
    expected = np.zeros_like(x)
    np.put_along_axis(expected, places, np.take_along_axis(x, places, 1), 1)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(("fraction", "d", "nbytes"), [(0.2, 1000, 125), (0.01, 1000, 15), (0.01, 10**6, 25000)])
def test_positions_are_a_bitmap_or_indices_whichever_is_smaller(fraction, d, nbytes):
    """A bit for each of d, or for each of k a number up to d: 10 bits of 1000, 20 of a million."""
    message = jax.eval_shape(lambda x: sent(compress.top_k(fraction), x), jnp.zeros(d))
    assert message.rest["positions"].shape == (nbytes,)
    assert message.payload["values"].shape == (math.ceil(fraction * d),)


def test_magnitudes_that_differ_in_their_last_bit_are_told_apart():
    one = np.float32(1.0)
    x = np.array([one, np.nextafter(one, np.float32(2)), one, np.nextafter(one, np.float32(0))])
    assert both(compress.top_k(0.25), x)[1].tolist() == [0, x[1], 0, 0]


def test_a_nan_comes_before_an_infinity_and_that_before_all_else():
    x = np.array([1.0, -np.inf, 3e38, np.nan, 2.0])
    assert np.isnan(both(compress.top_k(0.2), x)[1][3])
    np.testing.assert_array_equal(both(compress.top_k(0.4), x)[1], [0, -np.inf, 0, np.nan, 0])


def test_each_block_keeps_its_own_largest():
    """1003 numbers in blocks of 50, the last of them cut short."""
    x = np.random.default_rng(0).normal(size=1003) * np.linspace(1, 50, 1003)
    expected = np.zeros(1003)
    for first in range(0, 1003, 50):
        block = x[first : first + 50]
        places = first + numpy_top_k(block, min(5, len(block)))
        expected[places] = x[places]
    np.testing.assert_array_equal(both(compress.top_k(0.1, block=50), x)[1], expected.astype(np.float32))


@pytest.mark.parametrize("fraction", [0.2, 0.01])
def test_a_threshold_leaves_room_unused(fraction):
    """Of a bitmap and of indices."""
    x = np.zeros(1000)
    x[[3, 500, 999]] = [2.0, -5.0, 1.5]
    x[[4, 600]] = [1.0, -0.9]
    message, decoded = both(compress.threshold(1.0, capacity=fraction), x)
    np.testing.assert_array_equal(decoded, np.where(np.abs(x) > 1, x, 0))
    assert np.count_nonzero(message.payload["values"]) == 3


@pytest.mark.parametrize("fraction", [0.2, 0.01])
def test_a_threshold_that_too_many_exceed_keeps_the_largest(fraction):
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    _, decoded = both(compress.threshold(1e-3, capacity=fraction), x)
    _, largest = both(compress.top_k(fraction), x)
    np.testing.assert_array_equal(decoded, largest)


def test_a_pruned_model_is_sent_exactly():
    x = np.random.default_rng(0).normal(size=1000) * (np.random.default_rng(1).random(1000) < 0.09)
    x = x.astype(np.float32)
    assert 0 < np.count_nonzero(x) <= 100
    np.testing.assert_array_equal(both(compress.threshold(0.0, capacity=0.1), x)[1], x)


D, KEPT = 40, 12  # of the random coordinates


def coordinates(rounds, x=None):
    """Which numbers are sent in each of these rounds, [rounds, D]."""
    x = jnp.ones(D) if x is None else x
    link = compress.random_k(KEPT / D, scale="none")
    return np.asarray(jax.jit(jax.vmap(lambda t: compress.decode(sent(link, x, t))))(jnp.asarray(rounds))) != 0


def test_senders_of_a_round_send_the_same_coordinates_and_others_in_the_next():
    one = coordinates(range(10))
    other = coordinates(range(10), jnp.arange(1.0, D + 1))
    np.testing.assert_array_equal(one, other)
    assert np.all(one.sum(1) == KEPT)
    assert len(np.unique(one, axis=0)) == 10


def test_coordinates_are_drawn_alike_and_in_pairs():
    """Each with probability k / d, and two with k (k - 1) / (d (d - 1))."""
    rounds = 20000
    chosen = coordinates(np.arange(rounds)).astype(np.float64)
    together = chosen.T @ chosen / rounds
    p, pair = KEPT / D, KEPT * (KEPT - 1) / (D * (D - 1))
    expected = np.where(np.eye(D, dtype=bool), p, pair)
    assert np.all(np.abs(together - expected) <= 5 * np.sqrt(expected * (1 - expected) / rounds))


def test_leaves_of_a_tree_and_seeds_have_coordinates_of_their_own():
    tree = {"a": jnp.ones(D), "b": jnp.ones(D)}
    got = compress.decode(sent(compress.random_k(KEPT / D), tree))
    again = compress.decode(sent(compress.random_k(KEPT / D, seed=1), tree))
    assert np.any(got["a"] != got["b"]) and np.any(got["a"] != again["a"])


def test_ternary_is_the_mean_of_what_was_kept_with_its_signs():
    x = np.array([1.0, -8.0, 0.5, 4.0, -6.0, 2.0, 0.0, 3.0])
    np.testing.assert_array_equal(both(compress.ternary(3 / 8), x)[1], [0, -6, 0, 6, -6, 0, 0, 0])


LARGE = 500_000


def energy(link, x):
    message, decoded = both(link, x)
    return float(np.sum(np.square(decoded, dtype=np.float64))), message


@pytest.mark.parametrize("tail", ["normal", "lognormal"])
def test_a_sample_finds_nearly_the_largest(tail):
    """Of a hundredth of 500,000 numbers, kept of the exact ones' |x|^2: 90 % at least.

    The threshold is that of every 15th number, of which 333 exceed it, give or take 18: 5.5 %.
    """
    x = getattr(np.random.default_rng(0), tail)(size=LARGE).astype(np.float32)
    exact, _ = energy(compress.top_k(0.01), x)
    near, message = energy(compress.top_k(0.01, method="sampled"), x)
    assert 0.9 * exact <= near <= exact * (1 + 1e-6)
    assert message.payload["values"].shape == (LARGE // 100,)


def test_a_sample_looks_at_every_column():
    """Columns of a kernel that are dead, or large, are as many of the sample as of all."""
    x = np.random.default_rng(2).normal(size=(8192, 128)).astype(np.float32)
    for scale in (0.0, 10.0):
        y = x.copy()
        y[:, [0, 64]] *= scale
        _, decoded = both(compress.top_k(0.01, method="sampled"), y.reshape(-1))
        exact = np.sort(np.abs(y).reshape(-1))[-math.ceil(0.01 * y.size) :]
        assert (np.asarray(decoded, np.float64) ** 2).sum() > 0.9 * (exact.astype(np.float64) ** 2).sum()


def test_a_sample_of_mostly_zeros_does_not_lose_what_is_there():
    x = np.zeros(LARGE, np.float32)
    x[LARGE // 2 :: 1000] = 1.0
    assert energy(compress.top_k(0.01, method="sampled"), x)[0] == np.count_nonzero(x)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_are_whole_numbers_of_any_size(seed):
    x = jnp.arange(1.0, 41.0)
    for link in (compress.random_k(0.5, seed=seed), compress.rotate(seed=seed), compress.count_sketch(1, 8, seed=seed)):
        assert np.isfinite(compress.decode(sent(link, x))).all()
    with pytest.raises(TypeError):
        compress.random_k(0.5, seed=0.5)


def test_few_numbers_are_ranked_exactly_though_sampling_is_asked_for():
    x = np.random.default_rng(0).normal(size=1000)
    exact, sampled = (both(compress.top_k(0.1, method=method), x)[1] for method in ("exact", "sampled"))
    np.testing.assert_array_equal(exact, sampled)


def test_blocks_too_short_to_sample_are_ranked_exactly():
    """A quarter of a block of 1024 numbers would hold 3 of its 11 largest, give or take as many."""
    x = np.random.default_rng(0).normal(size=2**17)
    exact, sampled = (both(compress.top_k(0.01, block=1024, method=m), x)[1] for m in ("exact", "sampled"))
    np.testing.assert_array_equal(exact, sampled)


def test_places_in_half_precision_keep_their_values():
    x = jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.bfloat16)
    link = compress.top_k(0.1)
    assert jax.eval_shape(lambda x: sent(link, x), x).payload["values"].dtype == jnp.bfloat16
    got = np.asarray(jax.jit(lambda x: compress.decode(sent(link, x)))(x), np.float32)
    assert np.array_equal(got[got != 0], np.asarray(x, np.float32)[got != 0]) and np.count_nonzero(got) == 10


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: compress.top_k(0.0), "fraction"),
        (lambda: compress.top_k(1.5), "fraction"),
        (lambda: compress.top_k(0.1, method="fast"), "'exact' or 'sampled'"),
        (lambda: compress.top_k(0.1, block=0), "block"),
        (lambda: compress.threshold(-1.0, capacity=0.1), "least"),
        (lambda: compress.threshold(1.0, capacity=0.0), "capacity"),
        (lambda: compress.random_k(0.1, scale="mean"), "'unbiased' or 'none'"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_values_go_through_the_rest_of_the_chain():
    x = np.random.default_rng(0).normal(size=1000)
    chain = optax.chain(compress.top_k(0.05), compress.scaled_sign())
    np.testing.assert_array_equal(both(chain, x)[1], both(compress.ternary(0.05), x)[1])
