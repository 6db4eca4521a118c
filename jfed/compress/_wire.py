"""How messages and vectors move between devices: what the all-reduces and 1-bit Adam are made of.

Letters: n devices, d numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _noise
from jfed.compress.message import decode
from jfed.core import Tree


def gather(message: Tree, axis_name: str) -> Tree:
    """All devices' messages: leaves [...] become [n, ...]."""
    return moved(lambda x: lax.all_gather(x, axis_name), message, axis_name)


def exchange(messages: Tree, axis_name: str) -> Tree:
    """Leaves [n, ...]: the i-th message goes to device i, which gets n of them, the j-th from device j."""
    return moved(lambda x: lax.all_to_all(x, axis_name, 0, 0, tiled=True), messages, axis_name, stacked=True)


def added(messages: Tree, axis_name: str) -> Tree:
    """The sum of what n messages with leaves [n, ...] stand for; small floats are added up in float32."""

    def wide(message):
        return jax.tree.map(lambda x: x.astype(jnp.float32) if small(x) else x, decode(message))

    # One after another: all n decoded at once would take n times the memory.
    first = jax.eval_shape(lambda m: wide(jax.tree.map(lambda x: x[0], m)), messages)
    zeros = differing(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first), axis_name)
    return lax.scan(lambda total, m: (jax.tree.map(jnp.add, total, wide(m)), None), zeros, messages)[0]


def differing(tree: Tree, axis_name: str) -> Tree:
    """The same tree, of a type that may differ from device to device, though it may not, as a seed or zeros do not.

    Loops of `shard_map` insist on the type, and the `all_to_all` of `vmap` gives wrong shapes without (jax 0.10, 0.12).
    """

    def one(x):
        return lax.select(jnp.broadcast_to(lax.axis_index(axis_name) >= 0, x.shape), x, x)

    return jax.tree.map(one, tree)


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


def own_key(key: jax.Array | None, axis_name: str) -> jax.Array | None:
    """A device's own key, of one that all share."""
    return hop_key(key, lax.axis_index(axis_name))


def hop_key(key: jax.Array | None, number: jax.Array | int) -> jax.Array | None:
    """A key for each encoding on the way."""
    return None if key is None else jax.random.fold_in(key, number)


def hop_round(round: jax.Array | int | None, number: jax.Array | int) -> jax.Array | None:
    """A round's number for each encoding on the way: the same draw twice would add up what must be independent."""
    if round is None:
        return None
    golden = jnp.uint32(0x9E3779B9) * jnp.asarray(number, jnp.uint32)
    return _noise.scramble(jnp.asarray(round, jnp.uint32) + golden)


def moved(collective: Callable, message: Tree, axis_name: str, *, stacked: bool = False) -> Tree:
    """Applies a collective to all arrays of a message, those of one type as one, [...] or [n, ...] if stacked.

    Floats of fewer than 32 bits travel as their bits, since some backends widen them on the way.
    """
    leaves, structure = jax.tree.flatten(message)
    lead = 1 if stacked else 0
    sent: dict = {}
    for i, x in enumerate(leaves):
        bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if small(x) else x
        sent.setdefault(bits.dtype, {})[i] = bits
    for group in sent.values():
        flat = [x.reshape(*x.shape[:lead], -1) for x in group.values()]
        whole = jnp.concatenate(flat, axis=-1) if len(flat) > 1 else flat[0]
        came = collective(differing(whole, axis_name))
        begin = 0
        for (i, x), part in zip(group.items(), flat, strict=True):
            here = came[..., begin : begin + part.shape[-1]].reshape(*came.shape[:-1], *x.shape[lead:])
            begin += part.shape[-1]
            kind = leaves[i].dtype
            leaves[i] = here if here.dtype == kind else lax.bitcast_convert_type(here, kind)
    return jax.tree.unflatten(structure, leaves)


def small(x: jax.Array) -> bool:
    """Whether these are floats of fewer than 32 bits."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
