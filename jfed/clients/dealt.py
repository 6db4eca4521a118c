"""Clients dealt to devices beforehand, on the host: no device holds examples that are not its own.

`sharded` deals inside the compiled program, so every device must see all examples. Here `deal_on_host`
has done it beforehand, for `jfed.run.stream`, and `dealt` runs on each device the clients it got with
their rows. Dealing is list scheduling, longest first (Graham 1969).

Letters: C clients in the cohort, N clients in the population, n devices, E rows.
"""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jfed import mesh as meshes
from jfed.core import ClientMap, ClientWork, Cohort, Tree


def dealt(mesh: Mesh, inner: ClientMap, *, axis: str = "clients") -> ClientMap:
    """Runs each device's own clients on it, and sums what they add with one `psum`.

    Slots and rows lie in the order of devices: the first n-th of the cohort's slots, and of the rows of
    its examples, are the first device's, and so on; empty slots make hands equal in length. `start`
    counts from the first row of all, as in any cohort. `kept` stays where it was made, in the order given.

    A client whose rows are not on its device weighs NaN: `federated` drops it and counts it under
    `"dropped"`.

    Args:
      mesh: from `jfed.mesh.make`; may span processes.
      inner: the client map each device runs, such as `lanes(16)`.
      axis: name of the mesh axis.

    Raises:
      ValueError: if the mesh has no such axis; when the map meets a cohort whose slots or rows are
        not a multiple of the devices.
    """
    n = meshes.devices_along("dealt", mesh, axis)

    def map_fn(work: ClientWork, shared: Tree, clients: Cohort) -> tuple[Tree, Tree]:
        slots = clients.ids.shape[0]
        rows = [leaf.shape[0] for leaf in jax.tree.leaves(shared.examples)]
        if slots % n or any(count % n for count in rows):
            raise ValueError(
                f"dealt(mesh of {n} devices): a cohort of {slots} slots, of {rows} rows, was not dealt to them; "
                "use run.stream(..., mesh=mesh), or clients.sharded for a cohort that is on the device."
            )
        everywhere = jax.tree.map(lambda _: P(), shared)._replace(examples=P(axis))

        @meshes.shard_map(mesh=mesh, in_specs=(everywhere, P(axis)), out_specs=(P(axis), P()))
        def on_each_device(shared, hand):
            block = rows[0] // n if rows else 0
            start = hand.start - lax.axis_index(axis) * block
            here = (hand.size == 0) | ((start >= 0) & (start + hand.size <= block))
            hand = hand._replace(
                start=jnp.where(here & (hand.size > 0), start, 0), weight=jnp.where(here, hand.weight, jnp.nan)
            )
            kept, added = inner(work, shared, hand)
            return kept, lax.psum(added, axis)

        return on_each_device(shared, clients)

    return map_fn


def deal_on_host(
    steps: np.ndarray, ids: np.ndarray, size: np.ndarray, *, devices: int, slots: int, capacity: int
) -> np.ndarray:
    """Deals a cohort on the host: the longest client left goes to the device with the least to do.

    A device with `slots` clients gets no more; nor does one whose rows would pass `capacity`, as long as
    another has room.

    Args:
      steps: [C] local steps.
      ids: [C] clients; one outside [0, N) is an empty slot and is not dealt.
      size: [N] rows of every client; a client dealt twice to a device has its rows there once.
      devices: n.
      slots: clients a device may get; at least C / n.
      capacity: rows a device has room for.

    Returns:
      [n, slots] places in the cohort; C where a slot stays empty.

    >>> size = np.ones(5, np.int32)
    >>> print(deal_on_host(np.array([1, 9, 2, 3, 4]), np.arange(5), size, devices=2, slots=4, capacity=4))
    [[1 0 5 5]
     [4 3 2 5]]
    """
    count = ids.shape[0]
    hands = np.full((devices, slots), count)
    dealt_to, rows, held = [0] * devices, [0] * devices, [set() for _ in range(devices)]
    waiting = [(0, d) for d in range(devices)]  # steps to do, device: a heap of those that have a free slot
    for place in np.argsort(-steps, kind="stable").tolist():
        client = int(ids[place])
        if not 0 <= client < size.shape[0]:
            continue
        full = []
        while waiting:
            load, d = heapq.heappop(waiting)
            if client in held[d] or rows[d] + int(size[client]) <= capacity:
                break
            full.append((load, d))
        else:  # nobody has room: whoever has least to do, and the caller tells
            load, d = full.pop(0)
        hands[d, dealt_to[d]] = place
        dealt_to[d] += 1
        rows[d] += 0 if client in held[d] else int(size[client])
        held[d].add(client)
        if dealt_to[d] < slots:
            full.append((load + int(steps[place]), d))
        for entry in full:
            heapq.heappush(waiting, entry)
    return hands
