"""A cohort on its way from the host to the device: laid out, its rows gathered, sent.

Letters: C clients in a cohort, n devices.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jfed.core import Cohort, Tree


def lay_out(cohort: Cohort, hands: np.ndarray, size: np.ndarray, capacity: int) -> tuple[Cohort, list[np.ndarray]]:
    """The cohort in the order of `hands` [n, slots], and for each device the clients whose rows its block holds.

    `start` comes in as rows within the client and leaves as rows of all blocks. A block holds a client once,
    however often it was drawn; clients lie in the order of their ids.
    """
    count = cohort.ids.shape[0]
    filled = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), cohort)
    filled.ids[count] = size.size
    cohort = jax.tree.map(lambda x: x[hands.reshape(-1)], filled)
    within = cohort.start.reshape(hands.shape)  # a window over the client's rows may begin later
    start, owners = np.zeros(hands.shape, np.int32), []
    for d, ids in enumerate(cohort.ids.reshape(hands.shape)):
        real = ids < size.size
        held, place = np.unique(ids[real], return_inverse=True)
        first = np.cumsum(size[held], dtype=np.int64) - size[held]
        start[d, real] = (d * capacity + first)[place] + within[d, real]
        owners.append(held[size[held] > 0])
    return cohort._replace(start=start.reshape(-1)), owners


def block(where: str, row: Tree, capacity: int, clients: Iterable[tuple[str, list[np.ndarray]]]) -> list[np.ndarray]:
    """Leaves [capacity, ...] with the clients' rows one after another, in the dtypes they have on a device."""
    # Zeros, not whatever memory holds: a lane that has nothing to do still reads a row.
    leaves = [np.zeros((capacity, *one.shape), _on_device(one).dtype) for one in jax.tree.leaves(row)]
    first = 0
    for name, rows in clients:
        for leaf, part in zip(leaves, rows, strict=True):
            here = leaf[first : first + len(part)]
            np.copyto(here, part, casting="same_kind")
            if leaf.dtype != part.dtype and leaf.dtype.kind in "iu" and not np.array_equal(here, part):
                raise ValueError(
                    f"{where}({name}): it holds {part.dtype} values beyond {leaf.dtype}; renumber them, or set "
                    "jax_enable_x64."
                )
        first += len(rows[0])
    return leaves


def send(
    cohort: Cohort, block: Callable[[int], list[np.ndarray]], row: Tree, capacity: int, mesh: Mesh | None, axis: str
) -> Cohort:
    """The cohort on the device or, with a mesh, each device's slots and block on it; only those are gathered."""
    structure = jax.tree.structure(row)
    if mesh is None:
        return jax.device_put(cohort._replace(examples=jax.tree.unflatten(structure, block(0))))
    sharding = NamedSharding(mesh, P(axis))
    block = functools.cache(block)  # asked for once a leaf and device; devices along other axes share one

    def leaf(k: int, one: jax.ShapeDtypeStruct) -> jax.Array:
        def of(index):
            return block((index[0].start or 0) // capacity)[k]

        return jax.make_array_from_callback((mesh.shape[axis] * capacity, *one.shape), sharding, of)

    examples = [leaf(k, one) for k, one in enumerate(jax.tree.leaves(row))]
    cohort = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), cohort)
    return cohort._replace(examples=jax.tree.unflatten(structure, examples))


def _on_device(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """As JAX would take it: 64 bits become 32 unless it was told otherwise."""
    return jax.eval_shape(lambda x: x, np.zeros((0, *one.shape), one.dtype))
