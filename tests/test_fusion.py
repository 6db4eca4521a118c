"""How often XLA:CPU computes an array, and in which order."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jfed._fusion import DIVISIONS_STAY, after, computed_once


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_pattern_of_a_float_stays_what_it_is_but_minus_zero(dtype):
    kind = np.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    most, minus_zero = np.iinfo(kind).max, np.iinfo(kind).max // 2 + 1
    bits = np.arange(0, most, max(most // 2**16, 1), kind)
    bits = np.append(bits[bits != minus_zero], kind.type(most))  # the last is a NaN
    of = jax.jit(computed_once)
    np.testing.assert_array_equal(np.asarray(of(jax.lax.bitcast_convert_type(bits, dtype))).view(kind), bits)
    np.testing.assert_array_equal(of(jnp.array([-0.0], dtype)), 0)


def test_whole_numbers_too():
    x = jnp.array([0, 1, 2**31 - 1, 2**31 + 1, 2**32 - 1], jnp.uint32)
    np.testing.assert_array_equal(jax.jit(computed_once)(x), x)


@pytest.mark.skipif(not DIVISIONS_STAY, reason="this version of XLA repeats divisions as well")
def test_xla_computes_it_once_for_two_readers():
    def times_computed(wrap):
        def two_readers(x):
            y = wrap(jnp.maximum(x, 0) + 1)
            return y[:, None] * x[None], y[None, :] + x[:, None]

        return jax.jit(two_readers).lower(jnp.ones(64)).compile().as_text().count(" maximum(")

    assert times_computed(computed_once) == 1
    assert times_computed(lambda y: y) == 2  # if not, `computed_once` has no use any more


LEAVES = {
    "matrix": jnp.ones((2, 3)),
    "NaN": jnp.full((), jnp.nan),
    "empty": jnp.zeros((0, 2)),
    "half": jnp.ones(2, jnp.bfloat16),
    "complex": jnp.ones(2, jnp.complex64),
    "whole": jnp.ones(2, jnp.int32),
}


@pytest.mark.parametrize("tree", [LEAVES, {}])
def test_what_waits_for_others_stays_what_it_is(tree):
    x = jnp.array([1.5, -0.0, jnp.inf, jnp.nan])
    of = jax.jit(after)
    np.testing.assert_array_equal(np.asarray(of(x, tree)).view(np.uint32), np.asarray(x).view(np.uint32))
    np.testing.assert_array_equal(jax.vmap(lambda x: of(x, tree))(x[:, None])[:, 0], x)


def test_waiting_has_no_derivative():
    def of(x):
        return jnp.sum(after(x, {"a": x**2}))

    assert jax.grad(of)(jnp.float32(3)) == 0 and jax.jvp(of, (jnp.float32(3),), (jnp.float32(1),))[1] == 0


def test_leaves_that_lie_otherwise_are_not_waited_for():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(lambda x, leaf: after(x, leaf), mesh=mesh, in_specs=(P(), P("a")), out_specs=P())
    assert jax.jit(mapped)(jnp.float32(3), jnp.ones(4)) == 3
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        leaf = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, P("a")))
        assert jax.jit(after)(jnp.float32(3), leaf) == 3


def test_xla_updates_what_a_loop_carries_in_place():
    """Two layers: the first one's gradient reads the second's kernel, which its update overwrites."""

    def loss(kernels, x):
        return jnp.sum(jnp.tanh(x @ kernels[0]) @ kernels[1])

    def copies(wait):
        def step(_, kernels):
            gradient = jax.grad(loss)(kernels, jnp.ones((4, 64)))
            rate = wait(jnp.float32(0.1), gradient)
            return [k - rate * g for k, g in zip(kernels, gradient, strict=True)]

        def train(kernels):
            return jax.lax.fori_loop(0, 10, step, kernels)

        kernels = [jnp.ones((64, 48)), jnp.ones((48, 56))]
        text = jax.jit(train).lower(kernels).compile().as_text()
        return len(re.findall(r"f32\[48,56\]\S* copy\(", text))

    assert copies(after) < copies(lambda x, tree: x)  # if not, `after` has no use any more
