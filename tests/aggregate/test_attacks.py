"""Attacks write what their papers say into the rows of malicious clients, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import close
from scipy import stats

from jfed import aggregate

IDS = np.array([4, 0, 12, 7, 2, 11, 5, 1])
WEIGHTS = np.array([3.0, 1.0, 0.0, 2.0, 5.0, 0.0, 1.0, 4.0])  # slots 2 and 5 are not there
LIARS = np.array([1, 4, 7])  # ids 0, 2 and 1
HONEST = np.array([0, 3, 6])  # ids 4, 7 and 5
X = np.random.default_rng(0).normal(size=(8, 3, 2))
X[[2, 5]] = 3e38


def seen_by_aggregator(attack, is_malicious=lambda ids: ids < 4, weights=WEIGHTS, dtype=jnp.float32):
    """The stack as it reaches the aggregator."""
    watch = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda stack, state, params=None, **given: (stack, state)
    )
    agg = aggregate.attacked(watch, attack, is_malicious)
    stack = {"w": jnp.asarray(X, dtype), "b": jnp.asarray(X[:, 0], dtype)}
    given = {"weights": jnp.asarray(weights, jnp.float32), "ids": jnp.asarray(IDS), "key": jax.random.key(0)}
    got, _ = agg.update(stack, agg.init(()), **given)
    np.testing.assert_array_equal(got["w"][:, 0], got["b"])
    return np.asarray(got["w"])


ATTACKS = {
    "sign flip": (aggregate.sign_flip(), -X[LIARS]),
    "sign flip, scaled": (aggregate.sign_flip(4.0), -4 * X[LIARS]),
    "ipm": (aggregate.ipm(0.3), np.stack([-0.3 * X[HONEST].mean(0)] * 3)),
    "alie": (aggregate.alie(1.5), np.stack([X[HONEST].mean(0) - 1.5 * X[HONEST].std(0)] * 3)),
    "mimic": (aggregate.mimic(), np.stack([X[0]] * 3)),  # id 4 is the lowest honest one
    "mimic 7": (aggregate.mimic(7), np.stack([X[3]] * 3)),
    "mimic somebody absent": (aggregate.mimic(11), np.stack([X[0]] * 3)),
    "mimic a liar": (aggregate.mimic(2), np.stack([X[0]] * 3)),
}
attacks = pytest.mark.parametrize("name", ATTACKS)


@attacks
def test_malicious_clients_send_what_the_paper_says(name):
    attack, expected = ATTACKS[name]
    close(seen_by_aggregator(attack)[LIARS], expected.astype(np.float32))


@attacks
def test_all_other_rows_are_left_alone(name):
    others = np.setdiff1d(np.arange(8), LIARS)
    np.testing.assert_array_equal(seen_by_aggregator(ATTACKS[name][0])[others], X.astype(np.float32)[others])


@attacks
def test_an_absent_client_does_not_attack(name):
    got = seen_by_aggregator(ATTACKS[name][0], is_malicious=lambda ids: ids == 11)
    np.testing.assert_array_equal(got, X.astype(np.float32))


@attacks
def test_an_attack_keeps_the_dtype(name):
    assert seen_by_aggregator(ATTACKS[name][0], dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["ipm", "alie", "mimic", "mimic 7"])
def test_without_an_honest_client_zeros_are_sent(name):
    got = seen_by_aggregator(ATTACKS[name][0], is_malicious=lambda ids: ids >= 0)
    assert not np.any(got[np.union1d(LIARS, HONEST)])


def test_with_nobody_malicious_an_attacked_aggregator_is_the_aggregator():
    x, weights = jnp.asarray(X[:, 0, 0], jnp.float32), jnp.asarray(WEIGHTS, jnp.float32)
    inner = aggregate.median()
    agg = aggregate.attacked(inner, aggregate.sign_flip(), lambda ids: ids < 0)
    close(agg.update(x, agg.init(0.0), weights=weights)[0], inner.update(x, inner.init(0.0), weights=weights)[0])


def test_a_large_ipm_turns_the_mean_round_and_a_small_one_the_median():
    x = jnp.asarray(np.random.default_rng(0).normal(0.1, 1.0, (25, 400)), jnp.float32)

    def towards(inner, epsilon):
        agg = aggregate.attacked(inner, aggregate.ipm(epsilon), lambda ids: ids < 11)
        return float(agg.update(x, agg.init(x[0]), weights=jnp.ones(25))[0] @ x[11:].mean(0))

    assert towards(aggregate.mean(), 0.1) > 0 > towards(aggregate.mean(), 2.0)
    assert towards(aggregate.krum(11), 0.1) < 0


@pytest.mark.parametrize(("clients", "byzantine"), [(25, 5), (50, 24), (51, 12), (10, 1)])
def test_alie_z_is_the_papers(clients, byzantine):
    s = np.floor(clients / 2 + 1) - byzantine
    expected = stats.norm.ppf((clients - byzantine - s) / (clients - byzantine))
    assert aggregate.alie_z(clients, byzantine) == pytest.approx(expected, abs=1e-9)
