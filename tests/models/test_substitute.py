"""The kit's convolution inside users' flax models."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfed.models import fast_convolutions, from_nnx

KINDS = {
    "strided": {"strides": 2, "padding": "VALID"},
    "no bias": {"strides": (1, 2), "use_bias": False},
    "padded": {"padding": ((2, 0), (1, 1))},
    "circular": {"padding": "CIRCULAR"},
    "half precision": {"dtype": jnp.bfloat16},
}
OTHERS = {
    "grouped": {"feature_group_count": 2, "out_features": 4},
    "dilated": {"kernel_dilation": 2},
    "transposed": {"input_dilation": (2, 1)},
    "one dimension": {"kernel_size": (3,)},
    "precise": {"precision": jax.lax.Precision.HIGHEST},
    "lower": {"padding": "SAME_LOWER"},
}


def conv(rngs, **kind):
    options = {"in_features": 2, "out_features": 3, "kernel_size": (3, 3)} | kind
    return nnx.Conv(**options, rngs=rngs)


class Net(nnx.Module):
    """A convolution as an attribute and two inside a container."""

    def __init__(self, rngs, **kind):
        self.first = conv(rngs, **kind)
        self.rest = nnx.Sequential(conv(rngs, in_features=3, out_features=2, strides=2), nnx.relu, conv(rngs))

    def __call__(self, x):
        return self.rest(self.first(x))


def both(make):
    """The model as written, its warning ignored, and with the kit's convolutions."""
    theirs = from_nnx(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.init(jax.random.key(0))
    return theirs, from_nnx(lambda rngs: fast_convolutions(make(rngs)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_substituted_model_has_the_same_params_outputs_and_gradients_and_no_warning(kind):
    theirs, ours = both(lambda rngs: Net(rngs, **KINDS[kind]))
    x = jax.random.normal(jax.random.key(1), (2, 8, 7, 2))
    params = ours.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(0)))
    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, m=model: jnp.sum(jnp.sin(m.apply(p, x)))))(params)
        for model in (ours, theirs)
    )
    # bfloat16 keeps 8 bits, and the two sum in another order.
    tolerance = 0.1 if kind == "half precision" else 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def test_a_substituted_model_with_one_kernel_per_client_has_no_grouped_convolution_on_cpu():
    _, ours = both(Net)
    params = jax.eval_shape(jax.vmap(ours.init), jax.random.split(jax.random.key(0), 5))
    x = jax.ShapeDtypeStruct((5, 2, 8, 8, 2), jnp.float32)
    text = jax.jit(jax.vmap(jax.grad(lambda p, x: ours.apply(p, x).sum()))).lower(params, x).as_text()
    assert "stablehlo.convolution" in text
    assert "group_count = 5" not in text


def test_from_nnx_warns_once_of_a_flax_convolution_and_names_the_cure():
    model = from_nnx(Net)
    with pytest.warns(UserWarning, match=r"first, rest\.layers\.0, rest\.layers\.2 run.*fast_convolutions") as record:
        params = model.init(jax.random.key(0))
        model.init(jax.random.key(1))
        model.apply(params, jnp.ones((1, 8, 8, 2)))
    assert len(record) == 1 and "\n" not in str(record[0].message)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_the_kit_cannot_run_is_left_alone_and_named(kind):
    layer = conv(nnx.Rngs(0), **OTHERS[kind])
    with pytest.warns(UserWarning, match="Conv stay as they are.*groups, dilation"):
        assert fast_convolutions(layer) is layer
    assert layer.conv_general_dilated is jax.lax.conv_general_dilated


def test_a_convolution_with_a_function_of_its_own_keeps_it():
    def own(*args, **kwargs):
        raise NotImplementedError

    layer = conv(nnx.Rngs(0), conv_general_dilated=own)
    assert fast_convolutions(layer).conv_general_dilated is own


def test_what_is_no_module_is_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"write fast_convolutions\(MyModule\(rngs=rngs\)\)"):
        fast_convolutions(Net)
