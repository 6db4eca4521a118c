"""Low rank: against the paper's algorithm in numpy, its volumes, and the mean over devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import compress

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

N, M = 20, 13  # rows and columns of most matrices


def matrix(rank, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(N, rank)) @ rng.normal(size=(rank, M))).astype(np.float32)


def stepper(link):
    """A compiled step: a matrix and a state to what it decodes to and the next state."""

    @jax.jit
    def step(m, state):
        message, state = link.update(m, state)
        return compress.decode(message), state

    return step


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_matrix_of_that_rank_or_less_comes_back(rank):
    link = compress.power_sgd(rank)
    for own_rank in range(1, rank + 1):
        m = matrix(own_rank)
        np.testing.assert_allclose(stepper(link)(m, link.init(m))[0], m, atol=1e-4)


def test_a_matrix_of_low_rank_costs_the_next_none_of_theirs():
    link = compress.power_sgd(4)
    state, step = link.init(matrix(4)), stepper(link)
    _, state = step(matrix(1), state)
    got, _ = step(matrix(4, seed=1), state)
    np.testing.assert_allclose(got, matrix(4, seed=1), atol=1e-3)


@pytest.mark.parametrize("scale", [1e-11, 1e11])
def test_small_and_large_matrices_come_back_step_after_step(scale):
    link, m = compress.power_sgd(1), scale * matrix(1)
    state, step = link.init(m), stepper(link)
    for _ in range(4):
        got, state = step(m, state)
        np.testing.assert_allclose(got / scale, m / scale, atol=1e-4)


def numpy_power_sgd(matrices, q):
    """Algorithms 1 and 2 of the paper, in float64: what each matrix is sent as."""
    q, sent, residual = np.asarray(q, np.float64), [], np.zeros((N, M))
    for m in matrices:
        whole = m + residual
        p, _ = np.linalg.qr(whole @ q)
        q = whole.T @ p
        sent.append(p @ q.T)
        residual = whole - sent[-1]
    return sent


@pytest.mark.parametrize("rank", [1, 3])
def test_steps_with_error_feedback_are_those_of_the_paper(rank):
    matrices = np.random.default_rng(0).normal(size=(6, N, M)).astype(np.float32)
    link = compress.error_feedback(compress.power_sgd(rank))
    state, step = link.init(matrices[0]), stepper(link)
    for m, expected in zip(matrices, numpy_power_sgd(matrices, state.compressor), strict=True):
        got, state = step(m, state)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_sent_is_a_projection(rank):
    """It and what is left out are at right angles."""
    link, m = compress.power_sgd(rank), np.random.default_rng(1).normal(size=(N, M)).astype(np.float32)
    got = np.asarray(stepper(link)(m, link.init(m))[0], np.float64)
    np.testing.assert_allclose((got**2).sum() + ((m - got) ** 2).sum(), (m**2).sum(), rtol=1e-5)
    assert np.linalg.matrix_rank(got, tol=1e-3) == rank


def test_from_one_step_to_the_next_it_finds_the_best_matrix_of_its_rank():
    """A power iteration: what it leaves of one and the same matrix is in the end what the singular values say."""
    rng = np.random.default_rng(2)
    u, v = np.linalg.qr(rng.normal(size=(N, N)))[0][:, :M], np.linalg.qr(rng.normal(size=(M, M)))[0]
    values = 2.0 ** -np.arange(M)
    m = ((u * values) @ v).astype(np.float32)
    link = compress.power_sgd(2)
    state, step = link.init(m), stepper(link)
    for _ in range(20):
        got, state = step(m, state)
    np.testing.assert_allclose(((m - got) ** 2).sum(), (values[2:] ** 2).sum(), rtol=1e-4)


def test_a_convolution_is_a_matrix_of_its_last_axis():
    kernel = matrix(2).reshape(2, 2, 5, M)
    link = compress.power_sgd(2)
    np.testing.assert_allclose(stepper(link)(kernel, link.init(kernel))[0], kernel, atol=1e-4)


def test_zeros_leave_the_start_as_it_was():
    link, m = compress.power_sgd(2), matrix(2)
    step, state = stepper(link), link.init(m)
    got, after = step(np.zeros((N, M), np.float32), state)
    assert not got.any()
    np.testing.assert_array_equal(after, state)
    np.testing.assert_allclose(step(m, after)[0], m, atol=1e-4)


def test_a_nan_does_not_spoil_what_comes_after():
    link, m = compress.power_sgd(2), matrix(2)
    step, bad = stepper(link), matrix(2)
    bad[0, 0] = np.nan
    got, state = step(bad, link.init(m))
    assert not np.isfinite(got).all()
    np.testing.assert_allclose(step(m, state)[0], m, atol=1e-4)


def test_vectors_and_matrices_that_would_not_get_smaller_are_sent_as_they_are():
    tree = {"vector": jnp.arange(100.0), "small": jnp.ones((3, 3)), "large": jnp.ones((30, 30)), "count": jnp.arange(3)}
    link = compress.power_sgd(2)  # 2 (3 + 3) numbers would be more than 9
    message, _ = link.update(tree, link.init(tree))
    assert all(message[name] is tree[name] for name in ("vector", "small", "count"))
    assert message["large"].payload["p"].shape == message["large"].payload["q"].shape == (30, 2)


def resnet18():
    """Shapes of the ResNet-18 for CIFAR that the paper trains, as flax lays them out."""
    shapes = {"first": (3, 3, 3, 64), "head": (512, 10), "bias": (10,)}
    norms, before = [64], 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes |= {f"{width}, {block}, 1": (3, 3, before, width), f"{width}, {block}, 2": (3, 3, width, width)}
            norms += [width, width]
            if before != width:
                shapes[f"{width}, shortcut"] = (1, 1, before, width)
                norms.append(width)
            before = width
    shapes |= {f"scale {i}": (width,) for i, width in enumerate(norms)}
    shapes |= {f"shift {i}": (width,) for i, width in enumerate(norms)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


PARAMETERS, STEPS = 11_173_962, 24  # of the model, and an epoch


@pytest.mark.parametrize(("rank", "mebibytes"), [(1, 4.205), (2, 7.531), (4, 14.182)])
def test_an_epoch_of_resnet18_takes_as_much_as_the_paper_says(rank, mebibytes):
    """Table 3 of arXiv:1905.13727: 1023 MB, and 4, 8 and 14."""
    shapes, link = resnet18(), compress.power_sgd(rank)
    assert sum(math.prod(x.shape) for x in shapes.values()) == PARAMETERS
    assert round(compress.nbytes(shapes) * STEPS / 2**20, 1) == 1023.0
    message = jax.eval_shape(lambda tree: link.update(tree, link.init(tree))[0], shapes)
    assert round(compress.nbytes(message) * STEPS / 2**20, 3) == mebibytes


def test_with_an_axis_all_send_the_mean():
    matrices = np.random.default_rng(3).normal(size=(5, N, M)).astype(np.float32)
    vectors = np.random.default_rng(4).normal(size=(5, M)).astype(np.float32)
    link = compress.power_sgd(2, axis_name="senders")
    tree = {"matrix": matrices, "vector": vectors}
    state = link.init(jax.tree.map(lambda x: x[0], tree))

    @jax.jit
    @functools.partial(jax.vmap, axis_name="senders", in_axes=(0, None))
    def together(tree, state):
        message, state = link.update(tree, state)
        return compress.decode(message), state

    got, after = together(tree, state)
    alone, q = stepper(compress.power_sgd(2))(matrices.mean(0), state["matrix"])
    for i in range(5):
        np.testing.assert_allclose(got["matrix"][i], alone, atol=1e-4)
        np.testing.assert_allclose(got["vector"][i], vectors.mean(0), atol=1e-6)
        np.testing.assert_allclose(after["matrix"][i], q, atol=1e-4)


def test_it_comes_first_in_a_chain():
    m = jnp.ones((N, M))
    thin = optax.chain(compress.power_sgd(1), compress.scaled_sign())
    state = thin.init(m)
    assert compress.nbytes(thin.update(m, state)[0]) == math.ceil(N / 8) + math.ceil(M / 8) + 2 * 4
    late = optax.chain(compress.scaled_sign(), compress.power_sgd(1))
    with pytest.raises(ValueError, match="put it before"):
        late.update(m, late.init(m))


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="rank"):
        compress.power_sgd(0)
