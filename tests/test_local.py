import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, SIZES, close, cohort_of, examples_of, numpy_gradient, numpy_sgd_client

from jfed import local, shuffle, tree
from jfed.core import Population, Shared, make_cohort

KEY = jax.random.key(11)


def run_alone(work, i, *, steps=None, params=PARAMS, round=0):
    """What one client keeps and adds, by the definition of ClientWork."""
    cohort = cohort_of([i], work)
    shared = Shared(params, cohort.examples, KEY, jnp.int32(round))
    client = tree.take(cohort._replace(examples=()), 0)
    step = jax.jit(work.step)
    carry = work.start(shared, client)
    for t in range(int(client.steps) if steps is None else steps):
        carry = step(shared, client, carry, jnp.int32(t))
    return work.finish(shared, client, carry)


def model_of(kept, params=PARAMS):
    return jax.tree.map(lambda p, k: p - k, params, kept)


@pytest.mark.parametrize(("batch_size", "epochs"), [(4, 1), (4, 3), (1, 2), (7, 1), (50, 2)])
@pytest.mark.parametrize("i", [0, 1, 3])
def test_sgd_follows_the_plain_loop(i, batch_size, epochs):
    work = local.sgd(problem.loss, optax.sgd(0.2), batch_size=batch_size, epochs=epochs)
    kept, _ = run_alone(work, i)
    expected = numpy_sgd_client(PARAMS, i, KEY, learning_rate=0.2, batch_size=batch_size, epochs=epochs)
    close(model_of(kept), expected)


def rows_seen(batch_size, i):
    """Row numbers of each batch, as the loss meets them."""
    seen = []

    def watching(params, batch, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["x"])
        return problem.loss(params, batch, key)

    watch = local.sgd(watching, optax.sgd(0.0), batch_size=batch_size, epochs=3)
    run_alone(watch, i)
    jax.effects_barrier()
    data = examples_of(i)["x"]
    return [[int(np.flatnonzero((data == row).all(1))[0]) for row in batch] for batch in seen]


def test_each_epoch_visits_every_example_once_in_a_new_order():
    n, size = 4, int(SIZES[0])
    batches = rows_seen(n, 0)
    epochs = [
        sum((b if e % 2 == 0 else b[: size - n] for e, b in enumerate(batches[2 * k : 2 * k + 2])), [])
        for k in range(3)
    ]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_short_batch_steps_along_the_mean_of_its_own_examples():
    """Client 0 has 7 examples: a step of 4, then one of the 3 left over."""
    work = local.sgd(problem.loss, optax.sgd(1.0), batch_size=4)
    before, after = (model_of(run_alone(work, 0, steps=t)[0]) for t in (1, 2))
    left_over = rows_seen(4, 0)[1][:3]
    data = examples_of(0)
    gradient = numpy_gradient({k: np.asarray(v) for k, v in before.items()}, data["x"][left_over], data["y"][left_over])
    close(after, {k: np.asarray(before[k]) - gradient[k] for k in gradient})


def test_loss_reported_is_the_sum_over_examples_met():
    frozen = local.sgd(problem.loss, optax.sgd(0.0), batch_size=3, epochs=2)
    _, added = run_alone(frozen, 0)
    data = {k: jnp.asarray(v) for k, v in examples_of(0).items()}
    np.testing.assert_allclose(added["loss"], 2 * problem.loss(PARAMS, data, None).sum(), rtol=1e-5)
    assert float(added["examples"]) == 14


