"""A checkpoint comes back bit for bit, or it says in one line why it cannot."""

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jfed import checkpoint


class State(NamedTuple):
    params: Any
    opt: Any
    keys: Any
    extra: Any


def make_state(seed=0):
    k = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": jax.random.normal(k[0], (4, 3)),
        "half": jax.random.normal(k[1], (5,), jnp.bfloat16),
        "edges": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45]),
        "minus zero": -jnp.zeros(7),
    }
    grads = jax.tree.map(lambda x: jnp.ones_like(x) * seed, params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt = optimizer.update(grads, optimizer.init(params), params)[1]
    extra = (jnp.array([1, -2], jnp.int8), jnp.array(True), (), None, np.arange(3), np.int64(2**40), 7, 0.1)
    return State(params, opt, {"typed": k, "rbg": jax.random.key(1, impl="rbg")}, extra)


def words(tree):
    """Structure, types, dtypes and bytes: equal if and only if two trees are alike to the bit."""

    def one(x):
        data = jax.random.key_data(x) if isinstance(x, jax.Array) and "key" in str(x.dtype) else x
        return type(x), str(getattr(x, "dtype", "")), np.shape(x), np.asarray(data).tobytes()

    return jax.tree.structure(tree), [one(x) for x in jax.tree.leaves(tree)]


def digest(folder):
    """Every path below a folder with its content."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in sorted(folder.rglob("*"))
    }


def refuses(folder, match, action):
    """Whether `action` raises a one-line ValueError that names the folder, and leaves it untouched."""
    before = digest(folder)
    with pytest.raises(ValueError, match=match) as info:
        action()
    assert str(folder) in str(info.value) and "\n" not in str(info.value)
    assert digest(folder) == before


def test_a_state_comes_back_with_the_same_structure_types_and_bits(tmp_path):
    state = make_state(seed=3)
    checkpoint.save(tmp_path / "c", 5, state)
    step, restored = checkpoint.restore(tmp_path / "c", make_state(seed=0))
    assert step == 5
    assert words(restored) == words(state)


def test_shapes_alone_are_enough_to_restore_from(tmp_path):
    state = make_state(seed=3)._replace(extra=())
    checkpoint.save(tmp_path, 0, state)
    shapes = jax.eval_shape(lambda: make_state()._replace(extra=()))
    assert words(checkpoint.restore(tmp_path, shapes)[1]) == words(state)


def test_a_weakly_typed_leaf_stays_weakly_typed(tmp_path):
    tree = {"scalar": jnp.full((), 0.3), "vector": jnp.full((2,), 0.3), "strong": jnp.zeros(2)}
    checkpoint.save(tmp_path, 0, tree)
    _, restored = checkpoint.restore(tmp_path, tree)
    assert {k: x.weak_type for k, x in restored.items()} == {"scalar": True, "vector": True, "strong": False}
    assert words(restored) == words(tree)


@pytest.mark.parametrize("tree", [(), jnp.zeros((0, 3)), jnp.float32(2), {"a": optax.EmptyState()}])
def test_empty_and_tiny_trees_come_back(tmp_path, tree):
    checkpoint.save(tmp_path, 0, tree)
    assert words(checkpoint.restore(tmp_path, tree)[1]) == words(tree)


def test_leaves_go_where_those_of_like_are_and_otherwise_stay_uncommitted(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    spread = NamedSharding(mesh, PartitionSpec("x"))
    second = SingleDeviceSharding(jax.devices()[-1])
    tree = {
        "spread": jax.device_put(jnp.arange(16.0), spread),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 8), spread),
        "moved": jnp.arange(3),
        "free": jnp.arange(4),
    }
    checkpoint.save(tmp_path, 0, tree)
    like = tree | {"moved": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=second)}
    _, restored = checkpoint.restore(tmp_path, like)
    assert words(restored) == words(tree)
    assert restored["spread"].sharding == spread and restored["moved"].sharding == second
    assert restored["keys"].sharding.is_equivalent_to(spread, 1)
    assert restored["spread"].committed and not restored["free"].committed


def test_only_the_latest_two_steps_are_kept(tmp_path):
    for step in range(4):
        checkpoint.save(tmp_path, step, jnp.float32(step))
    assert checkpoint.latest(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert checkpoint.restore(tmp_path, jnp.float32(0), step=2) == (2, 2.0)


def test_nothing_saved_yet_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "no") is None
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(ValueError, match="holds no checkpoint; check the path, or start afresh"):
        checkpoint.restore(tmp_path, ())


def test_a_saved_step_is_never_overwritten(tmp_path):
    checkpoint.save(tmp_path, 4, jnp.zeros(2))
    refuses(tmp_path, r"save\(step=4\): step must be .* at least 5", lambda: checkpoint.save(tmp_path, 4, jnp.ones(2)))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(step=-1), r"save\(step=-1\): step must be a whole number of at least 0"),
        (dict(step=1.5), r"save\(step=1.5\): step must be"),
        (dict(keep=0), r"save\(keep=0\): keep must be"),
        (dict(tree={"a": "text"}), r"leaf \['a'\] is a str; save arrays"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(tmp_path, kwargs, match):
    with pytest.raises(ValueError, match=match):
        checkpoint.save(tmp_path / "c", **(dict(step=0, tree=jnp.zeros(2)) | kwargs))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("like", "match"),
    [
        ({"w": jnp.zeros((3, 2))}, r"has \['w'\] as float32\[2, 3\], the tree to restore has it as float32\[3, 2\]"),
        ({"w": jnp.zeros((2, 3), jnp.bfloat16)}, r"as float32\[2, 3\], .* as bfloat16\[2, 3\]; .* another folder"),
        ({"w": jnp.zeros((2, 3)), "b": jnp.zeros(1)}, r"has no leaf \['b'\]"),
        ({}, r"has a leaf \['w'\], which"),
        (jax.random.key(0), "has no leaf tree"),
    ],
)
def test_another_tree_is_refused_by_its_first_difference(tmp_path, like, match):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones((2, 3))})
    refuses(tmp_path, match, lambda: checkpoint.restore(tmp_path, like))


def test_a_key_of_another_generator_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, jax.random.key(0))
    match = r"has tree as key<fry>\[\], the tree to restore has it as key<rbg>\[\]"
    refuses(tmp_path, match, lambda: checkpoint.restore(tmp_path, jax.random.key(0, impl="rbg")))


def test_a_step_that_is_not_there_lists_those_that_are(tmp_path):
    checkpoint.save(tmp_path, 1, ())
    checkpoint.save(tmp_path, 2, ())
    refuses(tmp_path, r"holds steps \[1, 2\]; choose one", lambda: checkpoint.restore(tmp_path, (), step=9))


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_text("sea")
    for action in (
        lambda: checkpoint.latest(tmp_path),
        lambda: checkpoint.restore(tmp_path, ()),
        lambda: checkpoint.save(tmp_path, 0, ()),
    ):
        refuses(tmp_path, r"holds no jfed checkpoint but other files \(holiday.jpg\); choose a new", action)


def test_a_folder_that_only_has_the_name_of_a_step_is_refused(tmp_path):
    (tmp_path / "step_00000001").mkdir()
    match = "step 1 has lost its manifest jfed.json, or is not a jfed checkpoint; no other step is intact"
    refuses(tmp_path, match, lambda: checkpoint.restore(tmp_path, ()))


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    checkpoint.save(tmp_path, 1, ())
    monkeypatch.undo()
    match = "step 1 has format 2, this jfed reads 1; use the jfed that wrote it"
    refuses(tmp_path, match, lambda: checkpoint.restore(tmp_path, ()))


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        checkpoint.save(tmp_path / "file", 0, ())
    with pytest.raises(ValueError, match="cannot be written .* choose another folder"):
        checkpoint.save(tmp_path / "file" / "below", 0, ())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_bytes(random.Random(0).randbytes(max(64, path.stat().st_size)))


def flip(path):
    """One bit in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [truncate, garble, flip, Path.unlink])
