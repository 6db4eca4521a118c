"""Builders of a `Population`: every client's examples end to end, checked before anything compiles.

A population is one array a leaf with the clients' rows one after another, and two integers a client
that say where its rows lie. Building it is host work, done once in numpy; what comes out are jax
arrays. All mistakes that would later show as a NaN, a silent wrap-around or a wrong mean are errors
here. The layout is that of segmented (ragged) arrays; it has no source of its own.

Letters: N clients, E examples.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate
from jfed.core import Population, Tree
from jfed.data._checks import (
    arrays,
    as_jax,
    check_finite,
    check_labels_of,
    check_sizes,
    leaf_named,
    numpy_generator,
    owned_rows,
    rows_of,
)


def population(
    examples: Tree, size: Any, *, allow_empty: bool = False, num_classes: int | None = None, label: str = "y"
) -> Population:
    """A population from rows that already lie in client order.

    Args:
      examples: tree of arrays [E, ...], client 0's rows first.
      size: [N] integers, rows of each client; they sum to E.
      allow_empty: whether a client may have no rows.
      num_classes: if given, the leaf `label` must hold labels in [0, num_classes), as `check_labels` has it.
      label: name of the leaf of labels.

    Returns:
      A `Population` of N clients.

    Raises:
      ValueError: if leaves differ in length, sizes do not sum to E, a client is empty, there are
        more than 2**31 - 1 rows, a floating leaf holds a NaN or an infinity, or a label is out of range.

    >>> print(population({"x": np.ones((5, 2))}, [2, 3]).start)
    [0 2]
    """
    return _build("population", examples, size, allow_empty, num_classes, label)


def from_clients(
    clients: Sequence[Tree], *, allow_empty: bool = False, num_classes: int | None = None, label: str = "y"
) -> Population:
    """A population from one tree of examples a client.

    Args:
      clients: N trees of one structure, client i's leaves [E_i, ...].
      allow_empty: whether a client may have no rows.
      num_classes: if given, the leaf `label` must hold labels in [0, num_classes), as `check_labels` has it.
      label: name of the leaf of labels.

    Returns:
      A `Population` of N clients in the order given.

    Raises:
      ValueError: if two clients differ in structure, in a leaf's trailing shape or dtype, one
        client's leaves differ in length, or as in `population`.

    >>> print(from_clients([{"y": np.array([3, 1])}, {"y": np.array([2])}]).size)
    [2 1]
    """
    if not len(clients):
        raise ValueError("from_clients(clients=[]): there must be a client; pass one tree of arrays for each.")
    structure = jax.tree.structure(clients[0])
    columns: list[list[np.ndarray]] = []
    size = []
    for i, tree in enumerate(clients):
        if jax.tree.structure(tree) != structure:
            raise ValueError(
                f"from_clients(clients[{i}]): its structure {jax.tree.structure(tree)} is not client 0's "
                f"{structure}; give every client the same leaves."
            )
        where = f"from_clients(clients[{i}])"
        leaves = arrays(where, tree)
        size.append(rows_of(where, leaves))
        for (name, leaf), (_, first) in zip(leaves, columns[0] if columns else leaves, strict=True):
            if leaf.shape[1:] != first.shape[1:] or leaf.dtype != first.dtype:
                raise ValueError(
                    f"{where}: leaf {name} has rows {leaf.dtype}{list(leaf.shape[1:])}, client 0's are "
                    f"{first.dtype}{list(first.shape[1:])}; give all clients rows of one shape and dtype."
                )
        columns.append(leaves)
    joined = [np.concatenate([leaf for _, leaf in same]) for same in zip(*columns, strict=True)]
    return _build("from_clients", jax.tree.unflatten(structure, joined), size, allow_empty, num_classes, label)


def by_owner(
    examples: Tree,
    owner: Any,
    *,
    num_clients: int | None = None,
    allow_empty: bool = False,
    num_classes: int | None = None,
    label: str = "y",
) -> Population:
    """A population from rows in any order and the client that owns each.

    A client's rows keep the order they have in `examples`. Rows left out are not checked, and errors
    number the others as they lie there.

    Args:
      examples: tree of arrays [E, ...].
      owner: [E] integers in [0, N), or -1 to leave the row out; see `jfed.data.partition`.
      num_clients: N; by default one more than the largest owner.
      allow_empty: whether a client may have no rows.
      num_classes: if given, the leaf `label` must hold labels in [0, num_classes), as `check_labels` has it.
      label: name of the leaf of labels.

    Returns:
      A `Population` of N clients.

    Raises:
      ValueError: if `owner` is not [E] integers in [-1, N), or as in `population`.

    >>> print(by_owner({"y": np.array([10, 11, 12, 13])}, [1, 0, -1, 1]).examples["y"])
    [11 10 13]
    """
    leaves = arrays("by_owner", examples)
    rows = rows_of("by_owner", leaves)
    owner = np.asarray(owner)
    if owner.shape != (rows,) or not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(
            f"by_owner(owner={owner.dtype}{list(owner.shape)}): owner must be integers of shape [{rows}], one a row; "
            "take it from a partitioner, or from partition.natural for ids of other kinds."
        )
    if num_clients is None:
        num_clients = int(owner.max(initial=-1)) + 1
        if num_clients == 0:
            raise ValueError("by_owner(owner): every row is left out; give at least one row an owner of 0 or more.")
    _validate.at_least_one("by_owner", "num_clients", num_clients, "leave it out to count the owners")
    bad = np.flatnonzero((owner < -1) | (owner >= num_clients))
    if bad.size:
        raise ValueError(
            f"by_owner(owner={int(owner[bad[0]])} at row {int(bad[0])}): an owner must lie in [0, {num_clients}), or "
            "be -1 to leave the row out; raise num_clients or renumber with partition.natural."
        )
    size = np.bincount(owner[owner >= 0], minlength=num_clients)
    order = np.argsort(owner, kind="stable")[rows - int(size.sum()) :]  # the -1s sort first
    taken = [leaf[order] for _, leaf in leaves]
    tree = jax.tree.unflatten(jax.tree.structure(examples), taken)
    return _build("by_owner", tree, size, allow_empty, num_classes, label, number=order)


def split(population: Population, fraction: float, *, key: jax.Array) -> tuple[Population, Population]:
    """Splits each client's rows at random into a part to train on and a part to test on.

    A client of `size` rows keeps `max(1, floor(fraction * size))` for training, so that a client
    with two or more rows has both parts. A client with one row has none to test on: sizes in the
    test population may be 0, and evaluation leaves such a client out. Rows keep their order.

    Args:
      population: N clients.
      fraction: share of each client's rows to TRAIN on, in (0, 1); 0.9 is usual.
      key: random key of the choice of rows.

    Returns:
      `(train, test)`, each of the same N clients.

    Raises:
      ValueError: if `fraction` is outside (0, 1) or no client has two rows.

    >>> whole = population({"y": np.arange(11)}, [10, 1])
    >>> train, test = split(whole, 0.8, key=jax.random.key(0))
    >>> print(train.size, test.size)
    [8 1] [2 0]
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"split(fraction={fraction}): fraction must lie in (0, 1); it is the share to train on, 0.9 is usual."
        )
    who, rows = owned_rows("split", population)
    start, size = np.asarray(population.start), np.asarray(population.size, np.int64)
    if not np.any(size >= 2):
        raise ValueError("split(population): no client has two rows to split; split the rows before dealing them out.")
    # The small term keeps 0.29 * 100 = 28.999... at 29.
    kept = np.clip(np.floor(fraction * size + 1e-9), 1, np.maximum(size - 1, 1)).astype(np.int64)
    kept = np.minimum(kept, size)  # a client that was empty stays so
    place = rows - start[who]  # of a row within its client
    shuffled = np.lexsort((numpy_generator("split", key).random(who.size), who))
    to_train = np.empty(who.size, bool)
    to_train[shuffled] = place < kept[who]

    def part(mask: np.ndarray, sizes: np.ndarray) -> Population:
        examples = jax.tree.map(lambda x: np.asarray(x)[rows[mask]], population.examples)
        return _build("split", examples, sizes, True)

    return part(to_train, kept), part(~to_train, size - kept)


