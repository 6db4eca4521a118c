import heapq

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, cohort_of

from jfed import _streams, local, run, sampling
from jfed.algorithms import fedasync, fedavg, fedbuff

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def at_once(key, cohort):
    return jnp.zeros(cohort.ids.shape)


def by_number(key, cohort):
    """Seconds that differ from client to client, the same in every round."""
    return 1.0 + 0.37 * ((7 * cohort.ids + 3) % 12)


@pytest.mark.parametrize("duration", [at_once, lambda key, cohort: jnp.full(cohort.ids.shape, 5.0)])
def test_with_the_whole_cohort_in_the_buffer_and_no_delay_it_is_fedavg(duration):
    a = fedbuff(WORK, concurrency=3, buffer=3, duration=duration)
    b = fedavg(WORK)
    state, plain = a.init(PARAMS), b.init(PARAMS)
    ours, theirs = jax.jit(a.round), jax.jit(b.round)
    for t, ids in enumerate(([3, 0, 5], [7, 3, 2], [1, 8, 11])):
        key = jax.random.fold_in(KEY, t)
        state, metrics = ours(state, cohort_of(ids, WORK), key)
        plain, _ = theirs(plain, cohort_of(ids, WORK), key)
        problem.close(a.params(state), plain.params)
        assert float(metrics["staleness"]) == 0


def simulated(concurrency, buffer, cohorts, away):
    """A plain event queue: for each step of the server, who returned, with what age, and when."""
    out, clock, turn, steps = [], 0.0, 0, []  # every cohort can fill the places
    free = [(0.0, place) for place in range(concurrency)]
    for now, cohort in enumerate(cohorts):
        waiting, returned = list(cohort), []

        def leave(at, places, now=now, waiting=waiting):
            nonlocal turn
            for place in places:
                if waiting:
                    i = waiting.pop(0)
                    heapq.heappush(out, (at[place] + away(i), turn, place, i, now))
                    turn += 1
                    free[:] = [f for f in free if f[1] != place]

        free[:] = [(clock, place) for _, place in free]  # also those that stayed empty for want of clients
        leave({p: at for at, p in free}, sorted(p for _, p in free))
        while len(returned) < buffer and out:
            soon = out[0][0]
            early = sorted(p for at, p in free if at < soon)
            leave({p: at for at, p in free}, early)
            clock, _, place, i, left = heapq.heappop(out)
            returned.append((i, now - left))
            free.append((clock, place))
        steps.append((returned, clock))
    return steps


def test_clients_return_in_the_order_of_a_plain_event_queue():
    concurrency, buffer, rounds = 5, 3, 12
    rng = np.random.default_rng(0)
    schedule = np.array([rng.permutation(12)[:6] for _ in range(rounds)])
    algorithm = fedbuff(WORK, concurrency=concurrency, buffer=buffer, duration=by_number)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    orders, found, clock = [], [], 0.0
    for t, ids in enumerate(schedule):
        key = jax.random.fold_in(KEY, t)
        order = [jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _streams.CLOCK), int(i))) for i in ids]
        orders.append(ids[np.argsort(order)].tolist())  # the order in which the round's clients set out
        state, metrics = advance(state, cohort_of(ids.tolist(), WORK), key)
        clock += float(metrics["seconds"])
        found.append((float(metrics["staleness"]), clock))
    away = [1.0 + 0.37 * ((7 * i + 3) % 12) for i in range(12)]
    expected = simulated(concurrency, buffer, orders, lambda i: away[i])
    np.testing.assert_allclose(
        found, [(np.mean([age for _, age in returned]), at) for returned, at in expected], rtol=1e-5
    )
    assert max(age for returned, _ in expected for _, age in returned) >= 2


@pytest.mark.parametrize("method", ["fedbuff", "fedasync"])
def test_the_model_follows_the_paper_with_the_models_the_clients_left_with(method):
    concurrency, rounds = 4, 6
    buffer = 2 if method == "fedbuff" else 1
    options = {"concurrency": concurrency, "duration": by_number}
    algorithm = (
        fedbuff(WORK, buffer=buffer, server=optax.sgd(0.5), **options)
        if method == "fedbuff"
        else fedasync(WORK, mixing=0.6, **options)
    )
    rng = np.random.default_rng(1)
    schedule = np.array([rng.permutation(12)[:5] for _ in range(rounds)])
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    keys, orders, models, weights = [], [], [], []
    for t, ids in enumerate(schedule):
        keys.append(jax.random.fold_in(KEY, t))
        order = [
            jax.random.uniform(jax.random.fold_in(jax.random.fold_in(keys[t], _streams.CLOCK), int(i))) for i in ids
        ]
        orders.append(ids[np.argsort(order)].tolist())
    away = [1.0 + 0.37 * ((7 * i + 3) % 12) for i in range(12)]
    x = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    for t, (returned, _) in enumerate(simulated(concurrency, buffer, orders, lambda i: away[i])):
        models.append(x)
        trained = [
            problem.numpy_sgd_client(models[t - age], i, keys[t - age], learning_rate=0.2, batch_size=4, epochs=2)
            for i, age in returned
        ]
        weights = [problem.SIZES[i] for i, _ in returned]
        if method == "fedbuff":
            changes = [
                {k: (models[t - age][k] - w[k]) / np.sqrt(1 + age) for k in w}
                for w, (_, age) in zip(trained, returned, strict=True)
            ]
            x = {k: x[k] - 0.5 * np.average([c[k] for c in changes], axis=0, weights=weights) for k in x}
        else:
            alpha = 0.6 * (1 + returned[0][1]) ** -0.5
            x = {k: (1 - alpha) * x[k] + alpha * trained[0][k] for k in x}
        state, _ = advance(state, cohort_of(schedule[t].tolist(), WORK), keys[t])
        problem.close(algorithm.params(state), x, tolerance=5e-5)


