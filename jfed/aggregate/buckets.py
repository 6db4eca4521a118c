"""Bucketing: mixing clients at random before an aggregator sees them.

Clients with different data send different messages, and a robust rule takes the unusual for the
malicious. Means of s random clients are s times less unlike, at the price that a liar spoils a bucket.
(Karimireddy et al. 2022, arXiv:2006.09365, Algorithm 1.)

Letters: C slots, m clients present, s clients a bucket, B = ceil(C / s) buckets.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.aggregate._rows import combine, narrow, shares, slots


def bucketing(aggregator: optax.GradientTransformation, size: int) -> optax.GradientTransformationExtraArgs:
    """Deals the clients present to ceil(m / size) buckets at random, and aggregates the buckets' means.

    Guarantees:
      * f liars spoil at most f buckets: `aggregator` should stand f of ceil(m / size), so with it
        `size < m / (2 f)`.
      * Who shares a bucket follows from the key and the ids alone, not from the slots.
      * Every client present counts once, in a bucket of `size` or in the last, which may be smaller.
      * `size=1` is the aggregator itself, on clients that weigh alike.

    Args:
      aggregator: sees means [B, ...] with weight 1, and 0 where a bucket is empty; its ids are the
        buckets' numbers. Its init is this one's.
      size: s, clients a bucket; 2 is the paper's choice.

    Returns:
      An aggregator whose `update` needs a `key`.

    Raises:
      ValueError: if `size` is not a whole number of at least 1; at `update`, if there is no key.

    >>> from jfed.aggregate import median
    >>> agg = bucketing(median(), size=2)
    >>> stack, key = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, 99.0]), jax.random.key(0)
    >>> print(agg.update(stack, agg.init(0.0), weights=jnp.ones(6), key=key)[0])
    1.0
    """
    _validate.at_least_one("bucketing", "size", size, "2 is usual, 1 leaves clients by themselves")
    inner = optax.with_extra_args_support(aggregator)

    def update_fn(stack, state, params=None, *, weights, ids=None, key=None, **extra_args):
        if key is None:
            raise ValueError("bucketing(key=None): clients are dealt at random; pass update a jax.random.key.")
        ids = slots(weights) if ids is None else ids
        deal_key, inner_key = jax.random.split(key)
        deal = _deal(deal_key, weights > 0, ids, size)
        each = jnp.sum(deal, axis=1, dtype=jnp.float32)
        parts = jax.vmap(shares)(deal.astype(jnp.float32))
        means = jax.vmap(combine, (None, 0))(stack, parts)
        given = {"weights": (each > 0).astype(jnp.float32), "ids": slots(each), "key": inner_key}
        aggregate, state = inner.update(means, state, params, **given, **extra_args)
        return narrow(aggregate, stack), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _deal(key: jax.Array, present: jax.Array, ids: jax.Array, size: int) -> jax.Array:
    """Who is in which bucket, [B, C] bool: the first `size` clients of a random order in the first, and so on."""
    count = present.shape[0]
    lots = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i)))(ids)
    order = jnp.lexsort((ids, lots, ~present))
    place = jnp.zeros(count, jnp.int32).at[order].set(slots(present))
    bucket = jnp.arange(-(-count // size), dtype=jnp.int32)
    return (bucket[:, None] == place[None] // size) & present[None]
