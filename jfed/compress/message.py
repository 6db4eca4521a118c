"""Messages: what is sent in place of an update, as a pytree of the arrays that are on the wire.

A compressor is an optax transform. It puts an `Encoded` node in the place of every floating array, with the few
arrays that are sent for it. A later link of the chain encodes the node's payload further, so that
`optax.chain(top_k(0.01), quantize(4))` quantizes the values that were kept and leaves their positions alone.
What is no number to compress (integers, empty arrays) is sent as it is.

Letters: d numbers of an array.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _noise
from jfed import tree as _tree
from jfed.core import Tree


class Decoder(NamedTuple):
    """How an array is made again; part of a message's structure, and not sent."""

    name: str  # of the operator
    function: Callable  # (payload, rest, *settings) -> array
    settings: tuple  # hashable
    contraction: bool  # whether |C(x) - x|^2 <= (1 - delta) |x|^2 for all x, with a delta above 0
    linear: bool  # whether the sum of payloads is the payload of the sum
    packed: tuple[
        tuple[str, Any], ...
    ] = ()  # which arrays of `rest` are packed, and how: `_pack.Codes`, `_pack.Places`


@functools.partial(jax.tree_util.register_dataclass, data_fields=["payload", "rest"], meta_fields=["decoder"])
@dataclasses.dataclass(frozen=True)
class Encoded:
    """An array as it is sent."""

    payload: dict[str, Tree]  # floating arrays, or what a later link made of them
    rest: dict[str, jax.Array]  # packed codes, positions, scales
    decoder: Decoder


class Source(NamedTuple):
    """What an operator draws from besides the array."""

    noise: Callable[..., jax.Array]  # (shape, first=0) -> uniform numbers in [0, 1), the sender's own, from `first` on
    own: jax.Array | None  # [2] uint32, words to draw from that the sender alone has; another stream than the noise
    shared: jax.Array | None  # [2] uint32, words all senders of a round have alike


def is_encoded(node: Any) -> bool:
    """Whether a node of a message is an array that was encoded."""
    return isinstance(node, Encoded)


def decode(message: Tree) -> Tree:
    """The tree that a message stands for; what was not encoded stays as it is.

    >>> from jfed import compress
    >>> halves = compress.top_k(0.5)
    >>> message, _ = halves.update({"w": jnp.array([1.0, -3.0, 2.0, 0.0])}, halves.init({"w": jnp.zeros(4)}))
    >>> print(decode(message)["w"])
    [ 0. -3.  2.  0.]
    """

    def one(node):
        if not is_encoded(node):
            return node
        return node.decoder.function(decode(node.payload), node.rest, *node.decoder.settings)

    return jax.tree.map(one, message, is_leaf=is_encoded)


def nbytes(message: Tree) -> int:
    """Bytes on the wire: those of all arrays in the message, known at trace time.

    >>> from jfed import compress
    >>> signs = compress.scaled_sign()
    >>> message, _ = signs.update(jnp.ones(800), signs.init(jnp.ones(800)))
    >>> nbytes(message)  # a bit for each number, and a scale
    104
    """
    return _tree.nbytes(message)


def decoded() -> optax.GradientTransformation:
    """The last link of a chain: turns the message back into an update, for an ordinary optimizer.

    >>> from jfed import compress
    >>> signs = optax.chain(compress.scaled_sign(), decoded(), optax.sgd(1.0))
    >>> update, _ = signs.update(jnp.array([1.0, -3.0]), signs.init(jnp.zeros(2)))
    >>> print(update)
    [-2.  2.]
    """
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda message, state, params=None: (decode(message), state)
    )


def undecoded() -> optax.GradientTransformation:
    """The last link of an uplink whose messages are added up as they are: arrays alone, which nobody decodes.

    Raises:
      ValueError: at `update`, if a message is not linear, or holds more than what is added up.
    """

    def bare(node):
        if not is_encoded(node):
            return node
        if not node.decoder.linear:
            raise ValueError(f"undecoded(): messages of {node.decoder.name} cannot be added up; decode them.")
        if node.rest:
            raise ValueError(
                f"undecoded(): messages of {node.decoder.name} hold {', '.join(node.rest)} besides; decode them."
            )
        return undecoded_tree(node.payload)

    def undecoded_tree(message):
        return jax.tree.map(bare, message, is_leaf=is_encoded)

    return optax.stateless(lambda message, params: undecoded_tree(message))


