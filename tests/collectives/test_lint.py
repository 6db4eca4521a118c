"""What is found wrong in programs of many devices, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jfed import collectives, mesh, parallel
from jfed._axis import vary
from jfed.collectives import lint

ALL_REDUCES = [name for name in collectives.__all__ if name.endswith("_all_reduce")]
RING = [(i, (i + 1) % 4) for i in range(4)]
ROWS, PARAMETERS = jnp.ones((8, 3)), jnp.ones(3)
checked = pytest.mark.parametrize("check_vma", [True, False])


def on(f, *, check_vma=False, shape=(4,), names=("d",), ins=None, outs=None):
    """`f` on a mesh of devices that do not exist, its inputs cut along all axes."""
    devices = AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    ins, outs = P(names) if ins is None else ins, P(names) if outs is None else outs
    return jax.shard_map(f, mesh=devices, in_specs=ins, out_specs=outs, check_vma=check_vma)


def kinds(f, *args, **options):
    return [finding.kind for finding in lint.check(on(f, **options), *(args or (ROWS,)))]


def add(x):
    return lax.psum(x, "d")


def differing(x):
    return lax.axis_index("d") > 1


def same(x):
    return lax.pmax(x.sum(), "d") > 1


def decided(predicate):
    return lambda x: lax.cond(predicate(x), lambda x: vary(add(x), "d"), lambda x: x, vary(x, "d"))


DIVERGENT = {
    "by its index": decided(differing),
    "by its rows": decided(lambda x: x.sum() > 1),
    "by what it was sent": decided(lambda x: lax.ppermute(x.sum(), "d", RING) > 1),
    "by what some were not sent": decided(lambda x: lax.ppermute(vary(jnp.ones(()), "d"), "d", [(0, 1)]) > 0),
    "by its share of a sum": decided(lambda x: lax.psum_scatter(jnp.ones(4) * x[0, 0], "d") > 1),
    "by a sum among some": decided(lambda x: lax.psum(x.sum(), "d", axis_index_groups=[[0, 1], [2, 3]]) > 1),
    "in a switch": lambda x: lax.switch(lax.axis_index("d"), [lambda x: x, lambda x: vary(add(x), "d")], vary(x, "d")),
    "within a scan within a branch": lambda x: lax.cond(
        differing(x), lambda x: lax.scan(lambda x, _: (lax.ppermute(x, "d", RING), None), x, None, length=3)[0],
        lambda x: x, vary(x, "d"),
    ),
    "by one of the kit's": lambda x: lax.cond(
        differing(x), lambda x: collectives.tree_all_reduce(x, "d"), lambda x: x, vary(x, "d")
    ),
    "in the body of a while": lambda x: lax.while_loop(
        lambda x: x.sum() < 9, lambda x: vary(add(x), "d"), vary(x, "d")
    ),
    "in the condition of a while": lambda x: lax.while_loop(
        lambda c: add(c[1].sum()) * c[0] < 9, lambda c: (c[0] + 1, c[1]), (lax.axis_index("d"), vary(x, "d"))
    )[1],
    "by what a scan carries from its second turn on": lambda x: lax.scan(
        lambda c, _: ((c[1], lax.axis_index("d"), decided(lambda x: c[0] > 0)(c[2])), None),
        (vary(jnp.int32(0), "d"), vary(jnp.int32(0), "d"), vary(x, "d")), None, length=3,
    )[0][2],
    "by how often a while went round": lambda x: decided(
        lambda x: lax.while_loop(lambda c: c < lax.axis_index("d"), lambda c: c + 1, vary(jnp.int32(0), "d")) > 1
    )(x),
}  # fmt: skip
GROUPED = {"by a sum among some"}  # check_vma knows no groups


@pytest.mark.parametrize("way", DIVERGENT)
def test_a_collective_that_some_devices_may_not_reach_is_found(way):
    for check_vma in (False,) if way in GROUPED else (False, True):
        assert kinds(DIVERGENT[way], check_vma=check_vma) == ["divergent collective"], check_vma


REACHED = {
    "decided by a maximum": decided(same),
    "decided by a sum": decided(lambda x: add(x.sum()) > 1),
    "decided by what all have gathered": decided(lambda x: lax.all_gather(x, "d").sum() > 1),
    "decided by the kit's sum": decided(lambda x: collectives.ring_all_reduce(x.sum(), "d") > 1),
    "decided by a turn of a loop": lambda x: lax.fori_loop(
        0, 4, lambda i, x: decided(lambda x: i % 2 == 0)(x), vary(x, "d")
    ),
    "nothing sent in a branch": lambda x: lax.cond(differing(x), jnp.sin, jnp.cos, vary(x, "d")),
    "nothing sent in a loop": lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, vary(x, "d")),
    "sent before, chosen after": lambda x: jnp.where(differing(x), add(x), x),
    "turns agreed on": lambda x: lax.while_loop(
        lambda x: lax.pmax(x.sum(), "d") < 9, lambda x: x + lax.ppermute(x, "d", RING), vary(x, "d")
    ),
}  # fmt: skip


@checked
@pytest.mark.parametrize("way", REACHED)
def test_a_collective_that_all_devices_reach_is_none(way, check_vma):
    assert kinds(REACHED[way], check_vma=check_vma) == []


def test_a_predicate_that_differs_along_another_axis_only_is_none():
    def f(over):
        return lambda x: lax.cond(lax.axis_index("b") > 0, lambda x: lax.psum(x, over), lambda x: x, x)

    options = {"shape": (2, 2), "names": ("a", "b")}
    assert kinds(f("a"), **options) == []
    assert kinds(f("b"), **options) == kinds(f(("a", "b")), **options) == ["divergent collective"]
    sharded = lambda x: lax.cond(x.sum() > 1, lambda x: lax.psum(x, "a"), lambda x: x, x)  # noqa: E731
    assert kinds(sharded, **options, ins=P("b"), outs=P("b")) == []
    assert kinds(sharded, **options, ins=P("a"), outs=P("a")) == ["divergent collective"]


@checked
@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([(0, 1), (0, 2)], r"device 0 sends more than once; take turns"),
        ([(0, 1), (2, 1), (3, 0), (1, 0)], r"device 0, 1 receives more than once; take turns"),
        ([(0, 1), (3, 4)], r"names device 4 of 4, .* modulo"),
    ],
)
def test_a_permutation_that_is_none_is_found(pairs, says, check_vma):
    f = on(lambda x: lax.ppermute(x, "d", pairs), check_vma=check_vma)
    assert [finding.kind for finding in lint.check(f, ROWS)] == ["not a permutation"]
    with pytest.raises(ValueError, match=says):
        lint.require(f, ROWS)


def test_permutations_are_of_all_devices_of_their_axes():
    options = {"shape": (2, 3), "names": ("a", "b")}
    x = jnp.ones((6, 3))
    assert kinds(lambda x: lax.ppermute(x, ("a", "b"), [(0, 5)]), x, **options) == []
    assert kinds(lambda x: lax.ppermute(x, "b", [(0, 5)]), x, **options) == ["not a permutation"]


def test_a_permutation_that_leaves_devices_out_is_none():
    assert kinds(lambda x: lax.ppermute(x, "d", [(0, 1), (2, 3)])) == []


def loss(w, x):
    return jnp.mean((x @ w) ** 2)


def step(all_reduce, *, varying):
    """A step of data-parallel gradient descent, with the gradient summed by hand too."""

    def f(w, x):
        gradient = jax.grad(loss)(vary(w, "d") if varying else w, x)
        updates, _ = optax.sgd(0.1).update(all_reduce(gradient), optax.sgd(0.1).init(w))
        return optax.apply_updates(w, updates)[None]

    return f


BY_HAND = {
    "psum": lambda g: lax.psum(g, "d") / 4,
    "pmean": lambda g: lax.pmean(g, "d"),
    "psum_scatter": lambda g: lax.all_gather(lax.psum_scatter(jnp.tile(g, 4), "d", tiled=True), "d")[0],
    "ring": lambda g: collectives.ring_all_reduce(g, "d") / 4,
    "tree": lambda g: collectives.tree_all_reduce(g, "d") / 4,
}
both = {"ins": (P(), P("d"))}


@pytest.mark.parametrize("way", BY_HAND)
def test_a_gradient_that_jax_has_summed_and_is_summed_again_is_found(way):
    f = on(step(BY_HAND[way], varying=False), check_vma=True, **both)
    with pytest.raises(ValueError, match=r"summed twice: .*gradient that JAX has summed .*varying"):
        lint.require(f, PARAMETERS, ROWS)


def test_the_same_is_found_where_the_loss_is_a_program_of_its_own_and_in_a_loop():
    inner = jax.jit(loss)

    def f(w, x):
        def turn(w, _):
            return w - lax.pmean(jax.grad(inner)(w, x), "d"), None

        return lax.scan(turn, w, None, length=2)[0]

    assert kinds(f, PARAMETERS, ROWS, check_vma=True, outs=P(), **both) == ["summed twice"]


@pytest.mark.parametrize("way", BY_HAND)
def test_a_correct_data_parallel_step_has_no_findings(way):
    for check_vma in (True, False):
        assert kinds(step(BY_HAND[way], varying=True), PARAMETERS, ROWS, check_vma=check_vma, **both) == []
    assert kinds(step(BY_HAND[way], varying=False), PARAMETERS, ROWS, check_vma=False, **both) == []
    assert kinds(step(lambda g: g / 4, varying=False), PARAMETERS, ROWS, check_vma=True, **both) == []


SUMS = {
    "psum": lax.psum,
    "pmean": lax.pmean,
    "ring": collectives.ring_all_reduce,
    "ring over n": lambda x, axis: collectives.ring_all_reduce(x, axis) / 4,
    "n-th before": lambda x, axis: lax.psum(x * 0.25, axis),
    "psum_scatter": lambda x, axis: lax.all_gather(lax.psum_scatter(jnp.tile(x, 4), axis, tiled=True), axis)[0],
}
LOSSES = {name: SUMS[name] for name in ("psum", "pmean", "ring")}


def test_the_sum_of_a_gradient_of_a_loss_that_is_a_sum_is_found_exactly_where_it_is_n_times_too_much():
    w, x = PARAMETERS, jnp.arange(24.0).reshape(8, 3)
    options = {"mesh": mesh.make((4,), ("d",)), "in_specs": (P(), P("d")), "out_specs": P()}

    def gradient(of, by):
        return lambda w, x: SUMS[by](jax.grad(lambda w: LOSSES[of](loss(w, x), "d"))(w), "d")

    ways = {(of, by): gradient(of, by) for of in LOSSES for by in SUMS}
    together = jax.jit(mesh.shard_map(**options)(lambda w, x: {way: f(w, x) for way, f in ways.items()}))
    own = [jax.grad(loss)(w, x[2 * i : 2 * i + 2]) for i in range(4)]
    for (of, by), got in together(w, x).items():
        times = np.asarray(got / (sum(own) / (4 if of == "pmean" else 1)))
        np.testing.assert_allclose(times, times[0], rtol=1e-5)
        found = kinds(ways[of, by], w, x, outs=P(), **both)
        assert (found, round(float(times[0]), 3)) in [([], 1.0), (["summed twice"], 4.0)], (of, by)


def test_it_is_found_after_accumulation_and_a_cast_and_a_clip_and_in_a_later_turn_of_a_loop():
    def whole(w, x):
        return lax.psum(loss(w, x), "d")

    def accumulated(w, x):
        def add_up(total, row):
            return total + jax.grad(whole)(w, row[None]), None

        return lax.psum(lax.scan(add_up, jnp.zeros(3), x)[0].astype(jnp.bfloat16), "d")

    def clipped(w, x):
        g = jax.grad(whole)(w, x)
        return lax.psum(g * jnp.minimum(1.0, 1 / jnp.linalg.norm(g)), "d")

    def late(w, x):
        def turn(carry, _):
            w, g = carry
            return (w - lax.psum(g, "d"), jax.grad(whole)(w, x)), None

        return lax.scan(turn, (w, jnp.zeros(3)), None, length=3)[0][0]

    for f in (accumulated, clipped, late):
        assert kinds(f, PARAMETERS, ROWS, outs=P(), **both) == ["summed twice"], f


def test_what_such_a_gradient_is_used_for_besides_is_none():
    def whole(w, x):
        return lax.psum(loss(w, x), "d")

    def own_steps(w, x):  # of parameters that are then the device's own
        for _ in range(2):
            w = w - 0.1 * jax.grad(whole)(w, x) / 4
        return lax.psum(w, "d")

    def sharded(w, x):
        def turn(w, _):
            return w - 0.1 * jax.grad(whole)(w, x), lax.psum(loss(w, x), "d")

        return lax.scan(turn, w, None, length=2)[1]

    def recomputed(w, x):
        scaled = jax.checkpoint(lambda w: loss(w, x) / lax.psum(jnp.ones(()), "d"))
        return lax.psum(jax.grad(scaled)(w), "d")

    def measured(w, x):
        return lax.psum(jnp.sum(jax.grad(lambda w: lax.pmean(loss(w, x), "d"))(w) ** 2), "d")[None]

    for f in (own_steps, sharded, recomputed, measured):
        assert kinds(f, PARAMETERS, ROWS, **both) == [], f


METHODS = {
    "data": lambda f, devices: parallel.data_parallel(f, optax.adam(0.1), workers=devices),
    "data, by a ring": lambda f, devices: parallel.data_parallel(
        f, optax.adam(0.1), workers=devices, accumulate=2, all_reduce=collectives.ring_all_reduce
    ),
    "zero1": lambda f, devices: parallel.zero1(f, optax.adam(0.1), workers=devices, clip_norm=1.0),
    "zero2": lambda f, devices: parallel.zero2(f, optax.adam(0.1), workers=devices, accumulate=2),
    "zero2, by rings": lambda f, devices: parallel.zero2(
        f, optax.adam(0.1), workers=devices,
        reduce_scatter=collectives.ring_reduce_scatter, all_gather=collectives.ring_all_gather,
    ),
    "diloco": lambda f, devices: parallel.diloco(
        f, inner=optax.adam(0.1), outer=optax.sgd(0.7, momentum=0.9, nesterov=True), workers=devices, steps=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_training_in_parallel_has_no_findings(name):
    method = METHODS[name](lambda w, x, key: jnp.sum((x - w[None]) ** 2, axis=1), mesh.make((4,), ("d",)))
    lint.require(method.round, method.init(PARAMETERS), jnp.ones((16, 3)), jax.random.key(0))


TWICE = {
    "psum of a psum": lambda x: add(add(x)),
    "psum of a mean": lambda x: add(lax.pmean(x, "d")),
    "psum of what was gathered": lambda x: add(lax.all_gather(x, "d").sum(axis=0)),
    "psum of the kit's": lambda x: add(collectives.ring_all_reduce(x, "d") / 2),
    "the kit's of a psum": lambda x: collectives.ring_all_reduce({"a": add(x)}, "d")["a"],
    "the kit's of the kit's": lambda x: collectives.tree_all_reduce(collectives.ring_all_reduce(x, "d"), "d"),
    "scattered after a sum": lambda x: lax.psum_scatter(jnp.tile(add(x), (2, 1)), "d", tiled=True),
    "times another number": lambda x: add(add(x)) * 0.125,
    "a mean and the sum": lambda x: (lambda y: y + y * 0.25)(add(add(x))),
    "in a branch": lambda x: lax.cond(same(x), lambda x: add(x), lambda x: x, add(x)),
    "from turn to turn": lambda x: lax.scan(lambda c, _: (add(c), None), add(x), None, length=2)[0],
}


@pytest.mark.parametrize("way", TWICE)
def test_a_sum_over_devices_of_a_sum_over_them_is_found(way):
    assert kinds(TWICE[way]) == ["summed twice"]


ONCE = {
    "the number of devices": lambda x: x / lax.psum(1, "d") / lax.psum(jnp.ones(()), "d"),
    "a mean of a mean": lambda x: lax.pmean(lax.pmean(x, "d"), "d"),
    "a mean by a product": lambda x: add(add(x)) * 0.25 + (1 / lax.axis_size("d")) * add(add(x)),
    "a mean by a product of halves": lambda x: add(add(x).astype(jnp.bfloat16)) * jnp.bfloat16(0.25),
    "a mean of what all have": lambda x: lax.pmean(jnp.sqrt(add(x)), "d"),
    "a maximum of a sum": lambda x: lax.pmax(add(x), "d"),
    "with what differs": lambda x: add(x * add(x)),
    "sums of two": lambda x: add(x) + add(2 * x),
    "a sum's part": lambda x: add(add(x) * lax.axis_index("d")),
    "the derivative of a sum": lambda x: jax.grad(lambda x: jnp.sum(add(x) ** 2))(x),
    "the derivative of the kit's": lambda x: jax.grad(lambda x: jnp.sum(collectives.ring_all_reduce(x, "d") ** 2))(x),
    "what servers hold": lambda x: collectives.ring_all_reduce(collectives.dedicated_servers_all_reduce(x, "d"), "d"),
}


@pytest.mark.parametrize("way", ONCE)
def test_a_sum_over_devices_of_what_differs_is_none(way):
    assert kinds(ONCE[way]) == []


HALVES = {
    "ring": (collectives.ring_reduce_scatter, collectives.ring_all_gather),
    "direct": (collectives.direct_reduce_scatter, collectives.direct_all_gather),
    "doubling": (collectives.halving_reduce_scatter, collectives.doubling_all_gather),
}


@pytest.mark.parametrize("name", HALVES)
def test_the_kits_halves_count_as_those_of_xla(name):
    scatter, gather = HALVES[name]
    assert kinds(lambda x: scatter(jnp.tile(add(x[0]), (4, 1)), "d")) == ["summed twice"]
    assert kinds(lambda x: scatter(jnp.tile(add(x[0]), (4, 1)), "d") / 4) == []
    assert kinds(lambda x: add(gather(x, "d").sum(axis=0))) == ["summed twice"]
    assert kinds(decided(lambda x: gather(x, "d").sum() > 1)) == []
    assert kinds(decided(lambda x: scatter(jnp.tile(x[0], (4, 1)), "d").sum() > 1)) == ["divergent collective"]
    assert kinds(lambda x: add(scatter(jnp.tile(x[0], (4, 1)), "d"))) == []
    back = jax.grad(lambda x: jnp.sum(gather(x, "d") * x[0, 0]))
    assert kinds(decided(lambda x: back(x).sum() > 1)) == ["divergent collective"]


def test_a_program_of_the_name_of_a_sum_is_none():
    def _my_all_reduce(x):
        return lax.ppermute(x, "d", RING)

    def _ring_all_reduce(x):
        return lax.ppermute(x, "d", RING)

    for f in (_my_all_reduce, _ring_all_reduce):
        assert kinds(lambda x, f=f: jax.jit(f)(add(x) + x)) == []
        assert kinds(lambda x, f=f: add(jax.jit(f)(x))) == []
        assert kinds(decided(lambda x, f=f: jax.jit(f)(x).sum() > 1)) == ["divergent collective"]
        assert kinds(lambda x, f=f: jax.jit(f)(add(x))) == []


def test_sums_over_one_axis_after_another_are_none():
    options = {"shape": (2, 2), "names": ("a", "b")}
    assert kinds(lambda x: lax.psum(lax.psum(x, "a"), "b"), **options) == []
    assert kinds(lambda x: lax.psum(lax.psum(x, "a"), ("a", "b")), **options) == ["summed twice"]
    groups = [[0, 1], [2, 3]]
    assert kinds(lambda x: lax.psum(lax.psum(x, "d", axis_index_groups=groups), "d", axis_index_groups=groups)) == []


@checked
@pytest.mark.parametrize("name", ALL_REDUCES)
def test_the_kits_own_have_no_findings(name, check_vma):
    f = getattr(collectives, name)
    for n in (3, 4):
        assert (
            kinds(lambda x: f({"a": x, "b": x[0]}, "d")["a"], jnp.ones((3 * n, 3)), check_vma=check_vma, shape=(n,))
            == []
        )


def test_a_finding_names_the_line_of_the_user_also_for_the_kits():
    def first(x):
        return collectives.ring_all_reduce(x, "d")

    def second(x):
        return lax.cond(x.sum() > 1, lambda x: collectives.ring_all_reduce(x, "d"), lambda x: x, x)

    lint.check(on(first), ROWS)  # the ring is traced here
    (found,) = lint.check(on(second), ROWS)
    line = second.__code__.co_firstlineno + 1
    assert found.where == f"{__file__}:{line}"
    with pytest.raises(ValueError, match=rf"test_lint.py:{line}: divergent collective: ppermute over 'd' in a cond"):
        lint.require(on(second), ROWS)


def test_require_lists_all_findings_one_a_line():
    f = on(lambda x: lax.ppermute(add(add(x)), "d", [(0, 1), (0, 2)]))
    with pytest.raises(ValueError) as raised:
        lint.require(f, ROWS)
    assert [line.split(": ")[1] for line in str(raised.value).splitlines()] == ["summed twice", "not a permutation"]
    lint.require(on(add), ROWS)


def test_a_program_without_devices_is_an_error():
    with pytest.raises(ValueError, match="shard_map"):
        lint.check(jnp.sin, ROWS)
