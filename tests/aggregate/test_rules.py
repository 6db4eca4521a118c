"""Each rule against its definition, written plainly in float64, and what it reduces to."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import close

from jfed import aggregate
from jfed.aggregate.coordinates import network

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics


def combined(agg, x, weights=None, state=None):
    x = jnp.asarray(x, jnp.float32)
    weights = jnp.ones(len(x)) if weights is None else jnp.asarray(weights, jnp.float32)
    state = agg.init(jnp.zeros(x.shape[1:])) if state is None else state
    return agg.update(x, state, weights=weights, key=jax.random.key(0))[0]


def messages(clients, numbers=6, seed=0):
    return np.random.default_rng(seed).normal(size=(clients, numbers))


COUNTS = pytest.mark.parametrize("clients", [1, 2, 3, 8, 25, 33])


def numpy_trimmed(x, k):
    return np.sort(x, axis=0)[k : len(x) - k].mean(0)


def numpy_krum_scores(x, f):
    scores = []
    for i in range(len(x)):
        squares = sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)) if j != i)
        scores.append(sum(squares[: max(len(x) - f - 2, 1)]))
    return np.array(scores)


def numpy_weiszfeld(x, alpha, iterations, nu):
    v = alpha @ x / alpha.sum()
    for _ in range(iterations):
        eta = alpha / np.maximum(nu, np.linalg.norm(x - v, axis=1))
        v = eta @ x / eta.sum()
    return v


def numpy_clipping(x, v, radius, iterations):
    for _ in range(iterations):
        off = x - v
        v = v + (off * np.minimum(1, radius / np.linalg.norm(off, axis=1).clip(1e-30))[:, None]).mean(0)
    return v


@COUNTS
def test_mean_is_the_weighted_mean(clients):
    weights = np.random.default_rng(1).uniform(1, 9, clients)
    close(combined(aggregate.mean(), messages(clients), weights), weights @ messages(clients) / weights.sum())


@COUNTS
def test_median_is_numpys(clients):
    close(combined(aggregate.median(), messages(clients)), np.median(messages(clients), axis=0))


@COUNTS
@pytest.mark.parametrize("trim", [0.0, 0.1, 0.25, 0.4, 0.49])
def test_trimmed_mean_is_its_definition(clients, trim):
    expected = numpy_trimmed(messages(clients), math.floor(Fraction(str(trim)) * clients))
    close(combined(aggregate.trimmed_mean(trim), messages(clients)), expected)


@pytest.mark.parametrize(("trim", "clients", "dropped"), [(0.29, 100, 29), (0.07, 100, 7), (0.2, 25, 5), (0.3, 10, 3)])
def test_a_fraction_that_floats_cannot_hold_drops_as_many_as_it_says(trim, clients, dropped):
    x = 2.0 ** np.arange(clients)[:, None]  # whoever is dropped makes a difference
    close(combined(aggregate.trimmed_mean(trim), x), numpy_trimmed(x, dropped))


def test_the_largest_trim_leaves_the_median():
    just_below_half = np.nextafter(0.5, 0)
    for clients in (1, 2, 7, 8):
        got = combined(aggregate.trimmed_mean(float(just_below_half)), messages(clients))
        close(got, combined(aggregate.median(), messages(clients)))


@pytest.mark.parametrize("n", range(1, 11))
def test_the_network_sorts_all_zeros_and_ones_so_it_sorts_everything(n):
    for bits in itertools.product((0, 1), repeat=n):
        values = list(bits)
        for low, high in itertools.chain(*network(n)):
            assert low < high
            values[low], values[high] = min(values[low], values[high]), max(values[low], values[high])
        assert values == sorted(bits)


@COUNTS
@pytest.mark.parametrize("f", [0, 7])
def test_krum_is_the_message_with_the_least_score(clients, f):
    x = messages(clients)
    np.testing.assert_array_equal(
        combined(aggregate.krum(f), x), x[np.argmin(numpy_krum_scores(x, f))].astype(np.float32)
    )


@COUNTS
@pytest.mark.parametrize(("f", "keep"), [(1, 4), (3, 2), (2, 100)])
def test_multi_krum_is_the_mean_of_the_least_scores(clients, f, keep):
    x = messages(clients)
    best = np.argsort(numpy_krum_scores(x, f), kind="stable")[:keep]
    close(combined(aggregate.multi_krum(f, keep), x), x[best].mean(0))


def test_of_two_clients_krum_takes_the_lower_id():
    x = jnp.array([[1.0, 2.0], [5.0, -3.0]])
    agg = aggregate.krum(1)
    for ids in ([3, 8], [8, 3]):
        got, _ = agg.update(x, agg.init(x[0]), weights=jnp.ones(2), ids=jnp.array(ids))
        np.testing.assert_array_equal(got, x[np.argmin(ids)])


@pytest.mark.parametrize("ladder", [[1e6] * 5, [1e30, 1e11, 1e8, 3e4, 10.0], [3e38, -3e38, 1e20, 1.0, 1.0]])
@pytest.mark.parametrize("first", [True, False])
def test_outliers_however_far_do_not_blur_which_honest_message_krum_takes(ladder, first):
    honest = 7.0 + 1e-3 * messages(20, 50)
    liars = np.asarray(ladder)[:, None] * np.ones((1, 50))
    x = np.concatenate([liars, honest] if first else [honest, liars]).astype(np.float32)
    expected = np.argmin(numpy_krum_scores(x.astype(np.float64), 5))
    np.testing.assert_array_equal(combined(aggregate.krum(5), x), x[expected])


@COUNTS
@pytest.mark.parametrize("iterations", [1, 8])
def test_geometric_median_is_smoothed_weiszfeld(clients, iterations):
    alpha = np.random.default_rng(1).uniform(1, 9, clients)
    got = combined(aggregate.geometric_median(iterations=iterations, smoothing=0.1), messages(clients), alpha)
    close(got, numpy_weiszfeld(messages(clients), alpha, iterations, 0.1))


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [1, 1, 5, 1, 1], [9, 1, 1, 1, 1]])
def test_the_geometric_median_of_collinear_points_is_their_weighted_median(weights):
    place = np.array([0.0, 1.0, 3.0, 4.0, 20.0])
    line = place[:, None] * np.array([[0.6, 0.8]]) + np.array([[1.0, -2.0]])
    reached = np.searchsorted(np.cumsum(weights), np.sum(weights) / 2)
    close(combined(aggregate.geometric_median(iterations=200), line, weights), line[reached], tolerance=1e-3)


@COUNTS
@pytest.mark.parametrize(("radius", "iterations"), [(0.5, 1), (2.0, 3)])
def test_centred_clipping_is_its_definition_over_two_rounds(clients, radius, iterations):
    agg = aggregate.centred_clipping(radius, iterations=iterations)
    state, v = agg.init(jnp.zeros(6)), np.zeros(6)
    for seed in range(2):
        x = messages(clients, seed=seed)
        got, state = agg.update(jnp.asarray(x, jnp.float32), state, weights=jnp.ones(clients))
        v = numpy_clipping(x, v, radius, iterations)
        close(got, v)
        close(state.centre, v)


def test_centred_clipping_moves_by_its_radius_at_most():
    x = np.full((4, 6), 1e6)
    assert np.linalg.norm(combined(aggregate.centred_clipping(0.5), x)) == pytest.approx(0.5, rel=1e-5)


def test_centred_clipping_with_a_huge_radius_is_the_mean_whatever_came_before():
    state = aggregate.ClippingState(jnp.full(6, 100.0))
    close(combined(aggregate.centred_clipping(1e6), messages(9), state=state), messages(9).mean(0), tolerance=1e-4)


def test_centred_clipping_keeps_its_centre_in_single_precision():
    agg = aggregate.centred_clipping(1.0)
    stack = jnp.asarray(messages(9), jnp.bfloat16)
    got, state = agg.update(stack, agg.init(stack[0]), weights=jnp.ones(9))
    assert got.dtype == jnp.bfloat16 and state.centre.dtype == jnp.float32


MEANS = {
    "trimmed by nothing": aggregate.trimmed_mean(0.0),
    "multi-krum that keeps all": aggregate.multi_krum(0, keep=9),
    "multi-krum that keeps more than all": aggregate.multi_krum(0, keep=50),
    "bucketing of the mean, all alike": aggregate.bucketing(aggregate.mean(), size=3),
    "one large bucket": aggregate.bucketing(aggregate.median(), size=9),
    "clipping beyond all distances": aggregate.centred_clipping(1e9),
    "a geometric median too smooth": aggregate.geometric_median(smoothing=1e6),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_rule_that_drops_nobody_is_the_mean(name):
    close(combined(MEANS[name], messages(9)), combined(aggregate.mean(), messages(9)))


def test_multi_krum_that_keeps_one_is_krum():
    close(combined(aggregate.multi_krum(2, keep=1), messages(9)), combined(aggregate.krum(2), messages(9)))


ROBUST = {
    "median": aggregate.median(),
    "trimmed mean": aggregate.trimmed_mean(0.25),
    "krum": aggregate.krum(2),
    "multi-krum": aggregate.multi_krum(2, keep=10),
    "geometric median": aggregate.geometric_median(iterations=100),
    "centred clipping": aggregate.centred_clipping(1.0),
    # Two of six buckets are spoilt at most.
    "bucketed median": aggregate.bucketing(aggregate.median(), size=2),
    "bucketed krum": aggregate.bucketing(aggregate.krum(2), size=2),
    "bucketed geometric median": aggregate.bucketing(aggregate.geometric_median(iterations=100), size=2),
}


def with_liars(size):
    """Ten honest messages of norm 1, and two liars."""
    honest = messages(10)
    honest /= np.linalg.norm(honest, axis=1, keepdims=True)
    return np.concatenate([np.full((2, 6), size), honest])


@pytest.mark.parametrize("size", [1e6, -1e6, 1e37])
@pytest.mark.parametrize("name", ROBUST)
def test_liars_cannot_drive_a_robust_rule_away(name, size):
    assert np.linalg.norm(combined(ROBUST[name], with_liars(size))) < 1.5


@pytest.mark.parametrize("name", ["median", "trimmed mean"])
def test_each_coordinate_of_a_coordinate_wise_rule_lies_between_honest_ones(name):
    x = with_liars(1e6)
    got = np.asarray(combined(ROBUST[name], x))
    assert np.all(got >= x[2:].min(0) - 1e-6) and np.all(got <= x[2:].max(0) + 1e-6)


def test_liars_drive_the_mean_away():
    assert np.linalg.norm(combined(aggregate.mean(), with_liars(1e6))) > 1e5


BAD = {
    "trim of a half": (lambda: aggregate.trimmed_mean(0.5), r"trimmed_mean\(trim=0.5\).*median"),
    "trim below 0": (lambda: aggregate.trimmed_mean(-0.1), r"trim must lie in \[0"),
    "liars below 0": (lambda: aggregate.krum(-1), r"krum\(byzantine=-1\).*at least 0"),
    "half a liar": (lambda: aggregate.multi_krum(0.5, keep=3), r"multi_krum\(byzantine=0.5\).*whole number"),
    "keep nobody": (lambda: aggregate.multi_krum(1, keep=0), r"multi_krum\(keep=0\)"),
    "no iteration": (lambda: aggregate.geometric_median(iterations=0), r"geometric_median\(iterations=0\)"),
    "no smoothing": (lambda: aggregate.geometric_median(smoothing=0.0), r"smoothing must be a finite number above 0"),
    "no radius": (lambda: aggregate.centred_clipping(0.0), r"centred_clipping\(radius=0.0\)"),
    "no movement": (lambda: aggregate.centred_clipping(1.0, iterations=0), r"centred_clipping\(iterations=0\)"),
    "empty buckets": (lambda: aggregate.bucketing(aggregate.mean(), size=0), r"bucketing\(size=0\)"),
    "infinite flip": (lambda: aggregate.sign_flip(math.inf), r"sign_flip\(scale=inf\)"),
    "no number": (lambda: aggregate.ipm(math.nan), r"ipm\(epsilon=nan\)"),
    "z is no number": (lambda: aggregate.alie(math.nan), r"alie\(z=nan\).*alie_z"),
    "a majority of liars": (lambda: aggregate.alie_z(10, 5), r"alie_z\(clients=10, byzantine=5\).*below half"),
    "no attacker": (lambda: aggregate.alie_z(10, 0), r"alie_z\(byzantine=0\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_what_is_wrong_and_the_cure(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()