def operator(
    name: str, encode: Callable[[jax.Array, Source], Encoded], *, draws: bool = False, shares: bool = False
) -> optax.GradientTransformationExtraArgs:
    """A compressor without state, out of what is done to one array.

    Its `update` takes the extra arguments `key`, the sender's own, which operators that draw at random need, and
    `round`, the same for all senders, from which shared randomness is drawn.

    Args:
      name: of the operator, for messages of errors.
      encode: `(array, source) -> Encoded`.
      draws: whether it draws from the sender's key.
      shares: whether it draws what all senders of a round have alike.
    """

    def update_fn(updates, state, params=None, *, key=None, round=None, **extra_args):
        del params, extra_args
        if draws and key is None:
            raise ValueError(f"{name}(...).update(key=None): it draws at random; pass key=, a new one each time.")
        if shares and round is None:
            raise ValueError(f"{name}(...).update(round=None): all senders draw by the round's number; pass round=.")
        words = None if key is None else _noise.words(key)
        common = (
            None
            if round is None
            else _noise.scramble(jnp.asarray(round, jnp.uint32) * jnp.uint32(2) + jnp.arange(2, dtype=jnp.uint32))
        )
        count = 0

        def one(x):
            nonlocal count
            if is_encoded(x):
                return dataclasses.replace(x, payload=jax.tree.map(one, x.payload, is_leaf=is_encoded))
            if not (jnp.issubdtype(x.dtype, jnp.floating) and x.size):
                return x
            if x.size >= 2**31:
                raise ValueError(
                    f"{name}(...): an array of {x.size} numbers is more than int32 can count; take it apart, or leave "
                    "out over_tree."
                )
            count += 1
            own, shared = (w if w is None else _noise.scramble(w + jnp.uint32(count)) for w in (words, common))
            return encode(x, Source(functools.partial(_noise.uniform, words, stream=count), own, shared))

        message = jax.tree.map(one, updates, is_leaf=is_encoded)
        if not count and (before := [node.decoder.name for node in nodes(message) if not node.payload]):
            raise ValueError(f"{name}(...): {before[0]}, before it, leaves no numbers to compress; change their order.")
        return message, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def over_tree(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies a chain to the whole tree laid end to end, as one vector of float32.

    `over_tree(top_k(0.01))` keeps the largest hundredth of all numbers, wherever they lie; `over_tree(scaled_sign())`
    has one scale for the model. Its message is one node in the place of the tree, which `optax.masked` cannot mend: put
    `masked` inside.

    Raises:
      ValueError: at `update`, if a leaf is not floating.

    >>> from jfed import compress
    >>> largest = over_tree(compress.top_k(0.25))
    >>> update = {"a": jnp.array([1.0, -9.0]), "b": jnp.array([[8.0, 2.0], [0.0, 0.0]])}
    >>> print(decode(largest.update(update, largest.init(update))[0])["a"])
    [ 0. -9.]
    """
    chain = optax.with_extra_args_support(optax.chain(*links))

    def vector(updates):
        leaves = jax.tree.leaves(updates, is_leaf=is_encoded)
        for x in leaves:
            if is_encoded(x) or not jnp.issubdtype(x.dtype, jnp.floating):
                held = f"a message of {x.decoder.name}" if is_encoded(x) else f"{x.dtype}{list(x.shape)}"
                raise ValueError(f"over_tree(...): it takes trees of floating arrays; this one holds {held}.")
        if not leaves:
            return jnp.zeros(0)
        return jnp.concatenate([x.reshape(-1).astype(jnp.float32) for x in leaves])

    def update_fn(updates, state, params=None, **extra_args):
        flat, state = chain.update(vector(updates), state, None if params is None else vector(params), **extra_args)
        leaves, structure = jax.tree.flatten(updates)
        like = tuple((x.shape, jnp.dtype(x.dtype).name) for x in leaves)
        decoder = Decoder("over_tree", _unravel, (structure, like), contraction=True, linear=True)
        return Encoded({"vector": flat}, {}, decoder), state

    return optax.GradientTransformationExtraArgs(lambda params: chain.init(vector(params)), update_fn)


def _unravel(payload, rest, structure, like):
    del rest
    leaves, first = [], 0
    for shape, dtype in like:
        size = math.prod(shape)
        leaves.append(payload["vector"][first : first + size].reshape(shape).astype(dtype))
        first += size
    return jax.tree.unflatten(structure, leaves)


def nodes(message: Tree) -> list[Encoded]:
    """All `Encoded` nodes of a message, outer ones first."""
    found = []
    for node in jax.tree.leaves(message, is_leaf=is_encoded):
        if is_encoded(node):
            found += [node, *nodes(node.payload)]
    return found
