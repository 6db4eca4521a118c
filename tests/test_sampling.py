import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import POPULATION, SIZES
from scipy import stats

from jfed import sampling
from jfed.core import Population


def steps(size):
    return 2 * size


SAMPLERS = {
    "uniform": sampling.uniform(5, steps=steps),
    "with_replacement": sampling.with_replacement(5, steps=steps),
    "by_size": sampling.by_size(5, steps=steps),
    "poisson": sampling.poisson(0.3, capacity=9, steps=steps),
    "full": sampling.full(steps=steps),
    "schedule": sampling.schedule(np.array([[0, 1], [2, -1]]), steps=steps),
}
KEYS = jax.random.split(jax.random.key(5), 4000)
samplers = pytest.mark.parametrize("name", SAMPLERS)


def draw(sampler, keys=KEYS, t=0):
    return jax.jit(jax.vmap(lambda k: sampler(POPULATION, k, jnp.int32(t))._replace(examples=())))(keys)


def often(cohorts):
    """How often each client was drawn."""
    ids = np.asarray(cohorts.ids).ravel()
    return np.bincount(ids[ids < 12], minlength=12)


@samplers
def test_a_sampler_is_a_function_of_its_key(name):
    a, b = draw(SAMPLERS[name], KEYS[:2]), draw(SAMPLERS[name], KEYS[:2])
    np.testing.assert_array_equal(a.ids, b.ids)


@pytest.mark.parametrize("name", ["uniform", "with_replacement", "by_size", "poisson"])
def test_another_key_draws_other_clients(name):
    ids = np.asarray(draw(SAMPLERS[name], KEYS[:50]).ids)
    assert len({tuple(row) for row in ids}) > 40


@samplers
def test_clients_bring_their_own_rows_and_steps(name):
    cohorts = draw(SAMPLERS[name], KEYS[:50], t=1)
    ids = np.asarray(cohorts.ids)
    real = ids < 12
    np.testing.assert_array_equal(np.asarray(cohorts.size)[real], SIZES[ids[real]])
    np.testing.assert_array_equal(np.asarray(cohorts.steps)[real], 2 * SIZES[ids[real]])
    assert np.all(np.asarray(cohorts.steps)[~real] == 0) and np.all(np.asarray(cohorts.weight)[~real] == 0)


@pytest.mark.parametrize("name", ["uniform", "with_replacement", "poisson", "full"])
def test_weights_are_numbers_of_examples(name):
    cohorts = draw(SAMPLERS[name], KEYS[:50])
    np.testing.assert_array_equal(cohorts.weight, cohorts.size)


def test_uniform_draws_different_clients_all_equally_often():
    cohorts = draw(SAMPLERS["uniform"])
    assert all(len(set(row)) == 5 for row in np.asarray(cohorts.ids)[:500].tolist())
    # Draws without replacement are negatively correlated: their chi-square is below its nominal law.
    assert stats.chisquare(often(cohorts)).pvalue > 1e-3


@pytest.mark.parametrize("n", [8, 11])
def test_the_draw_for_many_clients_makes_every_ordered_choice_equally_likely(n, monkeypatch):
    """With so few clients the first draws are often too few different ones, so both ways are taken."""
    monkeypatch.setattr(sampling, "_MANY", 1)
    pairs = np.asarray(jax.jit(jax.vmap(lambda key: sampling._distinct(key, n, 2)))(KEYS))
    assert np.all(pairs[:, 0] != pairs[:, 1]) and pairs.min() == 0 and pairs.max() == n - 1
    counts = np.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).reshape(n, n)
    assert stats.chisquare(counts[~np.eye(n, dtype=bool)]).pvalue > 1e-3


def test_many_clients_are_drawn_with_64_bits_too():
    jax.config.update("jax_enable_x64", True)
    try:
        ids = jax.jit(lambda key: sampling._distinct(key, 5000, 10))(jax.random.key(0))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert ids.dtype == jnp.int32 and len(set(ids.tolist())) == 10


def test_a_cohort_of_a_million_clients_is_drawn_without_sorting_them():
    population = POPULATION._replace(start=jnp.zeros(10**6, jnp.int32), size=jnp.ones(10**6, jnp.int32))
    sample = jax.jit(sampling.uniform(100, steps=steps))
    ids = np.asarray(sample(population, KEYS[0], jnp.int32(0)).ids)
    assert len(set(ids.tolist())) == 100 and ids.min() >= 0 and ids.max() < 10**6
    assert stats.kstest(ids / 10**6, "uniform").pvalue > 1e-3


