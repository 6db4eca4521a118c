"""All-reduces that send messages: the sum over devices of what they hold, with compressed bytes on the wire.

Every one is called as `all_reduce(tree, axis_name, key=, round=)` and returns the sum over the axis, as `lax.psum`
does, the same bits on all devices; the caller divides. The text runs in `shard_map` over devices, where
`check_vma=True` takes the result for one that varies, and in `vmap(axis_name=)` on one device.

    gathered    everybody gets everybody's message                           one error, few devices
    two_shot    each device adds up one chunk, and sends the sum compressed  two errors
    ring        a chunk's sum grows on the way from device to device         n errors, neighbours only
    in_halves   the same along any reduce-scatter and all-gather             an error a hop
    summed      linear messages are added up undecoded                       one error, any number of devices

A `key` is the same on all devices, which fold in their index; hops of a chunk draw anew, also from `round`. Operators
that draw by key want a new one each time, those that share what they draw, such as `random_k`, a new round.

Messages have no derivative: gradients through these all-reduces mean nothing.

Letters: n devices, d numbers, b(d) bytes of a message of d numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jfed._axis import cut, permute, uncut
from jfed.collectives.ring import ring_all_gather, ring_reduce_scatter
from jfed.compress._wire import added, exchange, gather, hop_key, hop_round, moved, own_key
from jfed.compress.message import decode, is_encoded, nodes
from jfed.core import Tree


class AllReduce(Protocol):
    """Sums a tree over a named axis, for code that takes the way of doing so as an argument."""

    def __call__(
        self, tree: Tree, axis_name: str, *, key: jax.Array | None = None, round: jax.Array | int | None = None
    ) -> Tree:
        """The sum over the axis, of the shapes and dtypes of `tree`."""


def gathered(compressor: optax.GradientTransformation) -> AllReduce:
    """Every device sends its message to all, and each decodes and adds up all n.

    Guarantees:
      * The error is the sum of n errors of the compressor: unbiased if that is.

    On the wire: b(d) bytes a device, to each of n - 1 others.

    Args:
      compressor: one without state, or an `optax.chain` of several; in `over_tree`, for one message of the model.

    Raises:
      ValueError: if it is none; at the call, when traced, if it has state.

    >>> from jfed import compress
    >>> total = gathered(compress.scaled_sign())
    >>> jax.vmap(lambda x: total(x, "devices"), axis_name="devices")(jnp.array([[1.0, -3.0], [1.0, 1.0]]))
    Array([[ 3., -1.],
           [ 3., -1.]], dtype=float32)
    """
    encode = _encoder("gathered", compressor)

    def all_reduce(tree, axis_name, *, key=None, round=None):
        tree = _counted(tree)
        message = encode(tree, own_key(key, axis_name), round)
        return _as(tree, added(gather(message, axis_name), axis_name))

    return all_reduce


def two_shot(compressor: optax.GradientTransformation) -> AllReduce:
    """Each device adds up a chunk of the tree for all, and sends them the sum, compressed again.

    All floating leaves are laid end to end as one vector of float32, cut into n chunks of equal length, the shorter
    ones filled up by one 0.

    Guarantees:
      * The error is that of n messages and of the one that their sum is sent as: unbiased if the compressor is.
      * Leaves of integers are added up exactly, uncompressed.

    On the wire: 2 (n - 1) b(d / n) bytes a device, in an all-to-all and an all-gather.

    Args:
      compressor: as in `gathered`.

    Raises:
      ValueError: as `gathered`.
    """
    encode = _encoder("two_shot", compressor)

    def sum_vector(x, axis_name, key, round):
        n = lax.axis_size(axis_name)
        first, second = hop_key(key, 0), hop_key(key, 1)
        keys = None if key is None else jax.random.split(first, n)
        messages = jax.vmap(lambda c, k: encode(c, k, hop_round(round, 0)))(cut(x, n), keys)
        total = added(exchange(messages, axis_name), axis_name)
        message = encode(total, second, hop_round(round, 1))
        return uncut(jax.vmap(decode)(gather(message, axis_name)), x.size)

    return _over_vector(sum_vector)


def in_halves(compressor: optax.GradientTransformation, reduce_scatter: Callable, all_gather: Callable) -> AllReduce:
    """A reduce-scatter that encodes sums anew at every hop, and an all-gather of one message of each chunk's total.

    Chunks are those of `two_shot`. With `halving_reduce_scatter` and `doubling_all_gather` there are log2 n + 1 errors.

    Guarantees:
      * Each encoding adds its error to the sum it is of: unbiased if the compressor is, with (1 + omega)^h - 1 for
        omega after h encodings, so take one of small error.
      * Leaves of integers are added up exactly, uncompressed.

    On the wire: 2 (n - 1) b(d / n) bytes a device on a ring; with halving the first messages are of half the vector.

    Args:
      compressor: as in `gathered`.
      reduce_scatter: such as `ring_reduce_scatter`, called with `send=`.
      all_gather: such as `ring_all_gather`.

    Raises:
      ValueError: as `gathered`.
    """
    encode = _encoder("in_halves", compressor)

    def sum_vector(x, axis_name, key, round):
        n = lax.axis_size(axis_name)

        def message_of(total, hop):
            return encode(total, hop_key(key, hop), hop_round(round, hop))

        def send(total, axis_name, pairs, hop):
            return decode(moved(lambda y: permute(y, axis_name, pairs), message_of(total, hop), axis_name))

        message = message_of(reduce_scatter(cut(x, n), axis_name, send=send), n)  # hops are numbered up to n - 1
        return uncut(jax.vmap(decode)(moved(lambda y: all_gather(y, axis_name), message, axis_name)), x.size)

    return _over_vector(sum_vector)


def ring(compressor: optax.GradientTransformation) -> AllReduce:
    """The quantized ring: chunks pass from device to device, each adds its own and encodes the sum anew.

    After n - 1 hops a chunk is summed; its message then goes round once more, the same bytes to all.

    Guarantees:
      * Those of `in_halves`, with n encodings; the error is then (n + 1) / 4 that of `two_shot` if vectors are
        independent.

    On the wire: 2 (n - 1) b(d / n) bytes a device, each hop to the next neighbour only.

    Args:
      compressor: as in `gathered`.

    Raises:
      ValueError: as `gathered`.
    """
    return in_halves(compressor, ring_reduce_scatter, ring_all_gather)


def summed(compressor: optax.GradientTransformation) -> AllReduce:
    """Adds up linear messages with `lax.psum`, and decodes their sum once.

    Guarantees:
      * The sum is what one sender would have made of the sum: its error does not grow with n.

    On the wire: 2 (n - 1) / n b(d) bytes a device, as for any all-reduce of b(d).

    Args:
      compressor: `random_k`, `count_sketch`, `rotate`, without state; devices share what it draws, by `round`.

    Raises:
      ValueError: as `gathered`; at the call, when traced, if messages are not linear.
    """
    encode = _encoder("summed", compressor)

    def all_reduce(tree, axis_name, *, key=None, round=None):
        message = encode(tree, own_key(key, axis_name), round)
        for node in nodes(message):
            if not node.decoder.linear:
                raise ValueError(
                    f"summed(...): messages of {node.decoder.name} cannot be added up; take gathered, two_shot or ring."
                )

        def one(x):
            if is_encoded(x):
                return dataclasses.replace(x, payload=jax.tree.map(one, x.payload, is_leaf=is_encoded))
            return lax.psum(x, axis_name)

        return decode(jax.tree.map(one, message, is_leaf=is_encoded))

    return all_reduce


def averaged(axis_name: str) -> optax.GradientTransformation:
    """The mean over an axis of what messages stand for, as a link: `decoded` for data-parallel training.

    It gathers the messages, as `gathered` does. What comes before it may have state, the device's own:
    `optax.chain(error_feedback(top_k(0.01)), averaged("devices"), optax.sgd(0.1))`.

    >>> from jfed import compress
    >>> link = optax.chain(compress.error_feedback(compress.top_k(0.5)), averaged("devices"))
    >>> x = jnp.array([[4.0, 1.0], [2.0, 6.0]])
    >>> print(jax.vmap(lambda x: link.update(x, link.init(x))[0], axis_name="devices")(x)[0])
    [2. 3.]
    """

    def update_fn(message, state, params=None):
        del params
        n = lax.axis_size(axis_name)
        mean = jax.tree.map(lambda s: s / n, added(gather(message, axis_name), axis_name))
        return _as(jax.eval_shape(decode, message), mean), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def _encoder(where: str, compressor: optax.GradientTransformation) -> Callable:
    """`(tree, key, round) -> message`."""
    if not isinstance(compressor, optax.GradientTransformation):
        raise ValueError(f"{where}(compressor={compressor!r}): give it a link of jfed.compress, such as scaled_sign().")
    compressor = optax.with_extra_args_support(compressor)

    def encode(tree, key, round):
        state = compressor.init(tree)
        if jax.tree.leaves(state):
            raise ValueError(
                f"{where}(...): its compressor has state, which an all-reduce cannot keep; "
                "chain it before averaged(axis_name) in the optimizer."
            )
        return compressor.update(tree, state, key=key, round=round)[0]

    return encode


def _over_vector(sum_vector: Callable) -> AllReduce:
    """An all-reduce of trees out of one of vectors of float32, or float64 if a leaf is."""

    def all_reduce(tree, axis_name, *, key=None, round=None):
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
        floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
        totals = [x if i in floats else lax.psum(x, axis_name) for i, x in enumerate(leaves)]
        if floats:
            wide = jnp.promote_types(jnp.float32, jnp.result_type(*(leaves[i] for i in floats)))
            flat = jnp.concatenate([leaves[i].reshape(-1).astype(wide) for i in floats])
            flat = sum_vector(flat, axis_name, own_key(key, axis_name), round)
            parts = jnp.split(flat, np.cumsum([leaves[i].size for i in floats])[:-1].tolist())
            for i, part in zip(floats, parts, strict=True):
                totals[i] = part.reshape(leaves[i].shape)
        return _as(tree, jax.tree.unflatten(structure, totals))

    return all_reduce


def _counted(tree: Tree) -> Tree:
    """Leaves as arrays, truth values as numbers."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32 if jnp.issubdtype(jnp.result_type(x), jnp.bool_) else None), tree
    )


def _as(like: Tree, tree: Tree) -> Tree:
    """In the dtypes of `like`; truth values are counted."""
    return jax.tree.map(lambda x, y: y.astype(jnp.int32 if x.dtype == bool else x.dtype), like, tree)
