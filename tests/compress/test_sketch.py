"""Count sketches estimate within their bound, find what is large, and FetchSGD learns from their sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import compress, local
from jfed.algorithms import fetchsgd

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics


def sent(link, x):
    return link.update(x, link.init(x))[0]


def decoded(link, x):
    return np.asarray(jax.jit(lambda x: compress.decode(sent(link, x)))(jnp.asarray(x, jnp.float32)), np.float64)


def estimates(x, columns, hashes):
    """What one row says of each number, under many hash functions; [hashes, d]."""
    x = jnp.asarray(x, jnp.float32)
    row = jax.vmap(lambda seed: compress.decode(sent(compress.count_sketch(1, columns, seed=seed), x)))
    return np.asarray(jax.jit(row)(jnp.arange(hashes)), np.float64)


@pytest.mark.parametrize("columns", [7, 16])
def test_an_estimate_of_one_row_is_unbiased_with_variance_below_the_square_over_the_columns(columns):
    d, hashes = 101, 20000
    x = np.random.default_rng(0).normal(size=d)
    off = estimates(x, columns, hashes) - x
    error = off.std(0) / np.sqrt(hashes)
    assert np.all(np.abs(off.mean(0)) <= 5 * error)
    # The standard error of a variance, of numbers with tails no heavier than normal ones
    variance, spread = (off**2).mean(0), (off**2).std(0) / np.sqrt(hashes)
    assert np.all(variance <= x @ x / columns + 5 * spread)
    # Of the columns of its own block a number meets none, of all others each with probability 1 / c.
    blocks = np.arange(d) // columns
    others = np.array([x @ x - x[blocks == b] @ x[blocks == b] for b in blocks]) / columns
    assert np.all(np.abs(variance - others) <= 5 * spread)


def test_what_is_large_is_found():
    """20 of 10,000 numbers, each ten times the rest's root of |x|^2 / c, by the median of 9 rows.

    Of 5 rows three may meet large ones: of 10,000 numbers one or two do, with one sign.
    """
    d, columns, heavy = 10_000, 500, 20
    rng = np.random.default_rng(1)
    x = rng.normal(size=d) * 0.1
    places = rng.choice(d, heavy, replace=False)
    x[places] = 10 * np.sqrt(x @ x / columns) * rng.choice([-1, 1], heavy) * rng.uniform(1, 3, heavy)
    got = decoded(compress.count_sketch(9, columns), x)
    assert set(np.argsort(-np.abs(got))[:heavy]) == set(places)
    np.testing.assert_allclose(got[places], x[places], rtol=0.5)


def test_more_rows_are_wrong_less_often():
    x = np.random.default_rng(2).standard_t(2, size=2000)
    worst = [np.abs(decoded(compress.count_sketch(rows, 100), x) - x).max() for rows in (1, 5)]
    assert worst[0] > worst[1]


def test_the_mean_of_tables_is_the_table_of_the_mean():
    x = np.random.default_rng(3).normal(size=(6, 900)).astype(np.float32)
    link = compress.count_sketch(5, 40)
    tables = jax.jit(jax.vmap(lambda x: sent(link, x)))(x)
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), tables)
    np.testing.assert_allclose(mean.payload["table"], sent(link, x.mean(0)).payload["table"], atol=1e-4)


@pytest.mark.parametrize(("rows", "same"), [(1, True), (3, False)])
def test_sums_of_tables_decode_to_sums_with_one_row_only(rows, same):
    """The median of sums is not the sum of medians, so no other sketch may say that it decodes so."""
    a, b = jnp.asarray(np.random.default_rng(4).normal(size=(2, 100)), jnp.float32)
    one, other = (sent(compress.count_sketch(rows, 7), x) for x in (a, b))
    total = dataclasses.replace(one, payload=jax.tree.map(jnp.add, one.payload, other.payload))
    apart = compress.decode(one) + compress.decode(other)
    assert bool(jnp.allclose(compress.decode(total), apart, atol=1e-4)) == same


def test_arrays_no_larger_than_the_table_are_sent_as_they_are():
    tree = {"small": jnp.arange(35.0), "large": jnp.arange(36.0)}
    message = sent(compress.count_sketch(5, 7), tree)
    assert message["small"] is tree["small"]
    assert message["large"].payload["table"].shape == (5, 7)


def test_hash_functions_of_two_seeds_and_two_rows_are_unlike():
    x = jnp.ones(1000)
    one, other = (sent(compress.count_sketch(2, 50, seed=seed), x).payload["table"] for seed in (0, 1))
    assert np.any(one != other) and np.any(one[0] != one[1])


CLIENTS, D = 4, 1000


def fetched(sketch, server, *, rounds, optimum):
    """The distance from the optimum of the mean of quadratics 1/2 |x - b_i|^2 after so many rounds from 0."""
    apart = np.random.default_rng(5).normal(size=(CLIENTS, D)) * 0.1
    b = jnp.asarray(optimum + apart - apart.mean(0), jnp.float32)

    def step(carry, _):
        x, state = carry
        messages = jax.vmap(lambda b: sent(sketch, x - b))(b)
        update, state = server.update(jax.tree.map(lambda m: jnp.mean(m, 0), messages), state, x)
        return (optax.apply_updates(x, update), state), None

    x = jnp.zeros(D)
    (x, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=rounds))((x, server.init(x)))
    return np.linalg.norm(np.asarray(x, np.float64) - optimum)


def spiky():
    """An optimum of 20 large numbers."""
    optimum = np.zeros(D)
    optimum[np.random.default_rng(6).choice(D, 20, replace=False)] = np.linspace(1, 3, 20)
    return optimum


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fetch_sgd_finds_an_optimum_of_few_numbers(momentum):
    """A sketch of 700 numbers in place of 1000, a hundredth of all applied a round."""
    sketch = compress.over_tree(compress.count_sketch(7, 100))
    server = compress.fetch_sgd(sketch, learning_rate=0.3, fraction=0.01, momentum=momentum)
    start = np.linalg.norm(spiky())
    assert fetched(sketch, server, rounds=100, optimum=spiky()) < 1e-3 * start


def test_fetch_sgd_of_tables_that_hold_everything_is_gradient_descent():
    """All numbers are applied, and the momentum of what was applied is forgotten."""
    sketch, optimum = compress.count_sketch(1, D), np.random.default_rng(7).normal(size=D)
    server = compress.fetch_sgd(sketch, learning_rate=0.25, fraction=1.0)
    got = fetched(sketch, server, rounds=10, optimum=optimum)
    np.testing.assert_allclose(got, 0.75**10 * np.linalg.norm(optimum), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: compress.count_sketch(0, 5), "rows"),
        (lambda: compress.count_sketch(5, 0), "columns"),
        (lambda: compress.fetch_sgd(compress.count_sketch(5, 5), learning_rate=0.0, fraction=0.1), "learning_rate"),
        (lambda: compress.fetch_sgd(compress.count_sketch(5, 5), learning_rate=1.0, fraction=0.0), "fraction"),
        (
            lambda: compress.fetch_sgd(compress.count_sketch(5, 5), learning_rate=1.0, fraction=0.1, momentum=2.0),
            "momentum",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_sketch_as_large_as_the_model_is_refused():
    work = local.gradient(lambda w, x, key: (w - x) ** 2)
    with pytest.raises(ValueError, match="the model's 12 numbers are no more than those of the sketch; lower columns"):
        fetchsgd(work, rows=3, columns=4, fraction=0.5).init(jnp.zeros(12))
