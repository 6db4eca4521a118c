"""The workers of data-parallel training: devices of a mesh, or so many simulated on one device.

Letters: n workers.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jfed import _validate, mesh
from jfed.collectives import compressed, dedicated_servers_all_reduce
from jfed.core import Tree


class Workers(NamedTuple):
    """Who trains."""

    count: int  # n
    axis_name: str | tuple[str, ...]
    mesh: Mesh | None  # None where they are simulated


def of(where: str, workers: Mesh | int) -> Workers:
    """The devices along all axes of a mesh, or as many simulated workers.

    Raises:
      ValueError: if it is neither a mesh nor a whole number of at least 1.
    """
    if isinstance(workers, Mesh):
        names = workers.axis_names
        return Workers(workers.size, names[0] if len(names) == 1 else tuple(names), workers)
    _validate.at_least_one(where, "workers", workers, "or give a mesh, such as jfed.mesh.make()")
    return Workers(workers, "workers", None)


def each(workers: Workers, f: Callable, *, own: tuple[bool, ...], results: tuple[bool, ...]) -> Callable:
    """Runs `f` on every worker.

    Args:
      workers: who.
      f: the function of one worker, of as many arguments and results as there are flags.
      own: of each argument, whether workers have their own: leaves [n, ...], of which `f` sees [...].
      results: of each result, whether it is a worker's own, to be stacked to [n, ...]; what is not must be the same
        on all of them.
    """

    def first(flags, values):
        return tuple(
            value if flag else jax.tree.map(lambda x: x[0], value) for flag, value in zip(flags, values, strict=True)
        )

    if workers.mesh is None:
        axes = tuple(0 if flag else None for flag in own)
        spread = jax.vmap(f, in_axes=axes, axis_name=workers.axis_name, axis_size=workers.count)
        return lambda *values: first(results, spread(*values))

    def specs(flags):
        return tuple(PartitionSpec(workers.axis_name) if flag else PartitionSpec() for flag in flags)

    def one(*values):
        values = tuple(jax.tree.map(lambda x: x[0], v) if flag else v for flag, v in zip(own, values, strict=True))
        return tuple(
            jax.tree.map(lambda x: jnp.asarray(x)[None], v) if flag else v
            for flag, v in zip(results, f(*values), strict=True)
        )

    return mesh.shard_map(mesh=workers.mesh, in_specs=specs(own), out_specs=specs(results))(one)


def dealt(where: str, workers: Workers, batch: Tree, parts: int, what: str) -> Tree:
    """A batch [B, ...] as [n, parts, B / (n parts), ...], worker by worker.

    Raises:
      ValueError: if there is no batch, its leaves differ in length, or the workers' parts do not divide it.
    """
    lengths = {jnp.shape(x)[0] if jnp.ndim(x) else None for x in jax.tree.leaves(batch)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"{where}(batch with leaves of lengths {lengths}): give leaves [B, ...] of one length B.")
    (length,) = lengths
    if length % (workers.count * parts) or not length:
        raise ValueError(
            f"{where}(batch of {length}): {workers.count} workers times {parts} {what} must divide it; "
            f"take a multiple of {workers.count * parts}."
        )
    return jax.tree.map(lambda x: x.reshape(workers.count, parts, -1, *x.shape[1:]), batch)


class Mean(NamedTuple):
    """How workers average a tree, and with it a number, their loss."""

    init: Callable  # tree -> state of one worker
    update: Callable  # (tree, number, state, params, key, round) -> (mean tree, mean number, state)


def optimizer_of(where: str, name: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer, which may take extra arguments; of `optax.MultiSteps`, its transformation.

    Raises:
      ValueError: if it is none.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"{where}({name}={optimizer!r}): give an optax optimizer, such as optax.adam(1e-3).")
    return optax.with_extra_args_support(optimizer)


def mean(
    where: str, workers: Workers, all_reduce: Callable | None, uplink: optax.GradientTransformation | None
) -> Mean:
    """By an all-reduce, or by messages of an uplink, which may have state, that everybody gathers.

    Raises:
      ValueError: if both are given, or what is given is none.
    """
    if uplink is None:
        all_reduce = all_reduce_of(where, all_reduce)
        told = _parameters(all_reduce) & {"key", "round"}

        def over_all(x):
            return jax.tree.map(lambda t: (t / workers.count).astype(t.dtype), x)

        def update_fn(tree, number, state, params, key, round):
            if told:  # compressed; a code of both would bear the scale of the loss
                options = {name: value for name, value in (("key", key), ("round", round)) if name in told}
                total = all_reduce(tree, workers.axis_name, **options)
                return over_all(total), lax.pmean(number, workers.axis_name), state
            return *over_all(all_reduce((tree, number), workers.axis_name)), state

        return Mean(lambda tree: (), update_fn)
    if all_reduce is not None:
        raise ValueError(
            f"{where}(all_reduce=..., uplink=...): messages of an uplink are gathered by all workers; give one of them."
        )
    if not isinstance(uplink, optax.GradientTransformation):
        raise ValueError(
            f"{where}(uplink={uplink!r}): give a link of jfed.compress, such as error_feedback(top_k(.01))."
        )
    link = optax.with_extra_args_support(optax.chain(uplink, compressed.averaged(workers.axis_name)))

    def update_fn(tree, number, state, params, key, round):
        own = jax.random.fold_in(key, lax.axis_index(workers.axis_name))
        mean, state = link.update(tree, state, params, key=own, round=round)
        return mean, lax.pmean(number, workers.axis_name), state

    return Mean(link.init, update_fn)


def all_reduce_of(where: str, all_reduce: Any) -> Callable:
    """An all-reduce of all workers, by default `lax.psum`.

    Raises:
      ValueError: if it is none.
    """
    all_reduce = lax.psum if all_reduce is None else all_reduce
    if not callable(all_reduce):
        raise ValueError(
            f"{where}(all_reduce={all_reduce!r}): give a function (x, axis_name) such as jax.lax.psum or "
            "jfed.collectives.ring_all_reduce."
        )
    if getattr(all_reduce, "func", all_reduce) is dedicated_servers_all_reduce:
        raise ValueError(
            f"{where}(all_reduce=dedicated_servers_all_reduce): its servers hold no data, and here all workers do; "
            "take sharded_servers_all_reduce."
        )
    return all_reduce


def loss_and_gradient(where: str, loss: Callable) -> Callable:
    """`(params, batch, key) -> (mean loss, gradient)` of a loss of single examples, [B], or of a mean, []."""

    def mean_loss(params, batch, key):
        values = jnp.asarray(loss(params, batch, key))
        length = next((jnp.shape(x)[:1] for x in jax.tree.leaves(batch)), ())
        if values.shape not in ((), length):
            raise ValueError(
                f"{where}: the loss returned shape {values.shape} for a batch with leading axis {length}; it must "
                "return one value an example, or their mean."
            )
        return jnp.mean(values.astype(wide(values.dtype)))

    return jax.value_and_grad(mean_loss)


def wide(dtype: Any) -> Any:
    """The dtype to add up numbers of `dtype` in: float32 for what is smaller."""
    small = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.float32 if small or not jnp.issubdtype(dtype, jnp.inexact) else dtype


def placed(workers: Workers, tree: Tree) -> Tree:
    """A state as a step returns it, strongly typed and on the mesh, so that the first step's program serves all."""
    if _validate.is_concrete(tree):
        return mesh.onto(jax.tree.map(jnp.asarray, tree), workers.mesh)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def _parameters(f: Any) -> frozenset[str]:
    """Names that a function can be told; `key` and `round` are among them if it takes any."""
    try:
        parameters = inspect.signature(f).parameters
    except (TypeError, ValueError):  # some builtins have none
        return frozenset()
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return frozenset(parameters) | ({"key", "round"} if any_name else frozenset())
