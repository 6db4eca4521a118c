"""A mixture of experts: what a plain program computes, and on devices what one computes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jfed import mesh
from jfed.collectives import count
from jfed.parallel.experts import mixture_of_experts
from jfed.parallel.layered import Axes

B, T, H, E, F = 4, 12, 6, 4, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, H)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H)), jnp.float32)
make = functools.partial(mixture_of_experts, E, hidden=F)


@functools.cache
def params(num_experts=E):
    drawn = mixture_of_experts(num_experts, hidden=F, top=1).init(jax.random.key(2), H)
    return drawn | {"router": {"kernel": 2 * drawn["router"]["kernel"]}}  # some experts are liked more


def applied(layer, p, x):
    return jax.jit(lambda p, x: layer.apply(p, x, Axes()))(p, x)


def by_hand(params, x, *, top, capacity_factor, groups=1):
    """What the layer adds to one example [T, H], the balance before its coefficient, and the tokens dropped."""
    kernel, inside, out = (np.asarray(params[name]["kernel"], np.float64) for name in ("router", "in", "out"))
    num_experts, n = kernel.shape[1], len(x) // groups
    room = math.ceil(capacity_factor * top * n / num_experts)
    added, uneven, dropped = np.zeros(x.shape), [], 0
    for begin in range(0, len(x), n):
        logits = np.asarray(x[begin : begin + n], np.float64) @ kernel
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        order = np.argsort(-p, axis=1)[:, :top]
        taken, share = [0] * num_experts, np.zeros(num_experts)
        for choice in range(top):
            for token in range(n):
                e = order[token, choice]
                share[e] += 1 / (n * top)
                if taken[e] == room:
                    dropped += 1
                    continue
                taken[e] += 1
                gate = p[token, e] / (p[token, order[token]].sum() if top > 1 else 1)
                hidden = np.asarray(jax.nn.gelu(x[begin + token] @ inside[e]))
                added[begin + token] += gate * (hidden @ out[e])
        uneven.append(num_experts * (share * p.mean(0)).sum())
    return added, np.mean(uneven), dropped


@pytest.mark.parametrize(
    "setting",
    [
        {"top": 1, "capacity_factor": 1.0},
        {"top": 2, "capacity_factor": 1.0},
        {"top": 2, "capacity_factor": 0.5, "groups": 3},
        {"top": 3, "capacity_factor": 9.0},
    ],
    ids=lambda setting: "-".join(f"{name}={value}" for name, value in setting.items()),
)
def test_experts_take_the_tokens_that_a_plain_program_gives_them(setting):
    got, loss = applied(make(**setting, balance=0.3), params(), X)
    dropped = 0
    for example, value, lost in zip(X, got, loss, strict=True):
        want, uneven, number = by_hand(params(), example, **setting)
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(lost, 0.3 * uneven, rtol=1e-5)
        dropped += number
    assert (dropped == 0) == (setting["capacity_factor"] == 9.0)


def test_a_token_that_nobody_takes_gets_nothing():
    out, _ = applied(make(top=1, capacity_factor=1e-5), params(), X)  # room for one token
    wanted = jnp.argmax(X @ params()["router"]["kernel"], axis=-1)
    first = [[list(row).index(e) == i for i, e in enumerate(row)] for row in np.asarray(wanted).tolist()]
    np.testing.assert_array_equal(np.asarray(jnp.any(out != 0, axis=-1)), first)


def test_one_expert_is_a_dense_layer():
    p = params(1)
    out, loss = applied(mixture_of_experts(1, hidden=F, top=1, capacity_factor=1.0), p, X)
    want = jax.nn.gelu(X @ p["in"]["kernel"][0]) @ p["out"]["kernel"][0]
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, 0.01, rtol=1e-6)


def test_with_room_for_all_gradients_are_those_of_the_weighted_sum():
    def weighted(p, x):
        probabilities = jax.nn.softmax(x @ p["router"]["kernel"])
        least = jnp.sort(probabilities, axis=-1)[..., -2:-1]
        gates = jnp.where(probabilities >= least, probabilities, 0)
        inside = jax.nn.gelu(jnp.einsum("bth,ehf->btef", x, p["in"]["kernel"]))
        each = jnp.einsum("btef,efh->bteh", inside, p["out"]["kernel"])
        return jnp.einsum("bte,bteh->bth", gates / gates.sum(-1, keepdims=True), each)

    layer = make(top=2, capacity_factor=9.0)
    got = jax.jit(jax.grad(lambda p, x: (W * layer.apply(p, x, Axes())[0]).sum(), argnums=(0, 1)))(params(), X)
    want = jax.jit(jax.grad(lambda p, x: (W * weighted(p, x)).sum(), argnums=(0, 1)))(params(), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


@pytest.mark.parametrize(("kernel", "factor"), [(0.0, 1), (1e3, E)], ids=["nobody is preferred", "one gets all"])
def test_the_balance_is_told_by_its_extremes(kernel, factor):
    one = jnp.zeros((H, E)).at[:, 2].set(kernel)
    _, loss = applied(make(top=1, balance=0.5), params() | {"router": {"kernel": one}}, jnp.abs(X))
    np.testing.assert_allclose(loss, 0.5 * factor, rtol=1e-6)


def test_examples_are_routed_alone():
    layer = make(capacity_factor=1.0)
    together, one = applied(layer, params(), X), applied(layer, params(), X[1:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:2], b, rtol=0, atol=1e-6), together, one)


LAYER = make(capacity_factor=1.0, balance=0.3, groups=4)  # some tokens are dropped


def results(layer, axes, sums, p, x, w):
    """A device's value, losses and gradients: of the model by what a trainer does, of its tokens."""

    def loss(p, x):
        out, lost = layer.apply(p, x, axes)
        return (w * out).sum() + lost.sum(), (out, lost)

    (of_p, of_x), (out, lost) = jax.grad(loss, argnums=(0, 1), has_aux=True)(p, x)
    of_p = jax.tree.map(lambda g, names: jax.lax.psum(g, names) if names else g, of_p, sums)
    return out, lost, of_p, of_x


