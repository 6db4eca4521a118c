"""Stragglers, absence, growing data and simulated time: laws of all samplers around a sampler, then each one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import CLIENTS, PARAMS, POPULATION, SIZES
from scipy import stats

from jfed import _streams, availability, data, local, run, sampling
from jfed.algorithms import fedavg
from jfed.clients import lanes, vectorised
from jfed.core import Algorithm, Population, make_cohort

EPOCHS = 4
KEYS = jax.random.split(jax.random.key(11), 4000)


def steps(size):
    return EPOCHS * ((size + 1) // 2)


FULL = sampling.full(steps=steps)
WRAPPERS = {
    "dropout": lambda sampler: availability.dropout(sampler, 0.4),
    "drop": lambda sampler: availability.drop(sampler, 0.5),
    "partial_work": lambda sampler: availability.partial_work(sampler, 0.5, EPOCHS),
    "distributed_steps": lambda sampler: availability.distributed_steps(
        sampler, availability.per_client(jax.random.uniform)
    ),
}
wrappers = pytest.mark.parametrize("name", WRAPPERS)


def draw(sampler, keys=KEYS, t=0, population=POPULATION):
    many = jax.jit(jax.vmap(lambda k: sampler(population, k, jnp.int32(t))._replace(examples=())))
    return jax.tree.map(np.asarray, many(keys))


def listed(*ids):
    return sampling.schedule(np.array([ids]), steps=steps)


def standard_errors(found, expected):
    return abs(np.mean(found) - expected) / (np.std(found) / np.sqrt(np.size(found)))


# every sampler around a sampler


@wrappers
def test_what_a_client_draws_does_not_depend_on_its_place(name):
    ids = np.array([3, 12, 0, 7, 5, 11, 2, 12, 9])
    forth, back = (draw(WRAPPERS[name](listed(*row)), KEYS[:50]) for row in (ids, ids[::-1]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, ::-1]), forth, back)


@wrappers
def test_a_client_that_occurs_twice_has_the_same_steps_and_weight_both_times(name):
    twice = draw(WRAPPERS[name](listed(4, 1, 8, 1, 4, 0)), KEYS[:200])
    for row in (twice.steps, twice.weight):
        np.testing.assert_array_equal(row[:, [0, 1]], row[:, [4, 3]])


@wrappers
def test_only_steps_and_weights_change_and_never_grow(name):
    plain = draw(lambda p, key, t: FULL(p, jax.random.split(key)[0], t), KEYS[:100])
    other = draw(WRAPPERS[name](FULL), KEYS[:100])
    for field in ("ids", "start", "size"):
        np.testing.assert_array_equal(getattr(other, field), getattr(plain, field))
    assert np.all((other.steps <= plain.steps) & (other.steps >= 0))
    assert np.all((other.weight == plain.weight) | ((other.weight == 0) & (other.steps == 0)))
    assert np.any(other.steps != plain.steps)


@wrappers
def test_another_key_draws_anew(name):
    found = draw(WRAPPERS[name](FULL), KEYS[:50]).steps
    assert len({tuple(row) for row in found}) > 40


def test_all_wrappers_of_a_sampler_meet_the_clients_it_draws_with_the_first_half_of_the_key():
    inner = sampling.with_replacement(5, steps=steps)
    expected = draw(inner, jax.vmap(lambda k: jax.random.split(k)[0])(KEYS[:20])).ids
    for wrap in WRAPPERS.values():
        np.testing.assert_array_equal(draw(wrap(inner), KEYS[:20]).ids, expected)


@pytest.mark.parametrize(
    "nothing",
    [
        lambda s: availability.dropout(s, 0.0),
        lambda s: availability.drop(s, 0.0),
        lambda s: availability.partial_work(s, 0.0, EPOCHS),
        lambda s: availability.partial_work(s, 1.0, 1),
        lambda s: availability.distributed_steps(s, lambda key, cohort: jnp.ones(cohort.ids.shape)),
    ],
)
def test_without_stragglers_nothing_changes(nothing):
    jax.tree.map(np.testing.assert_array_equal, draw(nothing(FULL), KEYS[:3]), draw(FULL, KEYS[:3]))


@wrappers
def test_absent_clients_are_as_if_they_had_not_been_sampled(name):
    work = local.sgd(problem.loss, optax.sgd(0.2), batch_size=2, epochs=EPOCHS)
    method = fedavg(work, client_map=vectorised(max_steps=EPOCHS * 6))
    cohort = WRAPPERS[name](sampling.full(steps=work.steps))(POPULATION, jax.random.key(1), 0)
    there = cohort.weight > 0
    one_round = jax.jit(method.round)
    state, metrics = one_round(method.init(PARAMS), cohort, jax.random.key(2))
    gone = cohort._replace(ids=jnp.where(there, cohort.ids, CLIENTS), size=jnp.where(there, cohort.size, 0))
    problem.close(state.params, one_round(method.init(PARAMS), gone, jax.random.key(2))[0].params)
    assert metrics["reports"] == jnp.sum(there) and metrics["steps"] == jnp.sum(jnp.where(there, cohort.steps, 0))


# dropout


def test_dropout_is_independent_and_of_its_rate_and_no_other():
    gone = (draw(WRAPPERS["dropout"](FULL)).weight == 0).sum(1)
    expected = stats.binom(CLIENTS, 0.4).pmf(np.arange(CLIENTS + 1)) * len(gone)
    few = np.array([gone <= 2, gone == 3, gone == 4, gone == 5, gone == 6, gone >= 7]).sum(1)
    assert stats.chisquare(few, [expected[:3].sum(), *expected[3:7], expected[7:].sum()]).pvalue > 1e-3
    assert standard_errors(gone, 0.4 * CLIENTS) < 4 < standard_errors(gone, 0.42 * CLIENTS)


def test_two_dropouts_are_independent():
    gone = draw(availability.dropout(availability.dropout(FULL, 0.5), 0.5)).weight == 0
    assert standard_errors(gone.mean(1), 0.75) < 4


def test_dropout_of_everybody_leaves_nobody():
    cohort = draw(availability.dropout(FULL, 1.0), KEYS[:10])
    assert not cohort.weight.any() and not cohort.steps.any()


# FedAvg's and FedProx's rules


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_drop_keeps_the_number_that_the_published_code_keeps(fraction):
    rows = np.where(np.arange(12) < np.arange(13)[:, None], np.arange(12), -1)  # none, one, ..., all of twelve
    sampler = availability.drop(sampling.schedule(rows, steps=steps), fraction)
    each = jax.jit(jax.vmap(lambda t: sampler(POPULATION, KEYS[0], t).weight))
    assert (np.asarray(each(jnp.arange(13))) > 0).sum(1).tolist() == [round(n * (1 - fraction)) for n in range(13)]


def test_a_fraction_may_be_traced():
    many = jax.jit(jax.vmap(lambda f: availability.drop(listed(*range(10)), f)(POPULATION, KEYS[0], 0).weight))
    assert (np.asarray(many(jnp.array([0.0, 0.5, 0.9]))) > 0).sum(1).tolist() == [10, 5, 1]


def test_drop_is_exact_for_large_cohorts_too():
    population = Population((), jnp.arange(999), jnp.ones(999, jnp.int32))
    cohort = draw(availability.drop(FULL, 0.9), KEYS[:5], population=population)
    assert np.all((cohort.weight > 0).sum(1) == 100)


def test_drop_favours_nobody():
    late = draw(WRAPPERS["drop"](FULL)).weight == 0
    # Draws without replacement are negatively correlated: their chi-square is below its nominal law.
    assert stats.chisquare(late.sum(0)).pvalue > 1e-3


def test_more_stragglers_are_the_same_and_others():
    few, many = (draw(availability.drop(FULL, f), KEYS[:200]).weight == 0 for f in (0.25, 0.75))
    assert np.all(many[few]) and many.sum() == 3 * few.sum()


@pytest.mark.parametrize("fraction", [0.25, 0.9])
def test_partial_work_is_done_by_the_clients_that_drop_drops(fraction):
    inner = sampling.with_replacement(8, steps=steps)
    dropped = draw(availability.drop(inner, fraction), KEYS[:200])
    partial = draw(availability.partial_work(inner, fraction, 10**6), KEYS[:200])  # hardly one draws all its epochs
    np.testing.assert_array_equal(dropped.ids, partial.ids)
    np.testing.assert_array_equal(dropped.weight == 0, partial.steps < steps(partial.size))
    np.testing.assert_array_equal(partial.weight, partial.size)


def test_stragglers_do_every_number_of_epochs_equally_often():
    cohort = draw(availability.partial_work(FULL, 1.0, EPOCHS))
    done, rest = np.divmod(cohort.steps, steps(cohort.size) // EPOCHS)
    assert not rest.any() and set(np.unique(done)) == {1, 2, 3, 4}
    assert stats.chisquare(np.bincount(done.ravel())[1:]).pvalue > 1e-3
    assert (
        stats.chisquare(np.bincount(done[:, 0] * 5 + done[:, 1], minlength=25).reshape(5, 5)[1:, 1:].ravel()).pvalue
        > 1e-3
    )


def test_partial_work_that_is_no_whole_number_of_epochs_is_its_share_rounded_down():
    seven = sampling.schedule(np.array([[0]]), steps=lambda size: 7 + 0 * size)
    found = draw(availability.partial_work(seven, 1.0, 3), KEYS[:100]).steps
    assert set(np.unique(found)) == {7 // 3, 14 // 3, 7}


def test_partial_work_of_very_many_steps_does_not_overflow():
    many = sampling.schedule(np.array([[0]]), steps=lambda size: 2**31 - 1 + 0 * size)
    found = draw(availability.partial_work(many, 1.0, 20), KEYS[:100]).steps
    assert found.min() >= (2**31 - 1) // 20 and len(np.unique(found)) == 20


# any distribution


def test_shares_round_to_whole_steps_and_to_at_least_one():
    shares = jnp.array([0.0, 0.001, 0.3, 0.5, 0.7, 1.0, 2.0, -1.0, jnp.nan])
    ten = sampling.schedule(np.arange(9)[None], steps=lambda size: 10 + 0 * size)
    cohort = draw(availability.distributed_steps(ten, lambda key, cohort: shares), KEYS[:1])
    assert cohort.steps[0].tolist() == [0, 1, 3, 5, 7, 10, 10, 0, 0]
    np.testing.assert_array_equal(cohort.weight[0] > 0, [0, 1, 1, 1, 1, 1, 1, 0, 0])


def test_shares_are_those_of_the_distribution():
    beta = functools.partial(jax.random.beta, a=2.0, b=5.0)
    many = sampling.schedule(np.array([[0, 1]]), steps=lambda size: 10**6 + 0 * size)
    found = draw(availability.distributed_steps(many, availability.per_client(beta)), KEYS[:500]).steps / 1e6
    assert stats.kstest(found[:, 0], stats.beta(2, 5).cdf).pvalue > 1e-3
    assert stats.kstest(found[:, 0], stats.beta(2, 4).cdf).pvalue < 1e-3
    assert abs(np.corrcoef(found.T)[0, 1]) < 4 / np.sqrt(500)


# conditions


def day_and_night(key, ids, t):
    return ids % 2 == t % 2


def test_available_draws_uniformly_among_those_available():
    cohorts = draw(availability.available(3, day_and_night, steps=steps), t=1)
    assert np.all(cohorts.ids % 2 == 1) and all(len(set(row)) == 3 for row in cohorts.ids[:500].tolist())
    assert stats.chisquare(np.bincount(cohorts.ids.ravel(), minlength=12)[1::2]).pvalue > 1e-3
    np.testing.assert_array_equal(cohorts.weight, SIZES[cohorts.ids])
    np.testing.assert_array_equal(cohorts.steps, steps(SIZES[cohorts.ids]))


def test_slots_beyond_those_available_are_empty():
    cohorts = draw(availability.available(8, day_and_night, steps=steps), KEYS[:20])
    assert np.all((cohorts.ids < 12).sum(1) == 6)
    empty = cohorts.ids == 12
    assert not cohorts.steps[empty].any() and not cohorts.weight[empty].any() and not cohorts.size[empty].any()


def test_a_round_in_which_nobody_is_available_changes_nothing():
    work = local.gradient(problem.loss)
    method = fedavg(work, client_map=lanes(2))
    sampler = availability.available(3, availability.bernoulli(0.0), steps=work.steps)
    state, metrics = run.scan_rounds(method, sampler, POPULATION, method.init(PARAMS), jax.random.key(0), rounds=2)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    assert not metrics["reports"].any() and state.round == 2


def test_a_client_without_examples_is_not_available():
    population = POPULATION._replace(size=POPULATION.size.at[3].set(0))
    cohorts = draw(availability.available(12, availability.bernoulli(1.0), steps=steps), KEYS[:20], 0, population)
    assert np.all((cohorts.ids != 3).all(1)) and np.all((cohorts.ids < 12).sum(1) == 11)


def shares_of(condition, ids, rounds=4000):
    """How often each of `ids` is available: [K]."""
    keys = jax.random.split(jax.random.key(5), rounds)
    return np.asarray(jax.jit(jax.vmap(lambda k, t: condition(k, ids, t)))(keys, jnp.arange(rounds)))


def test_bernoulli_holds_with_its_probabilities_independently():
    held = shares_of(availability.bernoulli(np.array([0.1, 0.5, 0.9])), jnp.arange(3))
    for one, probability in zip(held.T, (0.1, 0.5, 0.9), strict=True):
        assert standard_errors(one, probability) < 4 < standard_errors(one, probability + 0.05)
    assert np.abs(np.corrcoef(held.T) - np.eye(3)).max() < 4 / np.sqrt(len(held))
    assert abs(np.corrcoef(held[1:, 1], held[:-1, 1])[0, 1]) < 4 / np.sqrt(len(held))


def test_what_holds_for_a_client_does_not_depend_on_who_else_is_asked():
    for one in (availability.bernoulli(0.5), availability.diurnal(6, low=0.2, high=0.8)):
        few, many = shares_of(one, jnp.array([5, 2]), 50), shares_of(one, jnp.arange(12), 50)
        np.testing.assert_array_equal(few, many[:, [5, 2]])


def test_periodic_holds_for_its_share_of_the_period_from_its_phase_on():
    held = shares_of(availability.periodic(10, np.array([0.3, 1.0, 0.0, 0.5]), phase=[0, 0, 0, 4]), jnp.arange(4), 40)
    expected = [[t % 10 < 3, True, False, (t + 4) % 10 < 5] for t in range(40)]
    np.testing.assert_array_equal(held, expected)


def test_periodic_is_exact_after_very_many_rounds():
    one = availability.periodic(7, 1 / 7, phase=0)
    late = jnp.arange(7) + 7 * 10**8
    assert jax.vmap(lambda t: one(None, jnp.arange(1), t))(late)[:, 0].tolist() == [True] + 6 * [False]


def test_by_default_about_the_same_share_of_any_clients_in_a_row_is_available_at_all_times():
    held = shares_of(availability.periodic(24, 0.25), jnp.arange(1000), 24)
    blocks = held.reshape(24, 10, 100).mean(2)
    assert np.abs(blocks - 0.25).max() < 0.05  # independent phases would reach three times that
    assert np.all(held.sum(0) == 6)


def test_diurnal_swings_between_its_probabilities():
    held = shares_of(availability.diurnal(8, low=0.1, high=np.array([0.9, 0.5]), phase=[0, 4]), jnp.arange(2), 8 * 2000)
    by_hour = held.reshape(-1, 8, 2)
    for client, (high, phase) in enumerate([(0.9, 0), (0.5, 4)]):
        for hour in range(8):
            expected = 0.1 + (high - 0.1) * (1 + np.cos(2 * np.pi * (hour + phase) / 8)) / 2
            assert standard_errors(by_hour[:, hour, client], expected) < 4
    assert standard_errors(by_hour[:, 2, 0], 0.45) > 3  # and not in a zigzag or anything else


def test_all_conditions_must_hold_each_with_its_own_chance():
    held = shares_of(
        availability.all_of(availability.bernoulli(0.5), availability.bernoulli(0.5), day_and_night), jnp.arange(2)
    )
    assert standard_errors(held[::2, 0], 0.25) < 4 and not held[1::2, 0].any()


# continuous data


SIZE, START = SIZES.astype(np.int64), np.asarray(POPULATION.start)
VIEWS = {
    "growing": (availability.growing(2, 1.5), lambda i, t: (0, min(SIZE[i], 2 + int(1.5 * t)))),
    "growing each": (
        availability.growing(np.arange(12), np.linspace(0, 2, 12)),
        lambda i, t: (0, min(SIZE[i], i + int(np.float32(np.linspace(0, 2, 12)[i]) * np.float32(t)))),
    ),
    "sliding": (
        availability.sliding(3, 2),
        lambda i, t: (min(2 * t, SIZE[i] - min(SIZE[i], 3)), min(SIZE[i], 3)),
    ),
    "sliding slowly": (
        availability.sliding(np.full(12, 4), 0.5),
        lambda i, t: (min(t // 2, SIZE[i] - min(SIZE[i], 4)), min(SIZE[i], 4)),
    ),
    "arriving": (availability.arriving(np.arange(12) // 2), lambda i, t: (0, SIZE[i] * (t >= i // 2))),
}
views = pytest.mark.parametrize("name", VIEWS)


def rows_seen(population, view, t):
    """The rows themselves, client by client, as a round would read them."""
    now = view(population, jnp.int32(t))
    bounds = zip(np.asarray(now.start), np.asarray(now.size), strict=True)
    return [np.asarray(population.examples["x"])[a : a + n] for a, n in bounds]


@views
def test_a_view_shows_the_rows_of_its_round(name):
    view, oracle = VIEWS[name]
    x = np.asarray(POPULATION.examples["x"])
    for t in (0, 1, 2, 5, 11, 1000):
        for i, seen in enumerate(rows_seen(POPULATION, view, t)):
            offset, size = oracle(i, t)
            assert 0 <= offset and offset + size <= SIZE[i]
            np.testing.assert_array_equal(seen, x[START[i] + offset : START[i] + offset + size])


def test_one_program_serves_all_rounds_of_all_views():
    traces = []
    sampler = FULL
    for view, _ in VIEWS.values():
        sampler = availability.over_time(sampler, view)

    @jax.jit
    def sample(t):
        traces.append(1)
        return sampler(POPULATION, KEYS[0], t)._replace(examples=())

    sizes = [int(sample(t).size.sum()) for t in range(8)]
    assert len(traces) == 1 and len(set(sizes)) > 3


def test_a_round_under_a_view_is_that_of_a_population_of_the_rows_it_shows():
    work = local.gradient(problem.loss, chunk_size=5)
    method = fedavg(work, client_map=lanes(3))
    view, oracle = VIEWS["sliding"]
    sampler = availability.over_time(sampling.full(steps=work.steps), view)
    bounds = [oracle(i, 1) for i in range(12)]
    rows = [START[i] + offset + np.arange(size) for i, (offset, size) in enumerate(bounds)]
    shown = [{name: np.asarray(leaf)[own] for name, leaf in POPULATION.examples.items()} for own in rows]
    one_round = jax.jit(method.round)
    state = method.init(PARAMS)
    found = one_round(state, sampler(POPULATION, KEYS[0], jnp.int32(1)), KEYS[1])
    expected = one_round(state, make_cohort(data.from_clients(shown), jnp.arange(12), steps=work.steps), KEYS[1])
    problem.close(found, expected)


def test_a_sampler_by_size_goes_by_the_rows_that_are_there():
    sampler = availability.over_time(sampling.by_size(5, steps=steps), availability.growing(np.arange(12) % 3, 0))
    now = np.minimum(SIZES, np.arange(12) % 3)
    ids = draw(sampler, t=7).ids
    counts = np.bincount(ids.ravel(), minlength=12)
    assert not counts[now == 0].any()
    expected = now / now.sum() * counts.sum()
    assert stats.chisquare(counts[now > 0], expected[now > 0]).pvalue > 1e-3


def test_a_client_that_has_not_arrived_leaves_its_slot_empty_or_is_not_drawn():
    view = availability.arriving(np.where(np.arange(12) < 4, 0, 3))
    everybody = draw(availability.over_time(FULL, view), KEYS[:1], t=2)
    np.testing.assert_array_equal(everybody.weight[0] > 0, np.arange(12) < 4)
    always = availability.bernoulli(1.0)
    drawn = availability.over_time(availability.available(3, always, steps=steps), view)
    assert np.all(draw(drawn, KEYS[:50], t=2).ids < 4) and np.any(draw(drawn, KEYS[:50], t=3).ids >= 4)
    nobody = availability.over_time(sampling.by_size(3, steps=steps), availability.arriving(np.full(12, 5)))
    assert not draw(nobody, KEYS[:2], t=4).weight.any()


def test_views_combine():
    both = availability.over_time(
        availability.over_time(FULL, availability.growing(1, 1)), availability.arriving(np.arange(12) % 2 * 9)
    )
    size = draw(both, KEYS[:1], t=3).size[0]
    np.testing.assert_array_equal(size, np.where(np.arange(12) % 2, 0, np.minimum(SIZES, 4)))


def test_growth_does_not_overflow_at_the_end_of_time():
    population = Population((), jnp.zeros(1, jnp.int32), jnp.full(1, 2**30 + 5, jnp.int32))
    view = availability.growing(10, 1e30)
    assert int(view(population, jnp.int32(2**31 - 1)).size[0]) == 2**30 + 5


@pytest.mark.parametrize("names", [("growing", "arriving"), ("sliding",)], ids=" and ".join)
def test_populations_that_change_stream_as_they_run_on_the_device(names):
    work = local.gradient(problem.loss)
    method = fedavg(work, client_map=vectorised())
    source = data.on_host(jax.tree.map(np.asarray, POPULATION.examples), SIZES)
    sampler = sampling.with_replacement(5, steps=work.steps)
    for name in names:
        sampler = availability.over_time(sampler, VIEWS[name][0])
    how = {"rounds": 4, "every": 4}
    (streamed,) = run.stream(method, sampler, source, method.init(PARAMS), jax.random.key(3), **how)
    (whole,) = run.iterate(method, sampler, POPULATION, method.init(PARAMS), jax.random.key(3), **how)
    problem.close(streamed.state.params, whole.state.params)


# durations


COHORT = make_cohort(POPULATION, jnp.array([4, 0, 7, 12, 2]), steps=steps)
HALF = stats.halfnorm
DURATIONS = {
    "exponential": (availability.exponential(3.0), stats.expon(scale=3.0).cdf, stats.expon(scale=3.6).cdf),
    "half_normal": (availability.half_normal(2.0), HALF(scale=2.0).cdf, HALF(scale=2.4).cdf),
    "lognormal": (
        availability.lognormal(2.0, sigma=0.7),
        stats.lognorm(0.7, scale=2.0).cdf,
        stats.lognorm(0.9, scale=2.0).cdf,
    ),
}


def seconds_of(duration, cohort=COHORT, keys=KEYS):
    return np.asarray(jax.jit(jax.vmap(lambda k: duration(k, cohort)))(keys))


@pytest.mark.parametrize("name", DURATIONS)
def test_durations_have_their_law_and_no_other_and_are_independent(name):
    duration, law, other = DURATIONS[name]
    found = seconds_of(duration)
    assert found.dtype == np.float32 and not found[:, 3].any()  # an empty slot
    assert stats.kstest(found[:, 0], law).pvalue > 1e-3 > stats.kstest(found[:, 0], other).pvalue
    assert abs(np.corrcoef(found[:, 0], found[:, 1])[0, 1]) < 4 / np.sqrt(len(found))


@pytest.mark.parametrize(
    "make",
    [
        availability.per_step,
        availability.exponential,
        availability.half_normal,
        lambda scale: availability.lognormal(scale, sigma=1.0),
    ],
)
def test_each_client_has_its_own_scale(make):
    scale = np.arange(1.0, 13.0)
    each, one = (seconds_of(make(s), keys=KEYS[:5]) for s in (scale, 1.0))
    np.testing.assert_allclose(each[:, [0, 1, 2, 4]], one[:, [0, 1, 2, 4]] * scale[[4, 0, 7, 2]], rtol=1e-6)
    assert not each[:, 3].any()


def test_a_client_past_the_end_of_the_scales_takes_no_number_of_seconds():
    assert np.isnan(seconds_of(availability.per_step([1.0, 2.0]), keys=KEYS[:1])[0]).tolist() == [1, 0, 1, 0, 1]


def test_a_step_takes_its_seconds():
    np.testing.assert_allclose(seconds_of(availability.per_step(0.5), keys=KEYS[:1])[0], 0.5 * COHORT.steps)


@pytest.mark.parametrize("name", DURATIONS)
def test_a_duration_does_not_depend_on_the_place_in_the_cohort(name):
    duration, *_ = DURATIONS[name]
    back = make_cohort(POPULATION, COHORT.ids[::-1], steps=steps)
    np.testing.assert_array_equal(seconds_of(duration, keys=KEYS[:9]), seconds_of(duration, back, KEYS[:9])[:, ::-1])


def test_durations_in_turn_add_up_and_are_independent():
    exponential = availability.exponential(1.0)
    twice = seconds_of(availability.in_turn(exponential, exponential))
    assert stats.kstest(twice[:, 0], stats.gamma(2).cdf).pvalue > 1e-3
    both = seconds_of(availability.in_turn(availability.per_step(2.0), availability.per_step(1.0)), keys=KEYS[:1])
    np.testing.assert_allclose(both[0], 3.0 * COHORT.steps)


# simulated time


QUICK = local.gradient(problem.loss)
METHOD = fedavg(QUICK, client_map=vectorised(max_steps=1))
BY_ID = availability.timed(METHOD, availability.per_step(np.arange(12.0)))
one_round, one_timed_round = jax.jit(METHOD.round), jax.jit(BY_ID.round)


def test_a_timed_method_is_the_method_and_tells_the_longest_duration():
    cohort = make_cohort(POPULATION, jnp.array([4, 7, 2]), steps=QUICK.steps)
    state, metrics = one_timed_round(BY_ID.init(PARAMS), cohort, jax.random.key(0))
    expected, others = one_round(METHOD.init(PARAMS), cohort, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert metrics.pop("seconds") == 7.0
    jax.tree.map(np.testing.assert_array_equal, metrics, others)
    assert BY_ID.params is METHOD.params


def test_a_round_waits_only_for_those_who_take_part():
    everyone = make_cohort(POPULATION, jnp.array([4, 7, 2]), steps=QUICK.steps)
    without = everyone._replace(steps=everyone.steps.at[1].set(0), weight=everyone.weight.at[1].set(0))
    nobody = everyone._replace(steps=jnp.zeros(3, jnp.int32), weight=jnp.zeros(3))
    for cohort, seconds in ((everyone, 7.0), (without, 4.0), (nobody, 0.0)):
        assert one_timed_round(BY_ID.init(PARAMS), cohort, jax.random.key(0))[1]["seconds"] == seconds


def test_the_time_is_drawn_from_no_clients_stream():
    told = []

    def duration(key, cohort):
        told.append(key)
        return jnp.zeros(cohort.ids.shape)

    key = jax.random.key(4)
    cohort = make_cohort(POPULATION, jnp.arange(3), steps=QUICK.steps)
    availability.timed(METHOD, duration).round(METHOD.init(PARAMS), cohort, key)
    others = {value for name, value in vars(_streams).items() if name.isupper()} - {_streams.STOPWATCH}
    used = [jax.random.fold_in(key, i) for i in (*range(12), *others)]
    assert not any(np.array_equal(jax.random.key_data(told[0]), jax.random.key_data(k)) for k in [key, *used])


def test_the_seconds_of_a_run_are_those_of_its_slowest_clients():
    timed = availability.timed(METHOD, availability.exponential(1.0))
    sampler = sampling.uniform(10, steps=QUICK.steps)
    _, metrics = run.scan_rounds(timed, sampler, POPULATION, timed.init(PARAMS), jax.random.key(0), rounds=400)
    harmonic = sum(1 / n for n in range(1, 11))  # the mean of the largest of ten exponential numbers
    assert standard_errors(np.asarray(metrics["seconds"]), harmonic) < 4


def test_a_method_that_tells_its_seconds_is_not_timed_again():
    method = Algorithm(lambda params: params, lambda state, cohort, key: (state, {"seconds": 1.0}), lambda state: state)
    with pytest.raises(ValueError, match="its metrics tell seconds already; give the duration to the method"):
        availability.timed(method, availability.exponential(1.0)).round(0, COHORT, KEYS[0])


# imbalance


def test_one_client_of_two_thousand_examples_trains_beside_two_thousand_of_one():
    rng = np.random.default_rng(0)
    rows = 4000
    examples = {"x": rng.normal(size=(rows, 4)).astype(np.float32), "y": rng.integers(0, 3, rows).astype(np.int32)}
    population = data.population(examples, [2000] + [1] * 2000)
    work = local.sgd(problem.loss, optax.sgd(0.1), batch_size=10)
    method = fedavg(work, client_map=lanes(4))
    everyone = sampling.full(steps=work.steps)
    _, metrics = run.scan_rounds(method, everyone, population, method.init(PARAMS), jax.random.key(1), rounds=1)
    assert metrics["steps"].tolist() == [2200] and metrics["reports"].tolist() == [2001]
    assert not metrics["dropped"].any() and np.isfinite(metrics["loss"][0])


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: availability.dropout(FULL, 1.1), r"dropout\(rate=1.1\): rate must lie in \[0.0, 1.0\]"),
        (lambda: availability.drop(FULL, -0.1), r"drop\(fraction=-0.1\): fraction must lie in \[0.0, 1.0\]"),
        (lambda: availability.partial_work(FULL, 2, 5), r"partial_work\(fraction=2\)"),
        (lambda: availability.partial_work(FULL, 0.5, 0), r"partial_work\(epochs=0\): epochs must be a whole number"),
        (
            lambda: draw(availability.distributed_steps(FULL, lambda key, cohort: jnp.ones(3)), KEYS[:1]),
            r"draw\): returned shape \(3,\) for a cohort of 12",
        ),
        (lambda: availability.available(0, day_and_night, steps=steps), r"available\(cohort_size=0\)"),
        (
            lambda: draw(availability.available(13, day_and_night, steps=steps), KEYS[:1]),
            r"available\(cohort_size=13\): the population has 12 clients",
        ),
        (
            lambda: draw(availability.available(3, lambda key, ids, t: t == 0, steps=steps), KEYS[:1]),
            r"is_available\): returned \(\) for 12 clients; return a bool for each",
        ),
        (lambda: availability.bernoulli(1.5), r"bernoulli\(probability=1.5\): .* in \[0, 1\], or one for each client"),
        (lambda: availability.bernoulli([0.5, np.nan]), r"bernoulli\(probability=float64\[2\]\)"),
        (
            lambda: draw(availability.available(3, availability.bernoulli([0.5]), steps=steps), KEYS[:1]),
            r"bernoulli\(probability of shape \(1,\)\): there are 12 clients",
        ),
        (lambda: availability.periodic(0, 0.5), r"periodic\(period=0\)"),
        (lambda: availability.periodic(24, -1), r"periodic\(share=-1\)"),
        (lambda: availability.periodic(24, 0.5, phase=[0.5]), r"periodic\(phase=float64\[1\]\): .* whole number"),
        (lambda: availability.diurnal(24, low=-0.1, high=1), r"diurnal\(low=-0.1\)"),
        (lambda: availability.diurnal(24, low=0, high=2), r"diurnal\(high=2\)"),
        (lambda: availability.all_of(), "give at least one"),
        (lambda: availability.growing(0.5, 1), r"growing\(first=0.5\): first must be a whole number"),
        (
            lambda: availability.growing(1, -1),
            r"growing\(per_round=-1\): per_round must be a finite number of at least 0",
        ),
        (lambda: availability.sliding(0, 1), r"sliding\(window=0\): window must be a whole number of at least 1"),
        (lambda: availability.arriving([-1]), r"arriving\(joined=int64\[1\]\)"),
        (
            lambda: draw(availability.over_time(FULL, availability.arriving([0, 1])), KEYS[:1]),
            r"arriving\(joined of shape \(2,\)\): the population has 12 clients",
        ),
        (
            lambda: draw(availability.over_time(FULL, availability.growing([0, 1], 1)), KEYS[:1]),
            r"growing\(first of shape \(2,\)\): the population has 12 clients",
        ),
        (lambda: availability.per_step(-1.0), r"per_step\(seconds=-1.0\): .* at least 0"),
        (lambda: availability.exponential(0.0), r"exponential\(mean=0.0\): mean must be a finite number above 0"),
        (lambda: availability.half_normal(np.inf), r"half_normal\(scale=inf\)"),
        (lambda: availability.lognormal(0, sigma=1), r"lognormal\(median=0\)"),
        (lambda: availability.lognormal(1.0, sigma=-1), r"lognormal\(sigma=-1\)"),
        (lambda: availability.in_turn(), "give at least one"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