def client(population: Population, i: int) -> Tree:
    """The examples of client `i`, for looking at: a tree of numpy arrays [size_i, ...] on the host.

    Raises:
      ValueError: if `i` is not in [0, N).

    >>> client(population({"y": np.arange(5)}, [2, 3]), 1)["y"].tolist()
    [2, 3, 4]
    """
    n = population.size.shape[0]
    if not 0 <= i < n:
        raise ValueError(f"client(i={i}): i must lie in [0, {n}); the population has {n} clients.")
    first = int(population.start[i])
    # Slicing a jax array would compile anew for every size.
    return jax.tree.map(lambda x: np.asarray(x)[first : first + int(population.size[i])], population.examples)


def owner(population: Population) -> np.ndarray:
    """The client that owns each row, the inverse of `by_owner`; -1 for a row nobody owns.

    Returns:
      [E] int32, on the host.

    Raises:
      ValueError: if two clients own one row, as a `Population` made by hand may have it.

    >>> owner(population({"y": np.arange(5)}, [2, 3])).tolist()
    [0, 0, 1, 1, 1]
    """
    who, rows = owned_rows("owner", population)
    out = np.full(jax.tree.leaves(population.examples)[0].shape[0], -1, np.int32)
    out[rows] = who
    if np.any(lost := out[rows] != who):
        row = int(rows[np.argmax(lost)])
        raise ValueError(
            f"owner(population): row {row} has more than one owner; give each client a copy of it with from_clients."
        )
    return out


def _build(
    where: str,
    examples: Tree,
    size: Any,
    allow_empty: bool,
    num_classes: int | None = None,
    label: str = "y",
    number: np.ndarray | None = None,
) -> Population:
    """Checks, then hands everything to jax; `number` [E] is what errors call the rows."""
    leaves = arrays(where, examples)
    rows = rows_of(where, leaves)
    size = np.asarray(size)
    if size.ndim != 1 or not size.size or not np.issubdtype(size.dtype, np.integer):
        raise ValueError(
            f"{where}(size={size.dtype}{list(size.shape)}): size must be integers of shape [N], N at least 1; "
            "give the number of rows of each client."
        )
    size = size.astype(np.int64)
    check_sizes(where, size, allow_empty)
    if size.sum() != rows:
        raise ValueError(f"{where}(size): sizes sum to {size.sum()} but there are {rows} rows; they must agree.")
    check_finite(where, leaves, number)
    if num_classes is not None:
        check_labels_of(where, leaf_named(f"{where}(label={label!r})", examples, label), num_classes, number)
    start = np.cumsum(size) - size
    on_device = [as_jax(where, name, leaf) for name, leaf in leaves]
    return Population(
        jax.tree.unflatten(jax.tree.structure(examples), on_device),
        jnp.asarray(start.astype(np.int32)),
        jnp.asarray(size.astype(np.int32)),
    )
