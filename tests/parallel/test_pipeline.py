"""Pipelines: phases that may wait, memory that the schedule bounds, and weights that are stashed."""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest

from jfed import mesh
from jfed.parallel import _phases, _slots, layered, on_mesh, pipedream, schedules, transformer

SCHEDULES = {
    "naive": schedules.naive,
    "gpipe": schedules.gpipe,
    "1f1b": schedules.one_f_one_b,
    "1f1b_fused": meshes.fused(schedules.one_f_one_b),
    "interleaved": meshes.INTERLEAVED,
    "zb_h1": schedules.zb_h1,
}


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@functools.cache
def block():
    """A transformer's block on one device, its params, input, and what its output means."""
    model = meshes.MODELS["dense"]
    functions, parts = model.functions(layered.Axes()), model.split(model.init(meshes.KEY))
    h = functions.enter(parts.enter, meshes.BATCH)
    return functions.block, jax.tree.map(lambda x: x[0], parts.blocks), h, jnp.cos(h)


@pytest.mark.parametrize("recompute", [True, False])
def test_three_phases_give_value_and_both_gradients(recompute):
    f, params, h, dy = block()
    y, pull = jax.vjp(f, params, h)
    phase = _phases.phases(f, params, h, recompute=recompute)
    found, kept = phase.forward(params, h)
    dh, waiting = phase.input_gradient(params, kept, dy)
    close((y, pull(dy)), (found, (phase.weight_gradient(params, kept, waiting), dh)))
    close(pull(dy), phase.backward(params, kept, dy))


