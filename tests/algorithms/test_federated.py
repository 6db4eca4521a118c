import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, SIZES, cohort_of

from jfed import algorithms, compress, local, run, sampling
from jfed.algorithms import compressed_downlink, fedadagrad, fedadam, fedavg, fedavgm, federated, fedsgd, fedyogi
from jfed.clients import lanes, vectorised
from jfed.core import ClientWork

KEY = jax.random.key(3)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def centralised_gradient(ids):
    x = np.concatenate([problem.examples_of(i)["x"] for i in ids])
    y = np.concatenate([problem.examples_of(i)["y"] for i in ids])
    return problem.numpy_gradient({k: np.asarray(v, np.float64) for k, v in PARAMS.items()}, x, y)


def test_fedavg_equals_a_plain_loop_over_clients():
    ids = [3, 0, 5, 1, 7]
    total = SIZES[ids].sum()
    expected = {k: np.zeros(v.shape) for k, v in PARAMS.items()}
    for i in ids:  # line by line: w <- sum n_k / n w_k
        w = problem.numpy_sgd_client(PARAMS, i, KEY, learning_rate=0.2, batch_size=4, epochs=2)
        expected = {k: expected[k] + SIZES[i] / total * w[k] for k in expected}
    algorithm = fedavg(WORK, client_map=lanes(2))
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of(ids, WORK), KEY)
    problem.close(algorithm.params(state), expected)


def test_fedavg_with_one_full_batch_step_is_centralised_gradient_descent():
    everyone = list(range(12))
    work = local.full_batch(problem.loss, optax.sgd(0.5), chunk_size=5)
    algorithm = fedavg(work)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of(everyone, work), KEY)
    gradient = centralised_gradient(everyone)
    problem.close(state.params, {k: PARAMS[k] - 0.5 * gradient[k] for k in PARAMS})


def test_fedsgd_is_one_large_batch_step():
    ids = [3, 0, 5]
    work = local.gradient(problem.loss, chunk_size=4)
    algorithm = fedsgd(work, learning_rate=0.5)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of(ids, work), KEY)
    gradient = centralised_gradient(ids)
    problem.close(state.params, {k: PARAMS[k] - 0.5 * gradient[k] for k in PARAMS})


def test_fedavgm_without_momentum_is_fedavg():
    cohort = cohort_of([1, 2, 3], WORK)
    with_momentum, plain = fedavgm(WORK, momentum=0.0), fedavg(WORK)
    a, _ = with_momentum.round(with_momentum.init(PARAMS), cohort, KEY)
    b, _ = plain.round(plain.init(PARAMS), cohort, KEY)
    problem.close(a.params, b.params)


def numpy_fedavgm(x, delta, memory, t):
    v = memory["v"] = 0.9 * memory.get("v", 0.0) + delta
    return x + v


def numpy_adaptive(second_moment, b1):
    """Reddi et al. 2021, Algorithm 2, with the paper's sign: Delta = x_i - x_t."""

    def step(x, delta, memory, t):
        m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * delta
        v = memory["v"] = second_moment(memory.get("v", 0.0), delta**2)
        return x + 0.05 * m / (np.sqrt(v) + 1e-2)

    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "server"),
    [
        (lambda: fedavgm(WORK), numpy_fedavgm),
        (
            lambda: fedadagrad(WORK, learning_rate=0.05, tau=1e-2),
            numpy_adaptive(lambda v, d2: v + d2, 0.0),
        ),
        (
            lambda: fedadam(WORK, learning_rate=0.05, tau=1e-2),
            numpy_adaptive(lambda v, d2: 0.99 * v + 0.01 * d2, 0.9),
        ),
        (
            lambda: fedyogi(WORK, learning_rate=0.05, tau=1e-2),
            numpy_adaptive(lambda v, d2: v - 0.01 * d2 * np.sign(v - d2), 0.9),
        ),
    ],
    ids=["fedavgm", "fedadagrad", "fedadam", "fedyogi"],
)
def test_server_optimizers_follow_their_papers_over_three_rounds(make, server):
    algorithm, plain = make(), fedavg(WORK)
    cohort = cohort_of([1, 2, 3, 4], WORK)
    state = algorithm.init(PARAMS)
    x = {k: np.asarray(v) for k, v in PARAMS.items()}
    memory = {k: {} for k in x}
    average, advance = jax.jit(plain.round), jax.jit(algorithm.round)
    for t in range(3):
        key = jax.random.fold_in(KEY, t)
        averaged, _ = average(plain.init({k: jnp.asarray(v, jnp.float32) for k, v in x.items()}), cohort, key)
        x = {k: server(x[k], np.asarray(averaged.params[k]) - x[k], memory[k], t) for k in x}
        state, _ = advance(state, cohort, key)
    problem.close(state.params, x, tolerance=1e-4)


