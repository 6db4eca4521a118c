"""One of two processes of two devices that run two rounds of each method, started by `together`."""

import sys
from pathlib import Path

import jax
import numpy as np
from methods import make, two_rounds
from problem import PARAMS

from jfed import mesh
from jfed.clients import lanes, sharded


def main(folder, methods):
    """Writes the leaves of each method's state and metrics."""
    devices = mesh.make()
    assert devices.shape["clients"] == 4
    for method in methods:
        algorithm = make(method, sharded(devices, lanes(2)))
        ended = two_rounds(
            jax.jit(algorithm.round), method, algorithm.init(PARAMS), place=lambda tree: mesh.replicate(tree, devices)
        )
        if jax.process_index() == 0:
            leaves = [
                np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x) for x in jax.tree.leaves(ended)
            ]
            np.savez(folder / f"{method}.npz", **{str(i): leaf for i, leaf in enumerate(leaves)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
