"""Meshes, schedules and options under which `on_mesh` must train as one device does; two processes run them, too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed.parallel import all_to_all_attention, layered, mixture_of_experts, on_mesh, schedules, transformer

V, T, B = 24, 8, 16
KEY = jax.random.key(0)
SIZES = {"width": 16, "layers": 4, "heads": 4, "context": T}
TOKENS = np.random.default_rng(0).integers(0, V, (B, T + 1))
BATCH = {"x": TOKENS[:, :-1].astype(np.int32), "y": TOKENS[:, 1:].astype(np.int32)}
BATCH["y"][3, 5:], BATCH["y"][7] = -1, -1  # padding, and an example of nothing else

DENSE = functools.partial(transformer, V, **SIZES)
MODELS = {
    "dense": DENSE(),
    "sequence_parallel": DENSE(sequence_parallel=True),
    "overlap": DENSE(sequence_parallel=True, overlap=True),
    "ulysses": DENSE(sequence_attention=all_to_all_attention),
    "experts": DENSE(feed_forward=mixture_of_experts(4, top=2)),
}

SAME = ("dense", "sequence_parallel", "overlap", "ulysses")  # they differ in what they send alone
SGD = optax.sgd(1.0)
NAN = {"fill": float("nan")}
INTERLEAVED = functools.partial(schedules.interleaved, chunks=2)


def fused(schedule):
    return lambda p, m: schedules.fused(schedule(p, m))


# name: model, shape and axes of the mesh, options
CASES = {
    "one": ("dense", {"data": 1}, {}),
    "data": ("dense", {"data": 8}, {}),
    "data_microbatches": ("dense", {"data": 4}, {"microbatches": 4, "recompute": False}),
    "fsdp": ("dense", {"data": 8}, {"fully_sharded": True}),
    "fsdp_kept_microbatches": ("dense", {"data": 4}, {"fully_sharded": True, "recompute": False, "microbatches": 2}),
    "tensor": ("dense", {"tensor": 4}, {}),
    "sequence_parallel": ("sequence_parallel", {"tensor": 4}, {}),
    "collective_matmul": ("overlap", {"tensor": 4}, {"recompute": False}),
    "ring_attention": ("dense", {"sequence": 8}, {}),
    "ulysses": ("ulysses", {"sequence": 4}, {}),
    "experts": ("experts", {"expert": 4}, {}),
    "experts_tensor": ("experts", {"data": 2, "expert": 2, "tensor": 2}, {"fully_sharded": True}),
    "naive": ("dense", {"pipe": 4}, {"microbatches": 4, "schedule": schedules.naive} | NAN),
    "gpipe": ("dense", {"pipe": 4}, {"microbatches": 8, "schedule": schedules.gpipe} | NAN),
    "gpipe_fused": ("dense", {"pipe": 4}, {"microbatches": 8, "schedule": fused(schedules.gpipe)} | NAN),
    "1f1b": ("dense", {"pipe": 4}, {"microbatches": 8} | NAN),
    "1f1b_kept": ("dense", {"pipe": 2}, {"microbatches": 8, "recompute": False} | NAN),
    "interleaved": ("dense", {"pipe": 2}, {"microbatches": 8, "schedule": INTERLEAVED} | NAN),
    "interleaved_fused_kept": (
        "dense",
        {"pipe": 2},
        {"microbatches": 4, "schedule": fused(INTERLEAVED), "recompute": False} | NAN,
    ),
    "zb_h1": ("dense", {"pipe": 4}, {"microbatches": 8, "schedule": schedules.zb_h1} | NAN),
    "zb_h1_kept": ("dense", {"pipe": 4}, {"microbatches": 8, "schedule": schedules.zb_h1, "recompute": False} | NAN),
    "data_tensor": ("dense", {"data": 4, "tensor": 2}, {}),
    "tensor_data": ("sequence_parallel", {"tensor": 2, "data": 4}, {"fully_sharded": True}),
    "data_sequence_tensor": ("dense", {"data": 2, "sequence": 2, "tensor": 2}, {"fully_sharded": True}),
    "pipe_tensor": ("sequence_parallel", {"pipe": 4, "tensor": 2}, {"microbatches": 4} | NAN),
    "pipe_sequence": ("ulysses", {"pipe": 2, "sequence": 4}, {"microbatches": 4} | NAN),
    "pipe_experts": ("experts", {"pipe": 2, "expert": 4}, {"microbatches": 2} | NAN),
    "3d": ("dense", {"data": 2, "pipe": 2, "tensor": 2}, {"microbatches": 4} | NAN),
    "3d_fsdp_zb_h1": (
        "sequence_parallel",
        {"data": 2, "pipe": 2, "tensor": 2},
        {"microbatches": 4, "schedule": schedules.zb_h1, "fully_sharded": True, "recompute": False} | NAN,
    ),
    "3d_fsdp_interleaved": (
        "sequence_parallel",
        {"data": 2, "pipe": 2, "tensor": 2},
        {"microbatches": 4, "schedule": INTERLEAVED, "fully_sharded": True} | NAN,
    ),
}


def over_all_processes(axes):
    """A mesh of as many devices as it takes, out of every process's alike."""
    needed = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[:: jax.device_count() // needed][:needed])
    return jax.sharding.Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def trained(name, optimizer=SGD, steps=1):
    """The params and loss that a case ends with, its state, and how many programs it took."""
    model, axes, options = CASES[name]
    model, devices = MODELS[model], over_all_processes(axes)
    method = on_mesh(model, optimizer, mesh=devices, **options)
    state, round_fn = method.init(model.init(KEY)), jax.jit(method.round)
    for _ in range(steps):
        state, metrics = round_fn(state, BATCH, KEY)
    return method.params(state), metrics["loss"], state, round_fn._cache_size()


@functools.cache
def _alone(model, optimizer, steps):
    model = MODELS[model]
    functions = model.functions(layered.Axes())

    def loss(parts):
        h = functions.enter(parts.enter, BATCH)
        for j in range(model.layers):
            h = functions.block(jax.tree.map(lambda x, j=j: x[j], parts.blocks), h)
        return jnp.mean(functions.leave(parts.leave, h, BATCH))

    parts = model.split(model.init(KEY))
    state, step = optimizer.init(parts), jax.jit(jax.value_and_grad(loss))
    for _ in range(steps):
        value, gradient = step(parts)
        updates, state = optimizer.update(gradient, state, parts)
        parts = optax.apply_updates(parts, updates)
    return model.join(parts), value


def alone(name, optimizer=SGD, steps=1):
    """What the same model becomes where there are no devices, axes, scans or microbatches at all."""
    kind = CASES[name][0]
    return _alone("dense" if kind in SAME else kind, optimizer, steps)
