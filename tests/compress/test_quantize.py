"""Codes on a grid: where the grid lies, how often a level is taken, and the levels that are best for normal numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import compress

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

WIDTHS = pytest.mark.parametrize("bits", range(1, 9))
DRAWS = 20000
KEYS = jax.random.split(jax.random.key(0), DRAWS)


def sent(link, x, key=KEYS[0]):
    x = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x)
    return link.update(x, link.init(x), key=key)[0]


def claims_contraction(link, d):
    message = jax.eval_shape(lambda x: sent(link, x), jnp.ones(d))
    return all(node.decoder.contraction for node in compress.nodes(message))


def decoded(link, x, key=KEYS[0]):
    return np.asarray(jax.jit(lambda x, key: compress.decode(sent(link, x, key)))(jnp.asarray(x, jnp.float32), key))


def drawn(link, x):
    """What x decodes to, [DRAWS, d]."""
    x = jnp.asarray(x, jnp.float32)
    return np.asarray(jax.jit(jax.vmap(lambda key: compress.decode(sent(link, x, key))))(KEYS), np.float64)


def many_arrays():
    """Arrays [8, 200] that lie around 0, on one side of it, and far from it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 200))
    spread = np.array([1.0, 1.0, 1e-3, 1e3, 1.0, 1.0, 1.0, 1.0])[:, None]
    shift = np.array([0.0, 0.5, 0.0, 0.0, 10.0, -10.0, 3.0, -1.0])[:, None]
    x = np.asarray(x * spread + shift, np.float32)
    x[:, 17] = 0.0
    return x


@WIDTHS
def test_the_least_and_largest_number_are_levels(bits):
    x = np.random.default_rng(bits).normal(size=100).astype(np.float32)
    got = drawn(compress.quantize(bits), x)[:100]
    assert np.all(got[:, x.argmin()] == x.min())
    np.testing.assert_allclose(got[:, x.argmax()], x.max(), rtol=1e-6)
    assert got.min() == x.min()


@WIDTHS
def test_a_number_goes_to_one_of_the_two_levels_around_it(bits):
    x = np.random.default_rng(bits).normal(size=100).astype(np.float32)
    step = (float(x.max()) - float(x.min())) / (2**bits - 1)
    off = drawn(compress.quantize(bits), x)[:100] - x
    assert np.abs(off).max() < step * (1 + 1e-5)


@WIDTHS
def test_the_nearest_level_keeps_zero_and_moves_no_number_by_more_than_itself_or_half_a_step(bits):
    x = many_arrays()
    link = compress.quantize(bits, rounding="nearest", per="row")
    got = decoded(link, x)
    assert not got[:, 17].any()
    moved = np.abs(got.astype(np.float64) - x)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = (high.astype(np.float64) - low) / (2**bits - 1)
    assert np.all(moved <= np.abs(x) * (1 + 1e-6))
    assert np.all(moved <= step * (1 / 2 + 1e-5))


def test_zero_stays_zero_where_the_compiler_joins_products_and_sums():
    """The tests compile without optimization, which would hide what a fused multiply-add leaves of k step - k step."""
    x = jnp.asarray(many_arrays())
    for bits in range(2, 9):
        link = compress.quantize(bits, rounding="nearest", per="row")
        usual = jax.jit(
            lambda x, link=link: compress.decode(sent(link, x)), compiler_options={"xla_backend_optimization_level": 3}
        )
        assert not np.any(usual(x)[:, 17]), bits


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_numbers_all_equal_come_back_as_they_are(rounding):
    same = np.full(50, -0.3)
    np.testing.assert_allclose(decoded(compress.quantize(5, rounding=rounding), same), same, rtol=1e-6)


def test_one_bit_to_the_nearest_is_no_contraction():
    """Of -1 and 1 the grid that holds 0 reaches one only, or none."""
    x = np.array([-1.0, 1.0])
    link = compress.quantize(1, rounding="nearest")
    assert not claims_contraction(link, 2)
    assert np.sum((decoded(link, x) - x) ** 2) >= 1.0


