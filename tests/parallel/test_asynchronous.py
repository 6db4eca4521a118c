"""Asynchronous descent, against plain descent, plain-Python oracles and the stability limit of delayed descent."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import _streams, availability, core, run
from jfed.parallel import _server
from jfed.parallel.arrivals import Trace, recorded, simulated, trace
from jfed.parallel.asynchronous import asynchronous, random_batch
from jfed.parallel.corrections import adaptive_delay_compensation, delay_compensation, per_age, scale_by_age

KEY = jax.random.key(7)
N = 4
X = jax.random.normal(jax.random.key(1), (40, 3))
POPULATION = core.Population({"x": X, "y": X @ jnp.array([1.0, -2.0, 0.5]) + 0.3}, jnp.array([0]), jnp.array([40]))
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}
HEAVY = availability.lognormal(1.0, sigma=1.5)


def whole(population, key, t):
    return population.examples


def loss(params, batch, key):
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2 / 2


def make(optimizer, arrivals, workers=N, **options):
    return asynchronous(loss, optimizer, workers=workers, arrivals=arrivals, batch=random_batch(5), **options)


def train(algorithm, rounds, params=PARAMS, key=KEY):
    return run.scan_rounds(algorithm, whole, POPULATION, algorithm.init(params), key, rounds=rounds)


def trace_of(metrics):
    return Trace(*(metrics[name] for name in Trace._fields))


def seed_of(key):
    return _server.seed_of(run.rounds.keys_of_round(key, 0)[1])


def batch_of(worker, iteration):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed_of(KEY)), worker), iteration)
    return random_batch(5)(POPULATION.examples, jax.random.split(key)[0], worker)


def same(a, b, tolerance=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def descend(optimizer, batches):
    """Plain descent, a loop in Python."""
    params, state, losses = PARAMS, optimizer.init(PARAMS), []
    for batch in batches:
        value, gradient = jax.value_and_grad(lambda p: jnp.mean(loss(p, batch, None)))(params)  # noqa: B023
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    return params, np.array(losses)


def test_one_worker_is_plain_descent():
    method = make(optax.adam(0.1), simulated(HEAVY), workers=1)
    state, metrics = train(method, 20)
    params, losses = descend(optax.adam(0.1), [batch_of(0, i) for i in range(20)])
    same((method.params(state), metrics["loss"]), (params, losses), 1e-6)
    assert not metrics["staleness"].any()


def test_lockstep_with_a_full_buffer_is_synchronous_data_parallel_descent():
    method = make(optax.adam(0.1), simulated(HEAVY, bound=0), buffer=N)
    state, metrics = train(method, 6 * N)
    together = [jax.tree.map(lambda *x: jnp.concatenate(x), *(batch_of(w, i) for w in range(N))) for i in range(6)]
    params, losses = descend(optax.adam(0.1), together)
    same(method.params(state), params, 1e-6)
    same(metrics["loss"].reshape(6, N).mean(1), losses, 1e-6)
    assert not metrics["staleness"].any() and int(state.server.steps) == 6


@pytest.mark.slow
@pytest.mark.parametrize("delay, limit", [(0, 2), (1, 1), (2, 0.618034), (4, 0.347296), (8, 0.184537), (16, 0.095164)])
def test_equal_workers_meet_the_stability_limit_of_delayed_descent(delay, limit):
    h, steps = 4.0, 3200
    assert limit == pytest.approx(2 * np.sin(np.pi / (4 * delay + 2)), rel=1e-5)
    rates = limit / h * np.linspace(0.99, 1.01, 41)

    @jax.jit
    @jax.vmap
    def path(rate):
        method = asynchronous(
            lambda w, x, key: h / 2 * w**2,
            optax.sgd(rate),
            workers=delay + 1,
            arrivals=simulated(availability.lognormal(0.3, sigma=0.0)),
            batch=lambda x, key, worker: x,
        )

        def one_round(state, _):
            state, metrics = method.round(state, (), KEY)
            return state, (method.params(state), metrics["staleness"])

        return jax.lax.scan(one_round, method.init(jnp.array(1.0)), length=steps)[1]

    w, age = (np.asarray(x, float) for x in path(jnp.asarray(rates, jnp.float32)))
    assert np.all(age[:, delay:] == delay)
    before, after = (np.sqrt(np.mean(w[:, a : a + 800] ** 2, 1)) for a in (1600, 2400))
    grows = after > before
    assert not grows[0] and grows[-1] and np.sum(grows[1:] != grows[:-1]) == 1
    first = np.argmax(grows)
    assert (rates[first - 1] + rates[first]) / 2 * h == pytest.approx(limit, rel=5e-4)


def oracle(durations, bound, length):
    """Workers one by one on an absolute clock; `durations[w][i]` of worker w's i-th gradient."""
    n, sent = len(durations), [0] * len(durations)
    heap, now, idle, events = [(durations[w][0], 0, w) for w in range(n)], 0.0, set(), []
    heapq.heapify(heap)
    for t in range(length):
        due, _, worker = heapq.heappop(heap)
        sent[worker] += 1
        idle.add(worker)
        free = {w for w in idle if bound is None or sent[w] - min(sent) <= bound}
        for w in free:
            heapq.heappush(heap, (due + durations[w][sent[w]], t + 1, w))
        idle -= free
        events.append((worker, [w in free for w in range(n)], due - now))
        now = due
    return Trace(*(np.array(column) for column in zip(*events, strict=True)))


