"""One of two processes of four devices that together train over meshes, started by `together`.

Writes of each case the largest difference from one device, and how many programs it took.
"""

import json
import sys
from pathlib import Path

import jax
import meshes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def differences(names):
    found_of = {}
    for name in names:
        params, loss, state, programs = meshes.trained(name)
        devices = jax.tree.leaves(state)[0].sharding.mesh
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(devices, PartitionSpec()))
        found = jax.tree.map(lambda x, whole=whole: np.asarray(whole(x).addressable_data(0)), (params, loss))
        worst = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), found, meshes.alone(name))
        found_of[name] = max(jax.tree.leaves(worst)), programs
    return found_of


if __name__ == "__main__":
    said = json.dumps(differences(sys.argv[2:]))
    (Path(sys.argv[1]) / f"{jax.process_index()}.json").write_text(said)
