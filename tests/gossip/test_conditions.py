"""Lost messages, failed links, peers that come and go: arrays of the round."""

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest

from jfed import gossip, sampling
from jfed.core import Population
from jfed.gossip import conditions, topology

N = 40
PEOPLE = Population((), jnp.arange(N), jnp.ones(N, jnp.int32))
EVERYONE = sampling.full(steps=lambda size: size)


def drawn(sampler, t=0, seed=0):
    return sampler(PEOPLE, jax.random.fold_in(jax.random.key(seed), t), t)


def test_messages_are_lost_at_the_rate_given_anew_in_every_round_each_way_by_itself():
    sampler = conditions.lost_messages(EVERYONE, 0.25)
    heard = np.array([drawn(sampler, t).state for t in range(40)])
    assert heard.shape == (40, N, N)
    assert abs(1 - heard.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / heard.size)
    lost = ~heard
    for other in (np.roll(lost, 1, 0), lost.swapaxes(1, 2), np.roll(lost, 1, 1), np.roll(lost, 1, 2)):
        both = (lost & other)[:, np.triu(np.ones((N, N), bool), 1)].mean()
        assert abs(both - 0.0625) < 5 * np.sqrt(0.0625 / (40 * N * (N - 1) / 2))


def test_links_fail_both_ways_and_stay_down_for_so_many_rounds():
    sampler = conditions.failed_links(EVERYONE, 0.3, rounds=5)
    heard = np.array([drawn(sampler, t).state for t in range(20)])
    np.testing.assert_array_equal(heard, heard.swapaxes(1, 2))
    for t in range(0, 20, 5):
        assert (heard[t : t + 5] == heard[t]).all() and (t == 0 or (heard[t] != heard[t - 1]).any())
    upper = heard[::5][:, np.triu(np.ones((N, N), bool), 1)]
    assert abs(upper.mean() - 0.7) < 4 * np.sqrt(0.21 / upper.size)


def test_links_of_another_run_fail_otherwise():
    sampler = conditions.failed_links(EVERYONE, 0.3, rounds=5, seed=1)
    other = conditions.failed_links(EVERYONE, 0.3, rounds=5, seed=2)
    assert (drawn(sampler).state != drawn(other).state).any()


def test_what_fails_for_several_reasons_does_not_come():
    both = conditions.lost_messages(conditions.failed_links(EVERYONE, 0.3), 0.25)
    assert abs(drawn(both).state.mean() - 0.7 * 0.75) < 0.05


def test_the_same_message_is_lost_whatever_the_order_of_the_cohort():
    def backwards(population, key, t):
        cohort = EVERYONE(population, key, t)
        return jax.tree.map(lambda x: x[::-1], cohort._replace(examples=()))

    a, b = (drawn(conditions.lost_messages(s, 0.5)).state for s in (EVERYONE, backwards))
    np.testing.assert_array_equal(a, b[::-1])


def test_peers_are_there_from_their_first_round_to_their_last():
    sampler = conditions.joining(EVERYONE, first=np.arange(N) // 10, last=np.full(N, 2))
    for t in range(4):
        expected = (np.arange(N) // 10 <= t) & (t <= 2)
        np.testing.assert_array_equal(drawn(sampler, t).weight > 0, expected)


def test_a_peer_that_joins_late_comes_to_the_others():
    graph = topology.ring(N)
    algorithm = gossip.averaging(graph)
    state = algorithm.init(jnp.zeros(()))._replace(params=jnp.where(jnp.arange(N) == 7, 0.0, 1.0))
    sampler = conditions.joining(EVERYONE, first=np.where(np.arange(N) == 7, 3, 0))
    for t in range(5):
        state, metrics = algorithm.round(state, drawn(sampler, t), jax.random.key(0))
        assert int(metrics["reports"]) == (N if t >= 3 else N - 1)
        assert (float(state.params[7]) > 0.5) == (t >= 3)
        np.testing.assert_allclose(state.params[jnp.array([0, 20])], 1.0, rtol=1e-6)


def test_a_record_is_replayed():
    record = np.random.default_rng(0).random((3, N, N)) < 0.5
    sampler = conditions.recorded(EVERYONE, record)
    for t in range(7):
        np.testing.assert_array_equal(drawn(sampler, t).state, record[t % 3])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: conditions.lost_messages(EVERYONE, 1.5), r"rate=1.5"),
        (lambda: conditions.failed_links(EVERYONE, 0.1, rounds=0), "rounds must be a whole number"),
        (lambda: conditions.joining(EVERYONE, first=0.5), "rounds are whole numbers"),
        (lambda: conditions.recorded(EVERYONE, np.ones((2, 3, 3))), r"give \[T, n, n\] of bool"),
        (lambda: drawn(conditions.recorded(EVERYONE, np.ones((2, 3, 3), bool))), "there are 40"),
    ],
)
def test_bad_input_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_round_refuses_flags_of_another_shape():
    algorithm = gossip.averaging(topology.ring(N))
    cohort = drawn(EVERYONE)._replace(state=jnp.ones((N, 3), bool))
    with pytest.raises(ValueError, match=r"one array \[C, 40\] of bool"):
        algorithm.round(algorithm.init(problem.PARAMS), cohort, jax.random.key(0))
