"""Rules that take each coordinate by itself: the median and the trimmed mean.

Both are means of what is left in the middle when the k smallest and the k largest of m values are dropped
(Yin et al. 2018, arXiv:1803.01498); they differ in k.

XLA sorts on a CPU one value at a time. A sorting network is the same few minima and maxima for every
coordinate, so it runs on whole vectors of them and is fused into one pass: for 25 clients and 200,000
coordinates 50 times faster. It is Batcher's (Knuth, The Art of Computer Programming, vol. 3, 5.2.2,
Algorithm M).

Letters: C slots, m clients present, k dropped at each end.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate
from jfed.aggregate._rows import narrow, spread, stateless, wide
from jfed.core import Tree

_NETWORK = 32  # slots; from about 40 on XLA no longer fuses the network into one pass


def median() -> optax.GradientTransformationExtraArgs:
    """The coordinate-wise median (Yin et al. 2018, arXiv:1803.01498, Definition 1).

    Guarantees:
      * With f < m / 2 malicious clients every coordinate lies between two honest ones.
      * Of an even number, the mean of the two in the middle; the sizes of weights do not count.

    On a CPU, cohorts of more than 32 slots are sorted the slow way: about a second for 50 clients and
    200,000 coordinates.

    >>> agg = median()
    >>> aggregate, _ = agg.update(jnp.array([0.0, 1.0, 3.0, 1e6]), agg.init(0.0), weights=jnp.ones(4))
    >>> print(aggregate)
    2.0
    """
    return _middle(lambda m: jnp.maximum(m - 1, 0) // 2)


def trimmed_mean(trim: float) -> optax.GradientTransformationExtraArgs:
    """Coordinate-wise mean after dropping the extremes (Yin et al. 2018, arXiv:1803.01498, Definition 2).

    In each coordinate the `k = floor(trim * m)` largest and smallest of the m values are dropped, the
    rest averaged.

    Guarantees:
      * With f <= k malicious clients every coordinate lies between two honest ones.
      * `trim=0` is the unweighted mean; the sizes of weights do not count.

    It takes as long as `median`.

    Args:
      trim: fraction dropped at each end, in [0, 0.5); the fraction of clients that may lie.

    Raises:
      ValueError: if `trim` is not in [0, 0.5).

    >>> agg = trimmed_mean(0.25)
    >>> aggregate, _ = agg.update(jnp.array([0.0, 1.0, 3.0, 99.0]), agg.init(0.0), weights=jnp.ones(4))
    >>> print(aggregate)
    2.0
    """
    most = float(np.nextafter(0.5, 0))
    _validate.within("trimmed_mean", "trim", trim, 0.0, most, "it is the fraction that may lie, and median() is 0.5")

    def dropped(m: jax.Array) -> jax.Array:
        # In floats 0.29 of 100 may be a little less than 29.
        k = jnp.floor(trim * m.astype(jnp.float32) * (1 + 1e-6)).astype(jnp.int32)
        return jnp.minimum(k, jnp.maximum(m - 1, 0) // 2)

    return _middle(dropped)


def _middle(dropped: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """The mean of each coordinate without the `dropped(m)` least and greatest."""

    def rule(stack: Tree, weights: jax.Array, ids: jax.Array) -> Tree:
        del ids
        present = weights > 0
        m = jnp.sum(present, dtype=jnp.int32)
        k = dropped(m)
        share = 1.0 / jnp.maximum(m - 2 * k, 1).astype(jnp.float32)
        ways = {"cpu": _by_network} if weights.shape[0] <= _NETWORK else {}

        def one(x: jax.Array) -> jax.Array:
            absent_last = jnp.where(spread(present, x), x, jnp.inf)
            return jax.lax.platform_dependent(absent_last, k, m - k, share, default=_by_sort, **ways)

        return narrow(jax.tree.map(one, wide(stack)), stack)

    return stateless(rule)


def _by_network(x: jax.Array, first: jax.Array, last: jax.Array, share: jax.Array) -> jax.Array:
    """`share` times the sum of the sorted rows [first, last)."""
    rows = list(x)
    for low, high in network(len(rows)):
        rows[low], rows[high] = jnp.minimum(rows[low], rows[high]), jnp.maximum(rows[low], rows[high])
    kept = [jnp.where((i >= first) & (i < last), row * share, 0.0) for i, row in enumerate(rows)]
    return sum(kept[1:], kept[0])


def _by_sort(x: jax.Array, first: jax.Array, last: jax.Array, share: jax.Array) -> jax.Array:
    place = spread(jnp.arange(x.shape[0]), x)
    return jnp.sum(jnp.where((place >= first) & (place < last), jnp.sort(x, axis=0) * share, 0.0), axis=0)


def network(n: int) -> list[tuple[int, int]]:
    """Pairs (low, high) to put in order, one after another, so that n values end up sorted.

    >>> network(3)
    [(0, 1), (0, 2), (1, 2)]
    """
    pairs = []
    run = 1  # runs of this many are sorted, and merged two by two
    while run < n:
        step = run
        while step:
            for start in range(step % run, n - step, 2 * step):
                for low in range(start, min(start + step, n - step)):
                    if low // (2 * run) == (low + step) // (2 * run):  # of the same two runs
                        pairs.append((low, low + step))
            step //= 2
        run *= 2
    return pairs