@pytest.mark.parametrize("chunk_size", [3, 7, 64])
def test_full_batch_steps_are_gradient_descent_whatever_the_chunks(chunk_size):
    work = local.full_batch(problem.loss, optax.sgd(0.3), epochs=2, chunk_size=chunk_size)
    kept, _ = run_alone(work, 0)
    data, w = examples_of(0), {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    for _ in range(2):
        g = numpy_gradient(w, data["x"], data["y"])
        w = {k: w[k] - 0.3 * g[k] for k in w}
    close(model_of(kept), w)


def test_full_batch_stopped_in_the_middle_of_a_pass_keeps_the_passes_done():
    work = local.full_batch(problem.loss, optax.sgd(0.3), epochs=2, chunk_size=3)  # 7 examples: 3 chunks
    close(run_alone(work, 0, steps=5)[0], run_alone(work, 0, steps=3)[0])


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_gradient_is_the_mean_over_the_clients_examples(chunk_size):
    kept, added = run_alone(local.gradient(problem.loss, chunk_size=chunk_size), 0)
    close(kept, numpy_gradient({k: np.asarray(v) for k, v in PARAMS.items()}, *examples_of(0).values()))
    assert float(added["examples"]) == 7


def test_an_epoch_of_one_batch_is_a_full_batch_step():
    mini = local.sgd(problem.loss, optax.sgd(0.3), batch_size=64)
    full = local.full_batch(problem.loss, optax.sgd(0.3))
    close(run_alone(mini, 0)[0], run_alone(full, 0)[0])


def test_any_optax_optimizer_trains_the_client():
    work = local.sgd(problem.loss, optax.adamw(0.01), batch_size=64)
    kept, _ = run_alone(work, 0)
    optimizer = optax.adamw(0.01)
    gradient = jax.tree.map(
        jnp.float32, numpy_gradient({k: np.asarray(v) for k, v in PARAMS.items()}, *examples_of(0).values())
    )
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    close(kept, jax.tree.map(jnp.negative, updates), tolerance=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda loss, optimizer: local.sgd(loss, optimizer, batch_size=64, epochs=3),
        lambda loss, optimizer: local.full_batch(loss, optimizer, epochs=3, chunk_size=3),
    ],
    ids=["sgd", "full_batch"],
)
def test_the_optimizer_is_told_the_anchor_the_round_and_the_loss(make):
    def update_fn(updates, state, params=None, *, anchor, round, value, **others):
        pull = jax.tree.map(lambda p, a: p - a, params, anchor)
        return jax.tree.map(lambda g, d: -0.1 * g - 0.5 * d + round + value, updates, pull), state

    told = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    work = make(problem.loss, told)
    kept, _ = run_alone(work, 0, round=3)
    data, w = examples_of(0), {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    for _ in range(3):
        g = numpy_gradient(w, data["x"], data["y"])
        value = float(problem.loss(w, data, None).mean())
        w = {k: w[k] - 0.1 * g[k] - 0.5 * (w[k] - np.asarray(PARAMS[k])) + 3 + value for k in w}
    close(model_of(kept), w)


def test_a_rate_that_decays_over_rounds_scales_the_steps():
    decayed = optax.chain(optax.sgd(0.2), local.scale_by_round(lambda t: 0.5**t))
    plain = local.sgd(problem.loss, optax.sgd(0.05), batch_size=4)
    close(run_alone(local.sgd(problem.loss, decayed, batch_size=4), 0, round=2)[0], run_alone(plain, 0)[0])


def test_a_loss_draws_differently_in_every_step_and_client():
    def noisy(params, batch, key):
        return params["b"][:1].repeat(batch["y"].shape[0]) * jax.random.normal(key)

    work = local.sgd(noisy, optax.sgd(1.0), batch_size=1)
    first = {i: float(run_alone(work, i, steps=1)[0]["b"][0]) for i in (0, 3)}
    second = float(run_alone(work, 0, steps=2)[0]["b"][0]) - first[0]
    assert len({round(v, 5) for v in (first[0], first[3], second)}) == 3


@pytest.mark.parametrize("wrong", [lambda *a: problem.loss(*a).mean(), lambda *a: (problem.loss(*a), {})])
def test_a_loss_that_is_not_one_value_an_example_is_refused(wrong):
    work = local.sgd(wrong, optax.sgd(0.1), batch_size=4)
    with pytest.raises(ValueError, match="must return one value an example, shape .4,.; leave out the mean"):
        run_alone(work, 0)


def test_params_that_cannot_be_trained_are_named():
    work = local.sgd(lambda p, batch, key: problem.loss(p["net"], batch, key), optax.sgd(0.1), batch_size=4)
    with pytest.raises(ValueError, match="params.'count'. has dtype int32 and cannot be trained"):
        run_alone(work, 0, params={"net": PARAMS, "count": jnp.int32(0)})


@pytest.mark.parametrize("make", [local.gradient, lambda *a, **k: local.full_batch(*a, optax.sgd(1.0), **k)])
def test_long_sums_of_gradients_do_not_stall_in_half_precision(make):
    """2000 equal gradients of 1: summed in bfloat16 they would stop at 256."""
    examples = jnp.ones((2000, 1))
    work = make(lambda p, x, key: p * x[:, 0], chunk_size=1)
    shared = Shared(jnp.bfloat16(0.0), examples, KEY, jnp.int32(0))
    client = tree.take(make_cohort(Population(examples, [0], [2000]), [0], steps=work.steps)._replace(examples=()), 0)
    carry = jax.lax.fori_loop(0, 2000, lambda t, c: work.step(shared, client, c, t), work.start(shared, client))
    kept, _ = work.finish(shared, client, carry)
    assert kept.dtype == jnp.bfloat16 and float(kept) == 1.0


def test_a_gradient_asked_for_more_steps_than_it_needs_is_the_same():
    work = local.gradient(problem.loss, chunk_size=3)
    close(run_alone(work, 0, steps=5), run_alone(work, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: local.sgd(problem.loss, optax.sgd(0.1), batch_size=0), r"sgd\(batch_size=0\)"),
        (lambda: local.sgd(problem.loss, optax.sgd(0.1), batch_size=10, epochs=0), r"sgd\(epochs=0\)"),
        (lambda: local.full_batch(problem.loss, optax.sgd(0.1), epochs=0), r"full_batch\(epochs=0\)"),
        (lambda: local.full_batch(problem.loss, optax.sgd(0.1), chunk_size=0), r"full_batch\(chunk_size=0\)"),
        (lambda: local.gradient(problem.loss, chunk_size=1.5), r"gradient\(chunk_size=1.5\)"),
    ],
)
def test_settings_that_are_no_counts_are_refused(make, message):
    with pytest.raises(ValueError, match=message + ".*at least 1"):
        make()


