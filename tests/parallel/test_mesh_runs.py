"""What users run on CPU devices: many steps, out of JAX's cache, as `mesh.use_cores` sets XLA up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# With more than a hundred programs under way on several CPU devices XLA hangs.
TRAINED = """
import collections

import jax
import meshes
import numpy as np
import optax

from jfed import run
from jfed.parallel import on_mesh

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
model, axes, options = meshes.CASES["3d_fsdp_zb_h1"]
model, devices = meshes.MODELS[model], meshes.over_all_processes(axes)
optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(0.02))
method = on_mesh(model, optimizer, mesh=devices, **options)
state = method.init(model.init(meshes.KEY))
steps = run.iterate(method, lambda population, key, t: meshes.BATCH, (), state, meshes.KEY, rounds=150)
last = collections.deque(steps, maxlen=1)[0]
params = method.params(last.state)
print(len(hits), float(last.metrics["loss"][0]), sum(float(np.abs(x).sum()) for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_many_steps_in_three_dimensions_out_of_the_cache_are_those_that_were_compiled(tmp_path):
    tests = Path(__file__).parents[1]
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
    }
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", TRAINED], env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout.split())
    (first, *trained), (again, *loaded) = said
    assert int(first) == 0 < int(again)
    assert trained == loaded


# Without an order of messages a device enters the next gathering while others are in the one before, and XLA aborts.
OPTIMIZED = """
from jfed import mesh

mesh.use_cores(8)
import jax
import numpy as np
import optax

from jfed.parallel import on_mesh, transformer

model = transformer(512, width=128, layers=16, heads=8, context=128)
tokens = np.random.default_rng(0).integers(0, 512, (16, 129)).astype(np.int32)
batch, found = {"x": tokens[:, :-1], "y": tokens[:, 1:]}, []
for shape in (8,), (1,):
    method = on_mesh(model, optax.adamw(1e-3), mesh=mesh.make(shape, ("data",)), fully_sharded=True)
    state, step = method.init(model.init(jax.random.key(0))), jax.jit(method.round)
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(1))
        found.append(float(metrics["loss"]))
np.testing.assert_allclose(found[:3], found[3:], rtol=1e-4)
"""


@pytest.mark.slow
def test_optimized_programs_of_many_gatherings_run_on_cpu_devices():
    unset = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", OPTIMIZED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
