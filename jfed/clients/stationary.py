"""Each device runs the clients that it has: what they remember never moves.

Letters: C clients in the cohort, n devices.
"""

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jfed import mesh as meshes
from jfed.core import ClientMap, ClientWork, Cohort, Tree


def stationary(mesh: Mesh, inner: ClientMap, *, axis: str = "clients") -> ClientMap:
    """Runs the first n-th of the cohort's slots on the first device, and so on, and sums what they add with one `psum`.

    `sharded` deals clients to devices anew each round, and with them what is remembered of each. Here they stay, as
    peers do that train models of their own; examples are on every device.

    Args:
      mesh: from `jfed.mesh.make`; may span processes.
      inner: the client map each device runs, such as `lanes(16)`.
      axis: name of the mesh axis.

    Raises:
      ValueError: if the mesh has no such axis; when the map meets a cohort that is not a multiple of the devices.
    """
    n = meshes.devices_along("stationary", mesh, axis)

    def map_fn(work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        slots = clients.ids.shape[0]
        if slots % n:
            raise ValueError(
                f"stationary(mesh of {n} devices): a cohort of {slots} slots is no multiple of them; add empty slots, "
                "or take clients.sharded."
            )
        everywhere = jax.tree.map(lambda _: P(), shared)

        @meshes.shard_map(mesh=mesh, in_specs=(everywhere, P(axis)), out_specs=(P(axis), P()))
        def on_each_device(shared, clients):
            kept, added = inner(work, shared, clients)
            return kept, lax.psum(added, axis)

        return on_each_device(shared, clients)

    return map_fn
