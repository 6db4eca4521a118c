"""Which device of a mesh holds which part of a layered model, of its optimizer's state and of a batch.

Letters: L blocks, p stages, v chunks a stage, m microbatches, B examples in a batch, n devices along data.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfed import _validate
from jfed.core import Tree
from jfed.parallel._specs import axes_of, is_spec, shardings_of, shortest
from jfed.parallel.layered import AXES, Axes, Layered, Parts, divides
from jfed.parallel.schedules import Schedule, check

BATCH = ("data", "expert")
"""Axes that examples are dealt to."""


class Placing(NamedTuple):
    """A model on a mesh; parts have blocks with leaves [v, L / v, ...]."""

    mesh: Mesh
    axes: Axes
    batch_axes: tuple[str, ...]
    holders: int  # devices that examples are dealt to
    parts_of_loss: tuple[str, ...]  # axes that a loss is summed over
    shapes: Parts  # jax.ShapeDtypeStructs of whole arrays
    specs: Parts  # PartitionSpecs
    cuts: Parts  # along which axis an array is cut over "data", of blocks without their first two; -1: it is not
    parts: Callable  # params -> Parts on the mesh
    params: Callable  # Parts -> params


def of(where: str, model: Layered, mesh: Mesh, *, chunks: int, fully_sharded: bool) -> Placing:
    """Deals a model to a mesh.

    Raises:
      ValueError: if the mesh has axes of other names, or one does not divide what it splits.
    """
    if not isinstance(mesh, Mesh) or not set(mesh.axis_names) <= set(AXES):
        raise ValueError(f"{where}(mesh={mesh!r}): give a jfed.mesh.make(...) whose axes are among {', '.join(AXES)}.")
    sizes = dict(mesh.shape)
    for name in ("tensor", "sequence"):  # over "expert" a model without experts has other examples
        if sizes.get(name, 1) > 1 and name not in model.axes:
            raise ValueError(
                f"{where}(mesh with an axis {name!r} of {sizes[name]}): the model's axes are {model.axes}; leave it "
                "out, or say so in `Layered.axes` where the model's functions use it."
            )
    model.check(sizes)
    if model.layers % (sizes.get("pipe", 1) * chunks):
        needed = sizes.get("pipe", 1) * chunks
        raise ValueError(
            f"{where}(layers={model.layers}): the mesh's axis 'pipe' has {sizes.get('pipe', 1)} devices of {chunks} "
            f"chunks, which must divide the layers; take a multiple of {needed}, or another mesh."
        )

    def split(params: Tree) -> Parts:
        parts = model.split(params)
        return parts._replace(blocks=jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), parts.blocks))

    shapes = jax.eval_shape(lambda key: split(model.init(key)), jax.random.key(0))
    cuts, specs = _cuts(model.specs, shapes, sizes, fully_sharded)
    shardings = shardings_of(specs, mesh)

    def parts_fn(params: Tree) -> Parts:
        parts = split(params)
        if odd := _unlike(parts, shapes):
            raise ValueError(f"{where}: init was given params with {odd}; give those of model.init.")
        return placed(parts, shardings)

    def params_fn(parts: Parts) -> Tree:
        blocks = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts.blocks)
        return model.join(parts._replace(blocks=blocks))

    axes = Axes(**{name: name if name in sizes else None for name in Axes._fields})
    batch_axes = tuple(name for name in mesh.axis_names if name in BATCH)
    holders = math.prod(sizes[name] for name in batch_axes)
    parts_of_loss = tuple(name for name in mesh.axis_names if name in (*BATCH, "pipe"))
    return Placing(mesh, axes, batch_axes, holders, parts_of_loss, shapes, specs, cuts, parts_fn, params_fn)


def table(where: str, mesh: Mesh, schedule: Any, microbatches: int, default: Callable) -> Schedule | None:
    """The schedule of a mesh's axis "pipe"; None where it has none.

    Raises:
      ValueError: if there is a schedule and no axis, or it is not one for this axis and so many microbatches.
    """
    stages = dict(getattr(mesh, "shape", {})).get("pipe")
    if stages is None:
        if schedule is not None:
            raise ValueError(f"{where}(schedule=...): the mesh has no axis 'pipe'; leave it out, or add the axis.")
        return None
    schedule = default if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        if not callable(schedule):
            raise ValueError(
                f"{where}(schedule={schedule!r}): give a function (stages, microbatches) such as gpipe, or a table."
            )
        schedule = schedule(stages, microbatches)
    check(schedule)
    if (schedule.op.shape[1], schedule.microbatches) != (stages, microbatches):
        raise ValueError(
            f"{where}(schedule=...): the table is of {schedule.op.shape[1]} devices and {schedule.microbatches} "
            f"microbatches; the mesh's axis 'pipe' has {stages} devices, and microbatches={microbatches}."
        )
    return schedule


def rows(placing: Placing, batch: Tree) -> Tree:
    """PartitionSpecs of a batch [B, ...], or [B, T, ...] where tokens are split."""
    tokens = ("sequence",) if placing.axes.sequence else ()
    return jax.tree.map(lambda x: PartitionSpec(placing.batch_axes or None, *(tokens if x.ndim > 1 else ())), batch)


def check_batch(where: str, placing: Placing, batch: Tree, microbatches: int) -> None:
    """Refuses a batch that cannot be dealt.

    Raises:
      ValueError: if its leaves differ in length, or devices and microbatches do not divide it.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"{where}(batch with leaves of lengths {lengths}): give leaves [B, ...] of one length B.")
    (length,) = lengths
    parts = placing.holders * microbatches
    if not length or length % parts:
        raise ValueError(
            f"{where}(batch of {length}): the mesh's axes {placing.batch_axes} have {placing.holders} devices, which "
            f"times {microbatches} microbatches must divide it; take a multiple of {parts}."
        )
    for tokens in {shape[1] for shape in shapes if len(shape) > 1}:
        divides(where, placing.mesh.shape, "sequence", tokens=tokens)


