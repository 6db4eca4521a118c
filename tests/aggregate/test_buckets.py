"""Bucketing deals everybody present once, at random, by key and id."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import close

from jfed import aggregate

KEY = jax.random.key(5)


def deal(size, weights, key=KEY, ids=None):
    """Shares [B, C] of clients in buckets, and the buckets' weights."""

    def hand_out(stack, state, params=None, *, weights, **extra_args):
        del state, params, extra_args
        return stack, weights

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(0), hand_out)
    clients = len(weights)
    ids = jnp.arange(clients) if ids is None else jnp.asarray(ids)
    given = {"weights": jnp.asarray(weights, jnp.float32), "ids": ids, "key": key}
    return aggregate.bucketing(inner, size).update(jnp.eye(clients), inner.init(0.0), **given)


@pytest.mark.parametrize("size", [1, 2, 3, 9, 20])
@pytest.mark.parametrize("absent", [[], [0, 4], range(1, 9), range(9)])
def test_everybody_present_is_in_one_bucket_and_all_but_the_last_are_full(size, absent):
    weights = np.ones(9)
    weights[list(absent)] = 0
    shares, bucket_weights = map(np.asarray, deal(size, weights))
    m, buckets = int(weights.sum()), -(-9 // size)
    members = np.array([min(size, max(m - size * b, 0)) for b in range(buckets)])
    np.testing.assert_array_equal((shares > 0).sum(0), weights)
    np.testing.assert_array_equal((shares > 0).sum(1), members)
    np.testing.assert_allclose(shares, (shares > 0) / np.maximum(members, 1)[:, None], rtol=1e-6)
    np.testing.assert_array_equal(bucket_weights, members > 0)


def test_who_shares_a_bucket_follows_from_ids_and_not_from_slots():
    ids = np.array([4, 0, 7, 2, 11, 5, 1, 9])
    order = np.random.default_rng(0).permutation(8)
    one, _ = deal(2, np.ones(8), ids=ids)
    other, _ = deal(2, np.ones(8), ids=ids[order])
    np.testing.assert_array_equal(one[:, order], other)


def test_every_pair_meets_in_a_bucket_equally_often():
    deals = 1000
    together = np.asarray(jax.vmap(lambda key: deal(2, np.ones(6), key)[0])(jax.random.split(KEY, deals))) > 0
    met = np.einsum("dbi,dbj->ij", together.astype(int), together.astype(int))
    pairs = met[np.triu_indices(6, 1)]
    expected = deals / 5  # each client meets one of five others
    deviation = np.sqrt(deals * 0.2 * 0.8)
    assert np.all(np.abs(pairs - expected) < 4.5 * deviation)
    assert pairs.std() > deviation / 3  # nor is it dealt in turn


def test_buckets_of_one_are_the_aggregator_itself():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 6)), jnp.float32)
    weights = jnp.ones(9).at[3].set(0.0)
    for inner in (aggregate.mean(), aggregate.median(), aggregate.krum(2), aggregate.geometric_median()):
        state = inner.init(x[0])
        bucketed, _ = aggregate.bucketing(inner, size=1).update(x, state, weights=weights, key=KEY)
        close(bucketed, inner.update(x, state, weights=weights)[0])


def test_the_state_of_the_inner_aggregator_is_kept():
    agg = aggregate.bucketing(aggregate.centred_clipping(1.0), size=2)
    x = jnp.full((4, 3), 8.0)
    got, state = agg.update(x, agg.init(x[0]), weights=jnp.ones(4), key=KEY)
    close(got, state.centre)


def test_without_a_key_there_is_an_error_with_the_cure():
    agg = aggregate.bucketing(aggregate.mean(), size=2)
    with pytest.raises(ValueError, match=r"bucketing\(key=None\).*jax.random.key"):
        agg.update(jnp.ones(4), agg.init(0.0), weights=jnp.ones(4))
