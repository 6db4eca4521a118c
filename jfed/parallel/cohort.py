"""A federated cohort each of whose clients is trained by several devices, which hold its model in parts.

On a mesh `clients x model` the clients are dealt to rows of devices, by `jfed.clients.sharded`, and the devices of a
row share one client's model, and whatever else a method keeps of the model's shape: optimizers, control variates, what
is remembered of each client. The method's text is that of one device. Where its arrays lie is said once, for the
params, and the compiler adds the messages that follow (GSPMD: Xu et al. 2021, arXiv:2105.04663), so norms, clipping and
compressors see whole arrays. A loss may also say itself what it sends, in the pairs of `jfed.parallel.conjugate`:
`on_parts`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jfed.core import Algorithm, Cohort, Tree
from jfed.parallel._specs import axes_of, is_spec, shardings_of, shortest, specs_like


def split_model(algorithm: Algorithm, *, mesh: Mesh, specs: Tree) -> Algorithm:
    """The same method, whose state lies in parts on the devices of a mesh.

    A leaf of the state that ends in the path and in the shape of a parameter is split as that is, whatever axes come
    before: momenta, control variates, a row of each for every client. All else is on every device. The state comes
    from `init` so, no device ever holding it whole, and every round leaves it so.

    The method's client map should be `clients.sharded(mesh, ...)`, which deals clients along its own axis and leaves
    the others to the compiler; any other map runs the clients on the devices of the other axes all the same.

    Guarantees:
      * The result is that of the method on one device, up to the order of float additions.
      * Between rounds, and within them, a device holds its part only, as far as operations can be done on parts: one
        that sorts or factors a leaf, as `compress.top_k` or `power_sgd`, gathers that leaf.

    Args:
      algorithm: its `params(state)` must have the shapes of the params it is given.
      mesh: from `jfed.mesh.make`; may span processes, which all call `init` with equal params.
      specs: a tree like params, of `PartitionSpec`s.

    Raises:
      ValueError: if `specs` names an axis that the mesh has not; at `init`, if it is not a tree like params, an axis
        does not divide a dimension, or the method's model has other shapes than params.

    >>> import optax
    >>> from jfed import algorithms, local
    >>> from jfed import mesh as meshes
    >>> work = local.full_batch(lambda w, x, key: (x @ w) ** 2, optax.sgd(0.1))
    >>> mesh = meshes.make((1, 1), ("clients", "model"))
    >>> fedavg = split_model(algorithms.fedavg(work), mesh=mesh, specs=P("model"))
    >>> print(*fedavg.init(jnp.zeros(4)).params.sharding.spec)
    model
    """
    _known(specs, mesh, "split_model")

    def shardings(state: Tree) -> Tree:
        like = specs_like(jax.eval_shape(lambda s: s, state), jax.eval_shape(algorithm.params, state), specs)
        return shardings_of(like, mesh)

    def init_fn(params: Tree) -> Tree:
        params = put(params, mesh=mesh, specs=specs)

        def strongly_typed(params):
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), algorithm.init(params))

        state = jax.eval_shape(strongly_typed, params)
        have, want = (
            [(jax.tree_util.keystr(path), x.shape) for path, x in jax.tree.leaves_with_path(tree)]
            for tree in (jax.eval_shape(algorithm.params, state), params)
        )
        if have != want:
            raise ValueError(
                f"split_model(params={dict(want)}): the method's own model is {dict(have)}, so specs of the one do not "
                "say how the other is split; use a method that trains one model of the shapes it is given."
            )
        return jax.jit(strongly_typed, out_shardings=shardings(state))(params)

    def round_fn(state: Tree, cohort: Cohort, key: jax.Array) -> tuple[Tree, dict]:
        state, metrics = algorithm.round(state, cohort, key)
        return jax.lax.with_sharding_constraint(state, shardings(state)), metrics

    return algorithm._replace(init=init_fn, round=round_fn)


def put(params: Tree, *, mesh: Mesh, specs: Tree) -> Tree:
    """Params as `specs` says, each device given its part only.

    Args:
      params: the same in every process; or arrays that lie on several processes already.
      mesh: from `jfed.mesh.make`.
      specs: a tree like params, of `PartitionSpec`s.

    Raises:
      ValueError: as `split_model`.
    """
    _fits(params, specs, mesh)

    def one(spec, x):
        sharding = NamedSharding(mesh, shortest(axes_of(spec)))
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(x)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, specs, params, is_leaf=is_spec)


def on_parts(loss: Callable, *, mesh: Mesh, specs: Tree) -> Callable:
    """An ordinary loss of whole params, made of a text that each device runs on its part of them.

    The text communicates by the pairs of `jfed.parallel.conjugate` over the axes that `specs` names, and ends in
    losses that are the same on all devices. What comes out can be differentiated once, in reverse, anywhere: within
    client maps and out of them.

    Args:
      loss: `(params, batch, key) -> [B]`; sees its part of params, and batch and key whole.
      mesh: from `jfed.mesh.make`.
      specs: a tree like params, of `PartitionSpec`s.

    Returns:
      `(params, batch, key) -> [B]`.

    Raises:
      ValueError: if `specs` names no axis, or one that the mesh has not; when it meets params that are not as
        `split_model` wants them; if it is differentiated twice, or with respect to the batch.

    >>> from jfed import mesh as meshes
    >>> from jfed.parallel import conjugate
    >>> def text(w, x, key):
    ...     x = conjugate.sliced(conjugate.copied(x, "model"), "model", 1)
    ...     return conjugate.summed(x @ w, "model")
    >>> loss = on_parts(text, mesh=meshes.make((1,), ("model",)), specs=P("model"))
    >>> print(loss(jnp.array([1.0, 2.0]), jnp.ones((3, 2)), None))
    [3. 3. 3.]
    """
    axes = _known(specs, mesh, "on_parts")
    if not axes:
        raise ValueError(f"on_parts(specs={specs}): names no axis of {mesh.axis_names}; a loss of wholes needs none.")
    each = P(tuple(axes))  # residuals, which are a device's own: stacked

    def mapped(f, in_specs, out_specs):
        within = jax.sharding.get_abstract_mesh()
        return _not_differentiated(
            jax.shard_map(
                f,
                mesh=within if within.manual_axes else mesh,
                in_specs=in_specs,
                out_specs=out_specs,
                axis_names=set(axes),
                check_vma=False,
            )
        )

    @jax.custom_vjp
    def loss_fn(params, batch, key):
        return mapped(loss, (specs, P(), P()), P())(params, batch, key)

    def forward(params, batch, key):
        def text(params, batch, key):
            values, pull = jax.vjp(lambda params: loss(params, batch, key), params)
            return values, jax.tree.map(lambda x: x[None], pull)

        return mapped(text, (specs, P(), P()), (P(), each))(params, batch, key)

    def backward(pull, dvalues):
        def text(pull, dvalues):
            return jax.tree.map(lambda x: x[0], pull)(dvalues)[0]

        return mapped(text, (each, P()), specs)(pull, dvalues), None, None

    loss_fn.defvjp(forward, backward)

    compiled = jax.jit(lambda params, batch, key: loss_fn(params, _constant(batch), key))

    def checked(params: Tree, batch: Tree, key: jax.Array) -> jax.Array:
        _fits(params, specs, mesh)
        return compiled(params, batch, key)  # under jit alone may axes be left to the compiler

    return checked


def _not_differentiated(f: Callable) -> Callable:
    """`f`, which refuses to be: JAX does not know that its pairs are each other's derivative."""

    def refuse(*_):
        raise ValueError(
            "on_parts(loss): is differentiated once, in reverse and by params; for anything else give the compiler a "
            "loss of whole params, without on_parts."
        )

    guarded = jax.custom_vjp(f)
    guarded.defvjp(refuse, refuse)
    return guarded


