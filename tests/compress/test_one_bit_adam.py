"""1-bit Adam: exact limits, its two errors, what it learns, and what it sends."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jfed import compress, mesh
from jfed._axis import uncut
from jfed.compress.one_bit_adam import one_bit_adam

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

WORKERS = 4


def gradients(steps, seed=0):
    """Leaves [steps, workers, ...]: 23 numbers, which four workers cut into chunks of 6."""
    draw = np.random.default_rng(seed)
    mean = {"w": draw.normal(size=(1, 1, 3, 7)), "b": draw.normal(size=(1, 1, 2))}
    return jax.tree.map(lambda m: jnp.asarray(m + draw.normal(size=(steps, WORKERS, *m.shape[2:])), jnp.float32), mean)


def zeros(g):
    return jax.tree.map(lambda g: jnp.zeros(g.shape[2:]), g)


def updates_of(optimizer, g, params, **extra_args):
    """Every worker's updates, leaves [steps, workers, ...], and the states after each."""

    def worker(g):
        def step(state, g):
            updates, state = optimizer.update(g, state, params, **extra_args)
            return state, (updates, state[0])

        return lax.scan(step, optimizer.init(params), g)[1]

    return jax.jit(jax.vmap(worker, axis_name="workers", in_axes=1, out_axes=1))(g)


def close(a, b, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.01, 5)], ids=["number", "schedule"])
def test_within_the_warmup_it_is_adam_of_the_mean_gradient(rate):
    g = gradients(6)
    updates, states = updates_of(one_bit_adam(rate, warmup=6, axis_name="workers"), g, zeros(g))
    adam = optax.adam(rate)
    mean = jax.tree.map(lambda g: g.mean(1), g)
    expected = lax.scan(lambda state, g: adam.update(g, state)[::-1], adam.init(zeros(g)), mean)[1]
    close(updates, jax.tree.map(lambda e: jnp.stack([e] * WORKERS, 1), expected))
    close(states.worker.residual, jnp.zeros((6, WORKERS, WORKERS, 6)))


def frozen(g, rate, warmup, b1=0.9, b2=0.999, eps=1e-8):
    """Adam of gradients [steps, d] whose variance stays as it is after the warm-up."""
    m, v, updates = np.zeros(g.shape[1]), np.zeros(g.shape[1]), []
    for t, g_t in enumerate(np.asarray(g, np.float64), 1):
        m = b1 * m + (1 - b1) * g_t
        if t <= warmup:
            v = b2 * v + (1 - b2) * g_t**2
        updates.append(-rate * m / (1 - b1**t) / (np.sqrt(v / (1 - b2 ** min(t, warmup))) + eps))
    return np.stack(updates)


def flat(tree):
    """Leaves [steps, ...] as [steps, d]."""
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)


@pytest.mark.parametrize("axis_name", ["workers", None])
def test_with_exact_messages_it_is_adam_with_frozen_variance(axis_name):
    g = gradients(9)
    exact = one_bit_adam(0.1, warmup=4, axis_name=axis_name, compressor=compress.top_k(1.0))
    updates, _ = updates_of(exact, g, zeros(g))
    first = jax.tree.map(lambda u: u[:, 0], updates)
    mean = jax.tree.map(lambda g: g.mean(1) if axis_name else g[:, 0], g)
    np.testing.assert_allclose(flat(first), frozen(flat(mean), 0.1, 4), rtol=1e-4, atol=1e-6)


