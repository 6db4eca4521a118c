"""The rotation is one, it is the Hadamard matrix behind random signs, and what DRIVE and EDEN lose after it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from jfed import compress

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics


def sent(link, x, round=0, key=None):
    return link.update(x, link.init(x), round=round, key=key)[0]


def flat(message):
    """The rotated numbers, longest blocks first."""
    return jnp.concatenate([message.payload[b].reshape(-1) for b in sorted(message.payload, key=int, reverse=True)])


@pytest.mark.parametrize(("d", "block"), [(1, None), (7, None), (1000, 256), (1003, 4096), (5000, None)])
def test_a_rotation_keeps_lengths_and_angles_and_can_be_undone(d, block):
    link = compress.rotate(block=block)
    x, y = jnp.asarray(np.random.default_rng(d).normal(size=(2, d)), jnp.float32)
    turned = [jax.jit(functools.partial(sent, link))(v) for v in (x, y)]
    a, b = (np.asarray(flat(message), np.float64) for message in turned)
    assert a.size == d
    np.testing.assert_allclose([a @ a, b @ b, a @ b], [x @ x, y @ y, x @ y], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(compress.decode(turned[0]), x, atol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 16, 64, 128, 4096, 8192])
def test_columns_are_those_of_the_hadamard_matrix_but_for_signs(d):
    """Its first row is all ones, so a column's first number tells its sign."""
    hadamard = scipy.linalg.hadamard(d, dtype=np.int8)
    columns = np.unique(np.random.default_rng(d).integers(0, d, 8))
    units = jnp.zeros((len(columns), d)).at[np.arange(len(columns)), columns].set(1.0)
    turned = np.asarray(jax.jit(jax.vmap(lambda x: flat(sent(compress.rotate(block=None), x))))(units))
    expected = hadamard[:, columns].T / math.sqrt(d)
    np.testing.assert_allclose(turned * np.sign(turned[:, :1]), expected, atol=1e-6)


def test_an_array_is_cut_into_whole_blocks_and_the_powers_of_two_that_are_left():
    message = jax.eval_shape(lambda x: sent(compress.rotate(block=256), x), jnp.zeros(1000))
    shapes = {b: x.shape for b, x in message.payload.items()}
    assert shapes == {"256": (3, 256), "128": (1, 128), "64": (1, 64), "32": (1, 32), "8": (1, 8)}


def test_senders_of_a_round_turn_alike_and_otherwise_in_the_next():
    x = jnp.ones(64)
    one, other, later = (flat(sent(compress.rotate(), x, round)) for round in (3, 3, 4))
    np.testing.assert_array_equal(one, other)
    assert np.any(one != later) and np.any(one != flat(sent(compress.rotate(seed=1), x, 3)))


