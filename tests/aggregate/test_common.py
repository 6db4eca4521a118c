"""What holds for every aggregator. A new one joins by one row of AGGREGATORS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import close

from jfed import aggregate

AGGREGATORS = {
    "mean": aggregate.mean,
    "median": aggregate.median,
    "trimmed mean": lambda: aggregate.trimmed_mean(0.2),
    "krum": lambda: aggregate.krum(byzantine=1),
    "multi-krum": lambda: aggregate.multi_krum(byzantine=2, keep=3),
    "geometric median": lambda: aggregate.geometric_median(iterations=5),
    "centred clipping": lambda: aggregate.centred_clipping(2.0, iterations=2),
    "bucketed median": lambda: aggregate.bucketing(aggregate.median(), size=2),
    "bucketed mean": lambda: aggregate.bucketing(aggregate.mean(), size=3),
    "bucketed krum": lambda: aggregate.bucketing(aggregate.krum(byzantine=1), size=2),
    "attacked mean": lambda: aggregate.attacked(aggregate.mean(), aggregate.sign_flip(2.0), lambda ids: ids < 3),
    "attacked median": lambda: aggregate.attacked(aggregate.median(), aggregate.mimic(), lambda ids: ids < 3),
    "attacked bucketed median": lambda: aggregate.attacked(
        aggregate.bucketing(aggregate.median(), size=2), aggregate.alie(1.0), lambda ids: ids < 3
    ),
}
# Clipping remembers, and moves only so far; a flipped sign does not know where the others went.
NOT_A_MEAN = {"centred clipping", "attacked mean"}
MEANS = sorted(set(AGGREGATORS) - NOT_A_MEAN)
aggregators = pytest.mark.parametrize("name", AGGREGATORS)
means = pytest.mark.parametrize("name", MEANS)

SLOTS, EMPTY = 9, 12
IDS = np.array([4, 0, EMPTY, 7, 2, 11, 5, 1, 9])
WEIGHTS = np.array([3.0, 1.0, 0.0, 2.0, 5.0, 0.0, 1.0, 4.0, 2.0], np.float32)  # slots 2 and 5 are not there
KEY = jax.random.key(3)


def make_stack(seed=0, slots=SLOTS):
    rng = np.random.default_rng(seed)
    shapes = {"w": (slots, 4, 3), "inner": {"b": (slots, 3), "scalar": (slots,)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def shape_of(stack):
    return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), stack)


def rows(stack, index):
    return jax.tree.map(lambda x: x[np.asarray(index)], stack)


@functools.cache
def compiled(name):
    """The aggregator, its compiled update, and the list of its traces."""
    agg, traces = AGGREGATORS[name](), []

    def update(stack, state, weights, ids, key):
        traces.append(name)
        return agg.update(stack, state, shape_of(stack), weights=weights, ids=ids, key=key, round=jnp.int32(0))

    return agg, jax.jit(update), traces


def combined(name, stack, weights=WEIGHTS, ids=IDS, key=KEY):
    """The aggregate of a first round."""
    agg, update, _ = compiled(name)
    return update(stack, agg.init(shape_of(stack)), jnp.asarray(weights), jnp.asarray(ids), key)[0]


@functools.cache
def reference(name):
    return combined(name, make_stack())


@aggregators
@pytest.mark.parametrize("wild", [0.0, 1e6, -1e30, 3e38])
def test_what_absent_clients_hold_does_not_matter(name, wild):
    stack = jax.tree.map(lambda x: x.at[jnp.array([2, 5])].set(wild), make_stack())
    close(combined(name, stack), reference(name))


@aggregators
def test_absent_clients_do_not_matter(name):
    here = np.flatnonzero(WEIGHTS)
    close(combined(name, rows(make_stack(), here), WEIGHTS[here], IDS[here]), reference(name))


@aggregators
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_clients_does_not_matter(name, seed):
    order = np.random.default_rng(seed).permutation(SLOTS)
    close(combined(name, rows(make_stack(), order), WEIGHTS[order], IDS[order]), reference(name))


@aggregators
def test_how_a_message_is_cut_into_leaves_does_not_matter(name):
    flat = jnp.concatenate([x.reshape(SLOTS, -1) for x in jax.tree.leaves(make_stack())], axis=1)
    whole = combined(name, flat)
    close(whole, jnp.concatenate([x.ravel() for x in jax.tree.leaves(reference(name))]))


@aggregators
def test_a_compiled_update_equals_an_eager_one(name):
    agg = AGGREGATORS[name]()
    state = agg.init(shape_of(make_stack()))
    close(
        agg.update(make_stack(), state, weights=jnp.asarray(WEIGHTS), ids=jnp.asarray(IDS), key=KEY)[0], reference(name)
    )


@aggregators
def test_updates_side_by_side_equal_those_alone(name):
    agg, update, _ = compiled(name)
    stacks = [make_stack(seed) for seed in range(3)]
    many = jax.tree.map(lambda *x: jnp.stack(x), *stacks)
    weights = np.stack([WEIGHTS, np.ones(SLOTS, np.float32), WEIGHTS[::-1]])
    keys = jax.random.split(KEY, 3)
    state = agg.init(shape_of(make_stack()))
    together, _ = jax.vmap(update, (0, None, 0, None, 0))(many, state, jnp.asarray(weights), jnp.asarray(IDS), keys)
    for i in range(3):
        close(rows(together, i), combined(name, stacks[i], weights[i], key=keys[i]))


@aggregators
def test_one_program_serves_any_number_present(name):
    agg, update, traces = compiled(name)
    state = agg.init(shape_of(make_stack()))
    reference(name)
    before = len(traces)
    for present in range(SLOTS + 1):
        weights = jnp.asarray(np.arange(SLOTS) < present, jnp.float32)
        aggregated, state = update(make_stack(), state, weights, jnp.asarray(IDS), KEY)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(aggregated))
    assert len(traces) == before


@aggregators
def test_dtypes_come_back_and_half_precision_is_summed_in_single(name):
    # One leaf stays in single precision; the other rounds its messages, and once more the result.
    stack = {"half": make_stack()["w"].astype(jnp.bfloat16), "single": make_stack()["inner"]["b"]}
    got = combined(name, stack)
    exact = combined(name, jax.tree.map(lambda x: x.astype(jnp.float32), stack))
    assert got["half"].dtype == jnp.bfloat16 and got["single"].dtype == jnp.float32
    close(got["half"].astype(jnp.float32), exact["half"], tolerance=2**-7)
    if "attacked" not in name:  # an attacker's messages are rounded as well
        close(got["single"], exact["single"])


@aggregators
def test_nobody_present_is_a_zero_aggregate_and_the_state_stays(name):
    agg, update, _ = compiled(name)
    ids = jnp.asarray(IDS)
    _, state = update(make_stack(), agg.init(shape_of(make_stack())), jnp.ones(SLOTS), ids, KEY)
    got, after = update(make_stack(), state, jnp.zeros(SLOTS), ids, KEY)
    assert all(not np.any(x) for x in jax.tree.leaves(got))
    close(after, state)


@means
def test_an_aggregate_follows_a_translation_of_all_messages(name):
    shift = jax.tree.map(lambda x: jnp.full(x.shape[1:], 5.0), make_stack())
    moved = combined(name, jax.tree.map(lambda x, c: x + c[None], make_stack(), shift))
    close(moved, jax.tree.map(jnp.add, reference(name), shift), tolerance=1e-4)


@means
def test_what_all_send_alike_is_the_aggregate(name):
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), make_stack())
    close(combined(name, same), rows(same, 0))


@pytest.mark.parametrize("name", [name for name in MEANS if "attacked" not in name])
def test_one_client_alone_is_the_aggregate(name):
    weights = np.zeros(SLOTS, np.float32)
    weights[4] = 7.0
    close(combined(name, make_stack(), weights), rows(make_stack(), 4))


@aggregators
def test_an_aggregator_needs_neither_ids_nor_params(name):
    agg = AGGREGATORS[name]()
    bare, _ = agg.update(make_stack(), agg.init(shape_of(make_stack())), weights=jnp.asarray(WEIGHTS), key=KEY)
    close(bare, combined(name, make_stack(), ids=np.arange(SLOTS)))


WEIGH_ALIKE = ["median", "trimmed mean", "krum", "multi-krum", "centred clipping", "bucketed median", "bucketed mean"]


@pytest.mark.parametrize("name", WEIGH_ALIKE)
def test_the_sizes_of_weights_do_not_count(name):
    close(combined(name, make_stack(), (WEIGHTS > 0).astype(np.float32)), reference(name))