def products(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count("dot_general")


def test_the_weight_gradient_is_the_products_of_its_weights_and_nothing_twice():
    f, params, h, dy = block()
    phase = _phases.phases(f, params, h, recompute=False)
    _, kept = phase.forward(params, h)
    _, waiting = phase.input_gradient(params, kept, dy)
    assert products(phase.weight_gradient, params, kept, waiting) == 4  # qkv, attention_out, mlp_in, mlp_out
    assert products(phase.input_gradient, params, kept, dy) == 4 + 4  # theirs, and two of attention, each twice
    assert products(phase.backward, params, kept, dy) == 12


def test_a_lean_function_is_differentiated_as_the_function():
    f, params, h, dy = block()

    def loss(f):
        return lambda params, h: jnp.sum(f(params, h) * dy)

    close(jax.grad(loss(_phases.lean(f)), (0, 1))(params, h), jax.grad(loss(f), (0, 1))(params, h))


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_slot_is_written_while_another_microbatch_needs_it(name):
    """Plays a schedule with names in place of arrays."""
    table = SCHEDULES[name](4, 8)
    slots, p = _slots.assigned(table), 4
    last = p * table.chunks - 1
    held = [{} for _ in range(p)]
    for t, row in enumerate(table.op):
        sent = []
        for r, op in enumerate(row):
            stage, i = int(table.chunk[t, r]) * p + r, int(table.microbatch[t, r])
            if op == schedules.FORWARD:
                assert stage == 0 or held[r]["input", slots.input[t, r]] == (stage, i)
                held[r]["kept", slots.kept[t, r]] = (stage, i)
                if stage == last:
                    held[r]["gradient", slots.gradient[t, r]] = (stage, i)
                else:
                    sent.append(((r + 1) % p, "input", slots.got_input[t, (r + 1) % p], (stage + 1, i)))
            elif op in (schedules.BACKWARD, schedules.INPUT_GRADIENT):
                assert held[r]["kept", slots.kept[t, r]] == held[r]["gradient", slots.gradient[t, r]] == (stage, i)
                if op == schedules.INPUT_GRADIENT:
                    held[r]["waiting", slots.waiting[t, r]] = (stage, i)
                if stage:
                    sent.append(((r - 1) % p, "gradient", slots.got_gradient[t, (r - 1) % p], (stage - 1, i)))
            elif op == schedules.WEIGHT_GRADIENT:
                assert held[r]["kept", slots.kept[t, r]] == held[r]["waiting", slots.waiting[t, r]] == (stage, i)
        for r, kind, slot, what in sent:
            held[r][kind, slot] = what
    assert slots.counts[1] == max(schedules.predict(table).activations)


DEEP = transformer(16, width=32, layers=4, heads=4, context=8)


def temporary_memory(schedule, m, recompute):
    devices = mesh.make((4,), ("pipe",))
    method = on_mesh(DEEP, optax.sgd(0.1), mesh=devices, microbatches=m, schedule=schedule, recompute=recompute)
    state = jax.eval_shape(method.init, jax.eval_shape(DEEP.init, meshes.KEY))
    batch = {name: jax.ShapeDtypeStruct((4 * m, 8), jnp.int32) for name in "xy"}
    return jax.jit(method.round).lower(state, batch, meshes.KEY).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("recompute", [True, False])
def test_memory_of_1f1b_is_flat_in_microbatches_and_gpipes_grows(recompute):
    flat, grows = ([temporary_memory(SCHEDULES[name], m, recompute) for m in (8, 32)] for name in ("1f1b", "gpipe"))
    assert flat[1] <= 1.02 * flat[0]  # tables and batches are longer
    h = 4 * 4 * 8 * 32
    assert grows[1] - grows[0] >= (32 - 8) * h


def test_what_is_recomputed_is_not_kept():
    kept, again = (temporary_memory(schedules.one_f_one_b, 8, recompute) for recompute in (False, True))
    h = 4 * 4 * 8 * 32  # bytes; four microbatches of the first stage keep at least qkv and hidden units, twice
    assert kept - again >= 4 * (3 + 4 + 4) * h


def test_empty_slots_and_messages_are_filled_as_is_said():
    model, devices = meshes.MODELS["dense"], mesh.make((2,), ("pipe",))

    def program(**options):
        method = on_mesh(model, optax.sgd(1.0), mesh=devices, microbatches=4, **options)
        state = jax.eval_shape(method.init, jax.eval_shape(model.init, meshes.KEY))
        return str(jax.make_jaxpr(method.round)(state, meshes.BATCH, meshes.KEY))

    assert "123.0" in program(fill=123.0) and "123.0" not in program()


def toy(dtype, enter=lambda params, batch: batch["x"]):
    """A model of one number a block, whose gradient is the mean of x."""
    return layered.Layered(
        init=lambda key: jnp.ones((2, 1), dtype),
        split=lambda params: layered.Parts((), params, ()),
        join=lambda parts: parts.blocks,
        specs=layered.Parts((), jax.sharding.PartitionSpec(), ()),
        functions=lambda axes: layered.Functions(enter, lambda w, h: h + w[None], lambda params, h, batch: h[:, 0]),
        check=lambda sizes: None,
        layers=2,
    )


@pytest.mark.parametrize("axis", ["data", "pipe"])
def test_gradients_of_small_floats_are_added_up_in_single(axis):
    """A sum of 512 shares of 1 / 512 stops at a half in bfloat16."""
    model, m = toy(jnp.bfloat16), 512
    method = on_mesh(model, optax.sgd(1.0), mesh=mesh.make((1,), (axis,)), microbatches=m)
    batch = {"x": jnp.zeros((m, 1), jnp.bfloat16)}
    state, _ = jax.jit(method.round)(method.init(model.init(meshes.KEY)), batch, meshes.KEY)
    np.testing.assert_array_equal(method.params(state).astype(jnp.float32), 0.0)


def test_whole_numbers_between_blocks_are_refused():
    model = toy(jnp.int32)
    method = on_mesh(model, optax.sgd(1.0), mesh=mesh.make((2,), ("pipe",)), microbatches=2)
    batch = {"x": jnp.zeros((4, 1), jnp.int32)}
    with pytest.raises(ValueError, match="all of it must be floating"):
        method.round(method.init(model.init(meshes.KEY)), batch, meshes.KEY)


PIPE = (2, 4)


@pytest.mark.parametrize("stages", PIPE)
def test_pipedream_descends_gradients_of_the_weights_that_a_microbatch_has_seen(stages):
    """Against the paper's equation, stage by stage, with no table and no pipeline."""
    m, rate, model = 8, 0.5, meshes.MODELS["dense"]
    method = pipedream(model, optax.sgd(rate), mesh=mesh.make((stages,), ("pipe",)), microbatches=m)
    state = method.init(model.init(meshes.KEY))
    state, metrics = jax.jit(method.round)(state, meshes.BATCH, meshes.KEY)

    functions, parts = model.functions(layered.Axes()), model.split(model.init(meshes.KEY))
    each = model.layers // stages

    @jax.jit
    def gradients(versions, leave, enter, batch):
        def loss(enter, versions, leave):
            h = functions.enter(enter, batch)
            for blocks in versions:
                for j in range(each):
                    h = functions.block(jax.tree.map(lambda x, j=j: x[j], blocks), h)
            return jnp.mean(functions.leave(leave, h, batch))

        return jax.value_and_grad(loss, (0, 1, 2))(enter, versions, leave)

    def descended(w, g):
        return jax.tree.map(lambda x, d: x - rate * d, w, g)

    blocks = [[jax.tree.map(lambda x, r=r: x[r * each : (r + 1) * each], parts.blocks)] for r in range(stages)]
    enter, leave, losses = [parts.enter], parts.leave, []
    for t in range(m):
        age = [max(0, t - (stages - 1 - r)) for r in range(stages)]
        rows = jax.tree.map(lambda x, t=t: x[2 * t : 2 * t + 2], meshes.BATCH)
        value, (de, db, dl) = gradients([blocks[r][age[r]] for r in range(stages)], leave, enter[age[0]], rows)
        enter.append(descended(enter[-1], de))
        leave = descended(leave, dl)
        for r in range(stages):
            blocks[r].append(descended(blocks[r][-1], db[r]))
        losses.append(value)
    whole = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(versions[-1] for versions in blocks))
    close(method.params(state), model.join(layered.Parts(enter[-1], whole, leave)))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert state.step == m


