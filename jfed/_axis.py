"""What a program does along a named axis, in one text for devices (`shard_map`) and one device (`vmap(axis_name=)`).

Letters: n devices on the axis, d numbers.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfed.core import Tree

Pairs = Sequence[tuple[int, int]]
"""`(from, to)`: who sends to whom; nobody sends twice, and nobody receives twice."""


def on_devices(axis_name: str | tuple[str, ...]) -> bool:
    """Whether the axis is one of devices, rather than of a `vmap`.

    Raises:
      ValueError: if several axes are given and not all are of devices, or they are not in the mesh's order, by which
        JAX numbers the devices that a message goes to.
    """
    mesh, names = jax.sharding.get_abstract_mesh(), _names(axis_name)
    manual = [name in mesh.manual_axes for name in names]
    if len(names) > 1 and not all(manual):
        raise ValueError(f"axis_name={axis_name!r}: axes of vmap cannot be taken as one; sum over one after the other.")
    order = tuple(name for name in mesh.axis_names if name in names)
    if all(manual) and names != order:
        raise ValueError(f"axis_name={axis_name!r}: the mesh has them in another order; give {order}.")
    return all(manual)


def vary(tree: Tree, axis_name: str | tuple[str, ...]) -> Tree:
    """The same tree, of a type that may differ from device to device, as loops over devices want it under check_vma."""
    if not on_devices(axis_name):
        return tree

    def one(x):
        x = jnp.asarray(x)
        missing = tuple(name for name in _names(axis_name) if name not in _varying(x))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        # Before jax 0.10 what casts is differentiated as a sum over devices, even where types are not checked.
        return differing(x, axis_name)

    return jax.tree.map(one, tree)


def differing(tree: Tree, axis_name: str | tuple[str, ...]) -> Tree:
    """The same tree, which compilers and `vmap` take for one that differs, though it may not, as zeros do not.

    The `all_to_all` of `vmap` gives wrong shapes without (jax 0.10, 0.12).
    """

    def one(x):
        return lax.select(jnp.broadcast_to(lax.axis_index(axis_name) >= 0, x.shape), x, x)

    return jax.tree.map(one, tree)


def permute(x: jax.Array, axis_name: str | tuple[str, ...], pairs: Pairs) -> jax.Array:
    """What this device is sent along `pairs`: zeros if nobody sends to it.

    XLA:CPU widens floats of fewer than 32 bits on the way, other backends do not.
    """
    n = lax.axis_size(axis_name)
    if not pairs or not x.size:
        return jnp.zeros_like(x)
    if len(pairs) == n or on_devices(axis_name):
        return lax.ppermute(x, axis_name, tuple(pairs))
    # The permutations of vmap are whole: the rest of the devices send each other what nobody reads.
    sending, receiving = ({pair[i] for pair in pairs} for i in (0, 1))
    rest = zip((i for i in range(n) if i not in sending), (i for i in range(n) if i not in receiving), strict=True)
    got = lax.ppermute(x, axis_name, (*pairs, *rest))
    return jnp.where(among(receiving, axis_name), got, jnp.zeros_like(got))


def among(devices: Sequence[int] | set[int], axis_name: str | tuple[str, ...]) -> jax.Array:
    """Whether this device is one of `devices`; [] bool."""
    belongs = np.isin(np.arange(lax.axis_size(axis_name)), sorted(devices))
    return jnp.asarray(belongs)[lax.axis_index(axis_name)]


def joined(f: Callable[[jax.Array], jax.Array], tree: Tree, *, lead: int = 0) -> Tree:
    """Applies `f` to all leaves of one dtype as one array.

    Args:
      f: maps [*lead, d] to [*any, d]; it must treat the last axis number by number.
      tree: leaves [*lead, ...]; those without numbers are left as they are, but for their leading axes.
      lead: leading axes that leaves share.

    Returns:
      Leaves [*any, ...].
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(x) for x in leaves]
    groups: dict = {}
    for i, x in enumerate(leaves):
        groups.setdefault(x.dtype, []).append(i)
    for where in groups.values():
        flat = [leaves[i].reshape(*leaves[i].shape[:lead], -1) for i in where]
        came = f(jnp.concatenate(flat, axis=-1) if len(flat) > 1 else flat[0])
        begin = 0
        for i, part in zip(where, flat, strict=True):
            here = lax.slice_in_dim(came, begin, begin + part.shape[-1], axis=-1)
            begin += part.shape[-1]
            leaves[i] = here.reshape(*came.shape[:-1], *leaves[i].shape[lead:])
    return jax.tree.unflatten(structure, leaves)


def cut(x: jax.Array, n: int) -> jax.Array:
    """A vector [d] as n chunks [n, ceil(d / n)], of which the later ones end in a 0 if n does not divide d.

    >>> print(cut(jnp.arange(1, 6), 3))
    [[1 2]
     [3 4]
     [5 0]]
    """
    length, longer = divmod(x.size, n)
    if not longer:
        return x.reshape(n, length)
    at = longer * (length + 1)
    short = jnp.pad(x[at:].reshape(n - longer, length), ((0, 0), (0, 1)))
    return jnp.concatenate([x[:at].reshape(longer, length + 1), short])


def uncut(chunks: jax.Array, d: int) -> jax.Array:
    """The inverse of `cut`: [d]."""
    n = chunks.shape[0]
    length, longer = divmod(d, n)
    if not longer:
        return chunks.reshape(-1)
    return jnp.concatenate([chunks[:longer].reshape(-1), chunks[longer:, :length].reshape(-1)])


def small(x: jax.Array) -> bool:
    """Whether these are floats of fewer than 32 bits."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def as_bits(x: jax.Array) -> jax.Array:
    """Small floats as integers of their bits, which no backend widens on the way; what else there is, as it is."""
    return lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}") if small(x) else x


def from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `as_bits`."""
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def _names(axis_name: str | tuple[str, ...]) -> tuple[str, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _varying(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma
