import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jfed import shuffle

KEYS = jax.random.split(jax.random.key(0), 24_000)


def orders(n, keys=KEYS, epoch=0):
    place = jax.jit(
        jax.vmap(lambda key, n, e: shuffle.position(shuffle.draw(key), places, n, epoch=e), (0, None, None))
    )
    places = jnp.arange(n)
    return np.asarray(place(keys, jnp.int32(n), jnp.int32(epoch)))


def p_value_of_uniform(counts):
    return stats.chisquare(counts).pvalue


def all_orders_counted(n, drawn):
    codes = drawn @ (10 ** np.arange(n))
    return [int((codes == np.dot(order, 10 ** np.arange(n))).sum()) for order in itertools.permutations(range(n))]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 63, 64, 65, 600, 5000])
def test_every_index_is_visited_exactly_once(n):
    drawn = orders(n, KEYS[:20])
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(n), (20, 1)))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_are_equally_likely(n):
    assert p_value_of_uniform(all_orders_counted(n, orders(n))) > 1e-3


@pytest.mark.parametrize("epochs", [(0, 1), (1, 2), (3, 8)])
def test_the_orders_of_two_epochs_know_nothing_of_each_other(epochs):
    """All 36 pairs of orders of three are equally likely."""
    first, second = (orders(3, epoch=e) @ (10 ** np.arange(3)) for e in epochs)
    pairs = np.unique(np.stack([first, second]), axis=1, return_counts=True)[1]
    assert len(pairs) == 36 and p_value_of_uniform(pairs) > 1e-3


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_orders_of_neighbouring_clients_are_equally_likely_and_know_nothing_of_each_other(impl):
    """As `local.sgd` draws them: keys folded from one by the client's number."""
    of = jax.vmap(lambda i: shuffle.position(shuffle.draw(jax.random.fold_in(key, i)), jnp.arange(3), jnp.int32(3)))
    key = jax.random.key(5, impl=impl)
    first, second = np.asarray(jax.jit(of)(jnp.arange(24_000))).reshape(-1, 2, 3).swapaxes(0, 1) @ (10 ** np.arange(3))
    pairs = np.unique(np.stack([first, second]), axis=1, return_counts=True)[1]
    assert len(pairs) == 36 and p_value_of_uniform(pairs) > 1e-3


def test_a_raw_key_draws_what_the_key_does():
    np.testing.assert_array_equal(shuffle.draw(jax.random.key_data(KEYS[0])), shuffle.draw(KEYS[0]))


@pytest.mark.slow
def test_a_shuffle_of_too_few_rounds_would_be_noticed(monkeypatch):
    monkeypatch.setattr(shuffle, "ROUNDS", 3)
    jax.clear_caches()
    assert p_value_of_uniform(all_orders_counted(4, orders(4))) < 1e-6


def test_places_and_neighbours_of_a_larger_set_are_uniform():
    drawn = orders(50)
    assert p_value_of_uniform(np.bincount(drawn[:, 3], minlength=50)) > 1e-3
    step = (drawn[:, 4] - drawn[:, 3]) % 50
    assert p_value_of_uniform(np.bincount(step, minlength=50)[1:]) > 1e-3


def test_the_order_does_not_depend_on_which_places_are_asked_for():
    some = shuffle.position(shuffle.draw(KEYS[0]), jnp.array([[6, 2], [0, 0]]), 7)
    np.testing.assert_array_equal(some, orders(7, KEYS[:1])[0][[[6, 2], [0, 0]]])
