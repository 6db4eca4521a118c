"""Clients dealt to the devices of a mesh, which may span processes.

Letters: C clients in the cohort, n devices.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jfed import mesh as meshes
from jfed import tree
from jfed.core import ClientMap, ClientWork, Cohort, Tree


def sharded(mesh: Mesh, inner: ClientMap, *, axis: str = "clients") -> ClientMap:
    """Deals the clients to the devices along one mesh axis and sums what they add with one `psum`.

    Clients are dealt longest first, back and forth over the devices, so that each device gets
    nearly the same number of local steps. `shared` is the same on every device: a state or population
    put there beforehand, with `jfed.mesh.replicate`, is not copied, nor a program compiled, again.

    Args:
      mesh: from `jfed.mesh.make`; may span processes.
      inner: the client map each device runs, such as `lanes(16)`.
      axis: name of the mesh axis.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"sharded(axis={axis!r}): the mesh has axes {mesh.axis_names}; name one of them.")
    n = mesh.shape[axis]

    def map_fn(work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        count = clients.ids.shape[0]
        rounds = -(-count // n)
        # Row d of `deal` is the hand of device d; a place past the cohort is a slot left empty.
        deal = jnp.arange(rounds * n).reshape(rounds, n)
        deal = jnp.where(jnp.arange(rounds)[:, None] % 2 == 0, deal, deal[:, ::-1]).T.reshape(-1)
        queue = jnp.argsort(clients.steps, descending=True, stable=True)
        hand = queue[jnp.minimum(deal, count - 1)]
        real = deal < count
        dealt = tree.take(clients, hand)
        dealt = dealt._replace(steps=jnp.where(real, dealt.steps, 0), state=(dealt.state, real))

        @meshes.shard_map(mesh=mesh, in_specs=(P(), P(axis)), out_specs=(P(axis), P()))
        def on_each_device(shared, dealt):
            kept, added = inner(_only_real(work), shared, dealt)
            return kept, lax.psum(added, axis)

        kept, added = on_each_device(shared, dealt)
        place = (
            jnp.zeros(count, jnp.int32)
            .at[jnp.where(real, hand, count)]
            .set(jnp.arange(rounds * n, dtype=jnp.int32), mode="drop")
        )
        return tree.take(kept, place), added

    return map_fn


def _only_real(work: ClientWork) -> ClientWork:
    """`work` for clients whose state is `(state, real)`: one that is not real adds nothing."""

    def plain(client: Cohort) -> Cohort:
        return client._replace(state=client.state[0])

    def finish(shared, client, carry):
        kept, added = work.finish(shared, plain(client), carry)
        return kept, tree.select(client.state[1], added, jax.tree.map(jnp.zeros_like, added))

    return ClientWork(
        steps=work.steps,
        start=lambda shared, client: work.start(shared, plain(client)),
        step=lambda shared, client, carry, t: work.step(shared, plain(client), carry, t),
        finish=finish,
    )