def test_senders_that_do_not_share_turn_each_in_their_own_way():
    link, x = compress.rotate(signs="own"), jnp.ones(64)
    one, again, other = (flat(sent(link, x, key=jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    np.testing.assert_allclose(compress.decode(sent(link, x, key=jax.random.key(1))), x, atol=1e-5)


def test_signs_are_fair_and_unlike_in_every_round():
    """The first numbers of the transform of one-hot arrays are the signs, by sqrt(d)."""
    d, rounds = 64, 4000
    signs = jax.jit(jax.vmap(lambda t: jax.vmap(lambda x: flat(sent(compress.rotate(), x, t))[0])(jnp.eye(d))))
    signs = np.asarray(signs(jnp.arange(rounds)), np.float64) * math.sqrt(d)
    np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-5)
    together = signs.T @ signs / rounds  # 1 on the diagonal, and 0 elsewhere within 5 standard errors
    assert np.all(np.abs(together - np.eye(d)) <= 5 / math.sqrt(rounds))
    assert np.all(np.abs(signs.mean(0)) <= 5 / math.sqrt(rounds))


def errors(link, d, vectors, *, senders=10):
    """|estimate - x|^2 / |x|^2 of vectors x of exp(N(0, 1)), [vectors].

    As in the authors' code, all senders of a round send x, each after a rotation of its own, and the estimate is the
    mean of what they send.
    """

    @jax.jit
    def all_of(keys):
        def one(i):
            x = jnp.exp(jax.random.normal(keys[i], (d,)))
            draws = jax.random.split(jax.random.fold_in(keys[i], 1), senders)
            got = jax.vmap(lambda key: compress.decode(sent(link, x, i, key)))(draws)
            return jnp.sum((jnp.mean(got, axis=0) - x) ** 2) / jnp.sum(x**2)

        return jax.lax.map(one, jnp.arange(vectors))

    return np.asarray(all_of(jax.random.split(jax.random.key(0), vectors)), np.float64)


ONE_BIT = {
    "drive": lambda: compress.drive(block=None),
    "uniform": lambda: optax.chain(compress.rotate(block=None, signs="own"), compress.quantize(1, per="row")),
}
# d, vectors, reference, how far the mean may be from it. At d = 128 the reference is that of a few vectors: a vector's
# error has a standard deviation of .013 and .09, and the next test says what the mean over many is.
REFERENCE = [
    pytest.param("drive", 128, 1000, 0.0573, 0.003),
    pytest.param("drive", 8192, 40, 0.0570, 0.0006),
    pytest.param("drive", 524288, 2, 0.0570, 0.0002, marks=pytest.mark.slow),
    pytest.param("uniform", 128, 1000, 0.532, 0.02),
    pytest.param("uniform", 8192, 40, 1.349, 0.04),
    pytest.param("uniform", 524288, 2, 2.150, 0.2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "d", "vectors", "reference", "tolerance"), REFERENCE)
def test_what_one_bit_loses_is_what_was_published(name, d, vectors, reference, tolerance):
    assert abs(errors(ONE_BIT[name](), d, vectors).mean() - reference) <= tolerance


def numpy_errors(d, vectors, senders=10):
    """The same in float64, without jfed: DRIVE, and one bit between least and largest."""
    rng, hadamard, found = np.random.default_rng(1), scipy.linalg.hadamard(d) / math.sqrt(d), []
    for _ in range(vectors):
        x = rng.lognormal(size=d)
        signs = rng.choice([-1.0, 1.0], size=(senders, d))
        y = (signs * x) @ hadamard
        one = (x @ x) / np.abs(y).sum(1, keepdims=True) * np.sign(y)
        low, high = y.min(1, keepdims=True), y.max(1, keepdims=True)
        other = np.where(rng.random(y.shape) < (y - low) / (high - low), high, low)
        back = [((codes @ hadamard) * signs).mean(0) - x for codes in (one, other)]
        found.append([off @ off / (x @ x) for off in back])
    return np.array(found).T


def test_one_bit_loses_what_it_does_in_numpy():
    vectors = 1000
    for ours, theirs in zip(
        (errors(ONE_BIT[n](), 128, vectors) for n in ONE_BIT), numpy_errors(128, vectors), strict=True
    ):
        error = math.hypot(ours.std(), theirs.std()) / math.sqrt(vectors)
        assert abs(ours.mean() - theirs.mean()) <= 5 * error
        assert abs(ours.mean() - 1.2 * theirs.mean()) > 5 * error


# D / (1 - D) of the distortion D of the best levels for normal numbers (Max 1960); pi / 2 - 1 of one bit.
LOSSES = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", LOSSES)
def test_eden_loses_what_its_levels_lose_of_normal_numbers_whatever_the_input(bits):
    loss = errors(compress.eden(bits), 4096, 40, senders=1).mean()
    assert abs(loss / (LOSSES[bits] / (1 - LOSSES[bits])) - 1) < 0.03


def test_eden_of_one_bit_is_drive():
    x, key = jnp.asarray(np.random.default_rng(0).lognormal(size=203), jnp.float32), jax.random.key(0)
    one, other = (jax.jit(functools.partial(sent, link))(x, key=key) for link in (compress.eden(1), compress.drive()))
    np.testing.assert_allclose(compress.decode(one), compress.decode(other), rtol=1e-4, atol=1e-5)
    assert compress.nbytes(one) == compress.nbytes(other)


@pytest.mark.parametrize("link", [compress.drive(), compress.eden(2)])
def test_the_mean_over_rotations_is_nearly_the_input(link):
    """What is left of |x|^2: a draw's error over the number of draws, and a bias below 1 %."""
    x, draws = jnp.asarray(np.random.default_rng(0).lognormal(size=1024), jnp.float32), 1000
    keys = jax.random.split(jax.random.key(0), draws)
    got = jax.jit(jax.vmap(lambda key: compress.decode(sent(link, x, key=key))))(keys)
    off = np.mean(np.asarray(got, np.float64), 0) - x
    assert off @ off / (x @ x) <= 0.01 + 0.6 / draws


def test_a_block_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two; try 64"):
        compress.rotate(block=100)


def test_signs_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="'shared' or 'own'"):
        compress.rotate(signs="private")
