"""The law of client maps on a work that exposes every way to break it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import close

from jfed import mesh, tree
from jfed.clients import lanes, sharded, vectorised
from jfed.clients.sharded import deal
from jfed.core import ClientWork, Cohort

# The carry records which client it belongs to and every step it saw, so that a lane that hands on a
# stale carry, skips a step, repeats one or forgets a client gives another number.
WORK = ClientWork(
    steps=lambda size: size,
    start=lambda shared, client: {"trace": client.ids + shared, "count": jnp.int32(0)},
    step=lambda shared, client, carry, t: {
        "trace": (carry["trace"] * 31 + t * 7 + client.ids) % 10007,
        "count": carry["count"] + 1,
    },
    finish=lambda shared, client, carry: (
        {"trace": carry["trace"], "state": client.state["memory"] * 2.0},
        {"traces": carry["trace"], "steps": carry["count"], "weighted": client.weight * jnp.ones(3)},
    ),
)
MAPS = {
    "vectorised": lambda: vectorised(),
    "vectorised, bounded": lambda: vectorised(max_steps=40),
    "lanes(1)": lambda: lanes(1),
    "lanes(2)": lambda: lanes(2),
    "lanes(5)": lambda: lanes(5),
    "lanes(100)": lambda: lanes(100),
    "sharded lanes": lambda: sharded(mesh.make(), lanes(2)),
    "sharded lanes over 3": lambda: sharded(mesh.make((3,)), lanes(1)),
    "sharded vectorised": lambda: sharded(mesh.make((2,)), vectorised()),
}
COHORTS = {
    "ragged": [3, 0, 17, 1, 1, 40, 0, 5, 2, 9, 0],
    "equal": [4] * 6,
    "idle": [0] * 5,
    "one": [7],
    "one idle": [0],
}


def make_cohort(steps):
    count = len(steps)
    ids = jnp.arange(count, dtype=jnp.int32) * 3 + 1
    return Cohort(
        ids=ids,
        start=ids,
        size=jnp.asarray(steps, jnp.int32),
        steps=jnp.asarray(steps, jnp.int32),
        weight=(1 + jnp.arange(count, dtype=jnp.float32)) / 4,
        state={"memory": jnp.arange(2.0 * count).reshape(count, 2)},
    )


def alone(shared, client):
    """One client by the definition of ClientWork, in plain Python."""
    carry = WORK.start(shared, client)
    for t in range(int(client.steps)):
        carry = WORK.step(shared, client, carry, jnp.int32(t))
    return WORK.finish(shared, client, carry)


@functools.cache
def expected(name):
    cohort = make_cohort(COHORTS[name])
    results = [alone(jnp.int32(5), tree.take(cohort, i)) for i in range(len(COHORTS[name]))]
    kept, added = (jax.tree.map(lambda *x: np.stack(x), *part) for part in zip(*results, strict=True))
    return kept, jax.tree.map(lambda x: x.sum(0), added)


@pytest.mark.parametrize("cohort", COHORTS)
@pytest.mark.parametrize("client_map", MAPS)
def test_a_map_stacks_what_is_kept_and_sums_what_is_added(client_map, cohort):
    run = jax.jit(lambda shared, clients: MAPS[client_map]()(WORK, shared, clients))
    result = run(jnp.int32(5), make_cohort(COHORTS[cohort]))
    close(result, expected(cohort), tolerance=1e-6)


def test_lanes_take_no_more_steps_than_list_scheduling_needs():
    """Counted in steps of the whole program, by a carry that all lanes share."""
    steps = [9, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    seen = []
    work = WORK._replace(
        step=lambda shared, client, carry, t: (
            jax.debug.callback(lambda i: seen.append(int(i)), client.ids),
            WORK.step(shared, client, carry, t),
        )[1]
    )
    jax.block_until_ready(jax.jit(lambda c: lanes(2)(work, jnp.int32(0), c))(make_cohort(steps)))
    jax.effects_barrier()
    assert len(seen) == 2 * 9  # two lanes, nine steps: one lane has the long client, the other all others


def test_memory_of_lanes_does_not_grow_with_the_cohort():
    model = jnp.zeros(10_000)
    work = ClientWork(
        steps=lambda size: size,
        start=lambda shared, client: shared,
        step=lambda shared, client, carry, t: carry + 1.0,
        finish=lambda shared, client, carry: ((), client.weight * carry),
    )

    def temporary_bytes(client_map, count):
        program = jax.jit(lambda shared, clients: client_map(work, shared, clients))
        return program.lower(model, make_cohort([1] * count)).compile().memory_analysis().temp_size_in_bytes

    small, large = (temporary_bytes(lanes(4), count) for count in (40, 400))
    assert large - small < 360 * 200  # bookkeeping of a client, not its 40,000 bytes of model
    assert temporary_bytes(vectorised(), 400) > 400 * model.nbytes  # the measure does see models


def test_a_bounded_vectorised_map_can_be_differentiated():
    work = ClientWork(
        steps=lambda size: size,
        start=lambda shared, client: shared,
        step=lambda shared, client, carry, t: carry * 1.5,
        finish=lambda shared, client, carry: ((), client.weight * carry),
    )
    clients = make_cohort([0, 2, 3])
    gradient = jax.grad(lambda w: vectorised(max_steps=3)(work, w, clients)[1])(2.0)
    np.testing.assert_allclose(gradient, 0.25 + 0.5 * 1.5**2 + 0.75 * 1.5**3, rtol=1e-6)


HEAVY = {
    "log-normal": lambda rng: rng.lognormal(2, 1.5, 200),
    "power law": lambda rng: np.minimum(3 * (1 + rng.pareto(1.2, 200)), 300),
}


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("sizes", HEAVY)
def test_dealing_is_within_3_percent_of_the_least_that_the_busiest_device_can_do(sizes, devices):
    rng = np.random.default_rng(0)
    for _ in range(5):
        steps = np.ceil(HEAVY[sizes](rng)).astype(np.int32)
        slots = 2 * 200 // devices
        slot = np.asarray(deal(jnp.asarray(steps), devices, slots))
        assert len(set(slot.tolist())) == 200
        load = np.bincount(slot // slots, steps, minlength=devices)
        assert load.max() <= 1.03 * max(steps.max(), steps.sum() / devices)


def test_a_device_is_dealt_no_more_clients_than_it_has_slots():
    steps = jnp.asarray([1000] + [1] * 11, jnp.int32)
    slot = np.asarray(deal(steps, 2, 8))
    assert np.bincount(slot // 8).max() == 8 and len(set(slot.tolist())) == 12


def test_each_device_does_the_steps_it_was_dealt():
    rng = np.random.default_rng(0)
    steps = rng.lognormal(3, 1, 160).astype(int) + 1
    done = {}
    work = WORK._replace(
        step=lambda shared, client, carry, t: (
            jax.debug.callback(
                lambda d: done.__setitem__(int(d), done.get(int(d), 0) + 1), jax.lax.axis_index("clients")
            ),
            WORK.step(shared, client, carry, t),
        )[1]
    )
    run = jax.jit(lambda c: sharded(mesh.make((4,)), lanes(1))(work, jnp.int32(0), c))
    jax.block_until_ready(run(make_cohort(steps.tolist())))
    jax.effects_barrier()
    assert sum(done.values()) == steps.sum()
    assert max(done.values()) < 1.03 * steps.sum() / 4


@pytest.mark.parametrize("client_map", MAPS)
def test_absent_clients_are_not_looked_at(client_map):
    """No steps and no weight: even a finish that gives NaN for them cannot be seen."""
    work = WORK._replace(
        finish=lambda shared, client, carry: jax.tree.map(
            lambda x: jnp.where(client.weight == 0, x * jnp.nan, x), WORK.finish(shared, client, carry)
        )
    )
    cohort = make_cohort([3, 0, 2, 0, 0])
    cohort = cohort._replace(weight=cohort.weight.at[jnp.array([1, 4])].set(0.0))
    kept, added = jax.jit(lambda c: MAPS[client_map]()(work, jnp.int32(5), c))(cohort)
    alone_kept, alone_added = zip(*(alone(jnp.int32(5), tree.take(cohort, i)) for i in (0, 2, 3)), strict=True)
    close(added, jax.tree.map(lambda *x: sum(x), *alone_added), tolerance=1e-6)
    close(tree.take(kept, jnp.array([0, 2, 3])), jax.tree.map(lambda *x: np.stack(x), *alone_kept), tolerance=1e-6)
    close(tree.take(kept, jnp.array([1, 4])), jax.tree.map(lambda x: np.zeros_like(x[:2]), kept), tolerance=0)


@pytest.mark.parametrize(("width", "at_once"), [(1, 1), (8, 2)])
def test_finish_runs_once_for_a_few_lanes_not_in_every_step(width, at_once):
    """Counted in calls of the whole program: clients of one length finish together, the others alone."""
    steps, seen = [40, 30, 20, 10] + [3] * 4, []
    work = WORK._replace(
        finish=lambda shared, client, carry: (
            jax.debug.callback(lambda i: seen.append(int(i)), client.ids),
            WORK.finish(shared, client, carry),
        )[1]
    )
    jax.block_until_ready(jax.jit(lambda c: lanes(width)(work, jnp.int32(0), c))(make_cohort(steps)))
    jax.effects_barrier()
    ends = [1] * 8 if width == 1 else [2, 2, 2, 2, 2, 2]  # 3, 3, 10, 20, 30, 40: calls for two lanes each
    assert len(seen) == sum(ends) and max(ends) == at_once


@pytest.mark.parametrize("width", [0, -1, 2.5, "automatic", True])
def test_a_width_that_is_no_count_is_refused(width):
    with pytest.raises(ValueError, match=r"lanes\(width=.*at least 1; a good start is 16"):
        lanes(width)


def test_a_bound_that_is_no_count_is_refused():
    with pytest.raises(ValueError, match=r"vectorised\(max_steps=0\)"):
        vectorised(max_steps=0)


def test_a_bound_known_to_be_too_low_is_refused():
    with pytest.raises(ValueError, match=r"vectorised\(max_steps=3\): a client of this cohort does 4 steps"):
        vectorised(max_steps=3)(WORK, jnp.int32(0), make_cohort([4, 1]))


def test_an_axis_the_mesh_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"sharded\(axis='x'\): the mesh has axes \('clients',\)"):
        sharded(mesh.make(), lanes(1), axis="x")