@pytest.mark.parametrize("levels", [1, 3, 7, 100])
def test_qsgd_takes_each_level_as_often_as_the_paper_says(levels):
    """The upper level with probability s |x| / |x|_2 - l (Alistarh et al. 2017, section 3.1)."""
    x = np.random.default_rng(levels).normal(size=30)
    place = levels * np.abs(x) / np.linalg.norm(x)
    lower = np.floor(place)
    got = drawn(compress.qsgd(levels), x) / np.linalg.norm(x) * levels * np.sign(x)
    np.testing.assert_allclose(got, np.round(got), atol=1e-4)
    upper = np.round(got) == lower + 1
    assert np.all(upper | (np.round(got) == lower))
    p = place - lower
    error = np.sqrt(p * (1 - p) / DRAWS)
    assert np.all(np.abs(upper.mean(0) - p) <= 5 * error + 1e-4)


def test_qsgd_by_the_largest_number_keeps_it():
    x = np.array([0.1, -4.0, 1.0])
    assert np.all(drawn(compress.qsgd(1, norm="max"), x)[:, 1] == -4.0)


def test_numbers_keys_and_leaves_are_rounded_apart_from_each_other():
    """The errors of 20 numbers of 2 leaves have no correlations over draws, nor with those of the next key."""
    x = np.random.default_rng(3).normal(size=20).astype(np.float32)
    tree = {"a": x, "b": x}
    link = compress.quantize(2)
    got = jax.jit(jax.vmap(lambda key: compress.decode(sent(link, tree, key))))(KEYS)
    off = np.concatenate([np.asarray(got[leaf], np.float64) - x for leaf in "ab"], axis=1)
    off = np.concatenate([off[:-1], off[1:]], axis=1)
    off = off[:, off.std(0) > 0]  # the least and the largest are levels themselves
    correlation = np.corrcoef(off.T) - np.eye(off.shape[1])
    assert np.abs(correlation).max() <= 5 / math.sqrt(DRAWS)


def test_terngrad_has_the_variance_of_a_coin():
    """Each number is max|x| with probability |x| / max|x|, so E|C(x) - x|^2 = max|x| |x|_1 - |x|^2."""
    x = np.random.default_rng(1).normal(size=60)
    largest = np.abs(x).max()
    loss = np.sum((drawn(compress.terngrad(), x) - x) ** 2, axis=1)
    expected = largest * np.abs(x).sum() - x @ x
    assert abs(loss.mean() - expected) <= 5 * loss.std() / math.sqrt(DRAWS)
    assert abs(loss.mean() - 1.03 * expected) > 5 * loss.std() / math.sqrt(DRAWS)


def test_clipped_terngrad_is_the_mean_of_what_was_cut_off():
    x = np.random.default_rng(2).standard_t(2, size=100)
    bound = 2.5 * x.std()
    assert np.abs(x).max() > bound
    got = drawn(compress.terngrad(clip=2.5), x)
    off = got.mean(0) - np.clip(x, -bound, bound)
    assert np.all(np.abs(off) <= 5 * got.std(0) / math.sqrt(DRAWS) + 1e-4)
    np.testing.assert_allclose(np.unique(np.abs(got)), [0, bound], rtol=1e-5)


@pytest.mark.parametrize("d", [2, 8, 9])
def test_clipped_terngrad_claims_no_contraction(d):
    assert not claims_contraction(compress.terngrad(clip=2.5), d)


# Max, Quantizing for minimum distortion, 1960, table I: levels above 0, and the mean squared error.
PUBLISHED = {
    1: ([0.7979], 0.3634),
    2: ([0.4528, 1.5104], 0.1175),
    3: ([0.2451, 0.7560, 1.3439, 2.1520], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326], 0.009497),
}


def used_levels(bits):
    """Levels of unit normal numbers, from what 2^16 of them decode to; the scale is taken off."""
    x = np.random.default_rng(0).normal(size=2**16)
    message = jax.jit(functools.partial(sent, compress.lloyd_max(bits)))(x)
    return x, np.asarray(compress.decode(message), np.float64), float(message.rest["scale"][0])


@pytest.mark.parametrize("bits", PUBLISHED)
def test_lloyd_max_has_the_published_levels(bits):
    _, got, scale = used_levels(bits)
    levels = np.array(PUBLISHED[bits][0])
    np.testing.assert_allclose(np.unique(got) / scale, np.concatenate([-levels[::-1], levels]), atol=6e-5)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_lloyd_max_of_normal_numbers_loses_what_its_distortion_says(bits):
    """With distortion D the best scale would lose D, and the unbiased one loses D / (1 - D)."""
    x, got, _ = used_levels(bits)
    distortion = PUBLISHED[bits][1]
    np.testing.assert_allclose((got - x) @ (got - x) / (x @ x), distortion / (1 - distortion), rtol=0.02)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_lloyd_max_keeps_the_inner_product(bits):
    """Its scale is the one with <C(x), x> = |x|^2, whatever x is."""
    x = np.random.default_rng(3).lognormal(size=300)
    np.testing.assert_allclose(decoded(compress.lloyd_max(bits), x) @ x, x @ x, rtol=1e-5)


