"""Partitioners: who owns each row of a pooled data set.

A partitioner is a pure function of a key, the labels (or only their number) and keyword-only
hyperparameters; it returns one integer a row, which `jfed.data.by_owner` turns into a population.
All of them give every row to exactly one client, keep their promise on the smallest client by moving
rows (never by drawing again until it holds), and finish in O(E log E + K N) for any arguments. They
work in numpy, seeded by the jax key, so that millions of rows need no compile.

Sources: McMahan et al. 2017 (arXiv:1602.05629) for `shards`; Karimireddy et al. 2020 (arXiv:1910.06378) for
`similarity`; Yurochkin et al. 2019 (arXiv:1905.12022) for `dirichlet` and Li et al. 2022 (arXiv:2102.02079)
for it and `classes`; Li et al. 2020 (arXiv:1812.06127) for sizes that follow a power law or a lognormal.

Letters: N clients, E examples, K classes.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np

from jfed import _validate
from jfed.data._checks import numpy_generator


def iid(key: jax.Array, num_examples: int, *, num_clients: int) -> np.ndarray:
    """Deals the rows out at random, as evenly as can be.

    Args:
      key: random key.
      num_examples: E.
      num_clients: N.

    Returns:
      [E] int32 owners; two clients' sizes differ by at most one.

    Raises:
      ValueError: if there are more clients than rows.

    >>> print(np.bincount(iid(jax.random.key(0), 10, num_clients=4)))
    [3 3 2 2]
    """
    _check("iid", num_examples, num_clients, 1, None)
    owner = np.empty(num_examples, np.int32)
    owner[numpy_generator("iid", key).permutation(num_examples)] = np.arange(num_examples) % num_clients
    return owner


def shards(key: jax.Array, labels: Any, *, num_clients: int, shards_per_client: int = 2) -> np.ndarray:
    """Sorts rows by label, cuts them into equal shards, and deals each client a few (McMahan et al. 2017).

    With 200 shards of 300 and two a client this is the "pathological" MNIST split of that paper. The
    sort is stable: inside a label rows keep their order. Shards differ by at most one row.

    Args:
      key: random key of the deal.
      labels: [E] integers.
      num_clients: N.
      shards_per_client: shards each client gets.

    Returns:
      [E] int32 owners. If no label has fewer rows than a shard, a shard holds at most two labels.

    Raises:
      ValueError: if there are more shards than rows, or labels are not [E] integers.

    >>> labels = np.repeat(np.arange(4), 6)
    >>> owner = shards(jax.random.key(0), labels, num_clients=4)
    >>> max(len(set(labels[owner == i])) for i in range(4))
    2
    """
    labels = _labels("shards", labels)
    _validate.at_least_one("shards", "shards_per_client", shards_per_client, "two is usual")
    _check("shards", labels.size, num_clients, shards_per_client, "shards_per_client")
    num_shards = num_clients * shards_per_client
    dealt = numpy_generator("shards", key).permutation(num_shards) // shards_per_client
    owner = np.empty(labels.size, np.int32)
    owner[np.argsort(labels, kind="stable")] = dealt[np.arange(labels.size) * num_shards // labels.size]
    return owner


def similarity(key: jax.Array, labels: Any, *, num_clients: int, similarity: float) -> np.ndarray:
    """A share of the rows dealt at random, the rest sorted by label and cut in order (Karimireddy et al. 2020).

    With `similarity` 1 this is `iid`; with 0 each client holds one stretch of the sorted rows, the first clients
    the lowest labels. The paper, section 7, has 0, 0.1 and 1. Which rows are dealt, and the order within a
    label, are random.

    Guarantees:
      * Two clients' sizes differ by at most one row, and so do their numbers of sorted rows.
      * `round(similarity * E)` rows are dealt at random.

    Args:
      key: random key.
      labels: [E] integers.
      num_clients: N.
      similarity: share of the rows dealt at random, in [0, 1]; the paper's s is 100 times it.

    Returns:
      [E] int32 owners.

    Raises:
      ValueError: if `similarity` is not in [0, 1], there are more clients than rows, or labels are not [E]
        integers.

    >>> similarity(jax.random.key(0), np.repeat([0, 1], 3), num_clients=2, similarity=0.0).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    labels = _labels("similarity", labels)
    _validate.within("similarity", "similarity", similarity, 0.0, 1.0, "0 is sorted by label, 1 is IID")
    _check("similarity", labels.size, num_clients, 1, None)
    rng = numpy_generator("similarity", key)
    shuffled = rng.permutation(labels.size)
    at_random, rest = np.split(shuffled, [round(float(similarity) * labels.size)])
    rest = rest[np.argsort(labels[rest], kind="stable")]
    cut = np.diff(np.arange(num_clients + 1) * rest.size // num_clients)  # sorted rows of each client
    size = np.full(num_clients, labels.size // num_clients)
    size[np.argsort(-cut, kind="stable")[: labels.size % num_clients]] += 1  # so that nobody has more sorted rows
    owner = np.empty(labels.size, np.int32)
    owner[rest] = np.repeat(np.arange(num_clients), cut)
    owner[at_random] = np.repeat(np.arange(num_clients), size - cut)
    return owner


def classes(key: jax.Array, labels: Any, *, num_clients: int, classes_per_client: int) -> np.ndarray:
    """Label skew by number: each client gets a few labels, the owners of a label share its rows (Li et al. 2022).

    The paper's `#C = k`, section 4.1: each client is given k different labels at random, and the rows of a label
    are divided at random and equally among its owners. As in its published code, each label is given to N / K
    clients before the rest is left to chance; there a label may still be left without an owner, and its
    rows are lost.

    Guarantees:
      * Every row has an owner, every client k labels and at least a row of each.
      * Where labels have too few rows for that, a client has fewer labels, one at least; never more.
      * Two owners of a label differ by at most one in its rows.

    Args:
      key: random key.
      labels: [E] integers, K different ones.
      num_clients: N.
      classes_per_client: k; NIID-Bench has 1, 2 and 3.

    Returns:
      [E] int32 owners.

    Raises:
      ValueError: if k is not a whole number in [1, K], N * k < K, there are more clients than rows, or labels
        are not [E] integers.

    >>> labels = np.repeat(np.arange(4), 6)
    >>> owner = classes(jax.random.key(0), labels, num_clients=6, classes_per_client=2)
    >>> [len(set(labels[owner == i])) for i in range(6)]
    [2, 2, 2, 2, 2, 2]
    """
    labels = _labels("classes", labels)
    _validate.at_least_one("classes", "classes_per_client", classes_per_client, "two is usual")
    _check("classes", labels.size, num_clients, 1, None)
    _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
    if classes_per_client > count.size:
        raise ValueError(
            f"classes(classes_per_client={classes_per_client}): there are only {count.size} labels; ask for fewer."
        )
    if num_clients * classes_per_client < count.size:
        raise ValueError(
            f"classes(num_clients={num_clients}, classes_per_client={classes_per_client}): {count.size} labels need as "
            "many owners; use more clients or more classes for each."
        )
    rng = numpy_generator("classes", key)
    # How many clients own each label: no more than it has rows.
    most = np.minimum(count, num_clients)
    owners = np.minimum(most, max(num_clients // count.size, 1))
    pairs = min(num_clients * classes_per_client, int(most.sum()))
    owners += rng.multivariate_hypergeometric(most - owners, pairs - int(owners.sum()), method="marginals")
    owner = np.empty(labels.size, np.int32)
    shuffled = rng.permutation(labels.size)
    by_label = np.split(shuffled[np.argsort(label[shuffled], kind="stable")], np.cumsum(count)[:-1])
    for rows, clients in zip(by_label, _owners(rng, owners, num_clients), strict=True):
        owner[rows] = np.resize(clients, rows.size)
    return owner


def dirichlet(key: jax.Array, labels: Any, *, num_clients: int, alpha: float, min_size: int = 1) -> np.ndarray:
    """Label skew: each class is shared out over the clients in Dirichlet(alpha) proportions.

    Two partitions go by this name. This is the one used most: for each class, shares over the N
    clients are drawn from a symmetric Dirichlet (Yurochkin et al. 2019; Li et al. 2022), so sizes
    differ too. Hsu et al. 2019 (arXiv:1909.06335) instead draw each client's mixture over classes, at
    equal sizes. Two habits of the published code are left out: to bar clients that have reached E / N
    rows from further classes, and to draw again until every client is large enough.

    Guarantees:
      * Every row has one owner, every client at least `min_size` rows.
      * With `min_size=0` the expected number of rows of a client in a class, given its share, is the
        share times the rows of the class.
      * Ends, without NaN, for every finite alpha > 0; a small alpha tends to one client a class.

    Args:
      key: random key.
      labels: [E] integers, of any values.
      num_clients: N.
      alpha: concentration; below 0.1 nearly one class a client, above 100 nearly IID.
      min_size: fewest rows a client may have; 0 allows empty clients.

    Returns:
      [E] int32 owners.

    Raises:
      ValueError: if alpha is not a finite number above 0, N * min_size > E, or labels are not [E]
        integers.

    >>> labels = np.repeat(np.arange(3), 100)
    >>> owner = dirichlet(jax.random.key(0), labels, num_clients=5, alpha=0.1, min_size=10)
    >>> bool(np.bincount(owner, minlength=5).min() >= 10)
    True
    """
    labels = _labels("dirichlet", labels)
    _validate.positive("dirichlet", "alpha", alpha, "0.5 is usual, smaller is more skewed")
    _check("dirichlet", labels.size, num_clients, min_size)
    rng = numpy_generator("dirichlet", key)
    _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
    shuffled = rng.permutation(labels.size)
    by_class = np.split(shuffled[np.argsort(label[shuffled], kind="stable")], np.cumsum(count)[:-1])
    owner = np.empty(labels.size, np.int32)
    for rows in by_class:
        shares = np.exp(_log_dirichlet(rng, float(alpha), num_clients))
        owner[rows] = np.repeat(np.arange(num_clients), _cut(rng, shares, rows.size))
    return _repair(rng, owner, num_clients, min_size)


def quantity_lognormal(
    key: jax.Array, num_examples: int, *, num_clients: int, sigma: float, min_size: int = 1
) -> np.ndarray:
    """Quantity skew: sizes proportional to lognormal(0, sigma) draws, rows dealt at random.

    Args:
      key: random key.
      num_examples: E.
      num_clients: N.
      sigma: standard deviation of the logarithm of a size, at least 0; 0 is IID.
      min_size: fewest rows a client may have; 0 allows empty clients.

    Returns:
      [E] int32 owners.

    Raises:
      ValueError: if sigma is negative or not finite, or N * min_size > E.

    >>> np.bincount(quantity_lognormal(jax.random.key(0), 100, num_clients=4, sigma=0.0)).tolist()
    [25, 25, 25, 25]
    """
    _validate.at_least_zero("quantity_lognormal", "sigma", sigma, "0 is IID, 1 is usual")
    _check("quantity_lognormal", num_examples, num_clients, min_size)
    rng = numpy_generator("quantity_lognormal", key)
    return _deal(rng, rng.standard_normal(num_clients), float(sigma), num_examples, min_size)


def quantity_power_law(
    key: jax.Array, num_examples: int, *, num_clients: int, exponent: float, min_size: int = 1
) -> np.ndarray:
    """Quantity skew: the r-th largest client's size is proportional to r ** -exponent.

    Which client has which rank, and which rows it gets, is random.

    Args:
      key: random key.
      num_examples: E.
      num_clients: N.
      exponent: at least 0; 0 is IID, 1 is Zipf's law.
      min_size: fewest rows a client may have; 0 allows empty clients.

    Returns:
      [E] int32 owners.

    Raises:
      ValueError: if the exponent is negative or not finite, or N * min_size > E.

    >>> sorted(np.bincount(quantity_power_law(jax.random.key(0), 110, num_clients=3, exponent=1.0)).tolist())
    [20, 30, 60]
    """
    _validate.at_least_zero("quantity_power_law", "exponent", exponent, "0 is IID, 1 is usual")
    _check("quantity_power_law", num_examples, num_clients, min_size)
    rng = numpy_generator("quantity_power_law", key)
    return _deal(rng, -np.log(1 + rng.permutation(num_clients)), float(exponent), num_examples, min_size)


def natural(ids: Iterable[Hashable]) -> tuple[np.ndarray, list]:
    """Numbers the owners that the data came with: writers, users, hospitals.

    Args:
      ids: [E] ids, an array or any hashable things.

    Returns:
      `(owner, names)`: [E] int32, and the N ids in the order in which they first appear.

    Raises:
      ValueError: if `ids` is an array that is not one-dimensional.

    >>> natural(["ann", "bob", "ann"])
    (array([0, 1, 0], dtype=int32), ['ann', 'bob'])
    """
    if hasattr(ids, "__array__"):
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(
                f"natural(ids={array.dtype}{list(array.shape)}): ids must have shape [E]; flatten them first."
            )
        if array.dtype.kind != "O":  # numpy sorts where a dict would hash millions of Python objects
            values, first, code = np.unique(array, return_index=True, return_inverse=True)
            order = np.argsort(first)
            return np.argsort(order)[code].astype(np.int32), values[order].tolist()
        ids = array.tolist()
    number: dict[Hashable, int] = {}
    owner = [number.setdefault(one, len(number)) for one in ids]
    return np.asarray(owner, np.int32), list(number)


def _owners(rng: np.random.Generator, owners: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Different clients [owners[j]] for each label j, so that clients' numbers of labels differ by at most one.

    Labels in random order stand in line for the clients, who come up in one random order after another. A label
    that is cut by the end of an order goes on with clients that it has not met.
    """
    chosen: list[np.ndarray] = [np.empty(0, int)] * owners.size
    line = rng.permutation(num_clients)
    for j in rng.permutation(owners.size):
        taken, line = np.split(line, [owners[j]])
        if (short := owners[j] - taken.size) > 0:
            line = rng.permutation(num_clients)
            new = np.flatnonzero(np.isin(line, taken, invert=True))[:short]
            taken, line = np.concatenate([taken, line[new]]), np.delete(line, new)
        chosen[j] = rng.permutation(taken)
    return chosen


def _log_dirichlet(rng: np.random.Generator, alpha: float, n: int) -> np.ndarray:
    """Logarithm of a symmetric Dirichlet draw [n], up to a constant; its largest entry is about 0.

    A Gamma(alpha) variable is Gamma(alpha + 1) * U ** (1 / alpha) (Marsaglia and Tsang 2000, section 6).
    In logarithms nothing underflows, and the differences are taken before the division by alpha, so
    that an overflow can only make an entry -inf, never NaN.
    """
    log_gamma = np.log(np.maximum(rng.standard_gamma(alpha + 1.0, n), np.finfo(float).tiny))
    log_u = -rng.standard_exponential(n)
    best = int(np.argmax(alpha * log_gamma + log_u)) if alpha < 1 else int(np.argmax(log_gamma + log_u / alpha))
    with np.errstate(over="ignore"):
        return log_gamma - log_gamma[best] + (log_u - log_u[best]) / alpha


def _cut(rng: np.random.Generator, shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers [N] that sum to `total`, each within one of its share and with that as its mean."""
    to_here = np.cumsum(shares)
    # One random offset for all cuts; rounding down would short-change the first clients in every class.
    cuts = np.minimum(np.floor(to_here / to_here[-1] * total + rng.random()), total).astype(np.int64)
    cuts[-1] = total
    return np.diff(cuts, prepend=0)


def _deal(rng: np.random.Generator, z: np.ndarray, scale: float, num_examples: int, min_size: int) -> np.ndarray:
    """Rows dealt at random to clients whose sizes are proportional to exp(scale * z)."""
    with np.errstate(over="ignore"):
        size = _cut(rng, np.exp(scale * (z - z.max())), num_examples)
    give, need = _transfers(size, min_size)
    owner = np.empty(num_examples, np.int32)
    owner[rng.permutation(num_examples)] = np.repeat(np.arange(z.size), size - give + need)
    return owner


def _transfers(size: np.ndarray, min_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows each client gives and needs, [N] both, so that all reach `min_size`.

    The same as moving rows one at a time, always from the client that is then the largest: the
    largest are levelled down to a common level, found by bisection.
    """
    need = np.maximum(min_size - size, 0)
    missing = int(need.sum())
    low, high = min_size, int(size.max())  # at `low` enough is given, for N * min_size <= E
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(size - level, 0).sum() >= missing else (low, level - 1)
    give = np.maximum(size - low, 0) if missing else np.zeros_like(size)
    give[np.flatnonzero(give)[: int(give.sum()) - missing]] -= 1  # less than one a giver too many
    return give, need


def _repair(rng: np.random.Generator, owner: np.ndarray, num_clients: int, min_size: int) -> np.ndarray:
    """Moves random rows from the largest clients to those below `min_size`, in `owner` itself."""
    size = np.bincount(owner, minlength=num_clients)
    give, need = _transfers(size, min_size)
    if not need.any():
        return owner
    order = np.lexsort((rng.random(owner.size), owner))  # by owner, at random within
    place = np.arange(owner.size) - np.repeat(np.cumsum(size) - size, size)
    moved = order[place < np.repeat(give, size)]
    owner[rng.permutation(moved)] = np.repeat(np.arange(num_clients), need)
    return owner


def _labels(where: str, labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{where}(labels={labels.dtype}{list(labels.shape)}): labels must be integers of shape [E]; number other "
            "kinds with partition.natural."
        )
    return labels


def _check(where: str, num_examples: int, num_clients: int, each: int, name: str | None = "min_size") -> None:
    _validate.at_least_one(where, "num_examples", num_examples, "there must be rows to deal")
    _validate.at_least_one(where, "num_clients", num_clients, "100 is usual")
    if isinstance(each, bool) or not isinstance(each, int | np.integer) or each < 0:
        raise ValueError(f"{where}({name}={each!r}): {name} must be a whole number of at least 0; 1 is usual.")
    if num_clients * each > num_examples:
        what = f"{name}={each}, " if name else ""
        raise ValueError(
            f"{where}({what}num_clients={num_clients}): {num_clients} clients of at least {each} make more than the "
            f"{num_examples} rows there are; use fewer clients{f' or a smaller {name}' if each > 1 else ''}."
        )
