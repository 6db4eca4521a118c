"""Error feedback makes up for what a compressor leaves out; EF21 also where workers disagree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import compress

WORKERS = 10


def trained(link, data, start, *, learning_rate, steps, server=None):
    """The squared distance from the optimum, of least squares 1/2 |A_i x - b_i|^2 of each worker i.

    All take part in each step, and the model moves against the mean of what they send.
    """
    a, b, optimum = data
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    server = optax.identity() if server is None else server

    def one(a, b, x, state):
        message, state = link.update(a.T @ (a @ x - b), state)
        return compress.decode(message), state

    def step(carry, _):
        x, states, held = carry
        sent, states = jax.vmap(one, (0, 0, None, 0))(a, b, x, states)
        update, held = server.update(jnp.mean(sent, axis=0), held)
        return (x - learning_rate * update, states, held), None

    x = jnp.asarray(start, jnp.float32)
    states = jax.vmap(lambda _: link.init(x))(jnp.arange(WORKERS))
    (x, _, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((x, states, server.init(x)))
    return np.sum((np.asarray(x, np.float64) - optimum) ** 2)


def one_heavy_row():
    """Worker i has a heavy row 1 - 8 e_i besides a light one for each number, and all share an optimum.

    Along (1, ..., 1) the largest number of each gradient points the wrong way, and is outvoted only where all ten
    numbers are sent (after Beznosikov et al. 2020, arXiv:2002.12410, which has three workers).
    """
    d = WORKERS
    heavy = np.sqrt(2) * (np.ones((d, d)) - 8 * np.eye(d))
    a = np.concatenate([heavy[:, None], np.broadcast_to(np.eye(d) / np.sqrt(2), (d, d, d))], axis=1)
    optimum = np.random.default_rng(0).normal(size=d)
    return a, a @ optimum, optimum


def unlike_optima():
    """Random least squares whose workers have optima far from each other."""
    rng, d, rows = np.random.default_rng(0), 40, 20
    a = rng.normal(size=(WORKERS, rows, d)) / np.sqrt(rows)
    b = np.einsum("nmd,nd->nm", a, rng.normal(size=d) + rng.normal(size=(WORKERS, d)))
    optimum = np.linalg.solve(np.einsum("nmi,nmj->ij", a, a), np.einsum("nmi,nm->i", a, b))
    return a, b, optimum


TENTH = compress.top_k(0.1)


def test_a_tenth_of_each_gradient_goes_nowhere_and_with_error_feedback_to_the_optimum():
    """400 steps: plain top-10 % ends farther away than it began, error feedback at rounding."""
    data = one_heavy_row()
    start = data[2] + 1.0
    setting = {"learning_rate": 0.02, "steps": 400}
    assert trained(TENTH, data, start, **setting) > 17.2 > np.sum((start - data[2]) ** 2)
    assert trained(compress.error_feedback(TENTH), data, start, **setting) < 1e-9


def test_ef21_reaches_the_optimum_of_workers_that_disagree():
    """Where neither the plain compressor nor, at this constant rate, error feedback does."""
    data = unlike_optima()
    setting = {"start": np.zeros(40), "learning_rate": 0.1, "steps": 400}
    assert trained(TENTH, data, **setting) > 10
    assert trained(compress.error_feedback(TENTH), data, **setting) > 0.1
    assert trained(compress.ef21(TENTH), data, **setting, server=compress.ef21_server()) < 1e-6


def test_the_server_of_ef21_holds_the_mean_of_what_it_knows_of_each():
    link, server = compress.ef21(compress.top_k(0.2)), compress.ef21_server()
    gradients = np.random.default_rng(1).normal(size=(7, 5, 30)).astype(np.float32)
    states, held = jax.vmap(lambda _: link.init(jnp.zeros(30)))(jnp.arange(5)), server.init(jnp.zeros(30))

    @jax.jit
    def step(g, states, held):
        messages, states = jax.vmap(link.update)(g, states)
        return states, *server.update(jnp.mean(jax.vmap(compress.decode)(messages), axis=0), held)

    for g in gradients:
        states, update, held = step(g, states, held)
        np.testing.assert_allclose(held, jnp.mean(states.known, axis=0), atol=1e-5)
        np.testing.assert_array_equal(update, held)


def test_with_a_part_of_them_the_server_of_ef21_still_holds_the_mean():
    """Of five senders of unlike weights, two report; the others are known as before."""
    weights, server = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), compress.ef21_server(total_weight=15.0)
    known, held = np.zeros((5, 4)), server.init(jnp.zeros(4))
    rng = np.random.default_rng(2)
    for present in ([0, 3], [1, 4], [3, 4]):
        change = rng.normal(size=(2, 4)).astype(np.float32)
        known[present] += change
        w = weights[present]
        _, held = server.update(jnp.asarray(w @ change / w.sum(), jnp.float32), held, weight=w.sum())
        np.testing.assert_allclose(held, weights @ known / 15.0, atol=1e-5)


def test_ef21_of_a_gradient_that_stays_comes_to_know_it():
    link, g = compress.ef21(TENTH), jnp.asarray(np.random.default_rng(3).normal(size=50), jnp.float32)
    state = link.init(g)
    for _ in range(10):
        _, state = jax.jit(link.update)(g, state)
    np.testing.assert_array_equal(state.known, g)


ACROSS = [compress.error_feedback, compress.ef21, compress.momentum_correction]
NO_CONTRACTION = {
    "sign": compress.sign(),
    "qsgd": compress.qsgd(1),
    "terngrad": compress.terngrad(),
    "quantize": compress.quantize(2),
    "quantize to the nearest": compress.quantize(1, rounding="nearest"),
    "random_k": compress.random_k(0.1),
    "drive": compress.drive(),
    "count_sketch": compress.count_sketch(3, 10),
    "threshold": compress.threshold(1.0, capacity=0.1),
    "lloyd_max": compress.lloyd_max(2),
    "part of a chain": optax.chain(compress.top_k(0.5), compress.sign()),
    "inside of over_tree": compress.over_tree(compress.sign()),
}


@pytest.mark.parametrize("around", ACROSS)
@pytest.mark.parametrize("name", NO_CONTRACTION)
def test_what_is_no_contraction_is_refused_when_traced(around, name):
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)

    def first(link):
        return jax.eval_shape(lambda x: link.update(x, link.init(x), key=jax.random.key(0), round=0)[0], x)

    with pytest.raises(ValueError, match=f"{around.__name__}.*is no contraction"):
        first(around(NO_CONTRACTION[name]))
    first(around(NO_CONTRACTION[name], refuse=False))


@pytest.mark.parametrize("around", ACROSS)
def test_what_compresses_nothing_is_refused(around):
    link = around(optax.identity())
    with pytest.raises(ValueError, match="compresses nothing"):
        link.update(jnp.ones(3), link.init(jnp.ones(3)))


def test_what_rounds_finely_enough_is_taken_and_on_longer_arrays_refused():
    """s levels of d numbers are a contraction for certain while min(d / s^2, sqrt(d) / s) is below 1."""
    link = compress.error_feedback(compress.qsgd(10))

    def first(d):
        jax.eval_shape(lambda x: link.update(x, link.init(x), key=jax.random.key(0)), jnp.ones(d))

    first(99)
    with pytest.raises(ValueError, match="smaller blocks"):
        first(100)


def sums_of(link, xs):
    """What was sent in all, and the last state."""

    def step(state, x):
        message, state = link.update(x, state)
        return state, compress.decode(message)

    state, sent = jax.jit(lambda xs: jax.lax.scan(step, link.init(xs[0]), xs))(jnp.asarray(xs, jnp.float32))
    return np.asarray(sent, np.float64), state


def test_a_residual_around_a_contraction_stays_bounded_and_around_plain_signs_grows():
    """200 inputs of about 100 and of mean 50, of which plain signs send 1 each: the rest, near 10,000, is left."""
    xs = 50 + 100 * np.random.default_rng(4).normal(size=(200, 50))
    left = {}
    for name, link in (("scaled", compress.scaled_sign()), ("plain", compress.sign())):
        _, state = sums_of(compress.error_feedback(link, refuse=False), xs)
        left[name] = float(jnp.mean(jnp.abs(state.residual)))
    assert left["scaled"] < 1000 and 8000 < left["plain"]


GRADIENTS = np.random.default_rng(5).normal(size=(15, 20)).astype(np.float32)


def numpy_momentum_correction(gradients, k, momentum):
    """Momentum correction and factor masking of the paper (3.1, 3.2), of one worker: what is sent at each step."""
    u, v, sent = np.zeros(20), np.zeros(20), []
    for g in gradients.astype(np.float64):
        u = momentum * u + g
        v = v + u
        places = np.argsort(-np.abs(v), kind="stable")[:k]
        sent.append(np.zeros(20))
        sent[-1][places] = v[places]
        u[places], v[places] = 0, 0
    return np.array(sent), u, v


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_correction_is_that_of_the_paper(momentum):
    sent, state = sums_of(compress.momentum_correction(compress.top_k(0.2), momentum=momentum), GRADIENTS)
    expected, u, v = numpy_momentum_correction(GRADIENTS, 4, momentum)
    np.testing.assert_allclose(sent, expected, atol=1e-4)
    np.testing.assert_allclose(state.velocity, u, atol=1e-4)
    np.testing.assert_allclose(state.residual, v, atol=1e-4)


def test_what_was_sent_starts_again_without_momentum():
    link = compress.momentum_correction(compress.top_k(0.25))
    g = jnp.array([4.0, 3.0, 2.0, 1.0])
    message, state = link.update(g, link.init(g))
    assert compress.decode(message).tolist() == [4, 0, 0, 0]
    assert state.velocity.tolist() == state.residual.tolist() == [0, 3, 2, 1]


def test_momentum_correction_without_momentum_is_error_feedback():
    with_none, _ = sums_of(compress.momentum_correction(compress.top_k(0.2), momentum=0.0), GRADIENTS)
    np.testing.assert_array_equal(with_none, sums_of(compress.error_feedback(compress.top_k(0.2)), GRADIENTS)[0])


def test_momentum_correction_that_sends_everything_is_plain_gradient_descent():
    """All that is sent starts again, so that no momentum is left."""
    sent, _ = sums_of(compress.momentum_correction(compress.top_k(1.0)), GRADIENTS)
    np.testing.assert_array_equal(sent, GRADIENTS)


def test_what_waits_long_is_sent_as_momentum_would_have_moved_it():
    """A number that is sent at the last of T steps has then moved as by SGD with momentum: the reason for it all."""
    g = np.ones((8, 2), np.float32) * np.array([10.0, 0.1], np.float32)
    g[-1] = [0.0, 0.1]
    sent, _ = sums_of(compress.momentum_correction(compress.top_k(0.5), momentum=0.9), g)
    assert np.all(sent[:-1, 1] == 0)
    velocity = np.cumsum(0.9 ** np.arange(8)) * 0.1
    np.testing.assert_allclose(sent[-1, 1], velocity.sum(), rtol=1e-5)


def test_a_momentum_above_one_is_refused():
    with pytest.raises(ValueError, match="momentum"):
        compress.momentum_correction(TENTH, momentum=1.5)


def test_a_total_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="total_weight"):
        compress.ef21_server(total_weight=0.0)


@pytest.mark.parametrize(
    "make", [compress.error_feedback, functools.partial(compress.momentum_correction, momentum=0.0)]
)
def test_half_precision_loses_nothing_over_many_steps(make):
    """In bfloat16 a residual of 256 would not grow by 1."""
    link = make(compress.top_k(0.5))
    x = jnp.array([1.0, 1000.0], jnp.bfloat16)

    def step(carry, _):
        message, state = link.update(x, carry[0])
        return (state, carry[1] + compress.decode(message)), None

    (state, sent), _ = jax.lax.scan(step, (link.init(x), jnp.zeros(2)), None, length=1000)
    np.testing.assert_allclose(sent + state.residual, [1000, 1e6], rtol=1e-5)


@pytest.mark.parametrize("make", [compress.error_feedback, compress.momentum_correction])
@pytest.mark.parametrize("inner", [compress.top_k(0.5), compress.scaled_sign()], ids=["top_k", "scaled_sign"])
def test_a_nan_is_sent_once(make, inner):
    link = make(inner)
    x = jnp.array([1.0, -2.0, 3.0, 0.5])
    _, before = link.update(x, link.init(x))
    message, after = link.update(x.at[1].set(jnp.nan), before)
    assert not np.isfinite(compress.decode(message)).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert np.isfinite(compress.decode(link.update(x, after)[0])).all()


def test_the_servers_side_says_which_weight_it_wants():
    server = compress.ef21_server(10.0)
    with pytest.raises(ValueError, match="pass weight="):
        server.update(jnp.ones(3), server.init(jnp.ones(3)))


def test_a_chain_in_an_order_that_leaves_a_link_nothing_is_refused():
    wrong = optax.chain(compress.quantize(8, rounding="nearest"), compress.top_k(0.1))
    with pytest.raises(ValueError, match=r"top_k\(...\): quantize, before it, leaves no numbers to compress"):
        wrong.update(jnp.ones(10), wrong.init(jnp.ones(10)))
    with pytest.raises(ValueError, match="compresses nothing"):
        nothing = compress.error_feedback(compress.over_tree(optax.identity()))
        nothing.update(jnp.ones(10), nothing.init(jnp.ones(10)))


def test_what_needs_more_than_its_payload_cannot_be_sent_undecoded():
    link = optax.chain(compress.random_k(0.5), compress.undecoded())
    with pytest.raises(ValueError, match="hold seed besides"):
        link.update(jnp.ones(10), link.init(jnp.ones(10)), round=0)
