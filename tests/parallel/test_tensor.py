"""Layers split over devices equal those of one device, in value and gradient, and send what theory says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from jfed import mesh, models
from jfed.collectives import _walk, count
from jfed.parallel import conjugate, networks, tensor

B, T, H, HIDDEN, V = 2, 8, 4, 12, 8
LAYOUTS = {"whole": tensor.WHOLE, "split": tensor.SPLIT, "overlapped": tensor.OVERLAPPED}
P = PartitionSpec
SPECS = {
    "table": P("tensor", None),
    "norm": {"scale": P(), "bias": P()},
    "up": {"kernel": P(None, "tensor"), "bias": P("tensor")},
    "down": {"kernel": P("tensor", None), "bias": P()},
    "out": {"kernel": P(None, "tensor"), "bias": P("tensor")},
}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def normal(seed, *shape):
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


def params_of_a_model():
    return {
        "table": normal(0, V, H),
        "norm": {"scale": 1 + normal(1, H), "bias": normal(2, H)},
        "up": {"kernel": normal(3, H, HIDDEN), "bias": normal(4, HIDDEN)},
        "down": {"kernel": normal(5, HIDDEN, H), "bias": normal(6, H)},
        "out": {"kernel": normal(7, H, V), "bias": normal(8, V)},
    }


TOKENS, LABELS = (jax.random.randint(jax.random.key(i), (B, T), low, V) for i, low in ((10, 0), (11, -1)))


def pair(params, x, axis_name, layout):
    h = jax.nn.gelu(tensor.column_dense(x, **params["up"], axis_name=axis_name, layout=layout))
    return tensor.row_dense(h, **params["down"], axis_name=axis_name, layout=layout)


def model(layout):
    """Every layer there is: the losses of all positions."""

    def apply(params, x, axis_name=None):
        tokens, labels = x
        h = tensor.embedding(tokens, params["table"], axis_name, layout=layout)
        h = h + pair(params, tensor.layer_norm(h, params["norm"], axis_name, layout=layout), axis_name, layout)
        h = layout.part(layout.whole(h, axis_name), axis_name)
        logits = tensor.column_dense(h, **params["out"], axis_name=axis_name, layout=layout)
        return tensor.cross_entropy(logits, labels, axis_name)

    return apply


def dealt(tree, specs, n):
    """What each of n devices holds of a tree: leaves [n, ...]."""

    def one(spec, x):
        axis = next((i for i, name in enumerate(spec) if name == "tensor"), None)
        return jnp.stack([x] * n if axis is None else jnp.split(x, n, axis))

    return jax.tree.map(one, specs, tree, is_leaf=lambda s: isinstance(s, PartitionSpec))


def on_devices(f, n):
    """`f` of one device as a program of trees of leaves [n, ...]."""
    every = P("tensor")

    def local(*rows):
        return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], rows)))

    return mesh.shard_map(mesh=mesh.make((n,), ("tensor",)), in_specs=every, out_specs=every)(local)


def simulated(f, n):
    return jax.vmap(f, axis_name="tensor")


def value_and_gradients(apply, axis_name):
    """Of the mean of outputs with unequal weights, so that none of them cancel."""

    def loss(params, x):
        y = apply(params, x, axis_name)
        return jnp.mean(y * jnp.linspace(0.5, 1.5, y.size).reshape(y.shape)), y

    return lambda params, x: jax.value_and_grad(loss, has_aux=True)(params, x)


@functools.cache
def of_one_device(name):
    """The case, and its outputs and gradients."""
    apply, params, specs, x = CASES[name]()
    (_, y), gradient = jax.jit(value_and_gradients(apply, None))(params, x)
    assert all(np.abs(g).max() > 1e-2 for g in jax.tree.leaves(gradient))
    return apply, params, specs, x, y, gradient


def equals_one_device(name, n, how):
    apply, params, specs, x, y, gradient = of_one_device(name)
    alike = jax.tree.map(lambda leaf: jnp.stack([leaf] * n), x)
    program = jax.jit(how(value_and_gradients(apply, "tensor"), n))
    (_, ys), gradients = program(dealt(params, specs, n), alike)
    close(ys, jnp.stack([y] * n))
    close(gradients, dealt(gradient, specs, n))


WAYS = [(1, on_devices), (2, on_devices), (4, on_devices), (4, simulated)]
ways = pytest.mark.parametrize(("n", "how"), WAYS, ids=[f"{n}-{how.__name__}" for n, how in WAYS])


@ways
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_of_all_layers_are_those_of_one_device(layout, n, how):
    equals_one_device(layout, n, how)


NETWORKS = {
    "mlp of two": (networks.mlp(H, 8, 3), (B, H)),
    "mlp of three": (networks.mlp(H, 8, 12, 3), (B, H)),
    "cnn of three": (networks.cnn((8, 8, 1), (4, 4, 4), 8, 3), (B, 8, 8, 1)),
    "cnn of two": (networks.cnn((5, 4, 2), (4, 8), 8, 3), (B, 5, 4, 2)),
}


def of_a_network(network, shape):
    params = jax.tree.map(lambda leaf: leaf + 0.1, network.init(jax.random.key(0)))
    return network.apply, params, network.specs, normal(1, *shape)


def of_all_layers(layout):
    return model(layout), params_of_a_model(), SPECS, (TOKENS, LABELS)


CASES = {name: functools.partial(of_all_layers, layout) for name, layout in LAYOUTS.items()}
CASES |= {name: functools.partial(of_a_network, *given) for name, given in NETWORKS.items()}


@ways
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_of_networks_are_those_of_one_device(name, n, how):
    NETWORKS[name][0].check({"tensor": n})
    equals_one_device(name, n, how)


def test_the_mlp_is_that_of_the_models():
    network, model = networks.mlp(784, 200, 200, 10), models.two_nn()
    theirs = jax.tree.leaves(model.init(jax.random.key(0)))
    # Both name layers in order, a bias before its kernel.
    ours = jax.tree.unflatten(jax.tree.structure(network.specs), theirs)
    x = normal(1, 3, 784)
    close(network.apply(ours, x), model.apply(model.init(jax.random.key(0)), x.reshape(3, 28, 28, 1)))


def test_the_cnn_is_that_of_flax():
    """Convolution, ReLU and pooling, then two dense layers, with its parameters."""

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, channels in (("conv_0", 4), ("conv_1", 8)):
                x = nn.max_pool(nn.relu(nn.Conv(channels, (3, 3), name=name)(x)), (2, 2), (2, 2))
            x = nn.relu(nn.Dense(8, name="dense")(x.reshape(len(x), -1)))
            return nn.Dense(3, name="out")(x)

    network, shape = NETWORKS["cnn of two"]
    _, params, _, x = of_a_network(network, shape)
    flat = params | {"dense": params["dense"] | {"kernel": params["dense"]["kernel"].reshape(-1, 8)}}
    close(network.apply(params, x), Flax().apply({"params": flat}, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_another_shape_or_of_whole_numbers_are_refused(name):
    network, shape = NETWORKS[name]
    params = network.init(jax.random.key(0))
    for x in (jnp.zeros((*shape, 2)), jnp.zeros(shape, jnp.uint8)):
        with pytest.raises(ValueError, match=r"convert it to floats \[B, "):
            network.apply(params, x)


def test_losses_are_those_of_the_models_at_every_kind_of_label():
    logits, labels = normal(0, 1, V, V), jnp.array([[0, V - 1, -1, -2, V, 3, 4, 5]])
    nll = tensor.cross_entropy(logits, labels)
    loss = models.cross_entropy(models.from_pair(lambda key: (), lambda params, x: x))
    close(nll[0], loss((), {"x": logits[0], "y": labels[0]}))
    halves = jnp.stack(jnp.split(logits, 2, -1))
    close(jax.vmap(tensor.cross_entropy, (0, None, None), axis_name="x")(halves, labels, "x"), jnp.stack([nll, nll]))


def test_logits_of_any_size_have_a_finite_loss():
    logits = jnp.array([[1e4, 0.0], [-1e4, -1e4]])
    close(tensor.cross_entropy(logits, jnp.array([1, 0])), jnp.array([1e4, np.log(2)]))


def test_a_token_outside_the_vocabulary_is_nan_on_every_device():
    table, tokens = normal(0, V, H), jnp.array([-1, 0, V - 1, V])
    expected = jnp.stack([jnp.full(H, jnp.nan), table[0], table[-1], jnp.full(H, jnp.nan)])
    halves = jnp.stack(jnp.split(table, 2))
    found = jax.vmap(tensor.embedding, (None, 0, None), axis_name="x")(tokens, halves, "x")
    close(found, jnp.stack([expected, expected]))
    close(tensor.embedding(tokens, table), expected)


def sent(f, *args, n=4):
    """Bytes that every device sends, and permutes run."""
    program = on_devices(f, n)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), args)
    counted = count.traced(program, *shapes)
    assert len(set(counted.sent.tolist())) == 1
    return int(counted.sent[0]), counted.permutes


def all_reduce(numbers, n=4):
    """Bytes that a device sends at least, to add up so many float32."""
    return 2 * 4 * numbers * (n - 1) // n


def sent_by_a_pair(layout, n=4):
    params = jax.tree.map(lambda x: x[0], dealt(params_of_a_model(), SPECS, n))
    held = jnp.zeros((B, T if layout == "whole" else T // n, H))
    both = {name: params[name] for name in ("up", "down")}
    gradient = jax.grad(lambda params, x: pair(params, x, "tensor", LAYOUTS[layout]).sum(), (0, 1))
    return sent(gradient, both, held)


def test_a_pair_of_layers_sums_once_forward_and_once_backward():
    assert sent_by_a_pair("whole") == (2 * all_reduce(B * T * H), 0)


def test_splitting_the_tokens_sends_as_much_and_the_gradient_of_the_bias():
    assert sent_by_a_pair("split") == (2 * all_reduce(B * T * H) + all_reduce(H), 0)


def test_overlapped_layers_send_as_much_in_permutes():
    # Each way a gather and a scatter of n - 1 hops.
    assert sent_by_a_pair("overlapped") == (2 * all_reduce(B * T * H) + all_reduce(H), 4 * 3)


def test_the_loss_of_split_logits_sends_three_numbers_a_position():
    gradient = jax.grad(lambda logits, labels: tensor.cross_entropy(logits, labels, "tensor").sum())
    assert sent(gradient, jnp.zeros((B, T, V // 4)), LABELS) == (3 * all_reduce(B * T), 0)


def test_an_embedding_sums_forward_and_its_gradient_nothing():
    gradient = jax.grad(lambda table, tokens: tensor.embedding(tokens, table, "tensor").sum())
    assert sent(gradient, jnp.zeros((V // 4, H)), TOKENS) == (all_reduce(B * T * H), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_half_precision_only_half_precision_is_multiplied_and_sums_are_single(layout):
    def loss(params, x):
        y = pair(params, x, "tensor", LAYOUTS[layout])
        assert y.dtype == jnp.bfloat16
        return y.astype(jnp.float32).sum()

    params = {name: params_of_a_model()[name] for name in ("up", "down")}
    args = jax.tree.map(lambda x: x[None], (params, normal(9, B, T, H).astype(jnp.bfloat16)))
    gradient = simulated(jax.grad(loss, (0, 1)), 1)
    equations = [e for e in _walk.equations(jax.make_jaxpr(gradient)(*args).jaxpr) if e.primitive.name == "dot_general"]
    kinds = [tuple(x.aval.dtype.name for x in (*e.invars, *e.outvars)) for e in equations]
    assert len(kinds) == 6 and set(kinds) == {("bfloat16", "bfloat16", "float32")}
    of_params, of_x = gradient(*args)
    assert of_x.dtype == jnp.bfloat16 and {g.dtype.name for g in jax.tree.leaves(of_params)} == {"float32"}


def test_a_network_names_what_the_axis_does_not_divide():
    with pytest.raises(ValueError, match=r"mlp\(outputs_of_layer_0=6\): the mesh's axis 'tensor' has 4 devices"):
        networks.mlp(H, 6, 3).check({"tensor": 4})
    with pytest.raises(ValueError, match=r"cnn\(inputs_of_out=6\): .* has 4 devices"):
        networks.cnn((4, 4, 1), (4,), 6, 3).check({"tensor": 4, "data": 2})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: networks.mlp(3), r"mlp\(sizes=\(3,\)\)"),
        (lambda: networks.mlp(3, 0), r"mlp\(sizes=0\)"),
        (lambda: networks.cnn((4, 4), (4,), 8, 3), r"cnn\(image_shape=\(4, 4\)\)"),
        (lambda: networks.cnn((4, 4, 1), (4, 0), 8, 3), r"cnn\(channels=0\)"),
        (lambda: networks.cnn((4, 4, 1), (4, 4, 4), 8, 3), r"3 poolings .* at most 2 convolutions"),
    ],
)
def test_wrong_sizes_of_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: tensor.matmul_scatter(x, jnp.ones((4, 4)), "tensor"), r"tokens=6\): .*'tensor' has 4 devices"),
        (lambda x: conjugate.scattered(x, "tensor", 0), r"scattered\(x of shape \(6, 4\)\): .* 4 devices.*dimension 0"),
        (lambda x: conjugate.sliced(x, "tensor", 0), r"sliced\(x of shape \(6, 4\)\): .* dimension 0"),
        (lambda x: conjugate.exchanged(x, "tensor", 0, 1), r"exchanged\(x of shape \(6, 4\)\): .* dimension 0"),
    ],
)
def test_tokens_that_devices_do_not_divide_are_refused(f, message):
    with pytest.raises(ValueError, match=message):
        jax.vmap(f, axis_name="tensor")(jnp.ones((4, 6, 4)))


def test_in_half_precision_norms_biases_and_logits_are_computed_in_single():
    x = (100 + normal(0, 3, H)).astype(jnp.bfloat16)  # a mean that half precision would lose
    params = {"scale": 1 + normal(1, H), "bias": normal(2, H)}
    want = tensor.layer_norm(x.astype(jnp.float32), params)
    found = tensor.layer_norm(x, params)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, want.astype(jnp.bfloat16))
    kernel, bias = normal(3, H, 5), 1e-3 * normal(4, 5)
    exact = x.astype(jnp.float32) @ kernel.astype(jnp.bfloat16).astype(jnp.float32) + bias[None]
    close(tensor.column_dense(x, kernel, bias, dtype=jnp.float32), exact)


def test_an_embeddings_messages_are_of_its_dtype_and_its_gradient_of_the_tables():
    def loss(table):
        h = tensor.embedding(TOKENS, table, "tensor", dtype=jnp.bfloat16)
        assert h.dtype == jnp.bfloat16
        return h.astype(jnp.float32).sum()

    table = normal(0, 4, V // 4, H)
    gradient = jax.vmap(jax.grad(loss), axis_name="tensor")(table)
    assert gradient.dtype == jnp.float32
    counted = count.traced(on_devices(jax.grad(loss), 4), jax.ShapeDtypeStruct(table.shape, table.dtype))
    assert set(counted.sent.tolist()) == {all_reduce(TOKENS.size * H) // 2}
