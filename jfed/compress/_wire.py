"""How messages and vectors move between devices: what the all-reduces and 1-bit Adam are made of.

Letters: n devices, d numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jfed import _noise
from jfed._axis import as_bits, differing, from_bits, joined, small
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

    if not jax.tree.leaves(messages):
        return messages
    # One after another: all n decoded at once would take n times the memory.
    first, others = (jax.tree.map(lambda x, rows=rows: x[rows], messages) for rows in (0, slice(1, None)))
    # Of such a type as the sum has, also if a message of nothing but shared seeds is the same on all devices.
    start = differing(wide(first), axis_name)
    return lax.scan(lambda total, m: (jax.tree.map(jnp.add, total, wide(m)), None), start, others)[0]


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
    came = joined(lambda x: collective(differing(x, axis_name)), jax.tree.map(as_bits, message), lead=int(stacked))
    return jax.tree.map(lambda bits, x: from_bits(bits, x.dtype), came, message)
