"""What XLA:CPU is made to compute once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed._fusion import DIVISIONS_STAY, computed_once


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_number_stays_what_it_is(dtype):
    kind = np.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    most = np.iinfo(kind).max
    bits = np.append(np.arange(0, most, max(most // 2**16, 1), kind), kind.type(most))
    same = jax.jit(computed_once)(jax.lax.bitcast_convert_type(bits, dtype))
    told = ~np.asarray(jnp.isnan(same))
    np.testing.assert_array_equal(np.asarray(same).view(kind)[told], bits[told])  # -0 and 0 differ too
    np.testing.assert_array_equal(told, ~np.asarray(jnp.isnan(jax.lax.bitcast_convert_type(bits, dtype))))


def test_whole_numbers_too():
    x = jnp.array([0, 1, 2**31, 2**32 - 2], jnp.uint32)
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