def test_pipedream_computes_again_what_it_does_not_keep():
    def memory(recompute):
        devices = mesh.make((4,), ("pipe",))
        method = pipedream(DEEP, optax.sgd(0.1), mesh=devices, microbatches=8, recompute=recompute)
        state = jax.eval_shape(method.init, jax.eval_shape(DEEP.init, meshes.KEY))
        batch = {name: jax.ShapeDtypeStruct((32, 8), jnp.int32) for name in "xy"}
        return jax.jit(method.round).lower(state, batch, meshes.KEY).compile().memory_analysis().temp_size_in_bytes

    assert memory(False) - memory(True) >= 4 * (3 + 4 + 4) * 4 * 4 * 8 * 32


def test_pipedream_with_one_stage_is_training_on_one_microbatch_after_another_also_data_parallel():
    model, optimizer = meshes.MODELS["dense"], optax.sgd(0.1, momentum=0.9)
    method = pipedream(model, optimizer, mesh=mesh.make((2, 1), ("data", "pipe")), microbatches=4)
    state, round_fn = method.init(model.init(meshes.KEY)), jax.jit(method.round)
    plain = on_mesh(model, optimizer, mesh=mesh.make((1,), ("data",)))
    one, step = plain.init(model.init(meshes.KEY)), jax.jit(plain.round)
    for _ in range(2):
        state, _ = round_fn(state, meshes.BATCH, meshes.KEY)
        for t in range(4):
            one, _ = step(one, jax.tree.map(lambda x, t=t: x[4 * t : 4 * t + 4], meshes.BATCH), meshes.KEY)
    close(method.params(state), plain.params(one))
    assert round_fn._cache_size() == 1


@pytest.mark.parametrize("name, model", [("ring attention", "dense"), ("overlap", "overlap")])
def test_permutes_inside_a_stage_are_refused(name, model):
    axes = {"pipe": 2, "sequence" if model == "dense" else "tensor": 2}
    method = on_mesh(meshes.MODELS[model], optax.sgd(1.0), mesh=mesh.make((2, 2), tuple(axes)), microbatches=2)
    state = method.init(meshes.MODELS[model].init(meshes.KEY))
    with pytest.raises(ValueError, match="the model sends by permutes"):
        method.round(state, meshes.BATCH, meshes.KEY)


def test_permutes_at_the_entrance_are_refused():
    model = toy(jnp.float32, lambda params, batch: jax.lax.ppermute(batch["x"], "pipe", [(0, 1), (1, 0)]))
    method = on_mesh(model, optax.sgd(1.0), mesh=mesh.make((2,), ("pipe",)), microbatches=2)
    with pytest.raises(ValueError, match="the model sends by permutes"):
        method.round(method.init(model.init(meshes.KEY)), {"x": jnp.zeros((4, 1))}, meshes.KEY)


def test_pipedream_without_a_pipe_is_refused():
    with pytest.raises(ValueError, match="there must be an axis 'pipe'"):
        pipedream(meshes.MODELS["dense"], optax.sgd(1.0), mesh=mesh.make((2,), ("data",)), microbatches=2)
