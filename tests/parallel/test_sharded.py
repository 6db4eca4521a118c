"""Training over a mesh: on any of them what one device does alone, and a part of everything on each device."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.lax import psum

from jfed import mesh
from jfed.parallel import on_mesh, schedules, transformer

SGD = optax.sgd(1.0)


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize("name", meshes.CASES)
def test_a_step_on_any_mesh_is_one_devices(name):
    params, loss, *_ = meshes.trained(name)
    want, value = meshes.alone(name)
    close(params, want)  # of sgd with a rate of 1: gradients
    np.testing.assert_allclose(loss, value, rtol=1e-5)


@pytest.mark.parametrize("name", ["tensor_data", "3d_fsdp_zb_h1"])
def test_an_optimizer_that_looks_at_the_whole_model_sees_it(name):
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(0.02))
    params, loss, _, programs = meshes.trained(name, optimizer, steps=3)
    close(params, meshes.alone(name, optimizer, 3)[0])
    assert programs == 1


def test_fully_sharded_a_device_holds_its_share_of_everything():
    *_, state, _ = meshes.trained("fsdp", optax.adam(0.1))
    whole = [x for x in jax.tree.leaves(state) if x.ndim]
    held = [x.addressable_shards[0].data.size for x in whole]
    total = sum(x.size for x in whole)
    assert total / 8 <= sum(held) <= 1.05 * total / 8


def test_in_three_dimensions_blocks_are_dealt_to_stages_and_their_layers_to_tensor_devices():
    *_, state, _ = meshes.trained("3d_fsdp_zb_h1")
    kernel = state.params.blocks["mlp_in"]["kernel"]
    assert kernel.shape == (1, 4, 16, 64)
    assert kernel.addressable_shards[0].data.shape == (1, 2, 8, 32)


def test_what_is_not_recomputed_needs_no_gathered_parameters_kept():
    """A block's gathered weights are no residuals: temporary memory is not that of 8 gathered blocks."""
    model = transformer(16, width=128, layers=8, heads=4, context=4)
    batch = {"x": jnp.zeros((8, 4), jnp.int32), "y": jnp.zeros((8, 4), jnp.int32)}
    method = on_mesh(model, optax.sgd(0.1), mesh=mesh.make((8,), ("data",)), fully_sharded=True, recompute=False)
    state = jax.eval_shape(method.init, jax.eval_shape(model.init, meshes.KEY))
    compiled = jax.jit(method.round).lower(state, batch, meshes.KEY).compile()
    blocks = sum(4 * x.size for x in jax.tree.leaves(state.params.blocks))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * blocks


def test_gradients_pass_the_all_reduce_that_is_given():
    """One that doubles, over all axes that examples are dealt to."""
    model, devices = meshes.MODELS["dense"], mesh.make((2, 2), ("data", "pipe"))
    method = on_mesh(
        model,
        SGD,
        mesh=devices,
        microbatches=2,
        all_reduce=lambda x, axis: jax.tree.map(lambda t: 2 * t, psum(x, axis)),
    )
    params = model.init(meshes.KEY)
    state, _ = jax.jit(method.round)(method.init(params), meshes.BATCH, meshes.KEY)
    twice = jax.tree.map(lambda w, end: w + 2 * (end - w), params, meshes.alone("one")[0])
    close(method.params(state), twice, 2e-5)


def test_an_optimizer_is_given_the_loss_and_its_state_is_strongly_typed():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: -value * g, updates), state + 1

    optimizer = optax.GradientTransformationExtraArgs(lambda params: jnp.asarray(0.0), update)  # a weak type
    model = meshes.MODELS["dense"]
    method = on_mesh(model, optimizer, mesh=mesh.make((2,), ("data",)))
    params = model.init(meshes.KEY)
    state = method.init(params)
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    round_fn = jax.jit(method.round)
    after, metrics = round_fn(state, meshes.BATCH, meshes.KEY)
    end, loss = meshes.alone("one")
    close(method.params(after), jax.tree.map(lambda w, e: w + loss * (e - w), params, end), 2e-5)
    round_fn(after, meshes.BATCH, meshes.KEY)
    assert round_fn._cache_size() == 1


def test_an_optimizer_that_adds_up_over_steps_is_taken_as_it_is():
    model = meshes.MODELS["dense"]
    method = on_mesh(model, optax.MultiSteps(SGD, 2), mesh=mesh.make((2,), ("data",)))
    params, round_fn = model.init(meshes.KEY), jax.jit(method.round)
    first, _ = round_fn(method.init(params), meshes.BATCH, meshes.KEY)
    close(method.params(first), params, 0)
    close(method.params(round_fn(first, meshes.BATCH, meshes.KEY)[0]), meshes.alone("one")[0])


SMALL = meshes.MODELS["dense"]
REFUSED = {
    "heads": ({"tensor": 8}, {}, r"heads=4\): the mesh's axis 'tensor' has 8 devices"),
    "layers": ({"pipe": 8}, {"microbatches": 8}, r"layers=4\): the mesh's axis 'pipe' has 8 devices"),
    "another axis": ({"model": 2}, {}, "axes are among data, pipe, tensor"),
    "a schedule and no pipe": ({"data": 2}, {"schedule": schedules.gpipe}, "no axis 'pipe'"),
    "a table of others": (
        {"pipe": 2},
        {"microbatches": 4, "schedule": schedules.gpipe(4, 4)},
        "the table is of 4 devices and 4 microbatches",
    ),
    "no schedule": ({"pipe": 2}, {"schedule": 3, "microbatches": 2}, "give a function"),
    "an axis that the model ignores": ({"sequence": 2}, {}, "mesh with an axis 'sequence' of 2"),
    "no flag": ({"data": 2}, {"recompute": "yes"}, "recompute must be True or False"),
    "no all-reduce": ({"data": 2}, {"all_reduce": "ring"}, r"all_reduce='ring'\): give a function"),
    "no number": ({"pipe": 2}, {"microbatches": 2, "fill": "nan"}, r"fill='nan'\): give one number"),
    "no microbatch": ({"data": 2}, {"microbatches": 0}, "microbatches must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_compiles(name):
    axes, options, message = REFUSED[name]
    model = SMALL._replace(axes=("tensor",)) if "ignores" in name else SMALL
    with pytest.raises(ValueError, match=message):
        on_mesh(model, optax.sgd(1.0), mesh=mesh.make(tuple(axes.values()), tuple(axes)), **options)


@pytest.mark.parametrize(
    "axes, batch, message",
    [
        ({"data": 8}, (12, 8), r"batch of 12\): the mesh's axes \('data',\) have 8 devices"),
        ({"sequence": 8}, (8, 6), r"tokens=6\): the mesh's axis 'sequence' has 8 devices"),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_refused(axes, batch, message):
    method = on_mesh(SMALL, optax.sgd(1.0), mesh=mesh.make(tuple(axes.values()), tuple(axes)))
    state = method.init(SMALL.init(meshes.KEY))
    with pytest.raises(ValueError, match=message):
        method.round(state, {"x": jnp.zeros(batch, jnp.int32), "y": jnp.zeros(batch, jnp.int32)}, meshes.KEY)


def test_params_of_another_model_are_refused():
    method = on_mesh(SMALL, optax.sgd(1.0), mesh=mesh.make((2,), ("data",)))
    other = transformer(meshes.V + 8, **meshes.SIZES)
    with pytest.raises(ValueError, match="in place of"):
        method.init(other.init(meshes.KEY))
