import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jfed import tree

ROWS = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.arange(3)}


def test_take_reads_rows_and_repeats_the_last_past_the_end():
    taken = tree.take(ROWS, jnp.array([2, 7]))
    np.testing.assert_array_equal(taken["a"], [[4, 5], [4, 5]])
    np.testing.assert_array_equal(taken["b"], [2, 2])


def test_put_writes_rows_and_nothing_past_the_end():
    written = tree.put(ROWS, jnp.array([1, 3]), tree.take(ROWS, jnp.array([0, 0])))
    np.testing.assert_array_equal(written["a"], [[0, 1], [0, 1], [4, 5]])
    np.testing.assert_array_equal(written["b"], [0, 0, 2])


def test_select_spreads_its_mask_over_trailing_axes():
    chosen = tree.select(jnp.array([True, False, True]), ROWS, tree.zeros(ROWS))
    np.testing.assert_array_equal(chosen["a"], [[0, 1], [0, 0], [4, 5]])
    np.testing.assert_array_equal(chosen["b"], [0, 0, 2])


def test_zeros_takes_leading_axes_and_keeps_dtypes():
    made = tree.zeros(ROWS, (5,))
    assert made["a"].shape == (5, 3, 2) and made["b"].dtype == ROWS["b"].dtype


def test_all_finite_sees_a_nan_or_an_infinity_in_any_leaf_and_ignores_integers():
    assert tree.all_finite(ROWS)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not tree.all_finite({**ROWS, "a": ROWS["a"].at[1, 1].set(bad)})


@pytest.mark.parametrize(("value", "finite"), [(jnp.nan, False), (-jnp.inf, False), (jnp.finfo(jnp.float32).max, True)])
def test_all_finite_of_a_large_leaf(value, finite):
    leaf = jnp.zeros((2, 100, 101)).at[1, 70, 3].set(value)
    assert leaf.size > tree._LARGE
    assert bool(tree.all_finite({"a": leaf, "b": jnp.ones(3)})) is finite
    assert jax.vmap(tree.all_finite)(jnp.stack([leaf, jnp.zeros_like(leaf)])).tolist() == [finite, True]


@pytest.mark.parametrize("rows", [0, 1, 4, 7])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bfloat16])
@pytest.mark.parametrize("entries", [5, 2 * tree._LARGE])
def test_total_adds_the_rows(rows, dtype, entries):
    x = jax.random.randint(jax.random.key(0), (rows, entries), -8, 8).astype(dtype)
    found = tree.total({"a": x})["a"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), np.sum(np.asarray(x, np.float32), 0))


def test_total_does_not_stall_in_half_precision():
    """Added one by one in bfloat16, ones stall at 256."""
    np.testing.assert_array_equal(tree.total(jnp.ones((300, 2 * tree._LARGE), jnp.bfloat16)).astype(int), 300)


@pytest.mark.parametrize("rows", [3, 7])
def test_total_of_large_rows_differentiates_and_maps(rows):
    x = jax.random.normal(jax.random.key(0), (2, rows, 2 * tree._LARGE))

    def loss(x):
        return jnp.sum(tree.total(x) ** 2)

    expected = jnp.broadcast_to(2 * jnp.sum(x, 1, keepdims=True), x.shape)
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(x), expected, rtol=1e-5, atol=1e-5)
    whole = jax.grad(lambda x: jnp.sum(tree.total({"x": x, "n": x > 0, "i": x.astype(int)})["x"]))(x[0])
    np.testing.assert_array_equal(whole, 1)
    tangent = jax.jvp(tree.total, (x[0],), (x[1],))[1]
    np.testing.assert_allclose(tangent, jnp.sum(x[1], 0), rtol=1e-5, atol=1e-5)


def test_total_of_rows_on_many_devices():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 2 * tree._LARGE)), NamedSharding(mesh, P("a")))
        np.testing.assert_array_equal(jax.jit(tree.total)(x), 4)


def test_nbytes_counts_every_leaf_in_its_own_dtype():
    assert tree.nbytes({"a": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(5, jnp.int8), "c": ()}) == 17


def test_bytes_of_two_messages_can_be_added():
    """As Mime's clients send two; what is exact is below 2 GiB."""
    for nbytes in (2**31 - 1, 2**31, 3 * 2**30):
        one = tree.count_bytes(nbytes, jnp.array([True, False]))
        assert (one + one).tolist() == [2 * nbytes, 0]
