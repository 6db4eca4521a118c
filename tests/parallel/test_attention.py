"""Attention over tokens split over devices: what one device computes, in messages and memory that are told."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jfed import mesh
from jfed.collectives import _walk, count
from jfed.parallel import attention

B, T, HEADS, D = 2, 32, 8, 4
WAYS = {
    "ring": attention.ring_attention,
    "zigzag": attention.zigzag_attention,
    "all_to_all": attention.all_to_all_attention,
}
Q, K, V, G = (jnp.asarray(np.random.default_rng(i).normal(size=(B, T, HEADS, D)), jnp.float32) for i in range(4))
BLOCK = B * HEADS * D  # numbers a token


def differentiated(f):
    """`(q, k, v, g)` to the value and the three gradients."""

    def all_four(q, k, v, g):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(g)

    return all_four


@functools.cache
def program(way, s):
    """Value and gradients on s devices, of arrays as one device has them."""
    split = P(None, "sequence")
    on_devices = mesh.shard_map(mesh=mesh.make((s,), ("sequence",)), in_specs=split, out_specs=split)
    return jax.jit(on_devices(differentiated(lambda q, k, v: WAYS[way](q, k, v, "sequence"))))


@functools.cache
def alone():
    """Value and gradients by JAX's own attention."""
    return jax.jit(differentiated(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)))


