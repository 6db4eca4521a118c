"""What was saved on one mesh comes back on another, bit for bit."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import together
import two_meshes
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from two_meshes import LARGE, large, placed, same_parts, shapes, values

from jfed import checkpoint, mesh

MESHES = {"2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1), "2x2": (2, 2), "1x1": (1, 1)}


def mesh_of(name):
    return mesh.make(MESHES[name], ("x", "y"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints for each mesh."""
    root = tmp_path_factory.mktemp("saved")
    for name in MESHES:
        checkpoint.save(root / name, 4, placed(mesh_of(name)))
    return root


@pytest.mark.parametrize(("ours", "theirs"), [*itertools.permutations(MESHES, 2)])
def test_a_state_in_parts_comes_back_in_the_parts_of_another_mesh(saved, ours, theirs):
    step, restored = checkpoint.restore(saved / ours, shapes(mesh_of(theirs)))
    assert step == 4
    assert same_parts(restored, mesh_of(theirs))


def test_a_third_axis_and_other_splits_of_the_same_leaves_are_served(saved):
    devices = mesh.make((2, 2, 2), ("data", "pipe", "tensor"))
    like = jax.eval_shape(values)["params"]
    specs = {"w": P(("data", "tensor"), "pipe"), "half": P("data"), "edges": P("tensor"), "whole": P()}

    def asked(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices, spec))

    state = shapes(mesh_of("2x4")) | {"params": jax.tree.map(asked, like, specs)}
    restored = checkpoint.restore(saved / "2x4", state)[1]["params"]
    for name, x in values()["params"].items():
        assert np.asarray(restored[name]).tobytes() == np.asarray(x).tobytes()
        assert restored[name].sharding.spec == specs[name]
    assert {shard.data.shape for shard in restored["w"].addressable_shards} == {(4, 12)}


@pytest.mark.parametrize("device", [None, 5])
def test_parts_come_back_whole_on_one_device_or_none_in_particular(saved, device):
    where = None if device is None else SingleDeviceSharding(jax.devices()[device])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes(mesh_of("2x4")))
    restored = checkpoint.restore(saved / "2x4", like)[1]
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(values()), strict=True):
        assert a.devices() == {jax.devices()[device or 0]} and a.committed == (device is not None)
        a, b = (jax.random.key_data(x) if "key" in str(x.dtype) else x for x in (a, b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_manifest_does_not_say_which_mesh_it_was(saved):
    def leaves(name):
        return json.loads((saved / name / "step_00000004" / "jfed.json").read_text())["manifest"]["leaves"]

    assert all(leaves(name) == leaves("1x1") for name in MESHES)
    assert not any("mesh" in entry or "sharding" in entry for entry in leaves("2x4"))


def test_a_weakly_typed_leaf_in_parts_stays_weakly_typed(tmp_path):
    x = jax.device_put(jnp.full((8,), -0.0), NamedSharding(mesh_of("8x1"), P("x")))
    assert x.weak_type
    checkpoint.save(tmp_path, 0, x)
    like = jax.device_put(jnp.full((8,), 1.0), NamedSharding(mesh_of("4x2"), P("x")))
    restored = checkpoint.restore(tmp_path, like)[1]
    assert restored.weak_type and restored.sharding == like.sharding
    assert np.signbit(np.asarray(restored)).all()


def test_two_processes_restore_what_one_saved_each_its_half_and_one_what_two_saved(tmp_path, saved):
    checkpoint.save(tmp_path / "small", 4, placed(mesh_of("4x2")))
    checkpoint.save(tmp_path / "large", 0, large(mesh_of("4x2"), P("x", "y")))
    together.two_processes(two_meshes.__file__, tmp_path, devices_per_process=4)
    whole = int(np.prod(LARGE)) * 4
    for i in range(2):  # a half, twice on its way from the disk to devices; a whole would be there twice too
        assert 0.1 * whole < int((tmp_path / f"grew_{i}").read_text()) < 1.5 * whole

    devices = mesh_of("8x1")
    step, restored = checkpoint.restore(tmp_path / "small", shapes(devices))
    assert step == 5 and same_parts(restored, devices)
