"""Device meshes, in the one form that runs alike on every supported JAX.

JAX 0.9 made `jax.make_mesh` default to explicit axes, under which `shard_map` refuses plain arrays;
everything in jfed uses automatic axes and gets its meshes here.
"""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jfed import _validate
from jfed.core import Tree


def make(shape: Sequence[int] | None = None, names: Sequence[str] = ("clients",)) -> Mesh:
    """A mesh over the devices of all processes.

    Args:
      shape: devices along each axis; by default all devices along a single axis.
      names: one name an axis.

    Raises:
      ValueError: if names and axes differ in number, or there are too few devices.

    >>> make((1,)).axis_names
    ('clients',)
    """
    shape = (jax.device_count(),) if shape is None else tuple(np.atleast_1d(shape).tolist())
    if not shape or len(shape) != len(names):
        raise ValueError(f"make(shape={shape}, names={tuple(names)}): there must be an axis, and one name for each.")
    needed = int(np.prod(shape))
    if needed > jax.device_count() or min(shape) < 1:
        raise ValueError(
            f"make(shape={shape}): needs {needed} devices and there are {jax.device_count()}; use a smaller shape, "
            "or on CPU set XLA_FLAGS=--xla_force_host_platform_device_count before JAX starts."
        )
    return jax.make_mesh(shape, tuple(names), axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:needed])


def use_cores(count: int | None = None) -> None:
    """Makes a device of every CPU core, for `make` to put in a mesh.

    Without it all cores work together on one device, which splits each operation among them: small
    ones then wait for each other. With `sharded(mesh.make(), lanes(1))` each core trains its own
    clients. It does nothing to an accelerator, and must come before JAX has started.

    In a loop of your own look at a result now and then: with more than a hundred programs under way on several CPU
    devices XLA hangs. `run.iterate` sees to that.

    Args:
      count: devices; by default as many as cores that this process may use, where JAX has not started.

    Raises:
      ValueError: if `count` is not a whole number of at least 1, or JAX has started with another number.
    """
    _be_patient()
    if count is not None:
        _validate.at_least_one("use_cores", "count", count, "leave it out to use every core")
    elif "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return  # somebody has chosen a number
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", usable if count is None else count)
    except RuntimeError:  # JAX has started
        have = len(jax.local_devices(backend="cpu"))
        if count not in (None, have):
            raise ValueError(
                f"use_cores(count={count}): JAX has started with {have} CPU devices; call it before anything "
                "makes an array."
            ) from None


def _be_patient() -> None:
    """Lets a CPU device wait for another as long as it takes.

    XLA ends the process if one waits a minute at a sum over devices, as happens where another has a large client.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ >= (0, 10) and "collective_call_terminate" not in flags:  # older ones know no such flag
        waits = "warn_stuck_timeout_seconds=3600", "terminate_timeout_seconds=86400"
        os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--xla_cpu_collective_call_{wait}" for wait in waits)]).strip()


def devices_along(where: str, mesh: Mesh, axis: str) -> int:
    """How many devices a mesh has along an axis.

    Raises:
      ValueError: if it has no such axis; `where` is who asks.
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"{where}(axis={axis!r}): the mesh has axes {mesh.axis_names}; name one of them.")
    return mesh.shape[axis]


def shard_map(
    *, mesh: Mesh, in_specs, out_specs, axis_names: Sequence[str] | None = None
) -> Callable[[Callable], Callable]:
    """`jax.shard_map` for code that must not know that it runs on many devices.

    Replication is not type-checked: a scan inside the function may start from a replicated value.
    Do not differentiate a collective through it, but for those of `jfed.parallel.conjugate`.

    Args:
      mesh: the devices.
      in_specs: how arguments are split, PartitionSpecs.
      out_specs: how results are put together.
      axis_names: the axes that the function is written for, by default all; the others are the compiler's.
    """
    names = set(mesh.axis_names if axis_names is None else axis_names)
    options = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs, "axis_names": names, "check_vma": False}
    return lambda f: jax.shard_map(f, **options)


def lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the program is gone: of a computation, or of waiting for all.

    JAX before 0.10 ends the process itself, with a message of its own, if the lost one was the first.

    >>> lost_process(RuntimeError("Gloo collective permute failed: Read error: Connection reset by peer"))
    True
    """
    broken = ("Connection reset", "onnection closed", "Broken pipe", "Socket closed", "Connection refused")
    signs = (*broken, "heartbeat timeout", "stopped sending heartbeats")
    return isinstance(error, RuntimeError | ValueError | OSError) and any(sign in str(error) for sign in signs)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copies of every leaf on all devices of a mesh, also when other processes hold some of them.

    Every process must call it with equal values.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def one(x):
        if jax.dtypes.issubdtype(getattr(x, "dtype", np.dtype(type(x))), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def of(tree: Tree) -> Mesh | None:
    """The mesh that a leaf of `tree` lies on, if one does."""
    placed = (x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return next((s.mesh for s in placed if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)


def onto(tree: Tree, mesh: Mesh | None) -> Tree:
    """`tree` as a round leaves it, so that the first round's program serves all: strongly typed, all on the mesh.

    What is not on the mesh yet is copied to all its devices.
    """

    def one(x):
        if not isinstance(x, jax.Array) or getattr(x, "weak_type", False):
            x = jnp.asarray(x, jnp.result_type(x))
        if mesh is None or (isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh):
            return x
        return replicate(x, mesh)

    return jax.tree.map(one, tree)
