import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jfed import mesh


def test_a_mesh_takes_all_devices_and_has_automatic_axes():
    made = mesh.make()
    assert made.shape == {"clients": 8} and made.axis_types == (AxisType.Auto,)


def test_a_mesh_may_take_some_devices_along_several_axes():
    assert mesh.make((2, 3), ("a", "b")).shape == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((), (), "there must be an axis"),
        ((9,), ("clients",), "needs 9 devices and there are 8"),
        ((2, 2), ("a",), "one name for each"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape, names, message):
    with pytest.raises(ValueError, match=message):
        mesh.make(shape, names)


def test_replicating_puts_every_leaf_on_every_device_unchanged():
    values = {"a": jnp.arange(3.0), "n": 3, "key": jax.random.key(4)}
    copied = mesh.replicate(values, mesh.make((4,)))
    assert len(copied["a"].devices()) == 4 and copied["a"].is_fully_replicated
    np.testing.assert_array_equal(copied["a"], values["a"])
    assert int(copied["n"]) == 3
    np.testing.assert_array_equal(jax.random.key_data(copied["key"]), jax.random.key_data(values["key"]))


def fresh(code, **env):
    """What a new process prints, in which no CPU devices have been asked for."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_each_core_becomes_a_device():
    done = fresh("import jax; from jfed import mesh; mesh.use_cores(3); print(mesh.make().shape['clients'])")
    assert done.stdout.strip() == "3", done.stderr


def test_by_default_every_usable_core_becomes_a_device():
    done = fresh("import jax; from jfed import mesh; mesh.use_cores(); print(jax.device_count())")
    assert int(done.stdout) == len(os.sched_getaffinity(0)), done.stderr


def test_a_number_of_devices_that_was_chosen_before_stays():
    flags = "--xla_force_host_platform_device_count=3"
    code = "import jax; from jfed import mesh; mesh.use_cores(); print(jax.device_count()); mesh.use_cores()"
    done = fresh(code, XLA_FLAGS=flags)
    assert done.stdout.strip() == "3" and done.returncode == 0, done.stderr


def test_cores_are_refused_once_jax_has_started():
    done = fresh("import jax; jax.devices(); from jfed import mesh; mesh.use_cores(3)")
    assert "use_cores(count=3): JAX has started with 1 CPU devices; call it before" in done.stderr