def _constant(batch: Tree) -> Tree:
    """The same batch, by which nothing is differentiated."""
    return jax.tree.map(lambda x: _not_differentiated(lambda x: x)(x) if _is_inexact(x) else x, batch)


def _is_inexact(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _known(specs: Tree, mesh: Mesh, where: str) -> list[str]:
    """The axes that `specs` names, in the mesh's order."""
    named = set()
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        if not is_spec(spec):
            raise ValueError(f"{where}(specs=...): holds {spec!r}; every leaf must be a jax.sharding.PartitionSpec.")
        named |= {axis for axes in axes_of(spec) for axis in axes}
    for axis in sorted(named - set(mesh.axis_names)):
        raise ValueError(f"{where}(specs=...): names axis {axis!r}, the mesh has {mesh.axis_names}; use one of them.")
    return [axis for axis in mesh.axis_names if axis in named]


def _fits(params: Tree, specs: Tree, mesh: Mesh) -> None:
    """Refuses specs that are not those of params."""
    ours, theirs = jax.tree.structure(specs, is_leaf=is_spec), jax.tree.structure(params)
    if ours != theirs:
        raise ValueError(f"specs={ours}: must be a tree like params, {theirs}; give every leaf a PartitionSpec.")
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    for (path, x), spec in zip(jax.tree.leaves_with_path(params), leaves, strict=True):
        name, shape = f"params{jax.tree_util.keystr(path)}", np.shape(x)
        if len(spec) > len(shape):
            raise ValueError(f"{name} of shape {shape}: its {spec} speaks of {len(spec)} axes; leave the last out.")
        for i, axes in enumerate(axes_of(spec)):
            n = math.prod(mesh.shape[axis] for axis in axes)
            if shape[i] % n:
                raise ValueError(
                    f"{name} of shape {shape}: the mesh's {' x '.join(map(repr, axes))} has {n} devices, which must "
                    f"divide dimension {i}, {shape[i]}; take {-(-shape[i] // n) * n}, or another mesh."
                )
