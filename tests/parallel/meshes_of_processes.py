"""One of two processes that together train over meshes: python meshes_of_processes.py PORT PROCESS NAMES...

Prints of each case the largest difference from one device, and how many programs it took.
"""

import os
import sys

import jax

if __name__ == "__main__":  # before anything makes an array
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))

import meshes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def differences(names):
    for name in names:
        params, loss, state, programs = meshes.trained(name)
        devices = jax.tree.leaves(state)[0].sharding.mesh
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(devices, PartitionSpec()))
        found = jax.tree.map(lambda x, whole=whole: np.asarray(whole(x).addressable_data(0)), (params, loss))
        worst = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), found, meshes.alone(name))
        print("case", name, max(jax.tree.leaves(worst)), programs, flush=True)


if __name__ == "__main__":
    differences(sys.argv[3:])