def test_both_errors_telescope():
    """Over all steps, the momenta that arrived and both residuals add up to the mean of those that were to be sent."""
    steps, warmup, b1 = 30, 5, 0.9
    g = gradients(steps)
    _, states = updates_of(one_bit_adam(0.1, warmup=warmup, axis_name="workers"), g, zeros(g))
    assert states.worker.residual.shape == (steps, WORKERS, WORKERS, 6)
    assert states.server.residual.shape == (steps, WORKERS, 6)
    mu = flat(jax.tree.map(lambda m: m[:, 0], states.mu))
    wanted = b1 * mu[warmup - 1 : -1] + (1 - b1) * flat(jax.tree.map(lambda g: g.mean(1), g))[warmup:]
    not_sent = states.worker.residual[-1].mean(0) + states.server.residual[-1]  # chunk by chunk: worker i serves i
    not_sent = uncut(not_sent, 23)
    np.testing.assert_allclose(mu[warmup:].sum(0) + not_sent, wanted.sum(0), rtol=1e-4, atol=1e-5)
    assert jnp.abs(states.server.residual[-1]).max() > 1e-3 and jnp.abs(states.worker.residual[-1]).max() > 1e-3


def test_variance_is_frozen_and_all_workers_move_alike():
    g = gradients(12)
    updates, states = updates_of(one_bit_adam(0.1, warmup=5, axis_name="workers"), g, zeros(g))
    jax.tree.map(lambda v: np.testing.assert_array_equal(v[5:], jnp.stack([v[4]] * 7)), states.nu)
    for tree in (updates, states.mu):
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, jnp.stack([x[:, 0]] * WORKERS, 1)), tree)
    # One bit a number: within a chunk all momenta are of one size.
    momenta = np.abs(flat(jax.tree.map(lambda m: m[:, 0], states.mu)))[5:]
    assert all(len(np.unique(row)) == WORKERS for row in momenta)


def test_a_number_without_a_gradient_stays():
    g = jax.tree.map(lambda g: g.at[..., 0].set(0), gradients(12))
    updates, _ = updates_of(one_bit_adam(0.1, warmup=5, axis_name="workers"), g, zeros(g))
    jax.tree.map(lambda u: np.testing.assert_array_equal(u[..., 0], jnp.zeros_like(u[..., 0])), updates)
    assert all(jnp.all(u[..., 1:] != 0) for u in jax.tree.leaves(updates))


def test_compressors_that_draw_take_a_key():
    g = gradients(8)
    draws = one_bit_adam(0.1, warmup=3, axis_name="workers", compressor=compress.quantize(8, per=4))
    updates, _ = updates_of(draws, g, zeros(g), key=jax.random.key(0))
    expected = frozen(flat(jax.tree.map(lambda g: g.mean(1), g)), 0.1, 3)
    np.testing.assert_allclose(flat(jax.tree.map(lambda u: u[:, 0], updates)), expected, atol=0.01)
    with pytest.raises(ValueError, match="pass key="):
        updates_of(draws, g, zeros(g))


def regression(workers=8, examples=100, d=40):
    """Logistic regression over workers whose examples differ in kind; its loss, and gradient of one worker."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(workers, examples, d)) * np.geomspace(0.2, 3, d) + 0.3 * draw.normal(size=(workers, 1, d))
    y = draw.random(size=(workers, examples)) < 1 / (1 + np.exp(-x @ draw.normal(size=d)))

    def loss(w, x, y):
        return jnp.mean(jnp.logaddexp(0, -(2 * y - 1) * (x @ w))) + 1e-3 * jnp.sum(w**2)

    return loss, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def trained(optimizer, steps=600):
    """The loss over all workers' examples after training in batches of 20."""
    loss, x, y = regression()

    def worker(x, y):
        def step(carry, t):
            w, state = carry
            rows = jax.random.randint(
                jax.random.fold_in(jax.random.key(2), t * 8 + lax.axis_index("workers")), 20, 0, 100
            )
            g = jax.grad(loss)(w, x[rows], y[rows])
            updates, state = optimizer.update(g, state, w)
            return (w + updates, state), None

        w = jnp.zeros(x.shape[1])
        return lax.scan(step, (w, optimizer.init(w)), jnp.arange(steps))[0][0]

    w = jax.jit(jax.vmap(worker, axis_name="workers"))(x, y)
    np.testing.assert_array_equal(w, jnp.stack([w[0]] * 8))
    return float(jnp.mean(jax.vmap(loss, (None, 0, 0))(w[0], x, y)))