def test_the_gradient_over_all_of_a_clients_examples_does_not_stall_in_half_precision():
    n = 2000
    population = Population({"x": jnp.ones((n, 1), jnp.bfloat16)}, jnp.zeros(1, jnp.int32), jnp.full(1, n, jnp.int32))
    work = local.sgd(lambda w, batch, key: batch["x"][:, 0] * w, optax.sgd(0.1), batch_size=1)
    cohort = make_cohort(population, jnp.arange(1), steps=work.steps)
    client = tree.take(cohort._replace(examples=()), 0)
    shared = Shared(jnp.ones((), jnp.bfloat16), population.examples, KEY, jnp.int32(0))
    sums = jax.jit(work.whole)(shared, client, shared.params)
    assert float(sums.gradient) == n and float(sums.examples) == n


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_stochastic_gradient_is_the_mean_over_examples_drawn_without_replacement(batch_size):
    found, added = run_alone(local.stochastic_gradient(problem.loss, batch_size=batch_size), 3)
    data, n = examples_of(3), int(SIZES[3])
    rows = shuffle.position(shuffle.draw(jax.random.fold_in(KEY, 3)), jnp.arange(min(batch_size, n)), n, epoch=0)
    rows = np.asarray(rows)
    assert len(set(rows.tolist())) == min(batch_size, n) == int(added["examples"])
    close(found, numpy_gradient({k: np.asarray(v) for k, v in PARAMS.items()}, data["x"][rows], data["y"][rows]))


def test_stochastic_gradients_of_an_epochs_batches_average_to_the_gradient():
    found, _ = run_alone(local.stochastic_gradient(problem.loss, batch_size=4), 3, steps=3)
    close(found, numpy_gradient({k: np.asarray(v) for k, v in PARAMS.items()}, *examples_of(3).values()))


def test_a_stochastic_gradient_of_a_second_epoch_meets_other_batches_with_other_keys():
    def loss(w, batch, key):
        return w * (batch["x"][:, 0] + jax.random.uniform(key))

    work = local.stochastic_gradient(loss, batch_size=4)

    cohort = cohort_of([3], work)
    shared = Shared(jnp.float32(1.0), cohort.examples, KEY, jnp.int32(0))
    client = tree.take(cohort._replace(examples=()), 0)

    def met(t):
        """What step t adds: the sum over its batch, with what is drawn."""
        carry = work.step(shared, client, work.start(shared, client), jnp.int32(t))
        return float(carry.so_far.gradient)

    plain = local.stochastic_gradient(lambda w, batch, key: w * batch["x"][:, 0], batch_size=4)

    def examples_alone(t):
        return float(plain.step(shared, client, plain.start(shared, client), jnp.int32(t)).so_far.gradient)

    drawn = {round(met(t) - examples_alone(t), 5) for t in range(6)}
    assert len(drawn) == 6  # a key for every step
    first, second = ([round(examples_alone(t), 5) for t in range(i, i + 3)] for i in (0, 3))
    assert sorted(first) != sorted(second)  # epochs are shuffled anew
    np.testing.assert_allclose(sum(first), sum(second), atol=1e-4)  # and meet the same examples
