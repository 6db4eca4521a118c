"""One model over all axes of a mesh: examples, blocks, layers, tokens and experts dealt to devices, and parameters cut.

`on_mesh` trains any `Layered` model on any mesh with axes out of `layered.AXES`, and equals training on one device:

    data       gradients are summed over it; `fully_sharded` also cuts parameters, gradients and the optimizer's state
               over it, and gathers a block's parameters where it is computed (FSDP, ZeRO-3)
    pipe       blocks are dealt to it, and microbatches pass by a schedule (`jfed.parallel.pipeline`)
    tensor, sequence, expert    are the model's own affair; gradients of what it has whole are summed

The program of gradients is written for one device (`shard_map`). The optimizer sees whole arrays, of which every device
computes its part, so any optax optimizer works, those that look at norms or shapes included.

Source: Rajbhandari et al. 2020 (arXiv:1910.02054), Narayanan et al. 2021 (arXiv:2104.04473).

Letters: L blocks, p stages, v chunks a stage, m microbatches, B examples in a batch, n devices along data.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jfed import _validate
from jfed import mesh as meshes
from jfed.core import Algorithm, Tree
from jfed.parallel import _placing, _workers, conjugate, pipeline
from jfed.parallel._phases import lean
from jfed.parallel._specs import shardings_of, specs_like
from jfed.parallel.layered import Functions, Layered, Parts
from jfed.parallel.schedules import Schedule, one_f_one_b


class MeshState(NamedTuple):
    """State between two steps: whole arrays, each device holding its part."""

    params: Parts  # leaves of blocks [v, L / v, ...]
    optimizer: Tree
    step: jax.Array  # [] int32, steps completed


def on_mesh(
    model: Layered,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    microbatches: int = 1,
    schedule: Callable | Schedule | None = None,
    fully_sharded: bool = False,
    recompute: bool = True,
    all_reduce: Callable | None = None,
    fill: float = 0.0,
) -> Algorithm:
    """Trains a model over any mesh.

    `round(state, batch, key)`: leaves of the batch are [B, ...], whose second axis, where the mesh has an axis
    "sequence", is tokens. Metrics: `"loss"`, the mean over the batch. Nothing is random, so `key` changes nothing.

    Guarantees:
      * It equals one device on the whole batch, up to the order of additions.
      * No device ever holds more than its part of the state: for params that no device can hold, either,
        `jax.jit(lambda key: method.init(model.init(key)))` makes them in parts.
      * `params(state)` are those of `model.init`, whatever the mesh. Arrays of the state are whole, and
        blocks' first two axes [v, L / v], so checkpoints restore onto any mesh with as many chunks.

    Args:
      model: such as `transformer(...)`.
      optimizer: any optax optimizer; it is also given `value`, the loss. It sees a tree `Parts`, with two
        axes more in blocks than a layer has: masks are of this tree, and a leaf's norm is that of all blocks.
      mesh: its axes are among `layered.AXES`.
      microbatches: m; gradients are added up over them.
      schedule: of the axis "pipe", which needs one: a function (p, m) such as `gpipe` or
        `functools.partial(interleaved, chunks=2)`, or a table; by default `one_f_one_b`.
      fully_sharded: cut every array along "data" too, each along its longest axis that n divides; one without such
        stays whole. Of the entrance and the exit what is gathered is kept for the whole step.
      recompute: keep a block's input only (in a pipeline a stage's) and compute the rest again for the gradient.
      all_reduce: of gradients over axes they are summed over: an exact `(x, axis_name) -> sum`, by default
        `jax.lax.psum`; axis_name is a tuple where there are several.
      fill: what a pipeline's empty slots and idle messages hold; NaN shows that nothing uses them.

    Raises:
      ValueError: if the mesh has other axes, one of them does not divide what it splits, there is a schedule and no
        axis for it, or its table is not right; when traced, if the batch cannot be dealt.

    >>> from jfed import mesh
    >>> from jfed.parallel import transformer
    >>> model = transformer(16, width=8, layers=2, heads=2, context=4)
    >>> method = on_mesh(model, optax.adam(0.01), mesh=mesh.make((1, 1), ("data", "pipe")), microbatches=2)
    >>> tokens = jnp.arange(8).reshape(2, 4)
    >>> state = method.init(model.init(jax.random.key(0)))
    >>> state, metrics = method.round(state, {"x": tokens, "y": tokens + 1}, jax.random.key(1))
    >>> print(state.step, metrics["loss"].shape)
    1 ()
    """
    where = "on_mesh"
    _validate.at_least_one(where, "microbatches", microbatches, "one takes the batch at once")
    optimizer = _workers.optimizer_of(where, "optimizer", optimizer)
    all_reduce = _workers.all_reduce_of(where, all_reduce)
    _validate.flags(where, fully_sharded=fully_sharded, recompute=recompute)
    if np.ndim(fill) or np.asarray(fill).dtype.kind not in "fiu":
        raise ValueError(f"{where}(fill={fill!r}): give one number, such as 0.0 or float('nan').")
    table = _placing.table(where, mesh, schedule, microbatches, one_f_one_b)
    placing = _placing.of(where, model, mesh, chunks=1 if table is None else table.chunks, fully_sharded=fully_sharded)
    cuts, specs = placing.cuts, placing.specs
    functions = model.functions(placing.axes)

    def gather(params: Tree, cuts: Tree) -> Tree:
        return jax.tree.map(lambda x, cut: x if cut < 0 else conjugate.gathered(x, "data", cut), params, cuts)

    def scatter(gradient: Tree, cuts: Tree) -> Tree:
        return jax.tree.map(lambda g, cut: g if cut < 0 else conjugate.scattered(g, "data", cut), gradient, cuts)

    gathering = functions._replace(block=lambda params, h: functions.block(gather(params, cuts.blocks), h))
    if table is None:
        all_microbatches = _accumulated(gathering, recompute)
    else:
        added = pipeline.accumulated()
        all_microbatches = pipeline.run(gathering, table, added, axis_name="pipe", recompute=recompute, fill=fill)

    def on_each_device(parts: Parts, batch: Tree) -> tuple[jax.Array, Parts]:
        batch, scale = _placing.in_microbatches(placing, batch, microbatches)
        whole = Parts(gather(parts.enter, cuts.enter), parts.blocks, gather(parts.leave, cuts.leave))
        loss, total = all_microbatches(whole, batch, scale)
        ends = scatter(total.enter, cuts.enter), scatter(total.leave, cuts.leave)
        ends = _placing.summed(all_reduce, mesh, ends, (specs.enter, specs.leave), also="pipe")
        blocks = _placing.summed(all_reduce, mesh, total.blocks, specs.blocks)
        gradient = Parts(ends[0], blocks, ends[1])
        return _placing.mean_loss(placing, loss), _as(parts, gradient)

    def shardings(state: MeshState) -> MeshState:
        inner = specs_like(state.optimizer, placing.shapes, specs)
        return shardings_of(MeshState(specs, inner, PartitionSpec()), mesh)

    def init_fn(params: Tree) -> MeshState:
        return _placing.started(
            lambda parts: MeshState(parts, optimizer.init(parts), 0), placing.parts(params), shardings
        )

    def round_fn(state: MeshState, batch: Tree, key: jax.Array) -> tuple[MeshState, dict]:
        del key
        _placing.check_batch(where, placing, batch, microbatches)
        in_specs, out_specs = (specs, _placing.rows(placing, batch)), (PartitionSpec(), specs)
        program = meshes.shard_map(mesh=mesh, in_specs=in_specs, out_specs=out_specs)(on_each_device)
        value, gradient = program(state.params, batch)
        updates, inner = optimizer.update(gradient, state.optimizer, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        state = MeshState(params, inner, state.step + 1)
        return _placing.placed(state, shardings(state)), {"loss": value}

    return Algorithm(init_fn, round_fn, lambda state: placing.params(state.params))


def _as(like: Tree, tree: Tree) -> Tree:
    return jax.tree.map(lambda x, t: t.astype(x.dtype), like, tree)


def _accumulated(functions: Functions, recompute: bool) -> Callable:
    """Gradients of all blocks at once, microbatch after microbatch; of the form of `pipeline.run`."""
    one = jax.checkpoint(functions.block) if recompute else lean(functions.block)

    def program(parts: Parts, batch: Tree, scale: float) -> tuple[jax.Array, Parts]:
        blocks = jax.tree.map(lambda x: x[0], parts.blocks)

        def loss(enter, blocks, leave, part):
            h, _ = lax.scan(lambda h, block: (one(block, h), None), functions.enter(enter, part), blocks)
            return jnp.sum(functions.leave(leave, h, part).astype(jnp.float32)) * scale

        differentiated = jax.value_and_grad(loss, (0, 1, 2))

        def add(so_far, part):
            found = differentiated(parts.enter, blocks, parts.leave, part)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), so_far, found), None

        if jax.tree.leaves(batch)[0].shape[0] == 1:
            value, gradient = differentiated(parts.enter, blocks, parts.leave, jax.tree.map(lambda x: x[0], batch))
        else:
            like = (parts.enter, blocks, parts.leave)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, _workers.wide(x.dtype)), like)
            (value, gradient), _ = lax.scan(add, (jnp.zeros((), jnp.float32), nothing), batch)
        enter, total, leave = gradient
        return value, Parts(enter, jax.tree.map(lambda x: x[None], total), leave)

    return program
