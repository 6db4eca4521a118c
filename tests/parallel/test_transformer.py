"""The transformer split over devices is that of the models on one device, in loss and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jfed import mesh, models
from jfed.collectives import count
from jfed.parallel.attention import all_to_all_attention, zigzag_attention
from jfed.parallel.experts import FeedForward, mixture_of_experts
from jfed.parallel.layered import Axes
from jfed.parallel.transformer import transformer

V, T, B = 8, 8, 4
SIZES = {"width": 8, "layers": 2, "heads": 4, "context": T}
P = PartitionSpec
X, Y = (jax.random.randint(jax.random.key(i), (B, T), low, V) for i, low in ((0, 0), (1, -1)))
BATCH = {"x": X, "y": Y.at[0].set(-1)}  # one example without labels
SPLIT = {"sequence_parallel": True}
OVERLAPPED = SPLIT | {"overlap": True}
EXPERTS = {"feed_forward": mixture_of_experts(4, hidden=8, groups=2, balance=0.1)}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def losses(model, axes, parts, batch):
    enter, block, leave = model.functions(axes)
    h, _ = lax.scan(lambda h, params: (block(params, h), None), enter(parts.enter, batch), parts.blocks)
    return leave(parts.leave, h, batch)


def params_of(model):
    """No zeros and ones: biases and scales matter."""
    params = model.init(jax.random.key(2))
    keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda p, key: p + 0.1 * jax.random.normal(key, p.shape), params, keys)


def gradient_fn(model, axes):
    """Losses, and the gradient of their mean over B, of what is a device's own; parts to parts."""

    def mean(parts, batch):
        each = losses(model, axes, parts, batch)
        return jnp.sum(each) / B, each

    return lambda parts, batch: jax.value_and_grad(mean, has_aux=True)(parts, batch)


def specs_of(model):
    is_spec = lambda s: isinstance(s, PartitionSpec)  # noqa: E731
    return model.specs._replace(blocks=jax.tree.map(lambda s: P(None, *s), model.specs.blocks, is_leaf=is_spec))


def over(devices, model):
    """The program of losses and gradients on a mesh, summed as whoever trains the model does; parts to parts."""
    axes = Axes(**{name: name for name in devices.axis_names})
    specs, gradient = specs_of(model), gradient_fn(model, axes)
    batch = P("expert" if axes.expert else None, "sequence" if axes.sequence else None)

    def whole(spec, g):
        names = [name for name in ("sequence", "expert") if name in devices.axis_names and name not in spec]
        return lax.psum(g, tuple(names)) if names else g

    def local(parts, batch):
        (_, each), gradients = gradient(parts, batch)
        return each, jax.tree.map(whole, specs, gradients, is_leaf=lambda s: isinstance(s, PartitionSpec))

    # Axes that the mesh lacks are left out of specs.
    have = lambda spec: P(*(name if name in devices.axis_names else None for name in spec))  # noqa: E731
    here = jax.tree.map(have, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.shard_map(local, mesh=devices, in_specs=(here, batch), out_specs=(P(*batch[:1]), here), check_vma=False)


@functools.cache
def on_one_device(kind):
    model = transformer(V, **SIZES, **(EXPERTS if kind == "experts" else {}))
    params = params_of(model)
    (_, each), gradient = jax.jit(gradient_fn(model, Axes()))(model.split(params), BATCH)
    assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(gradient))
    return params, each, gradient


MESHES = [
    ({"tensor": 2}, {}),
    ({"tensor": 2}, SPLIT),
    ({"tensor": 4}, OVERLAPPED),
    ({"tensor": 2, "sequence": 4}, OVERLAPPED),
    ({"expert": 2, "tensor": 2}, EXPERTS | OVERLAPPED),
]
MORE = [
    ({"tensor": 1}, {}),
    ({"tensor": 4}, {}),
    ({"tensor": 4}, SPLIT),
    ({"sequence": 4}, {}),
    ({"sequence": 2}, {"sequence_attention": zigzag_attention}),
    ({"sequence": 2, "tensor": 2}, {"sequence_attention": all_to_all_attention}),
    ({"tensor": 2}, EXPERTS),
    ({"expert": 4, "sequence": 2}, EXPERTS),
]
MESHES += [pytest.param(*row, marks=pytest.mark.slow) for row in MORE]


def named(value):
    return ",".join(f"{name}={n}" if isinstance(n, int) else name for name, n in value.items()) or "plain"


@pytest.mark.parametrize(("sizes", "options"), MESHES, ids=named)
def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(sizes, options):
    model = transformer(V, **SIZES, **options)
    model.check(sizes)
    params, each, gradient = on_one_device("experts" if "feed_forward" in options else "plain")
    program = jax.jit(over(mesh.make(tuple(sizes.values()), tuple(sizes)), model))
    found, gradients = program(model.split(params), BATCH)
    close(found, each)
    close(gradients, gradient)


