"""What programs send: counted by hand, in the jaxpr, in StableHLO and in compiled text."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jfed import collectives, mesh
from jfed.collectives import count

ALL_REDUCES = [name for name in collectives.__all__ if name.endswith("_all_reduce")]
THREE = jax.ShapeDtypeStruct((3,), jnp.float32)  # 12 bytes


def shift(n, step=1):
    return [(i, (i + step) % n) for i in range(n)]


def send(x, pairs):
    return lax.ppermute(x, "devices", pairs)


def on(shape, names, f, *, axes=None):
    """`f` of what each device of a mesh holds, one row each, with the shape of what all hold."""
    devices = AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    options = {} if axes is None else {"axis_names": set(axes)}
    spec = P(names if axes is None else axes)
    return jax.shard_map(f, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False, **options)


def rows(n, *shape):
    return jax.ShapeDtypeStruct((n, *shape), jnp.float32)


def counted(f, n=4, x=THREE, **options):
    return count.traced(*count.over(f, n, x), **options)


def test_a_permute_counts_for_who_sends_and_for_who_receives():
    found = counted(lambda x, _: send(x, [(0, 1), (2, 3), (3, 0)]))
    assert found.sent.tolist() == [12, 0, 12, 12]
    assert found.received.tolist() == [12, 12, 0, 12]
    assert (found.rounds, found.permutes, count.total(found)) == (1, 1, 36)
    assert found.sent.dtype == found.received.dtype == np.int64


def test_what_a_device_keeps_is_not_sent():
    found = counted(lambda x, _: send(x, [(0, 0), (1, 2), (2, 1)]))
    assert found.sent.tolist() == [0, 12, 12, 0]
    assert counted(lambda x, _: send(x, [(0, 0)])).rounds == 0


@pytest.mark.parametrize(
    ("dtype", "size"), [("int8", 1), ("int4", 1), ("bool", 1), ("bfloat16", 2), ("uint32", 4), ("complex64", 8)]
)
def test_bytes_are_those_of_the_dtype(dtype, size):
    x = jax.ShapeDtypeStruct((5,), dtype)
    f = lambda x, _: send(x, shift(2))  # noqa: E731
    assert counted(f, 2, x).sent.tolist() == [5 * size] * 2
    assert count.lowered(*count.over(f, 2, x)).sent.tolist() == [5 * size] * 2


def test_messages_that_wait_for_none_share_a_round():
    together = counted(lambda x, _: send(x, shift(4)) + send(2 * x, shift(4, 2)))
    in_turn = counted(lambda x, _: send(send(x, shift(4)), shift(4, 2)))
    assert (together.rounds, in_turn.rounds) == (1, 2)
    assert np.array_equal(together.sent, in_turn.sent)
    assert [step.times for step in in_turn.steps] == [1, 1] and len(together.steps[0].pairs) == 8


def test_a_scan_counts_as_often_as_it_goes_round():
    def f(x, _):
        def outer(x, _):
            return lax.scan(lambda x, _: (send(x, shift(4)), None), x, None, length=5)[0], None

        return lax.scan(outer, x, None, length=7)[0]

    found = counted(f)
    assert found.sent.tolist() == [35 * 12] * 4
    assert (found.rounds, found.permutes) == (35, 35)
    assert [(len(step.pairs), step.times) for step in found.steps] == [(4, 35)]


def test_turns_of_a_scan_that_do_not_wait_for_one_another_share_a_round():
    found = counted(lambda x, _: lax.scan(lambda c, x: (c, send(x, shift(4))), 0.0, x)[1])
    assert (found.rounds, found.permutes) == (1, 3)
    assert found.sent.tolist() == [12] * 4


def test_what_a_scan_carries_from_place_to_place_waits_as_often_as_it_is_sent():
    def turn(carry, _):
        first, second, third = carry
        return (send(second, shift(4)), third, first), None

    # In each turn one of three vectors is sent.
    found = counted(lambda x, _: sum(lax.scan(turn, (x, 2 * x, 3 * x), None, length=7)[0]))
    depths, longest = [0, 0, 0], 0
    for _ in range(7):
        depths = [depths[1] + 1, depths[2], depths[0]]
        longest = max(longest, *depths)
    assert (found.rounds, found.permutes) == (longest, 7)
    assert longest < 7


def test_a_message_after_a_scan_waits_for_it():
    def f(x, _):
        y = lax.scan(lambda x, _: (send(x, shift(4)), None), x, None, length=3)[0]
        return send(y, shift(4)) + send(x, shift(4, 2))

    found = counted(f)
    assert (found.rounds, found.permutes) == (4, 5)
    assert [len(step.pairs) for step in found.steps] == [8, 4]
    assert [step.times for step in found.steps] == [1, 3]


def test_steps_hold_every_message():
    for name in ALL_REDUCES:
        found = counted(getattr(collectives, name), 6, jax.ShapeDtypeStruct((31,), jnp.float32))
        sent, received = np.zeros(6, int), np.zeros(6, int)
        for step in found.steps:
            np.add.at(sent, step.pairs[:, 0], step.bytes * step.times)
            np.add.at(received, step.pairs[:, 1], step.bytes * step.times)
        assert np.array_equal(sent, found.sent) and np.array_equal(received, found.received), name
        assert found.rounds == sum(step.times for step in found.steps), name


def test_calls_remat_and_derivatives_are_followed():
    def f(x, axis):
        return jax.grad(lambda x: jnp.sum(jnp.sin(jax.checkpoint(jax.jit(lambda x: send(x * x, shift(4))))(x))))(x)

    assert counted(f).received.tolist() == [24] * 4  # there and back
    ring = lambda x, axis: jax.grad(lambda x: jnp.sum(collectives.ring_all_reduce(x, axis) ** 2))(x)  # noqa: E731
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((8,), dtype)
        assert np.array_equal(counted(ring, 4, x).sent, 2 * counted(collectives.ring_all_reduce, 4, x).sent)


OWN = {
    "psum": (lambda x, a: lax.psum(x, a), 2 * 32 * 3 // 4),
    "pmean": (lambda x, a: lax.pmean(x, a), 2 * 32 * 3 // 4),
    "pmax": (lambda x, a: lax.pmax(x, a), 2 * 32 * 3 // 4),
    "psum_scatter": (lambda x, a: lax.psum_scatter(x, a, tiled=True), 32 * 3 // 4),
    "all_to_all": (lambda x, a: lax.all_to_all(x, a, 0, 0, tiled=True), 32 * 3 // 4),
    "all_gather": (lambda x, a: lax.all_gather(x, a), 32 * 3),
    "in groups": (lambda x, a: lax.psum(x, a, axis_index_groups=[[0, 1], [2, 3]]), 32),
}


@pytest.mark.parametrize("name", OWN)
def test_collectives_of_xla_count_as_the_least_that_they_must_send(name):
    f, least = OWN[name]
    program = count.over(f, 4, jax.ShapeDtypeStruct((8,), jnp.float32))
    found = count.traced(*program)
    assert found.sent.tolist() == found.received.tolist() == [least] * 4
    assert (found.rounds, found.steps, found.opaque, found.permutes) == (1, (), 4 * least, 0)
    assert count.lowered(*program).sent.tolist() == [least] * 4


def test_uneven_shares_are_rounded_up_and_one_device_sends_nothing():
    assert counted(lambda x, a: lax.psum(x[0], a), 3).sent.tolist() == [6, 6, 6]  # 16 / 3 bytes
    alone = counted(lambda x, a: lax.psum(x, a) + lax.all_gather(x, a)[0], 1)
    assert (alone.sent.tolist(), alone.rounds) == ([0], 0)


def test_along_one_axis_of_a_mesh_all_its_rows_send():
    f = on((2, 3), ("a", "b"), lambda x: lax.ppermute(x, "b", [(0, 1), (2, 0)]))
    for found in (count.traced(f, rows(6, 3)), count.lowered(f, rows(6, 3))):
        assert found.sent.tolist() == [12, 0, 12, 12, 0, 12]
        assert found.received.tolist() == [12, 12, 0, 12, 12, 0]
    assert np.array_equal(count.traced(f, rows(6, 3)).steps[0].pairs, [(0, 1), (2, 0), (3, 4), (5, 3)])


@pytest.mark.parametrize("axes", [("a", "b"), ("b", "a"), ("c", "a"), ("b", "c")])
def test_of_several_axes_devices_are_numbered_as_the_compiler_numbers_them(axes):
    shape, names = (2, 2, 2), ("a", "b", "c")
    devices = mesh.make(shape, names)
    f = mesh.shard_map(mesh=devices, in_specs=P(names), out_specs=P(names))(
        lambda x: lax.ppermute(x, axes, [(0, 1), (1, 2)])
    )
    if list(axes) != sorted(axes) and hasattr(jax.config, "jax_raise_on_ppermute_sort_diff"):
        with pytest.raises(RuntimeError, match="same order"):  # from jax 0.12
            jax.jit(f).lower(rows(8, 3))
        return
    text = jax.jit(f).lower(rows(8, 3)).compile().as_text()
    found = [count.traced(f, rows(8, 3)), count.lowered(f, rows(8, 3)), count.compiled(text)]
    for other in found[1:]:
        assert np.array_equal(found[0].sent, other.sent) and np.array_equal(found[0].received, other.received)
    assert found[0].sent.any()


def test_a_sum_over_several_axes_is_one_among_all_their_devices():
    summed = on((2, 3), ("a", "b"), lambda x: lax.psum(x, ("a", "b")) + lax.psum(x, "a"))
    assert count.traced(summed, rows(6, 3)).sent.tolist() == [2 * 12 * 5 // 6 + 12] * 6


def test_a_number_of_few_bits_is_a_byte_at_every_stage():
    f = mesh.shard_map(mesh=mesh.make((2,), ("d",)), in_specs=P("d"), out_specs=P("d"))(
        lambda x: collectives.ring_all_reduce(x, "d")
    )
    x = jax.ShapeDtypeStruct((16,), "int4")
    stages = count.traced(f, x), count.lowered(f, x), count.compiled(jax.jit(f).lower(x).compile().as_text())
    assert [found.sent.tolist() for found in stages] == [[8, 8]] * 3


def test_branches_must_send_alike():
    def f(one, other):
        return lambda x, axis: lax.cond(lax.axis_index(axis) > 1, one, other, x)

    there, back = lambda x: send(x, shift(4)), lambda x: send(2 * x, shift(4))
    assert counted(f(there, back)).sent.tolist() == [12] * 4
    assert count.lowered(*count.over(f(there, back), 4, THREE)).sent.tolist() == [12] * 4
    unlike = f(there, lambda x: x)
    for counter in (count.traced, count.lowered):
        with pytest.raises(ValueError, match="send differently"):
            counter(*count.over(unlike, 4, THREE))


def test_a_while_that_sends_needs_its_turns():
    def f(x, axis):
        return lax.while_loop(
            lambda c: c[0] < lax.psum(c[1].sum(), axis), lambda c: (c[0] + 1, send(c[1], shift(4))), (0, x)
        )

    with pytest.raises(ValueError, match=r"trips=None.*test_count.py.*trips="):
        counted(f)
    with pytest.raises(ValueError, match="trips"):
        counted(f, trips=0)
    with pytest.raises(ValueError, match="not counted"):
        count.lowered(*count.over(f, 4, THREE))
    found = counted(f, trips=5)
    assert found.permutes == 5
    assert found.opaque == 6 * 4 * 6  # the condition is asked once more; 4 bytes among 4 devices


def test_a_while_that_sends_nothing_passes_depths_on():
    def f(x, axis):
        y = send(x, shift(4))
        return send(lax.while_loop(lambda c: c[0] < 3.0, lambda c: (c[0] + 1.0, c[0]), (y[0], 0.0))[1], shift(4))

    assert counted(f).rounds == 2


def test_what_cannot_be_counted_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="shard_map"):
        count.traced(jnp.sin, THREE)
    with pytest.raises(ValueError, match="shard_map"):
        count.lowered(jnp.sin, THREE)
    part = on((2, 2), ("a", "b"), lambda x: lax.psum(x, "a"), axes=("a",))
    with pytest.raises(ValueError, match="map all axes"):
        count.traced(part, rows(2, 3))
    two, four = (on((n,), ("a",), lambda x: lax.psum(x, "a")) for n in (2, 4))
    with pytest.raises(ValueError, match=r"\[2, 4\] devices"):
        count.traced(lambda x: two(x) + four(x), rows(4, 3))
    with pytest.raises(ValueError, match="has not"):
        counted(lambda x, _: send(x, [(0, 9)]))
    with pytest.raises(ValueError, match="n=0"):
        count.over(lambda x, _: x, 0, THREE)
    with pytest.raises(ValueError, match="no HLO"):
        count.compiled("module {}")


@pytest.mark.parametrize("name", ALL_REDUCES)
def test_stablehlo_sends_what_the_jaxpr_says(name):
    f, x = getattr(collectives, name), {"a": THREE, "b": jax.ShapeDtypeStruct((5, 4), jnp.bfloat16)}
    for n in (3, 8, 64):
        before, after = counted(f, n, x), count.lowered(*count.over(f, n, x))
        assert np.array_equal(before.sent, after.sent) and np.array_equal(before.received, after.received)
        assert before.permutes == after.permutes > 0 and after.rounds is None


def many_ways(x, small):
    """Loops, a small dtype and collectives of XLA's own; [4, 30] to [4, 30]."""
    y = collectives.ring_all_reduce(x, "d") + collectives.tree_all_reduce(x, "d")
    h = collectives.ring_all_reduce(x.astype(small), "d").astype(x.dtype)
    return y + h + lax.pmax(x, "d") + jnp.sum(lax.all_gather(x, "d"), axis=0) + lax.all_to_all(x, "d", 0, 0, tiled=True)