@pytest.mark.parametrize("bound", [None, 0, 1, 3])
def test_arrivals_are_those_of_a_plain_event_loop_and_keep_the_bound(bound):
    def whole_seconds(key, cohort):  # exact sums, many ties, and none at all now and then
        return jnp.floor(3 * HEAVY(key, cohort))

    runs, length, workers = 12, 80, 5
    keys = jax.random.split(KEY, runs)
    arrivals = simulated(whole_seconds, bound)
    traces = jax.vmap(lambda key: trace(arrivals, workers=workers, key=key, length=length))(keys)

    @jax.jit
    @jax.vmap
    def drawn(key):
        clock = jax.random.fold_in(jax.random.key(seed_of(key)), _streams.CLOCK)
        ones = jnp.ones(workers, jnp.int32)
        cohort = core.Cohort(jnp.arange(workers), ones, ones, ones, jnp.ones(workers))
        return jax.vmap(lambda i: whole_seconds(jax.random.fold_in(clock, i), cohort), out_axes=1)(
            jnp.arange(length + 1)
        )

    waited = 0
    for i, durations in enumerate(np.asarray(drawn(keys), float)):
        got = jax.tree.map(lambda x: np.asarray(x[i]), traces)  # noqa: B023
        same(got, oracle(durations.tolist(), bound, length))
        sent = np.cumsum(got.worker[:, None] == np.arange(workers), axis=0)
        ahead = sent - sent.min(1, keepdims=True)
        if bound is not None:
            assert ahead[got.fetched].max() <= bound and ahead.max() <= bound + 1
            waited += np.sum(got.fetched.sum(1) != 1)
    assert bound is None or waited  # else the bound was never felt


def test_a_trace_simulated_alone_or_replayed_gives_the_same_bits():
    simulation = simulated(HEAVY, bound=2)
    optimizer = optax.adam(0.1)
    once = train(make(optimizer, simulation), 60)
    happened = trace_of(once[1])
    same(trace(simulation, workers=N, key=KEY, length=60), happened)
    again = train(make(optimizer, recorded(happened)), 60)
    same((once[0].server, once[1]), (again[0].server, again[1]))


def test_a_run_cut_in_two_is_the_same_run():
    method = make(optax.adam(0.1), simulated(HEAVY, bound=2))
    state, metrics = train(method, 30)
    rest = {"rounds": 30, "start": 30, "donate": True}
    state, more = run.scan_rounds(method, whole, POPULATION, state, KEY, **rest)
    once = train(method, 60)
    same((state.server, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), metrics, more)), (once[0].server, once[1]))


