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

_MOST_ROWS = 2**31 - 1  # start and size are int32


def population(examples: Tree, size: Any, *, allow_empty: bool = False) -> Population:
    """A population from rows that already lie in client order.

    Args:
      examples: tree of arrays [E, ...], client 0's rows first.
      size: [N] integers, rows of each client; they sum to E.
      allow_empty: whether a client may have no rows.

    Returns:
      A `Population` of N clients.

    Raises:
      ValueError: if leaves differ in length, sizes do not sum to E, a client is empty, there are
        more than 2**31 - 1 rows, or a floating leaf holds a NaN or an infinity.

    >>> print(population({"x": np.ones((5, 2))}, [2, 3]).start)
    [0 2]
    """
    return _build("population", examples, size, allow_empty)


def from_clients(clients: Sequence[Tree], *, allow_empty: bool = False) -> Population:
    """A population from one tree of examples a client.

    Args:
      clients: N trees of one structure, client i's leaves [E_i, ...].
      allow_empty: whether a client may have no rows.

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
        leaves = _arrays(where, tree)
        size.append(_rows(where, leaves))
        for (name, leaf), (_, first) in zip(leaves, columns[0] if columns else leaves, strict=True):
            if leaf.shape[1:] != first.shape[1:] or leaf.dtype != first.dtype:
                raise ValueError(
                    f"{where}: leaf {name} has rows {leaf.dtype}{list(leaf.shape[1:])}, client 0's are "
                    f"{first.dtype}{list(first.shape[1:])}; give all clients rows of one shape and dtype."
                )
        columns.append(leaves)
    joined = [np.concatenate([leaf for _, leaf in same]) for same in zip(*columns, strict=True)]
    return _build("from_clients", jax.tree.unflatten(structure, joined), size, allow_empty)


def by_owner(examples: Tree, owner: Any, *, num_clients: int | None = None, allow_empty: bool = False) -> Population:
    """A population from rows in any order and the client that owns each.

    A client's rows keep the order they have in `examples`.

    Args:
      examples: tree of arrays [E, ...].
      owner: [E] integers in [0, N), or -1 to leave the row out; see `jfed.data.partition`.
      num_clients: N; by default one more than the largest owner.
      allow_empty: whether a client may have no rows.

    Returns:
      A `Population` of N clients.

    Raises:
      ValueError: if `owner` is not [E] integers in [-1, N), or as in `population`.

    >>> print(by_owner({"y": np.array([10, 11, 12, 13])}, [1, 0, -1, 1]).examples["y"])
    [11 10 13]
    """
    leaves = _arrays("by_owner", examples)
    rows = _rows("by_owner", leaves)
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
    return _build("by_owner", jax.tree.unflatten(jax.tree.structure(examples), taken), size, allow_empty)


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


def owned_rows(where: str, population: Population) -> tuple[np.ndarray, np.ndarray]:
    """Clients and rows of all examples, client after client: `(who, rows)`, [sum of sizes] int64 both.

    Raises:
      ValueError: if leaves differ in length or a client reaches past the rows; `where` is named.
    """
    rows = _rows(where, _arrays(where, population.examples))
    start, size = np.asarray(population.start, np.int64), np.asarray(population.size, np.int64)
    bad = np.flatnonzero((size < 0) | (start < 0) | (start + size > rows))
    if bad.size:
        i = int(bad[0])
        raise ValueError(
            f"{where}(population): client {i} owns rows [{start[i]}, {start[i] + size[i]}) of {rows}; "
            "build the population with jfed.data.population."
        )
    who = np.repeat(np.arange(size.size), size)
    return who, np.repeat(start - (np.cumsum(size) - size), size) + np.arange(who.size)


def leaf_named(where: str, examples: Tree, name: str) -> Any:
    """The leaf `name` of examples that are a dict, or an error that says which there are."""
    if isinstance(examples, dict) and name in examples:
        return examples[name]
    found = list(examples) if isinstance(examples, dict) else f"a {type(examples).__name__}, not a dict"
    raise ValueError(f"{where}: no leaf {name!r} among the examples ({found}); name the one that is meant.")


def check(
    population: Population, *, num_classes: int | None = None, label: str = "y", allow_empty: bool = False
) -> None:
    """Checks a population; the builders have called it, a `Population` made by hand has not been seen.

    Args:
      population: to be checked.
      num_classes: if given, the leaf `label` must hold labels in [0, num_classes).
      label: name of the leaf of labels.
      allow_empty: whether a client may have no rows.

    Raises:
      ValueError: if leaves differ in length, a client is empty or reaches past the rows, a floating
        leaf holds a NaN or an infinity, or a label is out of range.

    >>> check(population({"y": np.array([0, 1, 2])}, [1, 2]), num_classes=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: check_labels(num_classes=2): label 2 at row 2 is outside [0, 2); ...
    """
    leaves = _arrays("check", population.examples)
    _check_sizes("check", np.asarray(population.size), allow_empty)
    owned_rows("check", population)
    _check_finite("check", leaves)
    if num_classes is not None:
        check_labels(leaf_named(f"check(label={label!r})", population.examples, label), num_classes)


def check_labels(y: Any, num_classes: int) -> None:
    """Checks that labels can index `num_classes` logits.

    Args:
      y: integers, [E], or [E, ...] for one label a position; there -1 is padding and allowed.
      num_classes: classes the model tells apart.

    Raises:
      ValueError: if a label is not an integer or lies outside [0, num_classes).
    """
    y = np.asarray(y)
    _validate.at_least_one("check_labels", "num_classes", num_classes, "count the model's logits")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"check_labels(y={y.dtype}{list(y.shape)}): labels must be integers; use y.astype('int32') if they are "
            "classes, and no num_classes if they are targets of a regression."
        )
    bad = np.argwhere((y < (-1 if y.ndim >= 2 else 0)) | (y >= num_classes))
    if bad.size:
        padding = ", -1 aside" if y.ndim >= 2 else ""
        raise ValueError(
            f"check_labels(num_classes={num_classes}): label {int(y[tuple(bad[0])])} at row {int(bad[0][0])} is "
            f"outside [0, {num_classes}){padding}; count classes from 0, or raise num_classes."
        )


def numpy_generator(where: str, key: jax.Array) -> np.random.Generator:
    """A numpy generator seeded by a jax key, for host work on millions of rows that should not compile.

    Args:
      where: name of the function that was handed the key, for its errors.
      key: new-style key, not a batch of keys.

    Raises:
      ValueError: if `key` is not a single known `jax.random.key`.
    """
    typed = isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.ndim or not _validate.is_concrete(key):
        raise ValueError(
            f"{where}(key={key!r}): key must be a single new-style key outside jit; make it with jax.random.key(0)."
        )
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _build(where: str, examples: Tree, size: Any, allow_empty: bool) -> Population:
    """Checks, then hands everything to jax."""
    leaves = _arrays(where, examples)
    rows = _rows(where, leaves)
    size = np.asarray(size)
    if size.ndim != 1 or not size.size or not np.issubdtype(size.dtype, np.integer):
        raise ValueError(
            f"{where}(size={size.dtype}{list(size.shape)}): size must be integers of shape [N], N at least 1; "
            "give the number of rows of each client."
        )
    size = size.astype(np.int64)
    _check_sizes(where, size, allow_empty)
    if size.sum() != rows:
        raise ValueError(f"{where}(size): sizes sum to {size.sum()} but there are {rows} rows; they must agree.")
    _check_finite(where, leaves)
    start = np.cumsum(size) - size
    as_jax = [_as_jax(where, name, leaf) for name, leaf in leaves]
    return Population(
        jax.tree.unflatten(jax.tree.structure(examples), as_jax),
        jnp.asarray(start.astype(np.int32)),
        jnp.asarray(size.astype(np.int32)),
    )


def _arrays(where: str, examples: Tree) -> list[tuple[str, np.ndarray]]:
    """Name and host array of every leaf."""
    out = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(examples):
        name, array = jax.tree_util.keystr(path) or "examples", np.asarray(leaf)
        if array.dtype.kind in "OSUMm":
            raise ValueError(
                f"{where}(examples): leaf {name} holds {array.dtype}, not numbers; encode it as integers first "
                "(partition.natural does so for ids)."
            )
        out.append((name, array))
    return out


def _rows(where: str, leaves: list[tuple[str, np.ndarray]]) -> int:
    """The leading length all leaves share."""
    if not leaves or any(leaf.ndim == 0 for _, leaf in leaves):
        raise ValueError(f"{where}(examples): examples must be a tree of arrays [E, ...]; stack the examples first.")
    lengths = {name: leaf.shape[0] for name, leaf in leaves}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"{where}(examples): leaves differ in their number of rows ({told}); give each as many.")
    rows = leaves[0][1].shape[0]
    if rows > _MOST_ROWS:
        raise ValueError(
            f"{where}(examples): {rows} rows are more than int32 can count ({_MOST_ROWS}); split the population in two."
        )
    return rows


def _check_sizes(where: str, size: np.ndarray, allow_empty: bool) -> None:
    if np.any(size < 0):
        i = int(np.argmin(size))
        raise ValueError(f"{where}(size): client {i} has {size[i]} rows; a size must be at least 0.")
    if not allow_empty and np.any(size == 0):
        empty = np.flatnonzero(size == 0)
        raise ValueError(
            f"{where}: client {int(empty[0])} has no rows ({empty.size} such in all); leave it out, use a "
            "partitioner's min_size=1, or pass allow_empty=True."
        )


def _check_finite(where: str, leaves: list[tuple[str, np.ndarray]]) -> None:
    for name, leaf in leaves:
        # jnp knows bfloat16 and its kin as floating; numpy does not.
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not (good := np.isfinite(leaf)).all():
            row = int(np.argmin(good.reshape(len(leaf), -1).all(axis=1)))
            raise ValueError(
                f"{where}(examples): leaf {name} holds a NaN or an infinity, first in row {row}; mend it, or leave the "
                "row out (owner -1 in by_owner)."
            )


def _as_jax(where: str, name: str, leaf: np.ndarray) -> jax.Array:
    """The leaf as a jax array, or an error where jax would wrap or overflow it in silence."""
    with np.errstate(over="ignore"):  # told below, by name
        out = jnp.asarray(leaf)
    if out.dtype == leaf.dtype or not leaf.size:
        return out
    if jnp.issubdtype(out.dtype, jnp.inexact):
        _check_finite(where, [(f"{name} as {out.dtype}", np.asarray(out))])
    elif leaf.min() < jnp.iinfo(out.dtype).min or leaf.max() > jnp.iinfo(out.dtype).max:
        raise ValueError(
            f"{where}(examples): leaf {name} holds {leaf.dtype} values beyond {out.dtype}; renumber it, or set "
            "jax_enable_x64."
        )
    return out