def text_of(devices, small):
    spec, names = P("d"), Mesh(np.array(devices), ("d",), axis_types=(AxisType.Auto,))
    f = jax.jit(mesh.shard_map(mesh=names, in_specs=spec, out_specs=spec)(lambda x: many_ways(x, small)))
    return f.lower(jax.ShapeDtypeStruct((16, 30), jnp.float32, sharding=NamedSharding(names, spec))).compile().as_text()


def in_jaxpr(small):
    return count.traced(on((4,), ("d",), lambda x: many_ways(x, small)), rows(16, 30))


def test_compiled_text_sends_what_the_jaxpr_says():
    before, after = in_jaxpr(jnp.int16), count.compiled(text_of(jax.devices()[:4], jnp.int16))
    assert np.array_equal(before.sent, after.sent) and np.array_equal(before.received, after.received)
    assert before.permutes == after.permutes == 16 and before.opaque == after.opaque


def test_the_tpu_compiler_sends_what_the_jaxpr_says_and_does_not_wait(monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    before, after = in_jaxpr(jnp.bfloat16), count.compiled(text_of(devices, jnp.bfloat16))
    assert np.array_equal(before.sent, after.sent) and np.array_equal(before.received, after.received)
    assert after.permutes == after.asynchronous == 16


# A loop that counts by itself from 1 to 7 in steps of 2, as the TPU compiler writes it; %s is what it sends.
LOOP = """HloModule m, is_scheduled=true, num_partitions=4

%%test (p: (s32[], f32[30], s32[])) -> pred[] {
  %%end = s32[]{:T(128)} constant(7)
  %%p = (s32[]{:T(128)}, f32[30]{0:T(128)S(1)}, s32[]{:T(128)}) parameter(0)
  %%i = s32[]{:T(128)} get-tuple-element(%%p), index=0
  ROOT %%lt = pred[]{:T(512)} compare(%%i, %%end), direction=LT
}

%%turn (p.1: (s32[], f32[30], s32[])) -> (s32[], f32[30], s32[]) {
  %%p.1 = (s32[]{:T(128)}, f32[30]{0:T(128)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %%i.1 = s32[]{:T(128)} get-tuple-element(%%p.1), index=0
  %%x = f32[30]{0:T(128)S(1)} get-tuple-element(%%p.1), index=1
  %%step = s32[]{:T(128)} get-tuple-element(%%p.1), index=2
  %%add = s32[]{:T(128)} add(%%i.1, %%step)
%s
  ROOT %%out = (s32[]{:T(128)}, f32[30]{0:T(128)S(1)}, s32[]{:T(128)}) tuple(%%add, %%y, %%step)
}

ENTRY %%main (x.1: f32[30]) -> f32[30] {
  %%x.1 = f32[30]{0:T(128)} parameter(0)
  %%one = s32[]{:T(128)} constant(1)
  %%begin = s32[]{:T(128)} copy(%%one)
  %%two = s32[]{:T(128)} constant(2)
  %%in = (s32[]{:T(128)}, f32[30]{0:T(128)S(1)}, s32[]{:T(128)}) tuple(%%begin, %%x.1, %%two)
  %%loop = (s32[]{:T(128)}, f32[30]{0:T(128)S(1)}, s32[]{:T(128)}) while(%%in), condition=%%test, body=%%turn
  ROOT %%result = f32[30]{0:T(128)} get-tuple-element(%%loop), index=1
}
"""
START = """  %start = (f32[30]{0}, f32[30]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{2,2},{3,0}}
  %y = f32[30]{0} collective-permute-done(%start)"""
SUM = "  %y = f32[30]{0} all-reduce(%x), replica_groups=GROUPS, to_apply=%add"


def test_the_turns_of_a_loop_are_read_from_its_counter():
    found = count.compiled(LOOP % START)
    assert found.sent.tolist() == [360, 0, 0, 360]
    assert (found.permutes, found.asynchronous) == (3, 3)


def test_what_the_condition_of_a_loop_sends_is_sent_once_more_than_the_rest():
    asked = SUM.replace("GROUPS", "{}").replace("%x", "%v")
    text = (
        (LOOP % "")
        .replace("%y", "%x")
        .replace("  %i = ", f"  %v = f32[30]{{0}} get-tuple-element(%p), index=1\n{asked}\n  %i = ")
    )
    assert count.compiled(text).sent.tolist() == [4 * 180] * 4


def test_the_turns_of_a_loop_that_does_not_count_are_asked_for():
    text = (LOOP % SUM.replace("GROUPS", "{}")).replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match=r"trips=None.*trips="):
        count.compiled(text)
    assert count.compiled(text, trips=2).sent.tolist() == [2 * 180] * 4


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        ("{}", [4] * 4),
        ("{{0,1},{2,3}}", [2] * 4),
        ("{{0,1,2},{3}}", [3, 3, 3, 1]),
        ("[2,2]<=[4]", [2] * 4),
        ("[1,4]<=[2,2]T(1,0)", [4] * 4),
        ("mesh['a'=2,'b'=2] {'b'}", [2] * 4),
        ("mesh['a'=2,'b'=2] {'a','b'}", [4] * 4),
    ],
)
def test_groups_are_read_however_they_are_written(groups, sizes):
    found = count.compiled(LOOP % SUM.replace("GROUPS", groups))
    assert found.sent.tolist() == [3 * -(-2 * 120 * (size - 1) // size) for size in sizes]
    assert found.opaque == found.sent.sum() and found.permutes == 0


def test_groups_written_in_an_unknown_way_are_an_error():
    with pytest.raises(ValueError, match="unknown way"):
        count.compiled(LOOP % SUM.replace("GROUPS", "mesh['a'=4] {'a':(1)2}"))
    with pytest.raises(ValueError, match="collective-broadcast"):
        count.compiled((LOOP % SUM.replace("GROUPS", "{}")).replace("all-reduce", "collective-broadcast"))


BRANCHES = """HloModule m, num_partitions=2

%%one (x: f32[30]) -> f32[30] {
  %%x = f32[30]{0} parameter(0)
  ROOT %%y = f32[30]{0} collective-permute(%%x), source_target_pairs={{0,1}}, metadata={op_name="jit(f)/(a, b)/send"}
}

%%other (x.1: f32[30]) -> f32[30] {
  %%x.1 = f32[30]{0} parameter(0)
  ROOT %%y.1 = f32[30]{0} collective-permute(%%x.1), source_target_pairs={{%s}}
}

ENTRY %%main (x.2: f32[30], i: s32[]) -> f32[30] {
  %%x.2 = f32[30]{0} parameter(0)
  %%i = s32[] parameter(1)
  ROOT %%r = f32[30]{0} conditional(%%i, %%x.2, %%x.2), branch_computations={%%one, %%other}
}
"""


def test_branches_of_compiled_text_must_send_alike():
    assert count.compiled(BRANCHES % "0,1").sent.tolist() == [120, 0]
    with pytest.raises(ValueError, match="send differently"):
        count.compiled(BRANCHES % "1,0")


def test_what_is_started_as_a_call_is_asynchronous_too():
    calls = "async-start(%%x.2), calls=%%one\n  %%d = f32[30]{0} async-done(%%r), calls=%%one"
    text = BRANCHES.replace("conditional(%%i, %%x.2, %%x.2), branch_computations={%%one, %%other}", calls) % "0,1"
    found = count.compiled(text)
    assert (found.sent.tolist(), found.permutes, found.asynchronous) == ([120, 0], 1, 1)