def test_it_learns_as_well_as_adam():
    rate = optax.cosine_decay_schedule(0.05, 600)
    full = trained(one_bit_adam(rate, warmup=600, axis_name="workers"))
    compressed = trained(one_bit_adam(rate, warmup=100, axis_name="workers"))
    start = np.log(2)
    assert full < 0.6 * start
    assert compressed - full < 0.02 * (start - full)


def sent_by_branch(text):
    """Of each computation of a compiled program that sends something: operation, element type and numbers."""
    found = []
    for body in re.findall(r"^%?[\w.\-]+ [^\n]*\{\n(.*?)^\}", text, re.M | re.S):
        here = {}
        for types, operation in re.findall(
            r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", body
        ):
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
                key = operation, kind
                here[key] = here.get(key, 0) + int(np.prod([int(s) for s in shape.split(",") if s], initial=1))
        found += [here] if here else []
    return sorted(found, key=len)


def on_devices(optimizer, d):
    """One step on four devices, state and gradient of each in rows."""
    spec = PartitionSpec("workers")
    place = mesh.shard_map(mesh=mesh.make((WORKERS,), ("workers",)), in_specs=spec, out_specs=spec)

    def rows(tree):
        return jax.tree.map(lambda x: x[None], tree)

    def step(g, state):
        return rows(optimizer.update(g[0], jax.tree.map(lambda x: x[0], state)))

    return jax.jit(place(lambda g: rows(optimizer.init(jnp.zeros(d))))), jax.jit(place(step))


def test_on_devices_it_moves_one_bit_a_number():
    d = 4096
    init, step = on_devices(one_bit_adam(0.1, warmup=3, axis_name="workers"), d)
    g = jax.random.normal(jax.random.key(0), (6, WORKERS, d))
    state = init(g[0])
    warm, sent = sent_by_branch(step.lower(g[0], state).compile().as_text())
    assert warm == {("all-reduce", "f32"): d}
    assert sent == {
        ("all-to-all", "u8"): d // 8,
        ("all-to-all", "f32"): WORKERS,  # a scale for each chunk
        ("all-gather", "u8"): d // 8,
        ("all-gather", "f32"): WORKERS,
    }

    simulated, _ = updates_of(one_bit_adam(0.1, warmup=3, axis_name="workers"), g, jnp.zeros(d))
    for t in range(6):
        updates, state = step(g[t], state)
        close(updates, simulated[t], 1e-4)


def test_it_passes_the_check_of_varying_types():
    adam = one_bit_adam(0.1, warmup=3, axis_name="workers")
    spec = PartitionSpec("workers")

    @functools.partial(jax.shard_map, mesh=mesh.make((4,), ("workers",)), in_specs=spec, out_specs=spec, check_vma=True)
    def first_step(g):
        return adam.update(g[0], adam.init(jnp.zeros(99)))[0][None]

    assert jax.eval_shape(first_step, jnp.zeros((4, 99))).shape == (4, 99)


def test_a_bad_setting_is_said_at_once():
    with pytest.raises(ValueError, match="warmup must be a whole number of at least 1"):
        one_bit_adam(0.1, warmup=0)
    with pytest.raises(ValueError, match=r"b1 must lie in \[0, 1\)"):
        one_bit_adam(0.1, warmup=1, b1=1.0)
    with pytest.raises(ValueError, match=r"b2 must lie in \[0, 1\)"):
        one_bit_adam(0.1, warmup=1, b2=-0.1)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
        one_bit_adam(0.1, warmup=1, eps=-1)
    with pytest.raises(ValueError, match="there is no such axis here; call init and update inside"):
        one_bit_adam(0.1, warmup=1, axis_name="workers").init(jnp.zeros(3))
    with pytest.raises(ValueError, match="no contraction"):
        signs = one_bit_adam(0.1, warmup=1, compressor=compress.sign())
        signs.update(jnp.ones(3), signs.init(jnp.ones(3)))
