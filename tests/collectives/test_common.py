"""What every all-reduce is held to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reduces
import together
from jax import lax
from jax.sharding import PartitionSpec
from reduces import ALL, in_one, on_devices, options_for, trees

from jfed import collectives, mesh
from jfed.collectives import cost

every = pytest.mark.parametrize("name", ALL)
DEDICATED = collectives.dedicated_servers_all_reduce


def plain(x):
    """As numpy has it, small floats in single."""
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def assert_sums(found, x, n):
    """All n devices hold the sums of the leaves of `x`, the same bits."""
    for name, leaf in x.items():
        dtype = jnp.int32 if leaf.dtype == bool else leaf.dtype
        assert (found[name].dtype, found[name].shape) == (dtype, leaf.shape), name
        got = plain(found[name])
        np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape), err_msg=name)
        if jnp.issubdtype(dtype, jnp.integer):
            expected = np.asarray(leaf).sum(0, dtype=np.dtype(dtype))
            np.testing.assert_array_equal(got[0], expected, err_msg=name)
        else:
            digits = 3e-2 if name == "half" else 1e-6
            wide = np.complex64 if name == "complex" else np.float32
            np.testing.assert_allclose(got[0], np.asarray(leaf, wide).sum(0), atol=digits * n, err_msg=name)


@every
@pytest.mark.parametrize("n", [2, 3, 6, 8])
def test_it_is_the_sum_on_devices(name, n):
    x = trees(n)
    assert_sums(on_devices(lambda x: options_for(name, n)(x, "devices"), n)(x), x, n)


@pytest.mark.slow
@every
@pytest.mark.parametrize("n", [1, 4, 5, 7])
def test_it_is_the_sum_in_one_device(name, n):
    x = trees(n, seed=n)
    assert_sums(in_one(lambda x: options_for(name, n)(x, "devices"))(x), x, n)


@every
def test_devices_with_types_checked_and_one_device_give_the_same_bits(name):
    x, f = trees(6), lambda x: options_for(name, 6)(x, "devices")
    for a, b in zip(*(jax.tree.leaves(run(x)) for run in (on_devices(f, 6, check_vma=True), in_one(f))), strict=True):
        np.testing.assert_array_equal(plain(a), plain(b))


@every
def test_a_gradient_of_it_is_that_of_psum(name):
    """Each device has a loss of its own of the sum; integers have none."""
    n, x = 6, {k: v for k, v in trees(6).items() if k in ("matrix", "one", "half")}

    def gradient(all_reduce):
        def loss(x):
            mine = 1.0 + lax.axis_index("devices")
            return sum(
                jnp.sum(jnp.sin(mine * s.astype(jnp.float32) / n)) for s in jax.tree.leaves(all_reduce(x, "devices"))
            )

        return jax.grad(loss)

    expected = in_one(gradient(lax.psum))(x)
    for found in (on_devices(gradient(options_for(name, n)), n)(x), in_one(gradient(options_for(name, n)))(x)):
        for leaf, share in (("matrix", 1e-5), ("one", 1e-5), ("half", 0.05)):
            a, b = (np.asarray(tree[leaf], np.float32) for tree in (found, expected))
            assert 0 < np.linalg.norm(b) and np.linalg.norm(a - b) < share * np.linalg.norm(b), leaf


@every
def test_what_all_devices_hold_alike_is_summed_too(name):
    total = in_one(lambda i: options_for(name, 6)(jnp.arange(5.0), "devices") + i)(jnp.zeros(6))
    np.testing.assert_array_equal(total, np.broadcast_to(6 * np.arange(5.0), (6, 5)))


def test_servers_without_data_sum_what_workers_hold():
    x = trees(7)
    for servers in (1, 2, 3):
        for run in (
            on_devices(lambda x, s=servers: DEDICATED(x, "devices", servers=s), 7),
            in_one(lambda x, s=servers: DEDICATED(x, "devices", servers=s)),
        ):
            found = run(x)
            working = {k: v[: 7 - servers] for k, v in x.items()}
            assert_sums({k: v[: 7 - servers] for k, v in found.items()}, working, 7)
            assert not any(np.any(plain(v[7 - servers :])) for v in found.values())


HALVES = {
    "ring": (collectives.ring_reduce_scatter, collectives.ring_all_gather),
    "direct": (collectives.direct_reduce_scatter, collectives.direct_all_gather),
    "butterfly": (collectives.halving_reduce_scatter, collectives.doubling_all_gather),
}


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_those_of_lax(name):
    n, (scatter, gather) = 8 if name == "butterfly" else 6, HALVES[name]
    x = {"a": jnp.asarray(np.random.default_rng(0).integers(0, 99, (n, n, 3, 2))), "b": jnp.ones((n, n))}
    for run in (functools.partial(on_devices, n=n), in_one):
        shares = run(lambda x: scatter(x, "devices"))(x)
        jax.tree.map(lambda s, x: np.testing.assert_array_equal(s, np.asarray(x).sum(0)), shares, x)
        wholes = run(lambda x: gather(x, "devices"))(x)
        jax.tree.map(lambda w, x: np.testing.assert_array_equal(w, np.broadcast_to(x, (n, *x.shape))), wholes, x)


@every
def test_two_axes_of_a_mesh_are_taken_as_one_in_its_order(name):
    devices, x = mesh.make((2, 3), ("hosts", "chips")), trees(6)["matrix"]
    spec = PartitionSpec(("hosts", "chips"))

    def over(axes):
        local = mesh.shard_map(mesh=devices, in_specs=spec, out_specs=spec)
        return jax.jit(local(lambda x: ALL[name](x[0], axes)[None]))(x)

    np.testing.assert_allclose(over(("hosts", "chips"))[4], np.asarray(x).sum(0), atol=1e-5)
    with pytest.raises(ValueError, match=r"another order; give \('hosts', 'chips'\)"):
        over(("chips", "hosts"))


def test_second_derivatives_of_small_floats_pass_a_ring():
    x, v = trees(4)["half"] / 4, trees(4, seed=1)["half"] / 4

    def product(all_reduce):
        def gradient(x):
            return jax.grad(lambda x: jnp.sum(all_reduce(x, "devices").astype(jnp.float32) ** 3))(x)

        return in_one(lambda x, v: jax.jvp(gradient, (x,), (v,))[1])

    for name in ("ring", "torus", "halving and doubling"):
        found, expected = (np.asarray(product(all_reduce)(x, v), np.float32) for all_reduce in (ALL[name], lax.psum))
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: collectives.hierarchical_all_reduce(x, "devices", group=4),
            r"group=4\): the axis has 6 .*one of \[1",
        ),
        (lambda x: collectives.torus_all_reduce(x, "devices", rows=0), "rows must be a whole number of at least 1"),
        (lambda x: collectives.sharded_servers_all_reduce(x, "devices", servers=7), "take at most 6"),
        (lambda x: DEDICATED(x, "devices", servers=4), "of 6 devices as many must be workers; take at most 3"),
        (lambda x: DEDICATED(x, "devices", servers=0), "servers must be a whole number of at least 1"),
        (lambda x: collectives.halving_reduce_scatter(x[None], "devices"), "no power of two; use the ring"),
        (lambda x: collectives.doubling_all_gather(x, "devices"), "no power of two"),
        (
            lambda x: jax.vmap(lambda y: collectives.ring_all_reduce(y, ("devices", "b")), axis_name="b")(x),
            "axes of vmap cannot be taken as one",
        ),
        (lambda x: collectives.ring_all_reduce(x, ["devices"]), "give the name of an axis"),
        (lambda x: collectives.sharded_servers_all_reduce(x, "devices", servers=[2]), "servers must be a whole number"),
        (lambda x: collectives.ring_reduce_scatter(x, "devices"), r"leaf of shape \(3,\).*as many rows"),
        (lambda x: collectives.direct_reduce_scatter(x, "devices"), "as many rows"),
    ],
)
def test_what_does_not_fit_the_axis_is_said_before_anything_compiles(call, message):
    with pytest.raises(ValueError, match=message):
        jax.vmap(call, axis_name="devices")(jnp.ones((6, 3)))


def test_every_all_reduce_is_in_the_battery_and_has_a_theory():
    public = {getattr(collectives, name) for name in collectives.__all__ if name.endswith("_all_reduce")}
    assert public == set(cost.THEORY) == {*ALL.values(), DEDICATED}


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path):
    together.two_processes(reduces.__file__, tmp_path / "sums.npz", devices_per_process=2)
    found = np.load(tmp_path / "sums.npz")
    one = in_one(lambda x: {name: options_for(name, 4)(x, "devices") for name in ALL})(trees(4))
    for name, sums in one.items():
        for leaf, x in sums.items():
            np.testing.assert_array_equal(
                found[f"{name} {leaf}"][0], np.asarray(x.astype(jnp.float32) if leaf == "half" else x)[0]
            )
    assert len(found) == len(ALL) * len(reduces.trees(4))
