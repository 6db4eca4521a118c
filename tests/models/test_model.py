"""What every model promises, whatever it is made of; a new model joins by one row of ZOO."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jfed import models
from jfed.models import Model, from_linen, from_nnx, from_pair


class Row(NamedTuple):
    model: Model
    x: jax.Array  # [3, ...]
    y: jax.Array  # [3] or [3, T]
    outputs: tuple  # shape of the predictions
    parameters: int  # counted by hand


def images(*shape: int) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(7), (3, *shape)), jnp.array([0, 1, 4])


def tokens(vocabulary_size: int, length: int) -> tuple[jax.Array, jax.Array]:
    text = jax.random.randint(jax.random.key(7), (3, length + 1), 0, vocabulary_size)
    return text[:, :-1], text[:, 1:]


def linen_net() -> linen.Module:
    return linen.Sequential([linen.Dense(4), linen.relu, linen.Dense(5)])


ZOO = {
    "logistic_regression": Row(models.logistic_regression(60, 10), *images(60), (3, 10), 60 * 10 + 10),
    "two_nn": Row(models.two_nn(), *images(28, 28, 1), (3, 10), 199_210),
    "fedavg_cnn": Row(models.fedavg_cnn(), *images(28, 28, 1), (3, 10), 1_663_370),
    "lenet_gn": Row(models.lenet_gn(), *images(28, 28, 1), (3, 10), 114_410),
    "char_lstm": Row(
        models.char_lstm(11, embedding=3, hidden=4),
        *tokens(11, 6),
        (3, 6, 11),
        11 * 3 + (3 + 4 + 1) * 16 + (4 + 4 + 1) * 16 + 5 * 11,
    ),
    "char_gru": Row(
        models.char_gru(11, embedding=3, hidden=4), *tokens(11, 6), (3, 6, 11), 11 * 3 + (3 + 4 + 1) * 12 + 5 * 11
    ),
    "transformer": Row(
        models.transformer(11, width=8, layers=1, heads=2, context=9, dropout=0.5),
        *tokens(11, 6),
        (3, 6, 11),
        (12 * 8 + 13) * 8 + (2 * 11 + 9 + 2) * 8 + 11,
    ),
    "linen": Row(from_linen(linen_net(), jnp.ones((1, 6))), *images(6), (3, 5), 6 * 4 + 4 + 4 * 5 + 5),
    "pair": Row(from_pair(lambda key: jax.random.normal(key, (6, 5)), lambda w, x: x @ w), *images(6), (3, 5), 30),
}


@pytest.fixture(scope="module", params=ZOO)
def case(request):
    """A row with params of two seeds, made by one vmapped init, and its compiled apply."""
    row = ZOO[request.param]
    keys = jax.random.split(jax.random.key(0), 2)
    seeds = jax.jit(jax.vmap(row.model.init))(keys)
    first = jax.tree.map(lambda leaf: leaf[0], seeds)
    return row, keys, seeds, first, jax.jit(row.model.apply)


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


def test_parameters_are_a_plain_tree_of_float32_and_as_many_as_counted_by_hand(case):
    row, _, _, params, _ = case
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == row.parameters
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    containers = {type(node) for node in jax.tree.leaves(params, is_leaf=lambda n: not isinstance(n, dict))}
    assert not any(issubclass(kind, nnx.Variable | nnx.State) for kind in containers)


def test_init_is_pure_and_vmaps_over_keys(case):
    row, keys, seeds, _, _ = case
    close(jax.tree.map(lambda leaf: leaf[1], seeds), jax.jit(row.model.init)(keys[1]))
    assert any(not np.allclose(leaf[0], leaf[1]) for leaf in jax.tree.leaves(seeds))


def test_predictions_have_the_stated_shape_and_without_a_key_never_change(case):
    row, _, _, params, apply = case
    out = apply(params, row.x)
    assert out.shape == row.outputs and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, apply(params, row.x))


def test_jit_equals_eager(case):
    row, _, _, params, apply = case
    close(apply(params, row.x), row.model.apply(params, row.x))


def test_vmap_over_clients_equals_one_client_at_a_time_in_value_and_gradient(case):
    row, _, seeds, params, apply = case

    def total(p):
        return models.cross_entropy(row.model)(p, {"x": row.x, "y": row.y}, jax.random.key(1)).sum()

    values, grads = jax.jit(jax.vmap(jax.value_and_grad(total)))(seeds)
    value, grad = jax.jit(jax.value_and_grad(total))(params)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    close((values[0], jax.tree.map(lambda leaf: leaf[0], grads)), (value, grad), 1e-4)


def test_no_example_sees_another_of_its_batch(case):
    row, _, _, params, apply = case
    other = row.x.at[2].set(row.x[0])
    np.testing.assert_array_equal(apply(params, row.x)[:2], apply(params, other)[:2])
    assert not np.allclose(apply(params, row.x)[2], apply(params, other)[2])


class Dropper(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.linear(x))


class LinenDropper(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(64)(x))


@pytest.mark.parametrize("model", [from_nnx(Dropper), from_linen(LinenDropper(), jnp.ones((1, 3)))])
def test_dropout_follows_the_key_and_stops_without_one(model):
    params, x = model.init(jax.random.key(0)), jnp.ones((2, 3))
    a, b = (model.apply(params, x, jax.random.key(seed)) for seed in (1, 2))
    whole = model.apply(params, x)
    np.testing.assert_array_equal(a, model.apply(params, x, jax.random.key(1)))
    assert not np.allclose(a, b) and np.all(whole != 0)
    # 128 units of two seeds each: a rate of 0.5 within four standard deviations, 4 * sqrt(1/4 / 256).
    assert abs(np.mean(np.stack([a, b]) == 0) - 0.5) < 0.125
    np.testing.assert_allclose(a, np.where(a == 0, 0, 2 * whole), rtol=1e-6)
    # One key a client: the masks differ, and the module's own random state leaks nowhere.
    keys = jnp.stack([jax.random.key(1), jax.random.key(2)])
    both = jax.jit(jax.vmap(model.apply, (None, None, 0)))(params, x, keys)
    np.testing.assert_allclose(both, np.stack([a, b]), rtol=1e-6)


class Normalised(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


class Buffered(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.buffer = nnx.Variable(jnp.ones(3))

    def __call__(self, x):
        return x * self.buffer


def test_running_statistics_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"norm\.mean holds running statistics.*nnx\.GroupNorm"):
        from_nnx(Normalised).init(jax.random.key(0))
    bn = linen.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"batch_stats.*linen\.GroupNorm"):
        from_linen(bn, jnp.ones((2, 3))).init(jax.random.key(0))


def test_other_state_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"buffer is a Variable.*make it an nnx\.Param"):
        from_nnx(Buffered).init(jax.random.key(0))


def test_a_module_in_place_of_its_maker_is_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"write from_nnx\(lambda rngs: MyModule\(rngs=rngs\)\)"):
        from_nnx(Dropper(nnx.Rngs(0)))
    with pytest.raises(TypeError, match="use from_nnx for NNX modules"):
        from_linen(Dropper(nnx.Rngs(0)), jnp.ones((1, 3)))