def test_simulated_on_one_device_it_is_the_same():
    model, n = transformer(V, **SIZES, sequence_parallel=True), 2
    params, each, gradient = on_one_device("plain")

    def dealt(parts):
        def one(spec, x):
            axis = next((i for i, name in enumerate(spec) if name == "tensor"), None)
            return jnp.stack([x] * n if axis is None else jnp.split(x, n, axis))

        return jax.tree.map(one, specs_of(model), parts, is_leaf=lambda s: isinstance(s, PartitionSpec))

    program = jax.vmap(gradient_fn(model, Axes(tensor="tensor")), (0, None), axis_name="tensor")
    (_, found), gradients = jax.jit(program)(dealt(model.split(params)), BATCH)
    close(found, jnp.stack([each] * n))
    close(gradients, dealt(gradient))


def test_loss_and_gradient_are_those_of_the_models():
    theirs = models.cross_entropy(models.transformer(V, **SIZES))
    params, each, gradient = on_one_device("plain")
    expected, of_params = jax.jit(jax.value_and_grad(lambda p: jnp.mean(theirs(p, BATCH))))(params)
    close(jnp.mean(each), expected)
    close(transformer(V, **SIZES).join(gradient), of_params)


def test_parameters_are_the_tree_of_the_models_from_the_same_distribution():
    sizes = {"width": 64, "layers": 1, "heads": 4, "context": 64}
    ours, theirs = (make(65, **sizes).init(jax.random.key(0)) for make in (transformer, models.transformer))
    # The standard error of a standard deviation of 4096 numbers is 1.1 %.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.std(), b.std(), rtol=0.06, atol=1e-6), ours, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.mean(), b.mean(), atol=0.01), ours, theirs)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    far = jax.tree.map(lambda a, b: (np.abs(a).max(), np.abs(b).max()), ours, theirs)["block_0"]["qkv"]["kernel"]
    assert max(far) < 2.3 / 0.87962566 / 8  # normal, cut off at two standard deviations


@pytest.mark.parametrize("options", [{}, EXPERTS], ids=named)
def test_joining_undoes_splitting(options):
    model = transformer(V, **SIZES, **options)
    params = model.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, model.join(model.split(params)), params)
    assert jax.tree.structure(specs_of(model), is_leaf=lambda s: isinstance(s, PartitionSpec)) == jax.tree.structure(
        model.split(params)
    )


def test_in_half_precision_activations_are_small_and_the_loss_and_gradients_single():
    model = transformer(V, **SIZES, compute_dtype=jnp.bfloat16)
    params, each, gradient = on_one_device("plain")
    parts, functions = model.split(params), model.functions(Axes())
    h = functions.enter(parts.enter, BATCH)
    assert h.dtype == functions.block(jax.tree.map(lambda x: x[0], parts.blocks), h).dtype == jnp.bfloat16
    (_, found), gradients = jax.jit(gradient_fn(model, Axes()))(parts, BATCH)
    assert {x.dtype.name for x in jax.tree.leaves((found, gradients))} == {"float32"}
    close(found, each, 0.05)
    far = optax.tree.norm(optax.tree.sub(gradients, gradient)) / optax.tree.norm(gradient)
    assert 1e-4 < far < 0.05


def test_attention_is_what_one_gives():
    model = transformer(V, **SIZES, attention=lambda q, k, v: v)
    params, *_ = on_one_device("plain")
    h = jnp.zeros((1, 3, 8)).at[0, 0].set(1.0)
    one = jax.tree.map(lambda x: x[0], model.split(params).blocks)
    # Nothing but attention tells a token of others.
    moved = model.functions(Axes()).block(one, h + jnp.zeros_like(h).at[0, 0].set(jnp.arange(8.0)))
    close(moved[0, 1:], model.functions(Axes()).block(one, h)[0, 1:])


def test_balance_losses_of_all_blocks_are_added_to_every_example():
    def balanced(value):
        def apply(params, h, axes):
            return jnp.zeros_like(h), value * (1 + jnp.arange(B, dtype=jnp.float32))

        model = transformer(V, **SIZES, feed_forward=FeedForward(lambda key, width: {}, {}, apply, lambda sizes: None))
        return losses(model, Axes(), model.split(model.init(jax.random.key(0))), BATCH)

    close(balanced(3.0) - balanced(0.0), SIZES["layers"] * 3.0 * (1 + jnp.arange(B)))


def sent_by(function, sizes, options):
    """Bytes that a device sends for the value and gradient of the sum of `function(functions, parts, h, batch)`."""
    model = transformer(V, **SIZES, **options)
    n = sizes["tensor"]
    devices = AbstractMesh((n,), ("tensor",), axis_types=(AxisType.Auto,))
    specs = specs_of(model)
    parts, functions = (
        jax.eval_shape(lambda: model.split(model.init(jax.random.key(0)))),
        model.functions(Axes("tensor")),
    )
    h = jax.ShapeDtypeStruct((B, T, 8), jnp.float32)
    held = P(None, "tensor") if options else P()

    def local(parts, h, batch):
        return jax.grad(lambda parts, h: jnp.sum(function(functions, parts, h, batch)), (0, 1))(parts, h)

    program = jax.shard_map(local, mesh=devices, in_specs=(specs, held, P()), out_specs=(specs, held), check_vma=False)
    counted = count.traced(program, parts, h, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH))
    assert len(set(counted.sent.tolist())) == 1
    return int(counted.sent[0]), counted.permutes


