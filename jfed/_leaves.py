"""A pytree as arrays and the list that describes them, and back again, bit for bit.

The list has one entry a leaf: its path, shape and dtype as the user sees them, and those of the array
stored for it (a typed key is stored as its words).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jfed.core import Tree

_NUMBERS = bool | int | float | complex


def pack(tree: Tree) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """An entry for each leaf, and the arrays to write, under their entry's index.

    An array that lies in parts on several devices stays as it is, to be written part by part; any other becomes numpy.
    Orbax refuses empty arrays: their entry is all there is to know of them.
    """
    entries, arrays = [], {}
    for index, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        name = jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | _NUMBERS):
            raise ValueError(f"save: leaf {name or 'tree'} is a {type(leaf).__name__}; save arrays and numbers only.")
        entry = {"path": name} | _kind(leaf)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            entry["impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
            leaf = np.asarray(leaf)
        entries.append(entry | {"stored": _kind(leaf)})
        if leaf.size:
            arrays[str(index)] = leaf
    return entries, arrays


def stored(entries: list[dict[str, Any]], like: Tree) -> dict[str, Any]:
    """What to ask Orbax for: the arrays that `pack` gave out, in numpy but for those that `like` has in parts.

    Of the latter each process reads what its devices are to hold, and makes no whole of it.
    """
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
    arrays = {}
    for index, entry in enumerate(entries):
        shape, dtype = entry["stored"]["shape"], jnp.dtype(entry["stored"]["dtype"])
        sharding = _parts(wanted[entry["path"]])
        whole = sharding is None
        arrays[str(index)] = np.empty(shape, dtype) if whole else jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return {index: array for index, array in arrays.items() if array.size}


def difference(entries: list[dict[str, Any]], like: Tree) -> str:
    """The first leaf that `like` and the entries do not have alike, as the end of a sentence; '' if there is none.

    >>> entries, _ = pack({"w": np.zeros(3, np.float32)})
    >>> difference(entries, {"w": np.zeros(4, np.float32)})
    "has ['w'] as float32[3], the tree to restore has it as float32[4]"
    """
    wanted = {jax.tree_util.keystr(path): _kind(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
    held = {entry["path"]: entry for entry in entries}
    for name in [*wanted, *held]:
        if name not in held:
            return f"has no leaf {name or 'tree'}, which the tree to restore has"
        if name not in wanted:
            return f"has a leaf {name or 'tree'}, which the tree to restore has not"
        have, want = (f"{kind['dtype']}{kind['shape']}" for kind in (held[name], wanted[name]))
        if have != want:
            return f"has {name or 'tree'} as {have}, the tree to restore has it as {want}"
    return ""


def unpack(arrays: dict[str, Any], entries: list[dict[str, Any]], like: Tree) -> Tree:
    """Arrays as leaves of the kind, and on the devices, of those of `like`; matched by path, not order."""
    held = {entry["path"]: (index, entry) for index, entry in enumerate(entries)}

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        index, entry = held[jax.tree_util.keystr(path)]
        empty = np.empty(entry["stored"]["shape"], jnp.dtype(entry["stored"]["dtype"]))
        return _place(arrays.get(str(index), empty), entry.get("impl"), leaf)

    return jax.tree_util.tree_map_with_path(one, like)


def _place(array: np.ndarray | jax.Array, impl: str | None, like: Any) -> Any:
    """One array as a leaf like `like`; `impl` is the generator of a typed key."""
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return array.item() if isinstance(like, _NUMBERS) else array if isinstance(like, np.ndarray) else array[()]
    sharding = _asked(like)
    if isinstance(array, jax.Array):  # where it belongs
        return _weak(array, sharding) if impl is None and like.weak_type else _key(array, impl)
    if sharding is not None and not sharding.is_fully_addressable:
        return _key(jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]), impl)
    # A copy, lest the buffer of a donated leaf be memory that numpy owns.
    leaf = jnp.array(array)
    leaf = _weak(leaf, None) if impl is None and like.weak_type else _key(leaf, impl)
    return leaf if sharding is None else jax.device_put(leaf, sharding)


def _key(array: jax.Array, impl: str | None) -> jax.Array:
    return array if impl is None else jax.random.wrap_key_data(array, impl=impl)


def _weak(array: jax.Array, sharding: Any) -> jax.Array:
    """The same numbers, weakly typed: a weak float32 times bfloat16 is bfloat16, so that later bits would differ."""

    def weakly(x):
        weak = jnp.full(x.shape, x.dtype.type(0).item())
        return weak.at[...].set(x) if weak.dtype == x.dtype else x

    return weakly(array) if sharding is None else jax.jit(weakly, out_shardings=sharding)(array)


def _asked(like: Any) -> Any:
    """The sharding that a leaf is to have, if one is asked for."""
    committed = isinstance(like, jax.ShapeDtypeStruct) or (isinstance(like, jax.Array) and like.committed)
    return like.sharding if committed else None


def _parts(like: Any) -> NamedSharding | None:
    """The sharding asked for, where it has no device hold all; a key's is also that of its words."""
    sharding = _asked(like)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated else None


def _kind(leaf: Any) -> dict[str, Any]:
    """Shape and dtype as the manifest writes them."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return {"shape": list(np.shape(leaf)), "dtype": str(dtype)}