def poisoned(client):
    """The usual work, but the update of one client is not a number."""

    def finish(shared, who, carry):
        kept, added = WORK.finish(shared, who, carry)
        return jax.tree.map(lambda k: jnp.where(who.ids == client, jnp.nan, k), kept), added

    return ClientWork(WORK.steps, WORK.start, WORK.step, finish)


def test_an_update_that_is_not_finite_is_dropped_and_counted():
    algorithm, clean = fedavg(poisoned(5)), fedavg(WORK)
    state, metrics = algorithm.round(algorithm.init(PARAMS), cohort_of([3, 5, 7], WORK), KEY)
    without, _ = clean.round(clean.init(PARAMS), cohort_of([3, 7], WORK), KEY)
    problem.close(state.params, without.params)
    assert (int(metrics["dropped"]), int(metrics["reports"]), int((metrics["traffic"].up > 0).sum())) == (1, 2, 3)
    assert np.isfinite(metrics["loss"])


def test_nan_in_one_clients_data_reaches_nobody_else():
    examples = POPULATION.examples
    sick = POPULATION._replace(examples={**examples, "x": examples["x"].at[int(POPULATION.start[5])].set(jnp.nan)})
    algorithm = fedavg(WORK, client_map=lanes(2))
    cohort = cohort_of([3, 5, 7], WORK)._replace(examples=sick.examples)
    state, metrics = algorithm.round(algorithm.init(PARAMS), cohort, KEY)
    without, _ = algorithm.round(algorithm.init(PARAMS), cohort_of([3, 7], WORK), KEY)
    problem.close(state.params, without.params)
    assert int(metrics["dropped"]) == 1


def test_a_dropped_client_keeps_its_uplink_state():
    remember = optax.trace(decay=0.9)
    algorithm = federated(poisoned(5), uplink=remember, num_clients=12)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of([3, 5], WORK), KEY)
    memory = state.uplink.trace["w"]
    assert np.all(memory[5] == 0) and np.any(memory[3] != 0) and np.all(memory[4] == 0)


@pytest.mark.parametrize("absent", ["nobody is there", "all weights 0", "all dropped"])
def test_a_round_without_reports_changes_neither_model_nor_server(absent):
    work = poisoned(5) if absent == "all dropped" else WORK
    algorithm = fedavgm(work)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of([3, 7], WORK), KEY)
    cohort = cohort_of([12, 12] if absent == "nobody is there" else [5, 5], WORK)
    if absent == "all weights 0":
        cohort = cohort._replace(weight=jnp.zeros(2))
    after, metrics = algorithm.round(state, cohort, KEY)
    problem.close(after._replace(round=state.round), state, tolerance=0)
    assert int(metrics["reports"]) == 0 and np.isnan(metrics["loss"])


def test_messages_and_bytes_are_counted_truthfully():
    in_halves = optax.stateless(lambda updates, params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), updates))
    algorithm = fedavg(WORK, uplink=in_halves)
    cohort = cohort_of([3, 12, 7, 1], WORK)
    _, metrics = algorithm.round(algorithm.init(PARAMS), cohort._replace(weight=cohort.weight.at[0].set(0.0)), KEY)
    numbers = 4 * 3 + 3
    ids, up, down, _ = metrics["traffic"]
    assert ids.tolist() == [3, 12, 7, 1]
    assert up.tolist() == [0, 0, 2 * numbers, 2 * numbers]  # the first weighs nothing, the second is an empty slot
    assert down.tolist() == [4 * numbers, 0, 4 * numbers, 4 * numbers]
    assert int(metrics["steps"]) == 2 * (3 + 2 + 1)


def one_round(algorithm, cohort, state=None):
    return jax.jit(algorithm.round)(algorithm.init(PARAMS) if state is None else state, cohort, KEY)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_a_weight_that_is_no_weight_drops_its_client(weight):
    cohort = cohort_of([3, 5, 7], WORK)
    state, metrics = one_round(fedavg(WORK), cohort._replace(weight=cohort.weight.at[1].set(weight)))
    without, _ = one_round(fedavg(WORK), cohort._replace(weight=cohort.weight.at[1].set(0.0)))
    problem.close(state.params, without.params)
    assert (int(metrics["dropped"]), int(metrics["reports"])) == (1, 2)