@functools.cache
def alone():
    nowhere = jax.tree.map(lambda _: (), params())
    return jax.jit(functools.partial(results, LAYER, Axes(), nowhere))(params(), X, W)


def on(sizes, layer=LAYER):
    """The same on a mesh, as a function of whole arrays that may not exist, and the specs of params."""
    axes = Axes(**{name: name for name in sizes})
    keep = lambda spec: P(*(name if name in sizes else None for name in spec))  # noqa: E731
    specs = jax.tree.map(keep, layer.specs, is_leaf=lambda x: isinstance(x, P))
    sums = jax.tree.map(
        lambda spec: tuple(name for name in sizes if name not in spec and name != "tensor"),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    examples, tokens = (name if name in sizes else None for name in ("expert", "sequence"))
    ins = specs, P(examples, tokens), P(examples, tokens)
    outs = P(examples, tokens), P(examples), specs, P(examples, tokens)
    return functools.partial(results, layer, axes, sums), ins, outs


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert": 1},
        {"expert": 2},
        {"expert": 4},
        {"tensor": 4},
        {"sequence": 4},
        {"expert": 2, "tensor": 4},
        {"sequence": 2, "expert": 2, "tensor": 2},
    ],
    ids=lambda sizes: "-".join(f"{name}={value}" for name, value in sizes.items()),
)
def test_devices_compute_what_one_does(sizes):
    f, ins, outs = on(sizes)
    devices = mesh.make(tuple(sizes.values()), tuple(sizes))
    got = jax.jit(mesh.shard_map(mesh=devices, in_specs=ins, out_specs=outs)(f))(params(), X, W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, alone())