DETERMINISTIC = {
    "quantize, 3 bits": lambda per: compress.quantize(3, rounding="nearest", per=per),
    "quantize, 4 bits": lambda per: compress.quantize(4, rounding="nearest", per=per),
    "lloyd_max": lambda per: compress.lloyd_max(2, per=per),
    "scaled_sign": lambda per: compress.scaled_sign(per=per),
    "float8": lambda per: compress.low_precision("float8_e4m3fn", per=per),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_block_is_compressed_as_it_would_be_alone(name):
    """1003 numbers in blocks of 16: 7 groups of 8 blocks, 6 blocks more, and 11 numbers of another."""
    make, x = DETERMINISTIC[name], np.random.default_rng(5).normal(size=1003) * np.linspace(1, 50, 1003)
    whole = decoded(make(16), x)
    alone = jax.jit(jax.vmap(lambda x: compress.decode(sent(make(None), x))))(jnp.asarray(x[:992].reshape(62, 16)))
    np.testing.assert_allclose(whole[:992], np.asarray(alone).reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(whole[992:], decoded(make(None), x[992:]), rtol=1e-6)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_row_is_a_block_of_the_last_axis(name):
    x = np.random.default_rng(6).normal(size=(3, 4, 7))
    np.testing.assert_array_equal(decoded(DETERMINISTIC[name]("row"), x), decoded(DETERMINISTIC[name](7), x))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_block_longer_than_the_array_is_the_array(name):
    x = np.random.default_rng(7).normal(size=50)
    np.testing.assert_array_equal(decoded(DETERMINISTIC[name](64), x), decoded(DETERMINISTIC[name](None), x))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_nan_spoils_its_own_block_and_no_other(name):
    x = np.random.default_rng(8).normal(size=200)
    x[20] = np.nan
    bad = ~np.isfinite(decoded(DETERMINISTIC[name](16), x))
    assert bad[16:32].all() and bad.sum() == 16


STOCHASTIC = {"quantize": compress.quantize(3, per=16), "qsgd": compress.qsgd(3, per=16)}
STOCHASTIC["terngrad"] = compress.terngrad(per=16)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
def test_a_block_that_holds_what_is_not_finite_decodes_to_nothing_finite(name, wild):
    x = np.random.default_rng(8).normal(size=48)
    x[20] = wild
    bad = ~np.isfinite(drawn(STOCHASTIC[name], x)[:100])
    assert np.all(bad == ((np.arange(48) >= 16) & (np.arange(48) < 32)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: compress.quantize(0), "bits"),
        (lambda: compress.quantize(9), "at most 8"),
        (lambda: compress.quantize(4, rounding="up"), "'stochastic' or 'nearest'"),
        (lambda: compress.quantize(4, per=0), "per"),
        (lambda: compress.quantize(4, per="column"), "per"),
        (lambda: compress.qsgd(0), "levels"),
        (lambda: compress.qsgd(128), "at most 127"),
        (lambda: compress.qsgd(4, norm="l1"), "'l2' or 'max'"),
        (lambda: compress.terngrad(clip=0.0), "clip"),
        (lambda: compress.lloyd_max(9), "at most 8"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_what_was_kept_is_quantized_and_its_places_are_left_alone():
    x = np.random.default_rng(9).normal(size=1000)
    plain = decoded(compress.top_k(0.05), x)
    both = decoded(optax.chain(compress.top_k(0.05), compress.quantize(8, rounding="nearest")), x)
    np.testing.assert_array_equal(both != 0, plain != 0)
    np.testing.assert_allclose(both, plain, atol=(plain.max() - plain.min()) / 255)


@pytest.mark.parametrize("x", [3.0, [2.0, 2.0, 2.0], [-1.0]])
def test_clipping_leaves_what_has_no_deviation(x):
    link, x = compress.terngrad(clip=2.5), jnp.asarray(x)
    message, _ = link.update(x, link.init(x), key=jax.random.key(0))
    np.testing.assert_array_equal(compress.decode(message), x)
