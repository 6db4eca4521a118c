"""Masks that cancel over a neighbourhood: sums are exact, and messages tell nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

from jfed import compress, local, mesh
from jfed.gossip import adapt_then_combine, choco_gossip, masks, mix, relay, robust, topology

N, BOUND = 12, 3.0
TORUS = topology.torus(3, 4)
KEY = jax.random.key(5)
# Neighbours of unequal number and weight, at least two each.
EDGES = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 2), (0, 3), (1, 4)]
GRAPH = np.zeros((6, 6), int)
for one, other in EDGES:
    GRAPH[one, other] = GRAPH[other, one] = 1
CHANGING = topology.sequence(topology.from_graph(GRAPH), topology.ring(6))
NUMBERS = np.random.default_rng(0).uniform(-BOUND, BOUND, (N, 40)).astype(np.float32)
MODELS = {"a": jnp.asarray(NUMBERS[:, :10]), "b": jnp.asarray(NUMBERS[:, 10:].reshape(N, 5, 6))}
WORK = local.sgd(problem.loss, optax.sgd(0.1), batch_size=4)
MASKED = masks.masked(mix.sparse(), bound=BOUND)


def rows(models):
    return np.concatenate([np.asarray(x).reshape(x.shape[0], -1) for x in jax.tree.leaves(models)], 1)


def mixed(mixing, net, models, *, present=True, arrives=None, t=0, key=KEY):
    n = net.own.shape[1]
    present = jnp.broadcast_to(jnp.asarray(present), (n,))
    weights = mix.weights_of(net, jnp.asarray(t), present=present, arrives=arrives, lost=mix.own_instead)
    return mixing(net).combine(models, models, weights, key)


@functools.cache
def program():
    return jax.jit(lambda models, present, arrives: mixed(MASKED, TORUS, models, present=present, arrives=arrives))


ALL, EVERY = np.ones(N, bool), np.ones((N, N), bool)


@pytest.mark.parametrize("t", [0, 1, 3])
def test_it_is_the_plain_mixing_to_the_precision_of_its_numbers(t):
    x = NUMBERS[:6]
    got = np.asarray(changing()(x, t), np.float64)
    want = topology.matrices(CHANGING)[t % 2] @ np.float64(x)
    # Of four messages each rounded by 2^-30 of the bound, and floats of 24 bits: weights, products and the result.
    assert np.abs(got - want).max() < BOUND * (4 * 2.0**-30 + 8 * 2.0**-24)
    assert np.abs(x - want).max() > 1


@functools.cache
def changing():
    return jax.jit(lambda x, t: mixed(MASKED, CHANGING, x, t=t))


def test_sums_do_not_overflow_at_the_bound():
    net = topology.from_matrix((np.ones((5, 5)) - np.eye(5)) / 4)
    got = jax.jit(lambda x: mixed(MASKED, net, x))(jnp.tile(jnp.array([[BOUND, -BOUND]]), (5, 1)))
    np.testing.assert_allclose(got, [[BOUND, -BOUND]] * 5)


def test_what_is_beyond_the_bound_is_sent_as_the_bound_and_a_nan_as_zero():
    def with_first(values):
        return MODELS | {"a": MODELS["a"].at[5, : len(values)].set(jnp.array(values))}

    wild = rows(program()(with_first([99.0, -np.inf, np.nan]), ALL, EVERY))
    tame = rows(program()(with_first([BOUND, -BOUND, 0.0]), ALL, EVERY))
    others = np.arange(N) != 5
    np.testing.assert_array_equal(wild[others], tame[others])


def test_who_misses_a_message_keeps_its_model_and_others_mix():
    arrives = EVERY.copy()
    sender = int(np.flatnonzero(topology.matrices(TORUS)[0][4] * (np.arange(N) != 4))[0])
    arrives[4, sender] = False
    got, whole = rows(program()(MODELS, ALL, arrives)), rows(program()(MODELS, ALL, EVERY))
    np.testing.assert_array_equal(got[4], rows(MODELS)[4])
    np.testing.assert_array_equal(np.delete(got, 4, 0), np.delete(whole, 4, 0))


def test_neighbours_of_one_that_is_away_keep_their_models():
    got, whole = rows(program()(MODELS, np.arange(N) != 4, EVERY)), rows(program()(MODELS, ALL, EVERY))
    near = topology.matrices(TORUS)[0][4] > 0  # itself included
    np.testing.assert_array_equal(got[near], rows(MODELS)[near])
    np.testing.assert_array_equal(got[~near], whole[~near])


def test_what_travels_is_what_can_be_looked_at():
    travelled = []

    def listening(net):
        mixer = mix.sparse()(net)

        def hear(tree, slot, round):
            travelled.append(mixer.hear(tree, slot, round))
            return travelled[-1]

        return mixer._replace(hear=hear)

    x = jnp.asarray(NUMBERS[:6])
    mixed(masks.masked(listening, bound=BOUND), CHANGING, x, t=2)
    seen = masks.masked_messages(CHANGING, x, KEY, bound=BOUND, round=2)
    hears = CHANGING.source[0] != np.arange(6)
    assert all(one.dtype == jnp.uint32 for one in travelled)
    np.testing.assert_array_equal(np.where(hears[..., None], np.stack(travelled), 0), seen)
    assert not np.all(hears)
    assert np.all(np.asarray(seen)[~hears] == 0)


D = 20000


@functools.cache
def seen(model=1.0, key=5):
    """[4, 12, D], of models that are one number."""
    look = jax.jit(lambda x, key: masks.masked_messages(TORUS, x, key, bound=BOUND))
    return np.asarray(look(jnp.full((N, D), model), jax.random.key(key)))


def chi_square(words):
    """Of each byte of the numbers, 255 degrees of freedom: mean 255, standard deviation 22.6; [4]."""
    counts = np.stack([np.bincount((words.ravel() >> shift) & 255, minlength=256) for shift in (0, 8, 16, 24)])
    expected = words.size / 256
    return np.sum((counts - expected) ** 2 / expected, axis=1)


def test_a_message_is_uniform_whatever_the_model():
    assert np.abs(chi_square(seen()[0, 0]) - 255).max() < 6 * 22.6
    assert np.abs(chi_square(seen()) - 255).max() < 6 * 22.6
    unmasked = seen().sum(0, dtype=np.uint32)
    assert chi_square(unmasked).min() > 1e5


def test_all_messages_but_one_are_uniform_together():
    hearer = seen()[:, 0]
    for left_out in range(4):
        rest = np.delete(hearer, left_out, 0)
        for signs in ([1, 1, 0], [1, 0, 1], [0, 1, 1], [1, -1, 0], [1, 1, 1]):
            combined = sum(np.uint32(sign % 2**32) * row for sign, row in zip(signs, rest, strict=True))
            assert np.abs(chi_square(combined) - 255).max() < 6 * 22.6


def test_masks_do_not_depend_on_models():
    difference = (seen(1.0) - seen(-0.5)).astype(np.int32)
    np.testing.assert_allclose(difference / 2**28, 0.2 * 1.5, atol=1e-6)


def test_masks_are_of_one_hearer_pair_and_round():
    """Messages of equal models would be equal, or their differences repeat, if any were used twice."""
    words = np.concatenate([seen().reshape(-1, D), seen(key=6).reshape(-1, D)])[:, :64]
    fixed = np.uint32(np.float32(0.2) * 2**28)  # the model, 1, weighted; masks of opposite signs leave twice that
    same = np.mean((words[:, None] == words) | (words[:, None] + words == 2 * fixed), axis=2)
    assert np.max(same[~np.eye(len(words), dtype=bool)]) < 0.1


def test_any_kind_of_key_will_do():
    got = mixed(MASKED, TORUS, jnp.asarray(NUMBERS), key=jax.random.key(0, impl="rbg"))
    np.testing.assert_allclose(got, topology.matrices(TORUS)[0] @ NUMBERS, atol=1e-5)


def test_on_a_mesh_integers_of_32_bits_travel_and_nothing_else():
    devices = mesh.make((8,), ("peers",))
    net = topology.torus(4, 4)
    x = {"a": jnp.asarray(np.tile(NUMBERS[:8], (2, 1))), "b": jnp.arange(16.0) / 8}

    def program(mixing):
        return jax.jit(lambda x: mixed(masks.masked(mixing, bound=BOUND), net, x))

    placed = mix.on_mesh(devices)(net).place(x)
    compiled = program(mix.on_mesh(devices)).lower(placed).compile()
    problem.close(compiled(placed), program(mix.sparse())(x), 1e-6)
    sends = re.findall(
        r"= (\S+) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", compiled.as_text()
    )
    assert sends
    assert all(kind == "collective-permute" and what.startswith("u32[") for what, kind in sends)


def test_a_method_trains_with_it_in_one_program():
    states = []
    for mixing in (mix.sparse(), masks.masked(mix.sparse(), bound=8.0)):
        method = adapt_then_combine(WORK, TORUS, mixing=mixing)
        round_fn, state = jax.jit(method.round), method.init(problem.PARAMS)
        for t in range(3):
            cohort = problem.cohort_of(np.random.default_rng(t).permutation(N), WORK)
            state, _ = round_fn(state, cohort, jax.random.fold_in(KEY, t))
        assert round_fn._cache_size() == 1
        states.append(state.params)
    problem.close(*states)


def trace(method):
    cohort = problem.cohort_of(np.arange(N), WORK)
    return jax.eval_shape(lambda: method.round(method.init(problem.PARAMS), cohort, KEY))


HALF = compress.top_k(0.5)
BOTH = robust.robust(MASKED, robust.clipped(1.0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: masks.masked(mix.sparse(), bound=0.0), r"masked\(bound=0.0\): bound must lie in"),
        (lambda: masks.masked(mix.sparse(), bound=np.inf), r"masked\(bound=inf\)"),
        (lambda: MASKED(topology.chain(4)), "peer 0 hears peer 1 alone, and would see"),
        (lambda: MASKED(topology.one_peer_exponential(4)), "peer 0 hears peer 1 alone in round 0"),
        (lambda: MASKED(topology.from_matrix([[0.5, 1.0], [0.5, 0.0]])), "row 0 adds up to 1.5"),
        (lambda: mixed(MASKED, TORUS, jnp.zeros((N, 2), int)), "leaf of int32"),
        (lambda: trace(choco_gossip(TORUS, compressor=HALF, step_size=0.1, mixing=MASKED)), "codes or changes"),
        (lambda: trace(relay(WORK, topology.chain(N), mixing=MASKED)), "peer 0 hears peer 1 alone"),
        (lambda: trace(adapt_then_combine(WORK, TORUS, mixing=BOTH)), "single messages"),
    ],
)
def test_what_it_cannot_do_it_refuses(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_numbers_of_16_bits_come_back_as_such():
    x = jnp.asarray(NUMBERS, jnp.bfloat16)
    got = mixed(MASKED, TORUS, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), topology.matrices(TORUS)[0] @ np.float32(x), atol=0.02)