def of_a_block(functions, parts, h, batch):
    return functions.block(jax.tree.map(lambda x: x[0], parts.blocks), h)


def of_a_block_again(functions, parts, h, batch):
    one = jax.tree.map(lambda x: x[0], parts.blocks)
    return jax.checkpoint(functions.block)(one, h)


def of_the_exit(functions, parts, h, batch):
    return functions.leave(parts.leave, h, batch)


def of_the_entrance(functions, parts, h, batch):
    return functions.enter(parts.enter, batch)


WHOLE_H, SHARED = 4 * B * T * 8, 4 * 8  # bytes of h, and of a parameter of its width


@pytest.mark.parametrize(
    ("function", "options", "reduced", "gathered", "permutes"),
    [
        (of_a_block, {}, 4 * WHOLE_H, 0, 0),
        (of_a_block, SPLIT, 4 * WHOLE_H + 6 * SHARED, 0, 0),  # norms' scales and biases, and two biases
        (of_a_block, OVERLAPPED, 4 * WHOLE_H + 6 * SHARED, 0, 8 * 3),
        (of_a_block_again, {}, 5 * WHOLE_H, 0, 0),
        (of_a_block_again, SPLIT, 4 * WHOLE_H + 6 * SHARED, 3 * WHOLE_H, 0),  # two gathers and a scatter
        (of_a_block_again, OVERLAPPED, 4 * WHOLE_H + 6 * SHARED, 3 * WHOLE_H, 11 * 3),
        (of_the_exit, {}, WHOLE_H + 3 * 4 * B * T, 0, 0),
        (of_the_exit, SPLIT, WHOLE_H + 3 * 4 * B * T + 2 * SHARED, 0, 0),
        (of_the_entrance, {}, WHOLE_H, 0, 0),
        (of_the_entrance, SPLIT, WHOLE_H, 4 * T * 8, 0),  # the gradient of positions
    ],
)
def test_what_a_tensor_axis_sends_is_what_theory_says(function, options, reduced, gathered, permutes):
    n = 4
    expected = 2 * reduced * (n - 1) // n + gathered * (n - 1) // n
    assert sent_by(function, {"tensor": n}, options) == (expected, permutes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, r"transformer\(layers=0\)"),
        ({"heads": 3}, r"transformer\(width=8\): width must be a multiple of heads=3; use width=9"),
        ({"overlap": True}, r"transformer\(overlap=True\): .* sequence_parallel"),
        ({"compute_dtype": jnp.int8}, r"transformer\(compute_dtype=.*int8"),
        ({"compute_dtype": "small"}, r"transformer\(compute_dtype='small'"),
        ({"overlap": "no"}, r"transformer\(overlap='no'\): overlap must be True or False"),
        ({"sequence_attention": None}, r"transformer\(sequence_attention=None\)"),
        ({"sequence_parallel": 1}, r"transformer\(sequence_parallel=1\)"),
        ({"attention": "flash"}, r"transformer\(attention='flash'\): give a function"),
        ({"feed_forward": 4}, r"transformer\(feed_forward=4\): give mixture_of_experts"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        transformer(V, **(SIZES | change))


@pytest.mark.parametrize(
    ("vocabulary_size", "options", "sizes", "message"),
    [
        (V, {}, {"tensor": 8}, r"transformer\(heads=4\): the mesh's axis 'tensor' has 8 devices"),
        (9, {}, {"tensor": 2, "data": 2}, r"transformer\(vocabulary_size=9\): the mesh's axis 'tensor' has 2 devices"),
        (V, EXPERTS, {"expert": 8}, r"mixture_of_experts\(num_experts=4\): the mesh's axis 'expert' has 8 devices"),
    ],
)
def test_an_axis_that_does_not_divide_is_named(vocabulary_size, options, sizes, message):
    with pytest.raises(ValueError, match=message):
        transformer(vocabulary_size, **SIZES, **options).check(sizes)


@pytest.mark.parametrize(
    ("tokens", "labels", "axes", "options", "message"),
    [
        ((B, T), (B, T), {"sequence": 2}, {}, r"transformer\(context=8\): the sequence has 16 tokens"),
        ((B, 6), (B, 6), {"tensor": 4}, SPLIT, r"'tensor' has 4 devices, which must divide the 6 tokens"),
        ((B, T), (B,), {}, {}, r"transformer\(y of shape \(4,\) and dtype int32\)"),
    ],
)
def test_sequences_that_do_not_fit_are_refused_when_traced(tokens, labels, axes, options, message):
    model = transformer(V, **SIZES, **options)
    batch = {"x": jnp.zeros(tokens, jnp.int32), "y": jnp.zeros(labels, jnp.int32)}
    parts = jax.eval_shape(lambda: model.split(model.init(jax.random.key(0))))

    def run(parts, _):
        return losses(model, Axes(**{name: name for name in axes}), parts, batch)

    for name, n in axes.items():
        run = functools.partial(jax.vmap(run, (None, 0), axis_name=name, axis_size=n))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, parts, jnp.zeros(next(iter(axes.values()), 1)))