def in_microbatches(placing: Placing, batch: Tree, microbatches: int) -> tuple[Tree, float]:
    """A device's batch [B / holders, ...] as [m, b, ...], and 1 / B."""
    length = jax.tree.leaves(batch)[0].shape[0]
    batch = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
    return batch, 1 / (length * placing.holders)


def mean_loss(placing: Placing, loss: jax.Array) -> jax.Array:
    """The sum of what devices have of it."""
    return lax.psum(loss, placing.parts_of_loss) if placing.parts_of_loss else loss


def summed(all_reduce: Callable, mesh: Mesh, gradient: Tree, specs: Tree, *, also: str | None = None) -> Tree:
    """Sums every leaf over the axes along which devices have other examples or tokens, and the leaf alike.

    Args:
      all_reduce: `(x, axis_name) -> sum`.
      mesh: the devices.
      gradient: of this device's examples.
      specs: PartitionSpecs of its leaves.
      also: one more axis to sum over.
    """
    leaves, structure = jax.tree.flatten(gradient)
    over = [
        tuple(name for name in mesh.axis_names if name in (*BATCH, "sequence", also) and name not in split)
        for spec in jax.tree.leaves(specs, is_leaf=is_spec)
        for split in [{name for names in axes_of(spec) for name in names}]
    ]
    for axes in sorted(set(over) - {()}):
        where = [i for i, names in enumerate(over) if names == axes]
        total = all_reduce([leaves[i] for i in where], axes[0] if len(axes) == 1 else axes)
        for i, x in zip(where, total, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def started(init: Callable, parts: Parts, shardings: Callable) -> Tree:
    """A state `init(parts)` made where `shardings(state)` say, strongly typed."""

    def typed(parts: Parts) -> Tree:
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), init(parts))

    return jax.jit(typed, out_shardings=shardings(jax.eval_shape(typed, parts)))(parts)


def placed(tree: Tree, shardings: Tree) -> Tree:
    """Arrays where `shardings` say, strongly typed; inside a traced program, a constraint."""
    if not _validate.is_concrete(tree):
        return lax.with_sharding_constraint(tree, shardings)

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        x = jnp.asarray(x, jnp.result_type(x))
        on_it = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == sharding.mesh
        if on_it or sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def _cuts(specs: Parts, shapes: Parts, sizes: dict[str, int], fully_sharded: bool) -> tuple[Parts, Parts]:
    n = sizes.get("data", 1) if fully_sharded else 1
    cuts, whole = [], []
    for part, shape, lead in zip(specs, shapes, (0, 2, 0), strict=True):
        stages = ((), ("pipe",) if sizes.get("pipe", 1) > 1 else ())[:lead]
        flat, structure = jax.tree.flatten(part, is_leaf=is_spec)
        found = [
            _cut(spec, x.shape[lead:], sizes, n) for spec, x in zip(flat, structure.flatten_up_to(shape), strict=True)
        ]
        cuts.append(jax.tree.unflatten(structure, [cut for cut, _ in found]))
        whole.append(jax.tree.unflatten(structure, [shortest([*stages, *names]) for _, names in found]))
    return Parts(*cuts), Parts(*whole)


def _cut(spec: PartitionSpec, shape: tuple[int, ...], sizes: dict[str, int], n: int) -> tuple[int, list]:
    """The longest axis that n divides and nobody has split, or -1; and the names of axes."""
    names = [tuple(name for name in entry if sizes.get(name, 1) > 1) for entry in axes_of(spec)]
    names += [()] * (len(shape) - len(names))
    free = [i for i, name in enumerate(names) if not name and shape[i] and shape[i] % n == 0]
    cut = max(free, key=lambda i: shape[i], default=-1) if n > 1 else -1
    if cut >= 0:
        names[cut] = ("data",)
    return cut, names


def _unlike(tree: Tree, shapes: Tree) -> str | None:
    if jax.tree.structure(tree) != jax.tree.structure(shapes):
        return "another structure"
    for (path, x), want in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shapes), strict=True):
        if jnp.shape(x) != want.shape:
            return f"{jax.tree_util.keystr(path)} of shape {jnp.shape(x)} in place of {want.shape}"
    return None