def assert_near(got, want, atol):
    for name, one, other in zip(("value", "of q", "of k", "of v"), got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(("way", "s"), [("ring", 1), *itertools.product(WAYS, (2, 4, 8))], ids=lambda value: str(value))
def test_devices_attend_as_one_does(way, s):
    assert_near(program(way, s)(Q, K, V, G), alone()(Q, K, V, G), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_one_device_simulates_them(way):
    parts = [jnp.stack(jnp.split(x, 4, axis=1)) for x in (Q, K, V, G)]
    f = differentiated(lambda q, k, v: WAYS[way](q, k, v, "sequence"))
    got = jax.jit(jax.vmap(f, axis_name="sequence"))(*parts)
    assert_near([jnp.concatenate(list(x), axis=1) for x in got], alone()(Q, K, V, G), 1e-5)


def test_attention_of_one_device_is_that_of_jax():
    assert_near(jax.jit(differentiated(attention.causal_attention))(Q, K, V, G), alone()(Q, K, V, G), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_small_floats_are_summed_in_single(way):
    small = [x.astype(jnp.bfloat16) for x in (Q, K, V, G)]
    got = program(way, 4)(*small)
    assert {x.dtype.name for x in got} == {"bfloat16"}
    assert_near([x.astype(jnp.float32) for x in got], alone()(*(x.astype(jnp.float32) for x in small)), 0.04)


@pytest.mark.parametrize("way", ("ring", "zigzag"))
def test_scores_far_too_large_for_exp_do_no_harm(way):
    large = 300 * Q  # scores of thousands, which single floats hold to a few parts in ten thousand
    np.testing.assert_allclose(program(way, 4)(large, K, V, G)[0], alone()(large, K, V, G)[0], rtol=0, atol=3e-3)


def test_the_largest_score_may_come_last_or_first():
    rising = jnp.arange(T, dtype=jnp.float32).reshape(1, T, 1, 1) * jnp.ones_like(K) * 4
    for keys in (rising, -rising):
        q = jnp.ones_like(Q)
        assert_near(program("ring", 4)(q, keys, V, G), alone()(q, keys, V, G), 1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_later_is_not_seen(way):
    changed = [x.at[:, 11:].set(7.0) for x in (K, V)]
    np.testing.assert_array_equal(program(way, 4)(Q, *changed, G)[0][:, :11], program(way, 4)(Q, K, V, G)[0][:, :11])


def sent(f, s, tokens, *, arrays=3, dtype=jnp.float32):
    """Bytes sent by each of s devices that need not exist, each of so many tokens."""
    devices = AbstractMesh((s,), ("sequence",), axis_types=(AxisType.Auto,))
    spec = P(None, "sequence")
    shape = jax.ShapeDtypeStruct((B, tokens * s, HEADS, D), dtype)
    mapped = jax.shard_map(f, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    return count.traced(mapped, *[shape] * arrays).sent


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("s", (1, 2, 4, 64))
def test_a_ring_sends_what_its_theory_says(s, dtype):
    t, numbers, width = 6, 6 * BLOCK, dtype.dtype.itemsize
    forward = 2 * (s - 1) * numbers * width
    backward = (2 * s - 1) * numbers * width + (s - 1) * numbers * 4 + 2 * (s - 1) * B * HEADS * t * 4
    ring = functools.partial(attention.ring_attention, axis_name="sequence")
    assert set(sent(ring, s, t, dtype=dtype)) == {forward}
    assert set(sent(differentiated(ring), s, t, arrays=4, dtype=dtype)) == {(forward + backward) * (s > 1)}


@pytest.mark.parametrize("s", (2, 4, 16))
def test_a_zigzag_sends_four_arrays_more_at_most(s):
    t, block = 6, 6 * BLOCK * 4
    ring, zigzag = (functools.partial(WAYS[way], axis_name="sequence") for way in ("ring", "zigzag"))
    more = sent(zigzag, s, t) - sent(ring, s, t)
    # A device keeps that one of its two parts, if any, of which it is the place: part 0 of device 0, the last of s / 2.
    kept = [{2 * i, 2 * i + 1} & {i, 2 * s - 1 - i} for i in range(s)]
    np.testing.assert_array_equal(more, [(2 - len(parts)) * 2 * block for parts in kept])
    both = sent(differentiated(zigzag), s, t, arrays=4) - sent(differentiated(ring), s, t, arrays=4)
    np.testing.assert_array_equal(both, 2 * more)


@pytest.mark.parametrize("s", (2, 4, 8))
def test_all_to_all_sends_four_arrays_each_way(s):
    way = functools.partial(attention.all_to_all_attention, axis_name="sequence")
    each = 4 * (6 * BLOCK * 4) * (s - 1) // s
    assert set(sent(way, s, 6)) == {each}
    assert set(sent(differentiated(way), s, 6, arrays=4)) == {2 * each}


def multiplications(jaxpr):
    """Of all products in a program."""
    total = 0
    for eqn in _walk.equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contracted]))
    return total


@pytest.mark.parametrize(("way", "shares"), [("ring", {0.0, 1.0}), ("zigzag", {0.5})])
def test_all_devices_of_a_zigzag_work_equally(way, shares):
    """By the multiplications in each branch that a device may take at a hop, of those for its own block."""
    f = differentiated(lambda q, k, v: WAYS[way](q, k, v, "sequence"))
    part = jax.ShapeDtypeStruct((4, B, 8, HEADS, D), jnp.float32)
    devices = AbstractMesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(
        lambda *xs: [x[None] for x in f(*(x[0] for x in xs))],
        mesh=devices,
        in_specs=P("sequence"),
        out_specs=P("sequence"),
        check_vma=False,
    )
    jaxpr = jax.make_jaxpr(local)(*[part] * 4).jaxpr
    conds = [eqn for eqn in _walk.equations(jaxpr) if eqn.primitive.name == "cond"]
    own = {2: 2 * B * HEADS * 8 * 8 * D, 5: 5 * B * HEADS * 8 * 8 * D}  # products forward and backward
    found = {multiplications(branch.jaxpr) for eqn in conds for branch in eqn.params["branches"]}
    assert len(conds) == 4  # a hop and the last, forward and backward
    assert found == {share * whole for share in shares for whole in own.values()}


@pytest.mark.parametrize("way", ("ring", "zigzag"))
def test_no_scores_are_kept_for_the_gradient(way):
    parts = [jax.ShapeDtypeStruct((4, B, T // 4, HEADS, D), jnp.float32)] * 3

    def kept(q, k, v):
        return jax.vjp(lambda *x: WAYS[way](*x, "sequence"), q, k, v)[1]

    arrays = jax.tree.leaves(jax.eval_shape(jax.vmap(kept, axis_name="sequence"), *parts))
    floats = sum(x.size for x in arrays if x.dtype == jnp.float32) // 4  # a device
    assert floats == (T // 4) * (4 * BLOCK + B * HEADS)  # q, k, v, the value, and the logarithm of the sum


def temporary(s, tokens):
    """Bytes that the compiled value and gradients of a ring need on a device of so many tokens."""
    split = P(None, "sequence")
    on_devices = mesh.shard_map(mesh=mesh.make((s,), ("sequence",)), in_specs=split, out_specs=split)
    ring = jax.jit(on_devices(differentiated(lambda q, k, v: attention.ring_attention(q, k, v, "sequence"))))
    shape = jax.ShapeDtypeStruct((1, s * tokens, 2, D), jnp.float32)
    return ring.lower(*[shape] * 4).compile().memory_analysis().temp_size_in_bytes


def test_memory_depends_on_the_tokens_of_a_device_alone():
    few, many = temporary(4, 128), temporary(8, 128)
    rows = 2 * 8 * 128 * 128 * 4  # what [N, T, t] scores would take on 8 devices
    assert few <= many < few + rows // 64 and many < rows


@pytest.mark.parametrize("way", WAYS)
def test_shapes_that_differ_are_refused(way):
    with pytest.raises(ValueError, match=rf"{way}_attention\(q=\(2, 32, 8, 4\), k=\(2, 32, 4, 4\).*repeat keys"):
        WAYS[way](Q, K[:, :, :4], V, None)


def test_sizes_that_do_not_divide_are_refused():
    parts = jnp.zeros((4, 1, 3, 6, 2))
    with pytest.raises(ValueError, match="zigzag_attention.tokens=3.*4 devices of axis 'sequence'.*even"):
        jax.vmap(lambda x: attention.zigzag_attention(x, x, x, "sequence"), axis_name="sequence")(parts)
    with pytest.raises(ValueError, match="all_to_all_attention.heads_of_a_device=6.*'sequence' has 4 devices.*=8"):
        jax.vmap(lambda x: attention.all_to_all_attention(x, x, x, "sequence"), axis_name="sequence")(parts)


def test_all_to_all_attends_by_what_it_is_given():
    shapes = []

    def first_token(q, k, v):
        shapes.append(v.shape)
        return jnp.broadcast_to(v[:, :1], v.shape)

    way = functools.partial(attention.all_to_all_attention, axis_name="sequence", attention=first_token)
    parts = [jnp.stack(jnp.split(x, 4, axis=1)) for x in (Q, K, V)]
    found = jax.vmap(way, axis_name="sequence")(*parts)
    assert set(shapes) == {(B, T, HEADS // 4, D)}
    np.testing.assert_array_equal(jnp.concatenate(list(found), axis=1), jnp.broadcast_to(V[:, :1], V.shape))


@pytest.mark.parametrize("way", WAYS)
def test_in_half_precision_gradients_are_those_of_single_within_its_rounding(way):
    """Out of scores and sums in half precision they would be some per cent off."""
    small = [x.astype(jnp.bfloat16) for x in (Q, K, V, G)]
    exact = jax.jit(differentiated(attention.causal_attention))(*(x.astype(jnp.float32) for x in small))
    parts = [jnp.stack(jnp.split(x, 4, axis=1)) for x in small]
    one = functools.partial(WAYS[way], axis_name="sequence")
    found = jax.jit(jax.vmap(differentiated(one), axis_name="sequence"))(*parts)
    for x, want in zip(found, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        got = jnp.concatenate(list(x), axis=1).astype(jnp.float32)
        assert jnp.linalg.norm(got - want) < 0.006 * jnp.linalg.norm(want)
