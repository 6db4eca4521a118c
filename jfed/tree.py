"""What jfed does to whole pytrees that jax.tree and optax.tree do not."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jfed.core import Tree


def take(tree: Tree, index: jax.Array) -> Tree:
    """Row `index` of every leaf; an index past the end reads the last row.

    >>> print(take({"a": jnp.arange(3.0)}, jnp.array([2, 0, 9]))["a"])
    [2. 0. 2.]
    """
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), tree)


def put(tree: Tree, index: jax.Array, rows: Tree) -> Tree:
    """`tree` with `rows` written at `index`; an index past the end writes nothing.

    >>> print(put(jnp.zeros(3), jnp.array([1, 3]), jnp.array([5.0, 7.0])))
    [0. 5. 0.]
    """
    return jax.tree.map(lambda x, r: x.at[index].set(r, mode="drop"), tree, rows)


def select(mask: jax.Array, yes: Tree, no: Tree) -> Tree:
    """Leafwise `yes` where `mask` holds, else `no`; `mask` spans the leading axes."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        m = mask.reshape(mask.shape + (1,) * (jnp.ndim(a) - mask.ndim))
        return jnp.where(m, a, b)

    return jax.tree.map(one, yes, no)


def zeros(shapes: Tree, leading: tuple[int, ...] = ()) -> Tree:
    """Zeros of the shapes and dtypes of `shapes`, with `leading` axes in front."""
    return jax.tree.map(lambda s: jnp.zeros(leading + tuple(s.shape), s.dtype), shapes)


_LARGE = 10**4  # entries; below, all ways of reducing are as quick


def total(tree: Tree) -> Tree:
    """The sum of the rows of every leaf; zeros if there are none.

    >>> print(total({"a": jnp.arange(6.0).reshape(3, 2)})["a"])
    [6. 9.]
    """

    def one(x: jax.Array) -> jax.Array:
        # XLA:CPU of jax 0.10 reads rows of millions entry by entry, 40 times slower than row by row. In half
        # precision only `sum` adds in single, and rows that lie on several devices cannot be taken one by one.
        large = x.shape[0] and x.size > _LARGE * x.shape[0]
        wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4
        if large and wide and not any(jax.typeof(x).sharding.spec):
            return jax.lax.platform_dependent(x, cpu=_by_row, default=_at_once)
        return _at_once(x)

    return jax.tree.map(one, tree)


def _at_once(x: jax.Array) -> jax.Array:
    return jnp.sum(x, 0, dtype=x.dtype)


@jax.custom_jvp
def _by_row(x: jax.Array) -> jax.Array:
    if x.shape[0] <= 4:
        return sum((x[i] for i in range(1, x.shape[0])), x[0])
    return jax.lax.fori_loop(1, x.shape[0], lambda i, s: s + x[i], x[0])


# The loop's own would be transposed into one that writes all rows for each of them.
_by_row.defjvp(lambda x, x_dot: (_by_row(*x), _at_once(*x_dot)))


def all_finite(tree: Tree) -> jax.Array:
    """Whether no floating leaf holds a NaN or an infinity; [] bool.

    >>> print(all_finite({"a": jnp.array([1.0, jnp.nan])}), all_finite(()))
    False True
    """

    def one(x: jax.Array) -> jax.Array:
        if x.ndim > 1 and x.size > _LARGE:
            # 0 times any number is 0, unless it is not finite. A product is quicker than a reduction of flags.
            rows = x.reshape(-1, x.shape[-1])
            nothing = jax.lax.optimization_barrier(jnp.zeros(rows.shape[0], x.dtype))
            x = jnp.matmul(nothing, rows, precision=jax.lax.Precision.HIGHEST)  # lower, a large number may overflow
        return jnp.all(jnp.isfinite(x))

    flags = [one(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves, known at trace time.

    >>> nbytes({"a": jnp.zeros((2, 3)), "b": jnp.zeros(5, jnp.int8)})
    29
    """
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def count_bytes(nbytes: int, whom: jax.Array) -> jax.Array:
    """Bytes of a message for each client of `whom` [C] that it went to or came from; two such may be added."""
    count = number_of_bytes(nbytes)
    return jnp.where(whom, count, jnp.zeros((), count.dtype))


def number_of_bytes(nbytes: int) -> np.generic:
    """As it is counted: uint32, exact, below 2 GiB, then float32."""
    return np.uint32(nbytes) if nbytes < 2**31 else np.float32(nbytes)


def name_of(path: tuple) -> str:
    """The path of a leaf, as `jax.tree.leaves_with_path` gives it, as names joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
