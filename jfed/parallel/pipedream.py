"""PipeDream: a pipeline that learns from every microbatch at once, and so never waits for the others to end.

Stage r of p has, when a microbatch's gradient comes back to it, already changed its weights by p - 1 - r others. Each
microbatch is therefore differentiated at the weights that it has seen, which are kept till then. What stage r
descends at step t is the gradient at weights p - 1 - r steps old:

    w_r(t + 1) = w_r(t) - learning_rate * gradient_r f(w_0(t - p + 1), w_1(t - p + 2), ..., w_{p-1}(t))

Source: Narayanan et al. 2019 (doi:10.1145/3341301.3359646), section 3.3, weight stashing.

Letters: p stages, m microbatches, B examples.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jfed import _validate
from jfed import mesh as meshes
from jfed.core import Algorithm, Tree
from jfed.parallel import _placing, _workers, pipeline
from jfed.parallel._specs import shardings_of, specs_like
from jfed.parallel.layered import Layered, Parts
from jfed.parallel.schedules import fused, one_f_one_b
from jfed.parallel.sharded import MeshState


def pipedream(
    model: Layered,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    microbatches: int,
    recompute: bool = True,
) -> Algorithm:
    """An asynchronous pipeline with weight stashing: m optimizer steps a round, each by a microbatch.

    `round(state, batch, key)`: leaves of the batch are [B, ...], the examples of its first step first. The pipeline is
    empty at the ends of a round only. Metrics: `"loss"`, the mean over the batch, of each microbatch as it passed.

    Every device keeps as many copies of its blocks, and of the entrance, as microbatches are under way, p + 1.

    Guarantees:
      * With one stage it is training on one microbatch after another.

    Args:
      model: such as `transformer(...)`.
      optimizer: one that acts number by number, as sgd and adam: entrance, blocks and exit each have their own, of a
        device's part. One that looks at norms would see parts, and let devices drift apart.
      mesh: with an axis "pipe", and others of `layered.AXES`.
      microbatches: m, of B / m examples each.
      recompute: keep a stage's input only, and compute the rest again, with the stashed weights.

    Raises:
      ValueError: as `on_mesh`, and if the mesh has no axis "pipe".

    >>> from jfed import mesh
    >>> from jfed.parallel import transformer
    >>> model = transformer(16, width=8, layers=2, heads=2, context=4)
    >>> method = pipedream(model, optax.sgd(0.1), mesh=mesh.make((1,), ("pipe",)), microbatches=2)
    >>> tokens = jnp.arange(8).reshape(2, 4)
    >>> state = method.init(model.init(jax.random.key(0)))
    >>> state, metrics = method.round(state, {"x": tokens, "y": tokens + 1}, jax.random.key(1))
    >>> print(state.step)
    2
    """
    where = "pipedream"
    _validate.at_least_one(where, "microbatches", microbatches, "each is a step")
    optimizer = _workers.optimizer_of(where, "optimizer", optimizer)
    _validate.flags(where, recompute=recompute)
    if "pipe" not in getattr(mesh, "axis_names", ()):
        raise ValueError(f"{where}(mesh={mesh!r}): there must be an axis 'pipe'; without one, on_mesh trains.")
    placing = _placing.of(where, model, mesh, chunks=1, fully_sharded=False)
    table = fused(one_f_one_b(mesh.shape["pipe"], microbatches))
    functions, stages = model.functions(placing.axes), mesh.shape["pipe"]

    def summed(gradient: Tree, which: int) -> Tree:
        return _placing.summed(lax.psum, mesh, gradient, placing.specs[which])

    weights = pipeline.stashed(optimizer, summed)
    in_turn = pipeline.run(functions, table, weights, axis_name="pipe", recompute=recompute)

    def on_each_device(parts: Parts, states: Parts, batch: Tree) -> tuple[jax.Array, Parts, Parts]:
        batch, scale = _placing.in_microbatches(placing, batch, microbatches)
        loss, (parts, states) = in_turn((parts, states), batch, scale * microbatches)
        device = lax.axis_index("pipe")
        # The ends have learned on the stage that has them.
        enter, leave = (
            _from_stage(pair, device == stage)
            for pair, stage in (((parts.enter, states.enter), 0), ((parts.leave, states.leave), stages - 1))
        )
        parts, states = (Parts(enter[i], (parts, states)[i].blocks, leave[i]) for i in (0, 1))
        return _placing.mean_loss(placing, loss) / microbatches, parts, states

    def specs_of(states: Parts) -> Parts:
        return Parts(*map(specs_like, states, placing.shapes, placing.specs))

    def shardings(state: MeshState) -> MeshState:
        return shardings_of(MeshState(placing.specs, specs_of(state.optimizer), PartitionSpec()), mesh)

    def init_fn(params: Tree) -> MeshState:
        def init(parts: Parts) -> MeshState:
            return MeshState(parts, Parts(*map(optimizer.init, parts)), 0)

        return _placing.started(init, placing.parts(params), shardings)

    def round_fn(state: MeshState, batch: Tree, key: jax.Array) -> tuple[MeshState, dict]:
        del key
        _placing.check_batch(where, placing, batch, microbatches)
        inner = specs_of(state.optimizer)
        # A device's share of each microbatch must lie together.
        batch = jax.tree.map(lambda x: _dealt(x, microbatches, placing.holders), batch)
        program = meshes.shard_map(
            mesh=mesh,
            in_specs=(placing.specs, inner, _placing.rows(placing, batch)),
            out_specs=(PartitionSpec(), placing.specs, inner),
        )
        loss, parts, states = program(on_each_device)(state.params, state.optimizer, batch)
        state = MeshState(parts, states, state.step + microbatches)
        return _placing.placed(state, shardings(state)), {"loss": loss}

    return Algorithm(init_fn, round_fn, lambda state: placing.params(state.params))


def _from_stage(tree: Tree, here: jax.Array) -> Tree:
    """What the one device of the axis has where `here` holds."""
    return jax.tree.map(lambda x: lax.psum(jnp.where(here, x, jnp.zeros_like(x)), "pipe"), tree)


def _dealt(x: jax.Array, microbatches: int, devices: int) -> jax.Array:
    """[B, ...], microbatch by microbatch, to [B, ...], device by device."""
    rows = x.reshape(microbatches, devices, -1, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1).reshape(x.shape)
