"""A program that JAX's cache has kept runs as one that has just been compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Groups of devices along three axes send at the same time: under XLA's schedule for
# concurrency, which keeps no order of messages, these steps wait for one another for ever.
TRAINED = """
import jax
import meshes
import numpy as np
import optax

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(0.02))
params, loss, *_ = meshes.trained("3d_fsdp_zb_h1", optimizer, steps=150)
print(len(hits), float(loss), sum(float(np.abs(x).sum()) for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_a_step_in_three_dimensions_out_of_the_cache_is_the_one_that_was_compiled(tmp_path):
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