def test_a_fresh_state_can_be_donated():
    method = make(optax.adam(0.1), simulated(HEAVY), buffer=2)
    state, _ = run.scan_rounds(method, whole, POPULATION, method.init(PARAMS), KEY, rounds=30, donate=True)
    assert int(state.round) == 30


def test_beyond_a_recorded_trace_neither_time_nor_the_model_is_a_number():
    short = Trace(np.array([0]), np.array([[True] * N]), np.array([1.0]))
    method = make(optax.sgd(0.1), recorded(short))
    state, metrics = train(method, 1)
    assert metrics["seconds"] == 1 and np.all(np.isfinite(method.params(state)["w"]))
    state, metrics = train(method, 2)
    assert np.isnan(metrics["seconds"][1]) and np.all(np.isnan(method.params(state)["w"]))


def after_the_first(*seconds):
    """Of each worker; a first gradient, known by its key, takes a second."""

    def data(seed):
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _streams.CLOCK), 0))

    def duration(key, cohort):
        firsts = jnp.stack([data(0), data(seed_of(KEY))])  # of the check at construction, and of the run
        first = jnp.any(jnp.all(firsts == jax.random.key_data(key)[None], 1))
        return jnp.where(first, 1.0, jnp.array(seconds)[cohort.ids])

    return duration