def test_a_run_replays_bit_for_bit_and_can_be_cut_anywhere():
    algorithm = fedbuff(WORK, concurrency=5, buffer=2, duration=by_number)
    sampler = sampling.uniform(6, steps=WORK.steps)
    key = jax.random.key(5)
    whole, _ = run.scan_rounds(algorithm, sampler, POPULATION, algorithm.init(PARAMS), key, rounds=8)
    half, _ = run.scan_rounds(algorithm, sampler, POPULATION, algorithm.init(PARAMS), key, rounds=4)
    again, _ = run.scan_rounds(algorithm, sampler, POPULATION, half, key, rounds=4, start=4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_server_does_not_wait_for_the_slowest():
    def one_slow(key, cohort):
        return jnp.where(cohort.ids == 3, 100.0, 1.0)

    algorithm = fedbuff(WORK, concurrency=4, buffer=2, duration=one_slow)
    sampler = sampling.full(steps=WORK.steps)
    _, metrics = run.scan_rounds(algorithm, sampler, POPULATION, algorithm.init(PARAMS), KEY, rounds=10)
    assert float(metrics["seconds"].sum()) < 15


def test_a_round_in_which_nobody_reports_does_not_happen():
    algorithm = fedbuff(WORK, concurrency=2, buffer=2, duration=by_number)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of([3, 5], WORK), KEY)
    after, metrics = algorithm.round(state, cohort_of([12, 12], WORK), KEY)
    problem.close(after.model._replace(round=state.model.round), state.model, tolerance=0)
    problem.close(after.places, state.places, tolerance=0)
    assert float(metrics["seconds"]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedbuff(WORK, concurrency=2, buffer=3, duration=at_once), r"fedbuff\(buffer=3\): no more than"),
        (lambda: fedbuff(WORK, concurrency=0, buffer=1, duration=at_once), r"fedbuff\(concurrency=0\)"),
        (lambda: fedasync(WORK, concurrency=2, mixing=0.0, duration=at_once), r"fedasync\(mixing=0.0\)"),
        (lambda: fedasync(WORK, concurrency=2, mixing=1.5, duration=at_once), r"fedasync\(mixing=1.5\)"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_those_that_set_out_are_sent_the_model():
    algorithm = fedbuff(WORK, concurrency=2, buffer=2, duration=by_number)
    _, metrics = algorithm.round(algorithm.init(PARAMS), cohort_of([3, 5, 7, 2, 0, 8], WORK), KEY)
    traffic = metrics["traffic"]
    up, down = (int(np.sum(np.asarray(x) > 0)) for x in (traffic.up, traffic.down))
    assert down == up == int(metrics["reports"]) <= 3


def test_the_clock_does_not_run_backwards_where_clients_were_wanting():
    def away(key, cohort):
        return jnp.array([1.0, 2.0, 10.0, 100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])[cohort.ids]

    algorithm = fedbuff(WORK, concurrency=4, buffer=3, duration=away)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for t, ids in enumerate(([0, 1, 2, 3, 12, 12], [4, 5, 6, 7, 8, 9], [1, 0, 11, 10, 4, 5])):
        state, metrics = advance(state, cohort_of(ids, WORK), jax.random.fold_in(KEY, t))
        assert float(metrics["seconds"]) > 0


def test_small_cohorts_first_fill_the_places_and_nobody_is_awaited():
    algorithm = fedbuff(WORK, concurrency=5, buffer=2, duration=by_number)
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for t, ids in enumerate(([3, 0], [5, 7], [2, 9], [1, 4])):
        before = state
        state, metrics = advance(state, cohort_of(ids, WORK), jax.random.fold_in(KEY, t))
        waited = t >= 2
        assert (
            (float(metrics["seconds"]) > 0)
            == waited
            == bool(jnp.any(state.model.params["w"] != before.model.params["w"]))
        )
        assert int(state.steps) == max(t - 1, 0)
    assert float(metrics["staleness"]) <= 1
