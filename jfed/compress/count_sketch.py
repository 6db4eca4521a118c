"""Count sketches, which can be added up, and FetchSGD, which learns from their sum.

Each of r rows adds up all numbers, with random signs, in c buckets; a number's estimate is the median over rows of
its bucket with the sign taken off (Charikar et al. 2002). Here numbers go to buckets by blocks of c, each turned by a
random amount: two numbers of different blocks meet with probability 1 / c, those of one block never, which keeps the
sketch's mean and the bound on its variance, and needs no scatter.

Letters: d numbers, r rows, c columns.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _noise, _validate
from jfed.compress.message import Decoder, Encoded, Source, decode, operator, over_tree
from jfed.compress.sparse import top_k
from jfed.core import Tree


def count_sketch(rows: int, columns: int, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """A table of sums in place of each array; put it in `over_tree` for one table of the model.

    Guarantees:
      * Linear: the sum of tables is the table of the sum.
      * A row's estimate of a number is unbiased, with variance at most |x|^2 / c; decoding takes the median of rows.

    On the wire: 32 r c bits an array. Arrays of r c numbers or fewer are sent as they are.

    Args:
      rows: r, an odd number such as 5.
      columns: c.
      seed: of signs and places, which all senders share and which never change.

    Raises:
      ValueError: if `rows` or `columns` is not a whole number of at least 1.
    """
    _validate.at_least_one("count_sketch", "rows", rows, "5 is usual")
    _validate.at_least_one("count_sketch", "columns", columns, "a tenth of the model's numbers is a start")

    def encode(x: jax.Array, source: Source) -> Encoded:
        del source
        if x.size <= rows * columns:
            return x
        table = jnp.stack([_row(x.reshape(-1).astype(jnp.float32), columns, i, seed) for i in range(rows)])
        settings = (x.shape, jnp.dtype(x.dtype).name, seed)
        return Encoded({"table": table}, {}, Decoder("count_sketch", _median, settings, contraction=False, linear=True))

    return operator("count_sketch", encode)


class FetchState(NamedTuple):
    """On the server."""

    momentum: Tree  # a message of the sketch, S_u: tables [r, c]
    error: Tree  # a message of the sketch, S_e: tables [r, c]


def fetch_sgd(
    sketch: optax.GradientTransformation, *, learning_rate: float, fraction: float, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """The server of FetchSGD: momentum and error feedback in the sketch (Rothchild et al. 2020, arXiv:2007.07682).

    With S the mean sketch: S_u = momentum S_u + S, S_e = S_e + rate S_u, Delta = the largest of what S_e decodes to,
    which is applied. Its sketch is taken out of S_e, and S_u forgets the buckets it lies in.

    Args:
      sketch: what clients send, `over_tree(count_sketch(...))` or `count_sketch(...)`; it arrives `undecoded`.
      learning_rate: 1 applies what clients trained.
      fraction: of all numbers of the model, how many are applied a round, in (0, 1].
      momentum: in [0, 1]; 0 for none.

    Raises:
      ValueError: if a number is out of range.
    """
    _validate.positive("fetch_sgd", "learning_rate", learning_rate, "1 applies what clients trained")
    _validate.within("fetch_sgd", "momentum", momentum, 0, 1, "0.9 is usual")
    largest = over_tree(top_k(fraction))
    sketch = optax.with_extra_args_support(sketch)

    def sketched(updates, params):
        return sketch.update(updates, sketch.init(params), params)[0]

    def init_fn(params: Tree) -> FetchState:
        empty = jax.tree.map(jnp.zeros_like, sketched(params, params))
        return FetchState(empty, empty)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        # They come without the nodes they were in.
        updates = jax.tree.unflatten(jax.tree.structure(state.error), jax.tree.leaves(updates))
        u = jax.tree.map(lambda u, s: momentum * u + s, state.momentum, updates)
        e = jax.tree.map(lambda e, u: e + learning_rate * u, state.error, u)
        estimate = decode(e)
        delta = decode(largest.update(estimate, largest.init(estimate))[0])
        taken = sketched(delta, estimate)
        u = jax.tree.map(lambda u, t: jnp.where(t == 0, u, 0), u, taken)
        e = jax.tree.map(jnp.subtract, e, taken)
        return jax.tree.map(jnp.negative, delta), FetchState(u, e)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _row(x: jax.Array, columns: int, row: int, seed: int) -> jax.Array:
    """One row of the table."""
    signs, turns = _hashes(x.size, columns, row, seed)
    blocks = jnp.pad(x * signs, (0, -x.size % columns)).reshape(-1, columns)
    return jnp.sum(jax.vmap(jnp.roll)(blocks, turns), axis=0)


def _median(payload, rest, shape, dtype, seed):
    del rest
    table = payload["table"]
    d, columns = math.prod(shape), table.shape[1]

    def estimate(row: int):
        signs, turns = _hashes(d, columns, row, seed)
        return jax.vmap(lambda turn: jnp.roll(table[row], -turn))(turns).reshape(-1)[:d] * signs

    return _middle([estimate(i) for i in range(table.shape[0])]).reshape(shape).astype(dtype)


def _middle(rows: list[jax.Array]) -> jax.Array:
    """The median of few arrays, number by number: they are sorted by exchanging neighbours, whole arrays at a time."""
    rows, n = list(rows), len(rows)
    for turn in range(n):
        for j in range(turn % 2, n - 1, 2):
            rows[j], rows[j + 1] = jnp.minimum(rows[j], rows[j + 1]), jnp.maximum(rows[j], rows[j + 1])
    return (rows[(n - 1) // 2] + rows[n // 2]) / 2


def _hashes(d: int, columns: int, row: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Signs [d] of a row, and by how much each block of `columns` numbers is turned."""
    words = _noise.scramble(jnp.arange(2, dtype=jnp.uint32) + _noise.seeded(2 * row + 1009 * seed + 1))
    signs = _noise.signs(words, d)
    turns = _noise.bits(words, (-(-d // columns),), stream=1) % jnp.uint32(columns)
    return signs, turns.astype(jnp.int32)
