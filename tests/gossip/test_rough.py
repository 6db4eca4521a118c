"""Rounds in which peers are away, do not train, or are not heard: each method against a loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import quadratic

from jfed import compress, gossip, local
from jfed.availability import per_step
from jfed.core import make_cohort
from jfed.gossip import topology

N, D, T, ETA = quadratic.CLIENTS, quadratic.DIMENSIONS, 7, 0.1
WORK = local.gradient(quadratic.loss, chunk_size=1)
POPULATION = quadratic.population(spread=2.0)
A, B = (np.asarray(POPULATION.examples[name], np.float64) for name in "ab")
RNG = np.random.default_rng(4)
PRESENT = RNG.random((T, N)) < 0.8
STEPS = PRESENT & (RNG.random((T, N)) < 0.7)
ARRIVES = RNG.random((T, N, N)) < 0.8
START = RNG.normal(size=(N, D))
RING, LAZY, TREE = topology.ring(N), topology.lazy(topology.ring(N)), topology.binary_tree(N)
PUSH = topology.directed_ring(N, weights=topology.push)


def found(algorithm):
    """The state after the rough rounds."""
    everyone = make_cohort(POPULATION, jnp.arange(N), steps=WORK.steps)
    state = algorithm.init(jnp.zeros(D))
    state = state._replace(params=jnp.asarray(START, jnp.float32))
    one_round = jax.jit(algorithm.round)
    for t in range(T):
        rough = everyone._replace(
            steps=jnp.asarray(STEPS[t], jnp.int32),
            weight=jnp.asarray(PRESENT[t], jnp.float32),
            state=jnp.asarray(ARRIVES[t]),
        )
        state, metrics = one_round(state, rough, jax.random.key(t))
        assert int(metrics["steps"]) == STEPS[t].sum() and int(metrics["reports"]) == PRESENT[t].sum()
    return state


def came(w, t):
    """Which messages came, [n, n]."""
    here = PRESENT[t]
    return (w != 0) & ~np.eye(N, dtype=bool) & here[:, None] & here[None] & ARRIVES[t]


def own_instead(graph, t):
    w = topology.matrices(graph)[0]
    out = np.where(came(w, t), w, 0)
    np.fill_diagonal(out, 1 - out.sum(1))
    return out


def gradient(x):
    return A * (x - B)


def column(flags):
    return flags[:, None]


def test_dpsgd_with_momentum():
    x, m = START.copy(), np.zeros((N, D))
    for t in range(T):
        trained = column(STEPS[t])
        m = np.where(trained, 0.9 * m + gradient(x), m)
        x = own_instead(RING, t) @ x - np.where(trained, ETA * m, 0)
    problem.close(found(gossip.dpsgd(WORK, RING, optimizer=optax.sgd(ETA, momentum=0.9))).params, x)


def test_quasi_global_momentum():
    x, m = START.copy(), np.zeros((N, D))
    for t in range(T):
        half = np.where(column(STEPS[t]), x - ETA * (0.9 * m + gradient(x)), x)
        new = own_instead(RING, t) @ half
        m = np.where(column(PRESENT[t]), 0.9 * m + 0.1 * (x - new) / ETA, m)
        x = new
    problem.close(found(gossip.quasi_global(WORK, RING, learning_rate=ETA)).params, x)


def test_gradient_tracking():
    x, mixed, old = START.copy(), np.zeros((N, D)), np.zeros((N, D))
    for t in range(T):
        here, trained, w = column(PRESENT[t]), column(STEPS[t]), own_instead(RING, t)
        g = np.where(trained, gradient(x), old)
        y = mixed + g - old
        new, told = w @ np.where(here, x - np.where(trained, ETA * y, 0), x), w @ y
        x, mixed, old = np.where(here, new, x), np.where(here, told, mixed), np.where(here, g, old)
    problem.close(found(gossip.gradient_tracking(WORK, RING, optimizer=optax.sgd(ETA))).params, x)


def test_d2():
    x, c, u = START.copy(), np.zeros((N, D)), np.zeros((N, D))
    for t in range(T):
        here, w = column(PRESENT[t]), own_instead(LAZY, t)
        now = np.where(column(STEPS[t]), -ETA * gradient(x), u)
        ahead = x + now + c
        new = w @ ahead
        x, c, u = np.where(here, new, x), np.where(here, c + new - ahead, c), np.where(here, now, u)
    problem.close(found(gossip.d2(WORK, LAZY, optimizer=optax.sgd(ETA))).params, x)


def test_choco_counts_what_everybody_heard_and_nothing_else():
    w, gamma = topology.matrices(RING)[0], 0.5
    x, public = START.copy(), np.zeros((N, D))
    state = found(gossip.choco(WORK, RING, compressor=compress.top_k(1.0), step_size=gamma, optimizer=optax.sgd(ETA)))
    for t in range(T):
        here = column(PRESENT[t])
        half = np.where(column(STEPS[t]), x - ETA * gradient(x), x)
        to_hear = (w != 0) & ~np.eye(N, dtype=bool)
        heard_by_all = (came(w, t) | ~to_hear).all(0)
        public = np.where(column(heard_by_all), half, public)
        x = np.where(here, half + gamma * (w @ public - public), x)
    problem.close(state.params, x)


def test_choco_keeps_the_mean_whatever_is_lost_and_goes_on_to_agree():
    algorithm = gossip.choco_gossip(RING, compressor=compress.top_k(0.34), step_size=0.3)
    state = algorithm.init(jnp.zeros(D))._replace(params=jnp.asarray(START, jnp.float32))
    everyone = make_cohort(POPULATION, jnp.arange(N), steps=WORK.steps)
    one_round = jax.jit(algorithm.round)
    for t in range(400):
        heard = jnp.asarray(np.random.default_rng(t).random((N, N)) < 0.95)
        state, metrics = one_round(state, everyone._replace(state=heard), jax.random.key(t))
    assert float(metrics["consensus"]) < 1e-3
    problem.close(state.params.mean(0), START.mean(0), 1e-4)


def test_push_sum():
    w = topology.matrices(PUSH)[0]
    x, mass = START.copy(), np.ones(N)
    for t in range(T):
        here, trained = PRESENT[t], column(STEPS[t])
        half = x - np.where(trained, ETA * gradient(x / column(mass)), 0)
        out = np.where(came(w, t), w, 0)
        for i in range(N):
            for j in range(N):
                if i != j and w[i, j] and not (here[i] and here[j]):
                    out[j, j] += w[i, j]  # kept by who would have sent it
                elif i != j and w[i, j] and not ARRIVES[t, i, j]:
                    out[i, i] += w[i, j]  # its own in its place
        np.fill_diagonal(out, np.diag(out) + np.diag(w))
        x, mass = np.where(column(here), out @ half, x), np.where(here, out @ mass, mass)
    state = found(gossip.push_sum(WORK, PUSH, optimizer=optax.sgd(ETA)))
    problem.close(state.params, x)
    problem.close(state.memory, mass)


def test_push_sum_keeps_the_mean_while_peers_come_and_go():
    algorithm = gossip.push_sum(None, PUSH)
    state = algorithm.init(jnp.zeros(D))._replace(params=jnp.asarray(START, jnp.float32))
    everyone = make_cohort(POPULATION, jnp.arange(N), steps=WORK.steps)
    one_round = jax.jit(algorithm.round)
    for t in range(250):
        away = jnp.arange(N) == (t % N if t < 50 else N)
        state, _ = one_round(state, everyone._replace(weight=jnp.where(away, 0.0, 1.0)), jax.random.key(t))
    problem.close(algorithm.params(state), START.mean(0), 1e-4)
    problem.close(state.memory.sum(), float(N), 1e-4)


def test_relay():
    w = topology.matrices(TREE)[0]
    x, said, count = START.copy(), np.zeros((N, N, D)), np.zeros((N, N))  # [hearer, speaker]
    for t in range(T):
        half = x - np.where(column(STEPS[t]), ETA * gradient(x), 0)
        heard = came(w, t)
        told, numbers = np.zeros_like(said), np.zeros_like(count)
        for i, j in np.argwhere(heard):
            others = np.arange(N) != i
            told[i, j] = half[j] + said[j, others].sum(0)
            numbers[i, j] = 1 + count[j, others].sum()
        mean = (half + told.sum(1) + column(N - 1 - numbers.sum(1)) * x) / N
        here = PRESENT[t]
        x = np.where(column(here), mean, x)
        said = np.where(here[:, None, None], told, said)
        count = np.where(column(here), numbers, count)
    problem.close(found(gossip.relay(WORK, TREE, optimizer=optax.sgd(ETA))).params, x)


def test_peers_of_no_steps_are_neighbours_of_others_that_do_not_wait_for_them():
    algorithm = gossip.ad_psgd(
        WORK, topology.complete(3), gradients=12, duration=per_step([1.0, 1.45, 10.0]), optimizer=optax.sgd(ETA)
    )
    everyone = make_cohort(POPULATION, jnp.arange(3), steps=WORK.steps)
    some = everyone._replace(steps=jnp.array([1, 1, 0]))
    state, metrics = jax.jit(algorithm.round)(algorithm.init(jnp.zeros(D)), some, jax.random.key(0))
    assert int(metrics["steps"]) == 12 and float(metrics["seconds"]) == pytest.approx(7.25)  # five times 1.45
    assert np.isnan(state.due[2]) and np.abs(state.params[2]).max() > 0
    away = everyone._replace(weight=jnp.array([1.0, 1.0, 0.0]), steps=jnp.array([1, 1, 0]))
    state, _ = jax.jit(algorithm.round)(state, away, jax.random.key(1))
    before = state.params[2]
    state, _ = jax.jit(algorithm.round)(state, everyone, jax.random.key(2))
    assert float(state.due[2]) > 2 and np.abs(state.params[2] - before).max() > 0  # its first takes ten seconds


def test_nobody_there_changes_nothing():
    algorithm = gossip.ad_psgd(WORK, RING, optimizer=optax.sgd(ETA))
    everyone = make_cohort(POPULATION, jnp.arange(N), steps=WORK.steps)
    one_round = jax.jit(algorithm.round)
    state, _ = one_round(algorithm.init(jnp.zeros(D)), everyone, jax.random.key(0))
    after, metrics = one_round(
        state, everyone._replace(steps=jnp.zeros(N, jnp.int32), weight=jnp.zeros(N)), jax.random.key(1)
    )
    jax.tree.map(np.testing.assert_array_equal, state._replace(round=0), after._replace(round=0))
    assert int(metrics["reports"]) == 0 and float(metrics["seconds"]) == 0