@pytest.mark.parametrize(
    "uplink",
    [None, compress.natural(), compress.low_precision("bfloat16"), compress.quantize(8)],
    ids=["none", "natural", "bfloat16", "quantize"],
)
def test_an_update_that_overflows_once_weighted_is_dropped(uplink):
    def finish(shared, who, carry):
        kept, added = WORK.finish(shared, who, carry)
        return jax.tree.map(lambda k: jnp.where(who.ids == 5, 1e38, k), kept), added

    state, metrics = one_round(fedavg(WORK._replace(finish=finish), uplink=uplink), cohort_of([3, 5, 7], WORK))
    problem.close(state.params, one_round(fedavg(WORK, uplink=uplink), cohort_of([3, 7], WORK))[0].params)
    assert int(metrics["dropped"]) == 1


def test_a_loss_that_is_not_finite_does_not_spoil_the_rounds_loss():
    def finish(shared, who, carry):
        kept, added = WORK.finish(shared, who, carry)
        return kept, added | {"loss": jnp.where(who.ids == 5, jnp.nan, added["loss"])}

    _, metrics = one_round(fedavg(WORK._replace(finish=finish)), cohort_of([3, 5, 7], WORK))
    _, without = one_round(fedavg(WORK), cohort_of([3, 7], WORK))
    np.testing.assert_allclose(metrics["loss"], without["loss"], rtol=1e-6)


def test_an_absent_client_keeps_its_uplink_state():
    algorithm = federated(WORK, uplink=optax.trace(decay=0.9), num_clients=12)
    cohort = cohort_of([3, 5], WORK)
    state, _ = one_round(algorithm, cohort._replace(weight=cohort.weight.at[0].set(0.0)))
    memory = state.uplink.trace["w"]
    assert np.all(memory[3] == 0) and np.any(memory[5] != 0)


def test_a_client_past_num_clients_is_dropped_and_not_given_anothers_state():
    algorithm = federated(WORK, uplink=optax.trace(decay=0.9), num_clients=4)
    state, metrics = one_round(algorithm, cohort_of([3, 7], WORK))
    problem.close(state.params, one_round(fedavg(WORK), cohort_of([3], WORK))[0].params)
    assert int(metrics["dropped"]) == 1


def test_a_client_drawn_twice_counts_twice_and_remembers_once():
    algorithm = federated(WORK, uplink=optax.trace(decay=0.9), num_clients=12)
    cohort = cohort_of([3, 5], WORK)
    doubled, _ = one_round(algorithm, cohort._replace(weight=cohort.weight * jnp.array([2.0, 1.0])))
    twice, _ = one_round(algorithm, cohort_of([3, 5, 3], WORK))
    problem.close(twice, doubled)


def test_uplink_and_server_are_given_keys_and_the_uplinks_differ_by_client():
    def noisy(updates, state, params=None, *, key, round, **extra_args):
        return jax.tree.map(lambda u: jax.random.normal(key) + 0.0 * u + round, updates), state

    noise = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), noisy)
    sent = {
        i: one_round(federated(WORK, uplink=noise), cohort_of([i], WORK))[0].params["b"] - PARAMS["b"] for i in (3, 5)
    }
    assert not np.allclose(sent[3], sent[5])
    moved = one_round(federated(WORK, server=noise), cohort_of([3], WORK))[0].params["b"] - PARAMS["b"]
    assert not np.allclose(moved, sent[3])


def test_half_precision_and_traced_hyperparameters_pass_through_a_compiled_run():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)

    def whole_run(b1):
        algorithm = fedadam(WORK, learning_rate=0.05, b1=b1)
        sampler = sampling.uniform(3, steps=WORK.steps)
        return run.scan_rounds(algorithm, sampler, POPULATION, algorithm.init(params), KEY, rounds=2)[0].params

    for result in (whole_run(0.9), jax.tree.map(lambda x: x[0], jax.vmap(whole_run)(jnp.array([0.9])))):
        assert all(leaf.dtype == jnp.bfloat16 and np.isfinite(leaf.astype(float)).all() for leaf in result.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda loss: local.sgd(loss, optax.sgd(0.2), batch_size=4),
        lambda loss: local.full_batch(loss, optax.sgd(0.2), chunk_size=4),
    ],
    ids=["sgd", "full_batch"],
)
def test_a_round_can_be_differentiated_and_an_empty_slot_does_not_spoil_it(make):
    def bias_after(scale, ids):
        work = make(lambda *batch: scale * problem.loss(*batch))
        algorithm = fedavg(work, client_map=vectorised(max_steps=3))
        return algorithm.round(algorithm.init(PARAMS), cohort_of(ids, work), KEY)[0].params["b"][0]

    both = jax.jit(jax.value_and_grad(bias_after))
    ids = jnp.array([3, 5, 5])
    _, slope = both(1.0, ids)
    (above, _), (below, _) = both(1.05, ids), both(0.95, ids)
    np.testing.assert_allclose(slope, (above - below) / 0.1, rtol=2e-2)
    pair, with_empty_slot = (both(1.0, jnp.array(i))[1] for i in ([3, 5, 3], [3, 5, 12]))
    assert np.isfinite(with_empty_slot) and not np.isclose(with_empty_slot, pair)
    np.testing.assert_allclose(with_empty_slot, jax.jit(jax.grad(bias_after))(1.0, jnp.array([3, 5])), rtol=1e-5)


