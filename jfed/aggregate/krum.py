"""Krum: the message whose neighbours are nearest, or the mean of a few such.

Blanchard et al. 2017 (arXiv:1703.02757): a client is scored by the sum of squared distances to the
m - f - 2 others that are closest to it. Those of a liar far away include an honest client, so it scores
badly however many liars stand together.

Letters: C slots, m clients present, f of them malicious.
"""

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.aggregate._rows import alike, check_liars, combine, narrow, stateless, wide
from jfed.core import Tree

_FAR = 1e13  # no honest number is larger; squares of differences stay finite


def krum(byzantine: int) -> optax.GradientTransformationExtraArgs:
    """The one message with the least score (Blanchard et al. 2017, arXiv:1703.02757).

    Guarantees:
      * The aggregate is the message of a client, to the bit.
      * It does not depend on the order of clients: of equal scores the lowest id wins.

    The paper asks for m > 2 f + 2. With fewer than f + 3 present one neighbour still counts.

    Args:
      byzantine: f, how many clients of a round may lie.

    Raises:
      ValueError: if `byzantine` is not a whole number of at least 0.

    >>> agg = krum(byzantine=1)
    >>> aggregate, _ = agg.update(jnp.array([1.0, 2.0, 2.5, 4.0, -99.0]), agg.init(0.0), weights=jnp.ones(5))
    >>> print(aggregate)
    2.0
    """
    check_liars("krum", byzantine)
    return _nearest(byzantine, 1)


def multi_krum(byzantine: int, keep: int) -> optax.GradientTransformationExtraArgs:
    """The unweighted mean of the `keep` messages with the least scores (Blanchard et al. 2017, arXiv:1703.02757).

    Guarantees:
      * `keep=1` is Krum; `byzantine=0` and `keep` at least m is the unweighted mean.
      * It does not depend on the order of clients: of equal scores the lowest id wins.

    Args:
      byzantine: f, how many clients of a round may lie.
      keep: messages averaged; m - f at most, if none of the f shall be among them.

    Raises:
      ValueError: if `byzantine` is not a whole number of at least 0, or `keep` not one of at least 1.

    >>> agg = multi_krum(byzantine=1, keep=2)
    >>> aggregate, _ = agg.update(jnp.array([1.0, 2.0, 2.5, 4.0, -99.0]), agg.init(0.0), weights=jnp.ones(5))
    >>> print(aggregate)
    2.25
    """
    check_liars("multi_krum", byzantine)
    _validate.at_least_one("multi_krum", "keep", keep, "a good start is the number of honest clients")
    return _nearest(byzantine, keep)


def _nearest(byzantine: int, keep: int) -> optax.GradientTransformationExtraArgs:
    def rule(stack: Tree, weights: jax.Array, ids: jax.Array) -> Tree:
        present = weights > 0
        scores = _scores(stack, present, ids, byzantine)
        order = jnp.lexsort((ids, scores, ~present))
        kept = jnp.zeros(present.shape, bool).at[order[:keep]].set(True) & present
        return narrow(combine(stack, alike(kept)), stack)

    return stateless(rule)


def _scores(stack: Tree, present: jax.Array, ids: jax.Array, byzantine: int) -> jax.Array:
    """The score of each client, [C].

    Squared distances come from a Gram matrix of rows centred on a point c. What lies nearer to each other than
    about 1e-3 of the way to c is lost in rounding, so c must not be a mean, which an outlier carries away. It is
    a client: anyone first, then the best by the scores found so far, until that is c itself. Scores at an honest
    c are right; a malicious c is left for a better one, and each client serves once, so f + 2 looks will do.
    """
    rows = [jnp.clip(x.reshape(x.shape[0], -1), -_FAR, _FAR) for x in jax.tree.leaves(wide(stack))]
    others = present[:, None] & present[None] & ~jnp.eye(present.shape[0], dtype=bool)
    neighbours = jnp.maximum(jnp.sum(present, dtype=jnp.int32) - byzantine - 2, 1)

    def scores_from(centre: jax.Array) -> jax.Array:
        gram = sum(_gram(x - tree.take(x, centre)[None]) for x in rows)
        norms = jnp.diagonal(gram)
        squares = jnp.maximum(norms[:, None] + norms[None] - (gram + gram.T), 0.0)
        near_first = jnp.sort(jnp.where(others, squares, jnp.inf), axis=1)
        counts = jnp.arange(present.shape[0])[None] < neighbours
        return jnp.sum(jnp.where(counts, near_first, 0.0), axis=1)

    def first_of(scores: jax.Array) -> jax.Array:
        return jnp.lexsort((ids, scores, ~present))[0]

    def look(found: tuple) -> tuple:
        _, centre, _, looks = found
        scores = scores_from(centre)
        return centre, first_of(scores), scores, looks + 1

    found = look((0, jnp.argmax(present), 0, 0))
    return jax.lax.while_loop(lambda f: (f[0] != f[1]) & (f[3] < byzantine + 2), look, found)[2]


def _gram(x: jax.Array) -> jax.Array:
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
