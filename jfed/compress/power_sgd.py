"""PowerSGD: matrices sent as two thin ones (Vogels et al. 2019, arXiv:1905.13727, Algorithms 1 and 2).

Letters of the paper: M a matrix [n, m], P [n, r], Q [m, r], r the rank.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jfed import _validate
from jfed.compress.message import Decoder, Encoded
from jfed.core import Tree


def power_sgd(rank: int, *, axis_name: str | None = None, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """One step of power iteration: P = M Q, made orthonormal, then Q = M^T P, which starts the next.

    An array of more than one axis is a matrix whose columns are its last axis. Vectors, and matrices that would not
    get smaller, are sent as they are. Use it in `error_feedback`, as the paper does.

    Guarantees:
      * A projection, so never further from M than 0 is; of M of rank r or less, exact.
      * Vogels et al. (Algorithm 2) add momentum after it: chain `optax.trace` behind `decoded()`.
      * With `axis_name`, inside `shard_map` or `vmap`, the message is that of the mean over devices and is the same
        on all: P and Q are averaged on the way (`lax.pmean`), which is all that is sent.

    On the wire: 32 r (n + m) bits a matrix.

    Args:
      rank: r.
      axis_name: of the devices to average over; by default each sender's message is its own.
      seed: of the first Q.

    Raises:
      ValueError: if `rank` is not a whole number of at least 1; at `update`, if it comes after another compressor.

    >>> thin = power_sgd(1)
    >>> m = jnp.outer(jnp.arange(1.0, 9.0), jnp.arange(1.0, 9.0))
    >>> message, _ = thin.update(m, thin.init(m))
    >>> print({name: x.shape for name, x in message.payload.items()})
    {'p': (8, 1), 'q': (8, 1)}
    """
    _validate.at_least_one("power_sgd", "rank", rank, "1 to 4 are usual")

    def init_fn(params: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(params)
        draw = np.random.default_rng(seed)  # the same on all senders
        return jax.tree.unflatten(
            structure,
            [jnp.asarray(draw.normal(size=(x.shape[-1], rank)), jnp.float32) if _pays(x, rank) else () for x in leaves],
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, structure = jax.tree.flatten(updates, is_leaf=lambda x: isinstance(x, Encoded))
        if any(isinstance(x, Encoded) for x in leaves):
            raise ValueError("power_sgd(...): it looks at matrices; put it before the other compressors of a chain.")
        starts = structure.flatten_up_to(state)
        done = [_one(x, q, rank, axis_name) for x, q in zip(leaves, starts, strict=True)]
        return jax.tree.unflatten(structure, [d[0] for d in done]), jax.tree.unflatten(structure, [d[1] for d in done])

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _one(x, q, rank, axis_name):
    def mean(y):
        return y if axis_name is None else lax.pmean(y, axis_name)

    if not _pays(x, rank):
        return (mean(x) if jnp.issubdtype(x.dtype, jnp.floating) else x), q
    m = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    p = _orthonormal(mean(_product(m, q)))
    new = mean(_product(m.T, p))
    decoder = Decoder("power_sgd", _outer, (x.shape, jnp.dtype(x.dtype).name), contraction=True, linear=False)
    # Of a matrix of lower rank some columns are zeros, which leave nothing to start from: those keep the last. Lengths
    # do not matter to the next step, and would grow with it.
    largest = jnp.max(jnp.abs(new), axis=0, keepdims=True)
    alive = (largest > 0) & jnp.all(jnp.isfinite(new))
    return Encoded({"p": p, "q": new}, {}, decoder), jnp.where(alive, new / jnp.where(alive, largest, 1), q)


def _outer(payload, rest, shape, dtype):
    del rest
    return _product(payload["p"], payload["q"].T).reshape(shape).astype(dtype)


def _product(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _orthonormal(p: jax.Array) -> jax.Array:
    """Columns made orthonormal by modified Gram-Schmidt, as the paper has it; one of zeros stays zero."""
    columns: list[jax.Array] = []
    for i in range(p.shape[1]):
        c = p[:, i]
        size = jnp.sqrt(jnp.sum(c * c))
        for _ in range(2):  # twice is enough in float32
            for b in columns:
                c = c - b * jnp.sum(b * c)
        length = jnp.sqrt(jnp.sum(c * c))
        # What is left of a column that others span is rounding, and no direction.
        columns.append(jnp.where(length > 1e-6 * size, c / jnp.where(length > 0, length, 1), c * 0))
    return jnp.stack(columns, axis=1)


def _pays(x, rank: int) -> bool:
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    n, m = math.prod(x.shape[:-1]), x.shape[-1]
    return 0 < rank * (n + m) < n * m