def test_one_device_simulates_them():
    where = jax.tree.map(lambda spec: 0 if "expert" in spec else None, LAYER.specs, is_leaf=lambda x: isinstance(x, P))
    split = jax.tree.map(lambda x, axis: x if axis is None else x.reshape(2, E // 2, *x.shape[1:]), params(), where)
    sums = jax.tree.map(lambda axis: ("expert",) if axis is None else (), where, is_leaf=lambda x: x is None)
    f = functools.partial(results, LAYER, Axes(expert="expert"), sums)
    parts = [x.reshape(2, B // 2, T, H) for x in (X, W)]
    out, lost, of_p, of_x = jax.jit(jax.vmap(f, (where, 0, 0), axis_name="expert"))(split, *parts)
    of_p = {name: {"kernel": g["kernel"].reshape(-1, *g["kernel"].shape[2:])} for name, g in of_p.items()}
    of_p["router"]["kernel"] = of_p["router"]["kernel"][:H]  # the same on both
    got = out.reshape(X.shape), lost.reshape(B), of_p, of_x.reshape(X.shape)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, alone())


def sent(sizes, *, backward):
    """Bytes sent by each device of a mesh that need not exist, when every device has B examples of T tokens."""
    f, ins, outs = on(sizes, make(groups=1, capacity_factor=1.0))
    devices = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    axes = f.args[1]

    def forward(p, x, w):
        return f.args[0].apply(p, x, axes)

    def value_and_gradient(p, x, w):
        out, pull = jax.vjp(lambda p, x: forward(p, x, w), p, x)
        return *out, *pull((w, jnp.ones_like(out[1])))

    mapped = jax.shard_map(
        value_and_gradient if backward else forward,
        mesh=devices,
        in_specs=ins,
        out_specs=outs if backward else outs[:2],
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((B * sizes.get("expert", 1), T, H), jnp.float32)
    return count.traced(mapped, params(), x, x).sent


@pytest.mark.parametrize("e", (2, 4))
def test_tokens_travel_to_their_experts_and_back_and_so_do_gradients(e):
    room = math.ceil(2 * T / E)
    once = B * E * room * H * 4 * (e - 1) // e
    assert set(sent({"expert": e}, backward=False)) == {2 * once}
    assert set(sent({"expert": e}, backward=True)) == {4 * once}


def test_along_tensor_sums_of_the_tokens_and_of_the_gates_travel():
    summed = lambda numbers: 2 * numbers * 4 * 3 // 4  # noqa: E731  an all-reduce over 4 devices
    assert set(sent({"tensor": 4}, backward=False)) == {summed(B * T * H)}
    assert set(sent({"tensor": 4}, backward=True)) == {summed(2 * B * T * H + B * T * 2)}


def test_small_floats_stay_small_and_are_routed_in_single():
    small = X.astype(jnp.bfloat16)
    nowhere = jax.tree.map(lambda _: (), params())
    f = jax.jit(functools.partial(results, LAYER, Axes(), nowhere))
    out, lost, of_p, of_x = f(params(), small, W)
    want_out, want_lost, want_p, want_x = f(params(), small.astype(jnp.float32), W)
    assert (out.dtype, lost.dtype, of_x.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert {g.dtype.name for g in jax.tree.leaves(of_p)} == {"float32"}
    np.testing.assert_array_equal(lost, want_lost)
    for got, want in (
        (out, want_out),
        (of_x, want_x),
        *((of_p[name]["kernel"], want_p[name]["kernel"]) for name in of_p),
    ):
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top": 5}, r"top=5\): there are 4 experts"),
        ({"top": 0}, r"top=0\): top must be a whole number of at least 1"),
        ({"hidden": 0}, r"hidden=0\).*four times the width"),
        ({"capacity_factor": 0.0}, r"capacity_factor=0.0\).*above 0"),
        ({"balance": -1.0}, r"balance=-1.0\).*at least 0"),
        ({"groups": 0}, r"groups=0\).*at least 1"),
    ],
)
def test_values_out_of_bounds_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        mixture_of_experts(E, **setting)
    with pytest.raises(ValueError, match="num_experts=0"):
        mixture_of_experts(0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 3}, r"num_experts=4.*'expert' has 3 devices.*num_experts=6"),
        ({"tensor": 3}, r"hidden=8.*'tensor' has 3 devices.*hidden=9"),
        ({"sequence": 2}, r"groups=1.*'sequence' has 2 devices.*groups=2"),
    ],
)
def test_meshes_that_do_not_divide_are_refused(sizes, message):
    make().check({"expert": 2, "tensor": 4, "data": 3})
    with pytest.raises(ValueError, match=message):
        make().check(sizes)


def test_tokens_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"groups=5.*12 tokens"):
        make(groups=5).apply(params(), X, Axes())
    with pytest.raises(ValueError, match=r"groups=3.*2 devices"):
        parts = jnp.stack([X, X])
        jax.vmap(lambda x: make(groups=3).apply(params(), x, Axes(sequence="s")), axis_name="s")(parts)


def test_kernels_start_with_a_variance_of_one_over_their_inputs():
    drawn = mixture_of_experts(8, hidden=64, top=1).init(jax.random.key(0), 32)
    for name, inputs in {"router": 32, "in": 32, "out": 64}.items():
        kernel = drawn[name]["kernel"]
        np.testing.assert_allclose(kernel.std(), inputs**-0.5, rtol=3 / (2 * kernel.size) ** 0.5)  # standard errors
    assert mixture_of_experts(8, top=1).init(jax.random.key(0), 32)["in"]["kernel"].shape == (8, 32, 128)


def test_hidden_units_of_small_floats_are_rounded_once_after_the_activation():
    p, small = params(1), X.astype(jnp.bfloat16)
    layer = mixture_of_experts(1, hidden=F, top=1, capacity_factor=1.0)
    wide = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    inside = wide(jax.nn.gelu(wide(X) @ wide(p["in"]["kernel"][0])))
    want = inside @ wide(p["out"]["kernel"][0])
    found = applied(layer, p, small)[0].astype(jnp.float32)
    assert np.linalg.norm(found - want) < 0.003 * np.linalg.norm(want)
