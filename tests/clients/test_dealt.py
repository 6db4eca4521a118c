"""Dealing on the host, and the client map for what was dealt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import close

from jfed import mesh
from jfed.clients import dealt, lanes, vectorised
from jfed.clients.dealt import deal_on_host
from jfed.core import ClientWork, Cohort, Shared

DEVICES, SLOTS, ROWS = 4, 3, 6  # slots and rows of each device

# A client sums its own rows, one a step: rows of another client, or of no client, give another number.
WORK = ClientWork(
    steps=lambda size: size,
    start=lambda shared, client: jnp.zeros(()),
    step=lambda shared, client, carry, t: carry + shared.examples["x"][client.start + t] * shared.params,
    finish=lambda shared, client, carry: (
        {"sum": carry, "id": client.ids, "weight": client.weight},
        {"sum": carry, "steps": client.steps},
    ),
)
SHARED = Shared(
    jnp.float32(2.0), {"x": jnp.arange(1.0, DEVICES * ROWS + 1)}, jax.random.key(0), jnp.zeros((), jnp.int32)
)


OVER_DEVICES = {
    name: jax.jit(lambda shared, clients, inner=inner: dealt(mesh.make((DEVICES,)), inner)(WORK, shared, clients))
    for name, inner in {"vectorised": vectorised(), "lanes(2)": lanes(2)}.items()
}


def dealt_cohort():
    """Hands of 3, 1, 0 and 2 clients, told by where their rows lie in all 24."""
    size = np.array([[1, 2, 3], [6, 0, 0], [0, 0, 0], [2, 2, 0]], np.int32)
    start = np.cumsum(size, 1) - size + np.arange(DEVICES)[:, None] * ROWS
    return Cohort(
        ids=jnp.where(size.reshape(-1) > 0, jnp.arange(DEVICES * SLOTS), 99).astype(jnp.int32),
        start=jnp.asarray(start.reshape(-1), jnp.int32),
        size=jnp.asarray(size.reshape(-1)),
        steps=jnp.asarray(size.reshape(-1)),
        weight=jnp.asarray(size.reshape(-1), jnp.float32),
    )


@pytest.mark.parametrize("inner", OVER_DEVICES)
def test_each_device_sums_its_own_clients_and_keeps_their_order(inner):
    cohort = dealt_cohort()
    kept, added = OVER_DEVICES[inner](SHARED, cohort)
    sums = [2 * sum(range(s + 1, s + n + 1)) for s, n in zip(cohort.start.tolist(), cohort.size.tolist(), strict=True)]
    np.testing.assert_array_equal(kept["id"], np.where(cohort.size > 0, cohort.ids, 0))  # an absent client keeps 0
    np.testing.assert_array_equal(kept["weight"], cohort.weight)
    close(kept["sum"], jnp.asarray(sums, jnp.float32))
    close(added, {"sum": jnp.float32(sum(sums)), "steps": jnp.int32(16)})


def test_a_cohort_dealt_on_the_host_means_the_same_to_every_map():
    cohort = dealt_cohort()
    one_device = jax.jit(lambda shared, clients: vectorised()(WORK, shared, clients))
    close(OVER_DEVICES["vectorised"](SHARED, cohort), one_device(SHARED, cohort))


@pytest.mark.parametrize("shift", [-ROWS, ROWS, 1], ids=["the block before", "the block after", "across the border"])
def test_a_client_whose_rows_lie_elsewhere_weighs_nan(shift):
    cohort = dealt_cohort()
    wrong = 3  # the one client of device 1, which fills its block
    cohort = cohort._replace(start=cohort.start.at[wrong].add(shift))
    kept, _ = OVER_DEVICES["vectorised"](SHARED, cohort)
    assert np.flatnonzero(np.isnan(kept["weight"])).tolist() == [wrong]


def heavy_tailed(count, seed):
    return np.random.default_rng(seed).lognormal(3, 1, count).astype(int) + 1


@pytest.mark.parametrize(("count", "devices"), [(100, 2), (160, 4), (400, 8)])
def test_dealing_leaves_devices_less_than_three_percent_apart(count, devices):
    for seed in range(5):
        steps = heavy_tailed(count, seed)
        hands = deal_on_host(
            steps, np.arange(count), steps, devices=devices, slots=2 * -(-count // devices), capacity=steps.sum()
        )
        loads = np.append(steps, 0)[hands].sum(1)
        assert loads.sum() == steps.sum()
        assert loads.max() < 1.03 * loads.min()


def test_dealing_in_turns_is_not_enough_for_that():
    """The bound above tells dealing by load from dealing by count."""
    steps = np.sort(heavy_tailed(160, 0))[::-1]
    loads = steps.reshape(-1, 4).sum(0)
    assert loads.max() > 1.03 * loads.min()


def test_every_client_is_dealt_once_and_an_empty_slot_never():
    ids = np.array([4, 9, 0, 9, 2, 9])  # of 9 clients
    hands = deal_on_host(np.array([5, 0, 1, 0, 0, 0]), ids, np.ones(9, int), devices=2, slots=3, capacity=9)
    assert hands.shape == (2, 3)
    assert sorted(hands.reshape(-1).tolist()) == [0, 2, 4, 6, 6, 6]


def test_no_device_gets_more_clients_than_it_has_slots():
    steps = np.array([100] + [1] * 9)
    hands = deal_on_host(steps, np.arange(10), steps, devices=2, slots=6, capacity=1000)
    assert (hands < 10).sum(1).tolist() == [4, 6]  # by load alone it would be 1 and 9


def test_a_device_without_room_for_the_rows_is_passed_over():
    steps, size = np.array([9, 2, 2, 2]), np.array([1, 4, 4, 4])
    hands = deal_on_host(steps, np.arange(4), size, devices=2, slots=4, capacity=8)
    assert [sorted(h[h < 4].tolist()) for h in hands] == [[0, 3], [1, 2]]  # by load alone [0] and [1, 2, 3]


def test_rows_of_a_client_drawn_twice_take_room_once():
    hands = deal_on_host(np.array([3, 3, 1]), np.array([0, 0, 1]), np.array([5, 3]), devices=1, slots=3, capacity=8)
    assert hands.tolist() == [[0, 1, 2]]


def test_an_axis_the_mesh_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"dealt\(axis='x'\): the mesh has axes \('clients',\)"):
        dealt(mesh.make(), vectorised(), axis="x")


@pytest.mark.parametrize(("slots", "rows"), [(DEVICES * SLOTS - 1, DEVICES * ROWS), (DEVICES * SLOTS, 23)])
def test_a_cohort_that_was_not_dealt_is_refused(slots, rows):
    cohort = jax.tree.map(lambda x: x[:slots], dealt_cohort())
    shared = SHARED._replace(examples={"x": SHARED.examples["x"][:rows]})
    with pytest.raises(ValueError, match=r"dealt\(mesh of 4 devices\): .* was not dealt to them; use run.stream"):
        dealt(mesh.make((DEVICES,)), vectorised())(WORK, shared, cohort)