def test_with_replacement_draws_independently():
    cohorts = draw(SAMPLERS["with_replacement"])
    assert stats.chisquare(often(cohorts)).pvalue > 1e-3
    distinct = np.mean([len(set(row)) for row in np.asarray(cohorts.ids).tolist()])
    assert abs(distinct - 12 * (1 - (11 / 12) ** 5)) < 0.05  # the mean number of distinct values of 5 draws


def test_by_size_draws_in_proportion_to_examples_and_weighs_equally():
    cohorts = draw(SAMPLERS["by_size"])
    counts = often(cohorts)
    assert stats.chisquare(counts, SIZES / SIZES.sum() * counts.sum()).pvalue > 1e-3
    assert stats.chisquare(counts).pvalue < 1e-6  # and not uniformly
    assert np.all(np.asarray(cohorts.weight) == 1)


def test_by_size_weighs_nan_where_rows_are_more_than_int32_counts():
    size = jnp.full(3, 2**30, jnp.int32)
    cohort = sampling.by_size(2, steps=lambda n: n)(Population((), jnp.zeros_like(size), size), jax.random.key(0), 0)
    assert np.all(np.isnan(cohort.weight))


def test_poisson_takes_each_client_independently_at_its_rate():
    cohorts = draw(SAMPLERS["poisson"])
    sizes = (np.asarray(cohorts.ids) < 12).sum(1)
    expected = stats.binom(12, 0.3).pmf(np.arange(10)) * len(sizes)
    expected[-1] += stats.binom(12, 0.3).sf(9) * len(sizes)  # more than the capacity end at the capacity
    assert (
        stats.chisquare(
            np.bincount(sizes, minlength=10)[:9], expected[:9] / expected[:9].sum() * (sizes < 9).sum()
        ).pvalue
        > 1e-3
    )
    assert stats.chisquare(often(cohorts)).pvalue > 1e-3
    assert all(len(set(row[row < 12])) == (row < 12).sum() for row in np.asarray(cohorts.ids)[:200])


def test_poisson_past_its_capacity_favours_nobody():
    cohorts = draw(sampling.poisson(1.0, capacity=4, steps=steps))
    assert np.all(np.asarray(cohorts.ids) < 12)
    assert stats.chisquare(often(cohorts)).pvalue > 1e-3


def test_full_takes_everyone_once():
    np.testing.assert_array_equal(draw(SAMPLERS["full"], KEYS[:1]).ids[0], np.arange(12))


def test_a_schedule_is_followed_row_by_row_and_starts_over():
    rows = [draw(SAMPLERS["schedule"], KEYS[:1], t=t).ids[0].tolist() for t in range(3)]
    assert rows == [[0, 1], [2, 12], [0, 1]]


@samplers
def test_equal_weights_change_nothing_but_weights(name):
    plain, equal = draw(SAMPLERS[name], KEYS[:20]), draw(sampling.equally_weighted(SAMPLERS[name]), KEYS[:20])
    np.testing.assert_array_equal(equal.weight, np.asarray(plain.size) > 0)
    jax.tree.map(np.testing.assert_array_equal, equal._replace(weight=()), plain._replace(weight=()))


def test_equal_weights_leave_a_weight_that_is_no_number_for_the_round_to_count():
    def nan(population, key, t):
        return SAMPLERS["full"](population, key, t)._replace(weight=jnp.full(12, jnp.nan))

    assert np.all(np.isnan(draw(sampling.equally_weighted(nan), KEYS[:1]).weight))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampling.uniform(0, steps=steps), r"uniform\(cohort_size=0\)"),
        (lambda: sampling.with_replacement(0, steps=steps), r"with_replacement\(cohort_size=0\)"),
        (lambda: sampling.by_size(1.5, steps=steps), r"by_size\(cohort_size=1.5\)"),
        (lambda: sampling.poisson(1.5, capacity=3, steps=steps), r"poisson\(rate=1.5\): rate must lie in \[0.0, 1.0\]"),
        (lambda: sampling.poisson(0.5, capacity=0, steps=steps), r"poisson\(capacity=0\)"),
        (lambda: sampling.schedule(np.array([1, 2]), steps=steps), "one row of client numbers a round"),
        (lambda: sampling.schedule(np.array([[1.0, 2.0]]), steps=steps), "one row of client numbers a round"),
        (lambda: draw(sampling.uniform(13, steps=steps)), r"uniform\(cohort_size=13\): the population has 12 clients"),
        (
            lambda: draw(sampling.poisson(0.5, capacity=13, steps=steps)),
            r"poisson\(capacity=13\): the population has 12",
        ),
    ],
)
def test_cohorts_that_cannot_be_drawn_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
