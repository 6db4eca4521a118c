"""How unlike the clients of a population are, in numbers and as a table.

Label skew is told by the entropy of each client's labels and by its distance from the population's
label distribution; quantity skew by the Gini coefficient of the sizes. Report them with every
experiment: "Dirichlet(0.1)" alone does not say how skewed the draw came out.

Source: Zhao et al. 2018 (arXiv:1806.00582) for the distance, which they call the earth mover's.

Letters: N clients, K classes.
"""

import math
from typing import NamedTuple

import numpy as np

from jfed.core import Population
from jfed.data._checks import check_labels, leaf_named, owned_rows


class Skew(NamedTuple):
    """What `skew` measures; arrays are numpy, on the host."""

    size: np.ndarray  # [N] int64, rows of each client
    gini: float  # Gini coefficient of the sizes: 0 = all equal, towards 1 = one client has all
    classes: np.ndarray  # [N] int64, different labels a client has
    entropy: np.ndarray  # [N] float64, entropy of each client's labels in bits, between 0 and log2(K)
    mean_entropy: float  # bits, clients weighted by their number of labels
    distance: np.ndarray  # [N] float64, sum_k |p_client(k) - p_population(k)|, between 0 and 2
    mean_distance: float  # clients weighted by their number of labels


def skew(population: Population, *, num_classes: int, label: str = "y") -> Skew:
    """Measures label and quantity skew.

    The distance is that of Zhao et al. 2018, `sum_k |p_client(k) - p_population(k)|`: the earth mover's
    distance up to a factor when moving a label costs the same between any two classes, and twice the
    total variation. An empty client has entropy and distance 0, and no weight in the means.

    Args:
      population: N clients; clients without rows are allowed.
      num_classes: K. Memory is O(N K).
      label: name of the leaf of integer labels, [E], or [E, ...] where -1 is padding and not counted.

    Returns:
      A `Skew`.

    Raises:
      ValueError: if there is no such leaf or a label is outside [0, K).

    >>> import jax.numpy as jnp
    >>> two = Population({"y": jnp.array([0, 0, 0, 1])}, jnp.array([0, 2]), jnp.array([2, 2]))
    >>> found = skew(two, num_classes=2)
    >>> print(found.entropy, found.distance, found.gini)
    [0. 1.] [0.5 0.5] 0.0
    """
    y = np.asarray(leaf_named(f"skew(label={label!r})", population.examples, label))
    check_labels(y, num_classes)
    who, rows = owned_rows("skew", population)
    size = np.asarray(population.size, np.int64)
    n = size.size
    y = y[rows].reshape(who.size, math.prod(y.shape[1:]))
    cell = (who[:, None] * num_classes + y)[y >= 0]
    count = np.bincount(cell, minlength=n * num_classes).reshape(n, num_classes)
    labels = count.sum(axis=1)

    p = count / np.maximum(labels, 1)[:, None]
    p_all = count.sum(axis=0) / max(labels.sum(), 1)
    entropy = -np.sum(p * np.log2(np.where(p > 0, p, 1.0)), axis=1) + 0.0  # + 0.0 turns -0.0 into 0.0
    distance = np.where(labels > 0, np.abs(p - p_all).sum(axis=1), 0.0)
    weight = labels / max(labels.sum(), 1)
    return Skew(
        size=size,
        gini=_gini(size),
        classes=np.count_nonzero(count, axis=1),
        entropy=entropy,
        mean_entropy=float(weight @ entropy),
        distance=distance,
        mean_distance=float(weight @ distance),
    )


def table(measured: Skew) -> str:
    """A plain-text report of a `Skew`, a line a quantity; empty clients count only among the sizes.

    >>> import jax.numpy as jnp
    >>> two = Population({"y": jnp.array([0, 0, 0, 1])}, jnp.array([0, 1]), jnp.array([1, 3]))
    >>> print(table(skew(two, num_classes=2)))
    2 clients (0 empty), 4 examples, Gini coefficient of sizes 0.250
                              min    median       max      mean
    size                    1.000     2.000     3.000     2.000
    classes                 1.000     1.500     2.000     1.500
    label entropy, bits     0.000     0.459     0.918     0.689
    label distance          0.167     0.333     0.500     0.250
    (means of entropy and distance: clients weighted by their labels)
    """
    full = measured.size > 0
    lines = [
        f"{full.size} clients ({int(np.sum(~full))} empty), {int(measured.size.sum())} examples, "
        f"Gini coefficient of sizes {measured.gini:.3f}",
        f"{'':19}" + "".join(f"{name:>10}" for name in ("min", "median", "max", "mean")),
        _line("size", measured.size, measured.size.mean()),
    ]
    if full.any():
        lines += [
            _line("classes", measured.classes[full], measured.classes[full].mean()),
            _line("label entropy, bits", measured.entropy[full], measured.mean_entropy),
            _line("label distance", measured.distance[full], measured.mean_distance),
        ]
    return "\n".join([*lines, "(means of entropy and distance: clients weighted by their labels)"])


def _line(name: str, values: np.ndarray, mean: float) -> str:
    return f"{name:19}" + "".join(f"{v:10.3f}" for v in (values.min(), np.median(values), values.max(), mean))


def _gini(size: np.ndarray) -> float:
    """Mean absolute difference of two clients' sizes over twice the mean size; 0 if all are empty."""
    n, total = size.size, size.sum()
    rank = np.arange(1, n + 1)
    return float(np.sum((2 * rank - n - 1) * np.sort(size)) / (n * total)) if total else 0.0