def test_who_takes_no_number_of_seconds_never_arrives_and_who_takes_less_than_none_takes_none():
    happened = trace(simulated(after_the_first(0.5, jnp.nan, -3.0)), workers=3, key=KEY, length=8)
    np.testing.assert_array_equal(happened.worker, [0, 1, 2, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(happened.seconds, [1.0, 0, 0, 0, 0, 0, 0, 0])
    happened = trace(simulated(after_the_first(0.5, jnp.nan, jnp.inf)), workers=3, key=KEY, length=6)
    np.testing.assert_array_equal(happened.worker, [0, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(happened.seconds, [1.0, 0, 0, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("bound", [None, 0])
def test_once_nobody_ever_arrives_the_model_is_not_a_number(bound):
    method = make(optax.sgd(0.1), simulated(after_the_first(jnp.inf, jnp.nan), bound), workers=2)
    state, metrics = train(method, 2)
    assert np.all(np.isfinite(metrics["seconds"])) and np.all(np.isfinite(method.params(state)["w"]))
    state, metrics = train(method, 5)
    np.testing.assert_array_equal(metrics["seconds"], [1, 0, np.inf, np.inf, np.inf])
    assert np.all(np.isnan(method.params(state)["w"]))


@pytest.mark.parametrize("buffer", [1, 3])
def test_what_an_event_takes_does_not_grow_with_the_workers(buffer):
    params = jnp.zeros(10_000)

    def bytes_of(workers):
        method = asynchronous(
            lambda w, x, key: jnp.sum((w - x) ** 2),
            optax.sgd(0.1),
            workers=workers,
            arrivals=simulated(HEAVY),
            batch=lambda x, key, worker: x,
            buffer=buffer,
        )

        def scanned(state):
            return jax.lax.scan(lambda state, _: method.round(state, jnp.ones(1), KEY), state, length=5)

        compiled = jax.jit(scanned, donate_argnums=0).lower(method.init(params)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = bytes_of(2), bytes_of(32)
    assert few >= params.nbytes / 2 and many - few < params.nbytes  # of the 30 models more there are


def test_a_buffer_of_bfloat16_gradients_adds_them_all_up():
    gradients = 512
    method = asynchronous(
        lambda w, x, key: w,
        optax.sgd(1.0),
        workers=2,
        arrivals=simulated(HEAVY),
        batch=lambda x, key, worker: x,
        buffer=gradients,
    )
    state, _ = train(method, gradients, jnp.zeros((), jnp.bfloat16))
    assert method.params(state).dtype == jnp.bfloat16 and method.params(state) == -1


@pytest.mark.parametrize("buffer", [1, 2])
def test_the_servers_optimizer_is_told_the_mean_loss(buffer):
    def update_fn(updates, state, params, *, value):
        return jax.tree.map(lambda g: -0.1 * g, updates), value

    told = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update_fn)
    state, metrics = train(make(told, simulated(HEAVY), buffer=buffer), 6)
    np.testing.assert_allclose(state.server.optimizer, np.mean(metrics["loss"][-buffer:]), rtol=1e-6)


def test_an_optimizer_may_keep_a_key():
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(0.1))
    state, _ = train(make(optimizer, simulated(HEAVY), buffer=2), 4)
    assert int(state.server.steps) == 2


def test_models_without_numbers_are_trained():
    def nothing(params, batch, key):
        return batch["y"] ** 2

    for params in ({}, {"none": None}):
        method = asynchronous(
            nothing, optax.adam(0.1), workers=2, arrivals=simulated(HEAVY), batch=random_batch(5), buffer=2
        )
        state, metrics = train(method, 4, params)
        assert method.params(state) == params and np.all(metrics["loss"] > 0)


def test_a_loss_of_another_shape_is_an_error():
    method = asynchronous(
        lambda params, batch, key: batch["x"] * params["w"][None],
        optax.sgd(0.1),
        workers=2,
        arrivals=simulated(HEAVY),
        batch=random_batch(4),
    )
    with pytest.raises(ValueError, match=r"asynchronous: the loss returned shape \(4, 3\)"):
        train(method, 1)


def test_batches_do_not_depend_on_who_arrives_first():
    def batches(arrivals):
        metrics = train(make(optax.sgd(0.0), arrivals), 40)[1]  # nothing is learned, so a loss names a batch
        seen, sent = {}, [0] * N
        for worker, value in zip(metrics["worker"].tolist(), metrics["loss"].tolist(), strict=True):
            seen[worker, sent[worker]] = value
            sent[worker] += 1
        return seen

    free, lockstep = batches(simulated(HEAVY)), batches(simulated(HEAVY, bound=0))
    both = free.keys() & lockstep.keys()
    assert len(both) > 10 and free.keys() != lockstep.keys()
    assert all(free[which] == lockstep[which] for which in both)
    assert len(set(free.values())) == 40


def by_hand(metrics, *, buffer, strength, decay):
    """Momentum at the server, adaptive delay compensation, then `eta / tau`: written out in NumPy."""
    w = np.zeros(4)
    m, v, total = np.zeros(4), np.zeros(4), np.zeros(4)
    held, at, sent, steps, losses, ages = [w] * N, [0] * N, [0] * N, 0, [], []
    for t, worker in enumerate(np.asarray(metrics["worker"])):
        batch = jax.tree.map(lambda x: np.asarray(x, float), batch_of(int(worker), sent[worker]))
        x = np.concatenate([batch["x"], np.ones((5, 1))], 1)
        error = x @ held[worker] - batch["y"]
        g = x.T @ error / 5
        v = decay * v + (1 - decay) * g * g
        scale = np.sqrt(v + 1e-7) if decay else 1.0
        g = g + strength / scale * g * g * (w - held[worker])
        age = steps - at[worker]
        total = total + g / max(age, 1)
        losses.append(np.mean(error**2) / 2)
        ages.append(age)
        sent[worker] += 1
        if (t + 1) % buffer == 0:
            m = 0.9 * m + total / buffer
            w, total, steps = w - 0.05 * m, np.zeros(4), steps + 1
        for other in np.flatnonzero(metrics["fetched"][t]):
            held[other], at[other] = w, steps
    return {"w": w[:3], "b": w[3]}, np.array(losses), np.array(ages)


@pytest.mark.parametrize("buffer, bound", [(1, None), (3, 2)])
def test_corrections_are_those_written_out_by_hand(buffer, bound):
    correction = optax.chain(adaptive_delay_compensation(0.5, decay=0.9), scale_by_age(per_age))
    method = make(optax.sgd(0.05, momentum=0.9), simulated(HEAVY, bound), correction=correction, buffer=buffer)
    state, metrics = train(method, 60)
    params, losses, ages = by_hand(metrics, buffer=buffer, strength=0.5, decay=0.9)
    np.testing.assert_array_equal(metrics["staleness"], ages)
    assert ages.max() > 2
    same((method.params(state), metrics["loss"]), (params, losses), 2e-4)


def test_constant_delay_compensation_is_that_written_out_by_hand():
    correction = optax.chain(delay_compensation(0.3), scale_by_age())
    method = make(optax.sgd(0.05, momentum=0.9), simulated(HEAVY), correction=correction)
    state, metrics = train(method, 60)
    params, losses, _ = by_hand(metrics, buffer=1, strength=0.3, decay=0.0)
    same((method.params(state), metrics["loss"]), (params, losses), 2e-4)


def test_rates_side_by_side_are_those_alone():
    rates = jnp.array([0.02, 0.1])

    def one(rate):
        method = make(optax.sgd(rate), simulated(HEAVY))
        state, metrics = train(method, 30)
        return method.params(state), metrics["loss"]

    together = jax.vmap(one)(rates)
    for i, rate in enumerate(rates):
        same(jax.tree.map(lambda x: x[i], together), one(rate), 1e-6)  # noqa: B023


def test_runs_of_other_keys_meet_other_speeds_and_batches():
    method = make(optax.sgd(0.1), simulated(HEAVY))
    one, other = (train(method, 20, key=jax.random.key(i))[1] for i in range(2))
    assert np.all(one["seconds"] != other["seconds"]) and np.all(one["loss"] != other["loss"])


def test_nothing_compiles_after_the_first_round():
    method = make(optax.adam(0.1), simulated(HEAVY, bound=1), correction=delay_compensation(0.1), buffer=2)
    step = jax.jit(method.round)
    state = method.init({"w": np.zeros(3, np.float32), "b": 0.0})  # weakly typed
    for t in range(4):
        state, _ = step(state, POPULATION.examples, jax.random.fold_in(KEY, t))
    assert step._cache_size() == 1


TWICE = Trace(np.array([0, 1, 2, 0]), np.array([[0, 0, 0, 1], [0] * 4, [0] * 4, [1] * 4], bool), np.ones(4))
GOOD = Trace(np.zeros(3, int), np.ones((3, N), bool), np.ones(3))
CALLS = {
    "workers=0": lambda: make(optax.sgd(0.1), simulated(HEAVY), workers=0),
    "buffer=0": lambda: make(optax.sgd(0.1), simulated(HEAVY), buffer=0),
    "bound=-1": lambda: simulated(HEAVY, bound=-1),
    "bound=True": lambda: simulated(HEAVY, bound=True),
    "finite number": lambda: make(optax.sgd(0.1), simulated(availability.per_step([1.0, 2.0]))),
    "length=0": lambda: trace(simulated(HEAVY), workers=N, key=KEY, length=0),
    "size=0": lambda: random_batch(0),
    "must lie in [0, 4)": lambda: recorded(GOOD._replace(worker=np.full(3, N))),
    "[T], [T, n]": lambda: recorded(GOOD._replace(seconds=np.ones(2))),
    "worker 0 sends at event 3 and has not fetched since it sent at 0": lambda: recorded(TWICE),
    "asynchronous(optimizer='sgd')": lambda: make("sgd", simulated(HEAVY)),
    "asynchronous(correction=3)": lambda: make(optax.sgd(0.1), simulated(HEAVY), correction=3),
    "simulated(duration=3)": lambda: simulated(3),
    "the trace is of 4 workers": lambda: make(optax.sgd(0.1), recorded(GOOD), workers=2),
}


@pytest.mark.parametrize("words", CALLS)
def test_bad_input_is_an_error_of_one_line(words):
    with pytest.raises(ValueError) as error:
        CALLS[words]()
    assert words in str(error.value) and "\n" not in str(error.value)
