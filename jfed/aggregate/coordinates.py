"""Rules that take each coordinate by itself: the median and the trimmed mean.

Both are means of what is left in the middle when the k smallest and the k largest of m values are dropped
(Yin et al. 2018, arXiv:1803.01498); they differ in k.

XLA sorts on a CPU one value at a time. A sorting network, here Batcher's odd-even merge sort (1968, Sorting
networks and their applications), is the same minima and maxima for every coordinate, so it runs on whole
vectors of them.

Letters: C slots, m clients present, k dropped at each end.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate
from jfed.aggregate._rows import narrow, slots, stateless, wide
from jfed.core import Tree

_ONE_PASS = 32  # slots; from about 40 on XLA no longer fuses the network


def median() -> optax.GradientTransformationExtraArgs:
    """The coordinate-wise median (Yin et al. 2018, arXiv:1803.01498, Definition 1).

    Guarantees:
      * With f < m / 2 malicious clients every coordinate lies between two honest ones.
      * Of an even number, the mean of the two in the middle; the sizes of weights do not count.

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
        place = slots(weights)
        kept = (place >= k) & (place < m - k)
        left = jnp.maximum(m - 2 * k, 1).astype(jnp.float32)
        on_cpu = _by_network if weights.shape[0] <= _ONE_PASS else _by_layers

        def one(x: jax.Array) -> jax.Array:
            absent_last = jnp.where(present[:, None], x.reshape(present.size, -1), jnp.inf)
            total = jax.lax.platform_dependent(absent_last, kept, cpu=on_cpu, default=_by_sort)
            return (total / left).reshape(x.shape[1:])

        return narrow(jax.tree.map(one, wide(stack)), stack)

    return stateless(rule)


def _by_network(x: jax.Array, kept: jax.Array) -> jax.Array:
    """The sum of those sorted rows that are `kept` [C] bool."""
    # XLA fuses all comparisons into one pass only if nothing in it is broadcast: else it may be 15 times slower, and
    # 20 times longer to compile. No value is a NaN; asking makes `kept` as large as `x`, under `vmap` as well.
    x, kept = jax.lax.optimization_barrier((x, kept[:, None] & ~jnp.isnan(x)))
    rows = list(x)
    for low, high in itertools.chain(*network(len(rows))):
        rows[low], rows[high] = jnp.minimum(rows[low], rows[high]), jnp.maximum(rows[low], rows[high])
    return sum(jnp.where(yes, row, 0.0) for yes, row in zip(kept, rows, strict=True))


def _by_layers(x: jax.Array, kept: jax.Array) -> jax.Array:
    """The same in a pass for each layer, where the network is too large for one pass."""
    for pairs in network(x.shape[0]):
        partner, is_high = np.arange(x.shape[0]), np.zeros(x.shape[0], bool)
        low, high = np.array(pairs).T
        partner[low], partner[high], is_high[high] = high, low, True
        other = x[partner]
        x = jnp.where(is_high[:, None], jnp.maximum(x, other), jnp.minimum(x, other))
    return jnp.sum(jnp.where(kept[:, None], x, 0.0), axis=0)


def _by_sort(x: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(kept[:, None], jnp.sort(x, axis=0), 0.0), axis=0)


def network(n: int) -> list[list[tuple[int, int]]]:
    """Layers of pairs (low, high) to put in order, layer after layer, so that n values end up sorted.

    >>> network(3)
    [[(0, 1)], [(0, 2)], [(1, 2)]]
    """
    layers = []
    run = 1  # runs of this many are sorted, and merged two by two
    while run < n:
        step = run
        while step:
            starts = range(step % run, n - step, 2 * step)
            lows = [low for start in starts for low in range(start, min(start + step, n - step))]
            layers.append([(low, low + step) for low in lows if low // (2 * run) == (low + step) // (2 * run)])
            step //= 2
        run *= 2
    return layers
