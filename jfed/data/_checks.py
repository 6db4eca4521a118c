"""Checks of populations and of what they are built from, made on the host before anything compiles.

All mistakes that would later show as a NaN, a silent wrap-around or a wrong mean are errors here. The
package exports `check` and `check_labels`; builders, partitioners and measures share the rest.

Letters: N clients, E examples.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate
from jfed.core import Population, Tree

_MOST_ROWS = 2**31 - 1  # start and size are int32


def check(
    population: Population, *, num_classes: int | None = None, label: str = "y", allow_empty: bool = False
) -> None:
    """Checks a population made by hand; the builders have made the same checks of theirs.

    Args:
      population: to be checked.
      num_classes: if given, the leaf `label` must hold labels in [0, num_classes).
      label: name of the leaf of labels.
      allow_empty: whether a client may have no rows.

    Raises:
      ValueError: if leaves differ in length, a client is empty or reaches past the rows, a floating
        leaf holds a NaN or an infinity, or a label is out of range.

    >>> from jfed.data import population
    >>> check(population({"y": np.array([0, 1, 2])}, [1, 2]), num_classes=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: check_labels(num_classes=2): label 2 at row 2 is outside [0, 2); ...
    """
    leaves = arrays("check", population.examples)
    check_sizes("check", np.asarray(population.size), allow_empty)
    owned_rows("check", population)
    check_finite("check", leaves)
    if num_classes is not None:
        check_labels(leaf_named(f"check(label={label!r})", population.examples, label), num_classes)


def check_labels(y: Any, num_classes: int) -> None:
    """Checks that labels can index `num_classes` logits.

    The losses take -1 for padding whatever the shape. Here it is allowed only where there is one label
    a position: an example without its only label would be trained on in vain, and is surely a mistake.

    Args:
      y: integers, [E], or [E, ...] for one label a position; there -1 is padding and allowed.
      num_classes: classes the model tells apart.

    Raises:
      ValueError: if a label is not an integer or lies outside [0, num_classes).
    """
    check_labels_of("check_labels", y, num_classes)


def check_labels_of(where: str, y: Any, num_classes: int, number: np.ndarray | None = None) -> None:
    """`check_labels` in the name of `where`; `number` [E] is what to call the rows, if not 0 to E - 1."""
    y = np.asarray(y)
    _validate.at_least_one(where, "num_classes", num_classes, "count the model's logits")
    if not y.ndim or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{where}(labels={y.dtype}{list(y.shape)}): labels must be integers [E, ...]; use y.astype('int32') if "
            "they are classes, and no num_classes if they are targets of a regression."
        )
    bad = np.argwhere((y < (-1 if y.ndim >= 2 else 0)) | (y >= num_classes))
    if bad.size:
        padding = ", -1 aside" if y.ndim >= 2 else ""
        raise ValueError(
            f"{where}(num_classes={num_classes}): label {int(y[tuple(bad[0])])} at row {_number(bad[0][0], number)} is "
            f"outside [0, {num_classes}){padding}; count classes from 0, or raise num_classes."
        )


def leaf_named(where: str, examples: Tree, name: str) -> Any:
    """The leaf `name` of examples that are a dict, or an error that says which there are."""
    if isinstance(examples, dict) and name in examples:
        return examples[name]
    found = list(examples) if isinstance(examples, dict) else f"a {type(examples).__name__}, not a dict"
    raise ValueError(f"{where}: no leaf {name!r} among the examples ({found}); name the one that is meant.")


def owned_rows(where: str, population: Population) -> tuple[np.ndarray, np.ndarray]:
    """Clients and rows of all examples, client after client: `(who, rows)`, [sum of sizes] int64 both.

    Raises:
      ValueError: if leaves differ in length or a client reaches past the rows; `where` is named.
    """
    rows = rows_of(where, arrays(where, population.examples))
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


def arrays(where: str, examples: Tree) -> list[tuple[str, np.ndarray]]:
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


def rows_of(where: str, leaves: list[tuple[str, np.ndarray]]) -> int:
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


def check_sizes(where: str, size: np.ndarray, allow_empty: bool) -> None:
    """No size [N] is negative, nor 0 unless allowed."""
    if np.any(size < 0):
        i = int(np.argmin(size))
        raise ValueError(f"{where}(size): client {i} has {size[i]} rows; a size must be at least 0.")
    if not allow_empty and np.any(size == 0):
        empty = np.flatnonzero(size == 0)
        raise ValueError(
            f"{where}: client {int(empty[0])} has no rows ({empty.size} such in all); leave it out, use a "
            "partitioner's min_size=1, or pass allow_empty=True."
        )


def check_finite(where: str, leaves: list[tuple[str, np.ndarray]], number: np.ndarray | None = None) -> None:
    """No floating leaf holds a NaN or an infinity; `number` as in `check_labels_of`."""
    for name, leaf in leaves:
        # jnp knows bfloat16 and its kin as floating; numpy does not.
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not (good := np.isfinite(leaf)).all():
            row = _number(np.argmin(good.reshape(len(leaf), -1).all(axis=1)), number)
            raise ValueError(
                f"{where}(examples): leaf {name} holds a NaN or an infinity, first in row {row}; mend it, or leave the "
                "row out (owner -1 in by_owner)."
            )


def _number(row: Any, number: np.ndarray | None) -> int:
    return int(row if number is None else number[row])


def as_jax(where: str, name: str, leaf: np.ndarray) -> jax.Array:
    """The leaf as a jax array, or an error where jax would wrap or overflow it in silence."""
    with np.errstate(over="ignore"):  # told below, by name
        out = jnp.asarray(leaf)
    if out.dtype == leaf.dtype or not leaf.size:
        return out
    if jnp.issubdtype(out.dtype, jnp.inexact):
        check_finite(where, [(f"{name} as {out.dtype}", np.asarray(out))])
    elif leaf.min() < jnp.iinfo(out.dtype).min or leaf.max() > jnp.iinfo(out.dtype).max:
        raise ValueError(
            f"{where}(examples): leaf {name} holds {leaf.dtype} values beyond {out.dtype}; renumber it, or set "
            "jax_enable_x64."
        )
    return out