def test_messages_of_four_gigabytes_are_counted():
    huge = {"w": jax.ShapeDtypeStruct((2**30 + 1,), jnp.float32)}
    work = local.gradient(lambda w, batch, key: batch["x"][:, 0] * w["w"][0], chunk_size=4)
    plain = fedsgd(work, learning_rate=0.1)
    for algorithm in (plain, compressed_downlink(plain, compress.low_precision("bfloat16"), num_clients=12)):
        state = jax.eval_shape(algorithm.init, huge)
        _, metrics = jax.eval_shape(algorithm.round, state, cohort_of([1], work), KEY)
        assert metrics["traffic"].up.dtype == metrics["traffic"].down.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedsgd(WORK, learning_rate=0.0), r"fedsgd\(learning_rate=0.0\)"),
        (lambda: fedavgm(WORK, momentum=1.5), r"fedavgm\(momentum=1.5\): momentum must lie in \[0.0, 1.0\]"),
        (lambda: fedadagrad(WORK, learning_rate=0.1, tau=0.0), r"fedadagrad\(tau=0.0\)"),
        (lambda: fedadam(WORK, learning_rate=-1.0), r"fedadam\(learning_rate=-1.0\)"),
        (lambda: fedyogi(WORK, learning_rate=0.1, b2=2.0), r"fedyogi\(b2=2.0\)"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_uplink_with_state_needs_the_number_of_clients():
    with pytest.raises(ValueError, match="pass num_clients"):
        federated(WORK, uplink=optax.trace(0.9)).init(PARAMS)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("qfedavg", {"q": 1.0, "learning_rate": 0.1, "server": optax.sgd(1.0)}),
        ("fedavg", {"server": optax.sgd(1.0)}),
        ("fedadam", {"learning_rate": 0.1, "server": optax.sgd(1.0)}),
        ("mime", {"server": optax.sgd(1.0)}),
        ("mime", {"aggregator": optax.identity()}),
        ("fedasync", {"concurrency": 2, "mixing": 0.5, "duration": None, "server": optax.sgd(1.0)}),
        ("fedper", {"is_local": str, "num_clients": 12, "memory": tuple}),
        ("local_only", {"num_clients": 12, "uplink": optax.identity()}),
        ("ifca", {"clusters": 2, "num_clients": 12, "aggregator": optax.identity()}),
    ],
)
def test_what_a_method_decides_itself_is_refused(method, options):
    with pytest.raises(ValueError, match=rf"{method}\({list(options)[-1]}=...\): .* leave it out"):
        getattr(algorithms, method)(WORK, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fednova", {}),
        ("qfedavg", {"q": 1.0, "learning_rate": 0.2}),
        ("afl", {"learning_rate": 0.1, "num_clients": 12}),
        ("mimelite", {}),
        ("scaffold", {"num_clients": 12}),
    ],
)
def test_an_uplink_sees_the_update_and_not_the_numbers_sent_beside_it(method, options):
    """Halved on the way, the model moves half as far; were those numbers halved too, it would move as far as ever."""

    def moved(**uplink):
        algorithm = getattr(algorithms, method)(WORK, **options, **uplink)
        state, _ = jax.jit(algorithm.round)(algorithm.init(PARAMS), cohort_of([3, 5, 7], WORK), KEY)
        return jax.tree.map(jnp.subtract, state.params, PARAMS)

    problem.close(moved(uplink=optax.scale(0.5)), jax.tree.map(lambda m: 0.5 * m, moved()))


def test_an_uplink_that_looks_at_params_finds_them_in_the_shape_of_the_message():
    cohort, decays = cohort_of([3, 5, 7], WORK), optax.add_decayed_weights(0.5)
    with_it, without = (
        algorithms.scaffold(WORK, num_clients=12, uplink=decays),
        algorithms.scaffold(WORK, num_clients=12),
    )
    state, _ = jax.jit(with_it.round)(with_it.init(PARAMS), cohort, KEY)
    plain, _ = jax.jit(without.round)(without.init(PARAMS), cohort, KEY)
    problem.close(state.params, jax.tree.map(lambda w, w_0: w - 0.5 * w_0, plain.params, PARAMS))
