"""How what the last convolution made reaches all workers.

Source: Krizhevsky 2014 (arXiv:1404.5997), section 4.

Letters: n workers, b examples of each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jfed import _axis
from jfed.parallel.conjugate import gathered


class Turns(NamedTuple):
    """A scheme for n workers."""

    collect: tuple[Callable, ...]  # one a turn: (x [b, ...], axis_name) -> what all workers then hold, [b', ...]
    divisor: int  # of b


Scheme = Callable[[int], Turns]
"""`(n) -> Turns`. All turns are of the same size, and every example is in one; reverse mode sends gradients back."""


def assemble_all(n: int) -> Turns:
    """Every worker sends its features to all others, and all compute on the batch of B: scheme (a).

    A worker sends k (n - 1) bytes of the k of its features, and nothing can be computed meanwhile.

    >>> import jax
    >>> collect = functools.partial(assemble_all(2).collect[0], axis_name="workers")
    >>> print(jax.vmap(collect, axis_name="workers")(jnp.arange(4).reshape(2, 2)))
    [[0 1 2 3]
     [0 1 2 3]]
    """
    del n
    return Turns((lambda x, axis_name: gathered(x, axis_name, 0),), 1)


def in_turns(n: int) -> Turns:
    """One worker after another sends its features to all others, who compute on them: scheme (b).

    In its turn a worker sends k (n - 1) bytes of the k of its features, and nobody else sends.

    >>> import jax
    >>> collect = functools.partial(in_turns(2).collect[1], axis_name="workers")
    >>> print(jax.vmap(collect, axis_name="workers")(jnp.arange(4).reshape(2, 2)))
    [[2 3]
     [2 3]]
    """
    return Turns(tuple(functools.partial(_from_one, worker=worker) for worker in range(n)), 1)


def in_parts(n: int) -> Turns:
    """All workers send an n-th of their features to all others, who compute on these, n times: scheme (c).

    In each turn a worker sends k (n - 1) / n bytes of the k of its features.

    >>> import jax
    >>> collect = functools.partial(in_parts(2).collect[1], axis_name="workers")
    >>> print(jax.vmap(collect, axis_name="workers")(jnp.arange(4).reshape(2, 2)))
    [[1 3]
     [1 3]]
    """
    return Turns(tuple(functools.partial(_part, part=part, parts=n) for part in range(n)), n)


def bytes_sent(features: int, widths: Sequence[int], *, batch_size: int, workers: int, itemsize: int = 4) -> int:
    """What a worker sends a step, by every scheme; in `in_turns` all turns together.

    Gradients of P numbers are summed, 2 P (n - 1) / n. Activities of B examples are gathered before every dense layer,
    and their gradients scattered, each B I (n - 1) / n; logits are gathered only. Labels, of 4 bytes, travel too.

    Args:
      features: P, numbers of the convolutional part.
      widths: F, and the units of every dense layer.
      batch_size: B.
      workers: n.
      itemsize: bytes of a parameter and an activity.

    >>> bytes_sent(3_207_104, [9216, 4096, 4096, 1000], batch_size=1024, workers=8)
    150817856
    """
    *inputs, logits = widths
    numbers = 2 * features + batch_size * (2 * sum(inputs) + logits)
    return -(-(itemsize * numbers + 4 * batch_size) * (workers - 1) // workers)


def _from_one(x, axis_name, worker):
    """What one worker has, on all: it sends to each by itself."""
    others = [to for to in range(lax.axis_size(axis_name)) if to != worker]
    own = jnp.where(_axis.among((worker,), axis_name), x, jnp.zeros_like(x))
    return sum((_axis.permute(x, axis_name, [(worker, to)]) for to in others), start=own)


def _part(x, axis_name, part, parts):
    length = x.shape[0] // parts
    return gathered(x[part * length : (part + 1) * length], axis_name, 0)