def test_no_damage_to_any_file_goes_unnoticed_and_the_intact_step_is_named(tmp_path, harm):
    values = {"w": jax.random.normal(jax.random.key(0), (40, 50)), "n": jnp.arange(3)}
    checkpoint.save(tmp_path, 1, values)
    checkpoint.save(tmp_path, 2, values)
    for path in [p for p in (tmp_path / "step_00000002").rglob("*") if p.is_file() and p.stat().st_size]:
        content = path.read_bytes()
        harm(path)
        match = rf"step 2 has .*{path.name}.*; step 1 is intact: use step=1, or move step_00000002 away\."
        refuses(tmp_path, match, lambda: checkpoint.restore(tmp_path, values))
        path.write_bytes(content)
    assert checkpoint.restore(tmp_path, values)[0] == 2
    assert checkpoint.restore(tmp_path, values, step=1)[0] == 1


def test_a_swapped_step_is_noticed(tmp_path):
    checkpoint.save(tmp_path, 1, jnp.zeros(2))
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000003")
    match = "step 3 has a damaged manifest jfed.json; no other step is intact; choose a new folder"
    refuses(tmp_path, match, lambda: checkpoint.restore(tmp_path, jnp.zeros(2)))


def test_a_folder_without_our_manifest_is_never_deleted(tmp_path):
    (tmp_path / "step_00000000").mkdir()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, ())
    assert [p.name[-1] for p in sorted(tmp_path.iterdir())] == ["0", "2", "3"]


SAVER = """
import sys, jax.numpy as jnp
from jfed import checkpoint
folder, tree = sys.argv[1], lambda step: {"w": jnp.full((300, 300), step), "n": jnp.arange(9) * step}
step = -1
if checkpoint.latest(folder) is not None:
    step, restored = checkpoint.restore(folder, tree(0))
    assert all((restored[k] == tree(step)[k]).all() for k in restored)
while True:
    step += 1
    checkpoint.save(folder, step, tree(step))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_only_whole_steps(tmp_path):
    folder, rng, steps = tmp_path / "c", random.Random(0), []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SAVER, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        first = process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()  # SIGKILL: no handler, no clean-up
        printed, noise = process.communicate()
        assert process.returncode == -9 and noise == "", noise
        lines = re.findall(r"\d+\n", first + printed)
        newest = checkpoint.latest(folder)
        # A kill between rename and print may hide a step, never show one that is not there.
        assert newest in (int(lines[-1]), int(lines[-1]) + 1)
        step, tree = checkpoint.restore(folder, {"w": jnp.zeros((300, 300), jnp.int32), "n": jnp.arange(9)})
        assert step == newest and (tree["w"] == step).all() and (tree["n"] == jnp.arange(9) * step).all()
        steps.append(step)
    assert steps == sorted(set(steps))  # each process went on where the one before was killed
