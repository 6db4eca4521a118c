"""One bit a number, and the vote over senders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed import compress


def sent(link, x):
    x = jnp.asarray(x, jnp.float32)
    return link.update(x, link.init(x))[0]


def decoded(link, x):
    return np.asarray(compress.decode(sent(link, x)))


def test_signs_are_plus_and_minus_one():
    np.testing.assert_array_equal(decoded(compress.sign(), [3.0, -0.1, 0.0, -7.0]), [1, -1, 1, -1])


@pytest.mark.parametrize("link", [compress.sign(), compress.scaled_sign()])
@pytest.mark.parametrize("d", [8, 800, 8000])
def test_a_bit_a_number_and_one_scale(link, d):
    assert compress.nbytes(jax.eval_shape(lambda x: sent(link, x), jnp.ones(d))) == d / 8 + 4


def test_the_scale_is_the_mean_magnitude():
    x = np.random.default_rng(0).normal(size=999)
    got = decoded(compress.scaled_sign(), x)
    np.testing.assert_allclose(got, np.abs(x).mean() * np.sign(x), rtol=1e-5)


def test_no_other_scale_loses_less():
    x = np.random.default_rng(0).lognormal(size=999)
    got = decoded(compress.scaled_sign(), x)
    losses = [np.sum((factor * got - x) ** 2) for factor in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2])


def test_what_a_contraction_leaves_out_of_normal_numbers():
    """delta = 2 / pi."""
    x = np.random.default_rng(0).normal(size=10**5)
    left = np.sum((decoded(compress.scaled_sign(), x) - x) ** 2) / (x @ x)
    assert abs(left - (1 - 2 / np.pi)) < 0.005


def test_the_unbiased_scale_keeps_the_inner_product():
    x = np.random.default_rng(0).lognormal(size=999)
    np.testing.assert_allclose(decoded(compress.scaled_sign(scale="unbiased"), x) @ x, x @ x, rtol=1e-5)


def test_each_row_has_its_own_scale():
    x = np.array([[1.0, -3.0], [10.0, 30.0]])
    np.testing.assert_array_equal(decoded(compress.scaled_sign(per="row"), x), [[2, -2], [20, 20]])


def test_three_senders_vote():
    votes = np.stack([decoded(compress.sign(), x) for x in ([5.0, -1, 1, -1], [-0.1, -2, 9, 9], [0.2, 3, 1, -1])])
    vote = compress.majority_vote()
    mean = jnp.asarray(votes.mean(0))
    np.testing.assert_array_equal(vote.update(mean, vote.init(mean))[0], [1, -1, 1, -1])


def test_a_tie_is_zero():
    vote = compress.majority_vote()
    assert vote.update(jnp.zeros(3), vote.init(jnp.zeros(3)))[0].tolist() == [0, 0, 0]


def test_a_scale_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="'mean' or 'unbiased'"):
        compress.scaled_sign(scale="largest")
