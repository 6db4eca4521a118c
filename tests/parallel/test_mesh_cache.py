"""A program that JAX's cache has kept runs as one that has just been compiled."""

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
