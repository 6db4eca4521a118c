"""A model is two pure functions.

`init(key) -> params` and `apply(params, x, key=None) -> predictions`. All that a client learns, sends
and averages is in `params`, a plain pytree of arrays; nothing else persists between calls, so a model
runs under `jit`, `grad`, and `vmap` over clients or seeds. `key=None` means evaluation (no dropout).

Any library that can be written so joins by one adapter: flax NNX (`from_nnx`), flax Linen
(`from_linen`), or two functions of your own (`from_pair`, or `Model(init, apply)` itself).
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfed.core import Tree
from jfed.models.substitute import slow_convolutions, use_linear


class Model(NamedTuple):
    """A pure model; B examples in a batch."""

    init: Callable  # (key) -> params
    apply: Callable  # (params, x [B, ...], key=None) -> predictions [B, ...]; key=None: evaluation


def from_pair(init: Callable, apply: Callable) -> Model:
    """A model of your own functions, `apply(params, x)` drawing nothing at random.

    With randomness in training (dropout), write `apply(params, x, key=None)` and use
    `Model(init, apply)` directly.

    Args:
      init: `(key) -> params`, any pytree of arrays.
      apply: `(params, x [B, ...]) -> predictions [B, ...]`.

    Returns:
      A `Model` whose `apply` ignores its key.

    >>> line = from_pair(lambda key: jnp.zeros((2, 1)), lambda w, x: x @ w)
    >>> print(line.apply(line.init(jax.random.key(0)), jnp.ones((3, 2))).shape)
    (3, 1)
    """

    def apply_fn(params: Tree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        return apply(params, x)

    return Model(init, apply_fn)


def from_nnx(make: Callable[[Any], Any]) -> Model:
    """A model of a flax NNX module.

    `params` is a plain nested dict of the module's `nnx.Param` leaves (keys are strings). Random
    streams are rebuilt at every `apply` from its key; with `key=None` the module runs in `eval()` mode.

    Args:
      make: `(rngs: nnx.Rngs) -> nnx.Module`, a function and not a module, so that `init` is pure and
        can be vmapped over keys.

    Returns:
      A `Model`.

    Raises:
      TypeError: if `make` is a module.
      ValueError: from `init` or `apply`, if the module keeps state that is neither `nnx.Param` nor a
        random stream, such as BatchNorm's running statistics.

    Warns:
      UserWarning: once, from `init` or `apply`, if the module has an `nnx.Conv` that `fast_convolutions` speeds up.

    >>> from flax import nnx
    >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> params = model.init(jax.random.key(0))
    >>> print(params["kernel"].shape, model.apply(params, jnp.ones((5, 3))).shape)
    (3, 2) (5, 2)
    """
    if not callable(make) or _is_nnx_module(make):
        raise TypeError(
            f"from_nnx(make={type(make).__name__} object): make must be a function of nnx.Rngs that builds the "
            "module; write from_nnx(lambda rngs: MyModule(rngs=rngs))."
        )

    # The structure is traced once, without allocating; deferred so that building a Model imports and runs nothing.
    @functools.cache
    def structure() -> tuple[Any, tuple]:
        from flax import nnx

        module = nnx.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0))))
        if slow := slow_convolutions(module):
            warnings.warn(
                f"from_nnx: {', '.join(slow)} run XLA's convolution, slow to train inside a compiled loop and with one "
                "kernel per client; write from_nnx(lambda rngs: models.fast_convolutions(MyModule(rngs=rngs))).",
                stacklevel=3,
            )
        use_linear(module)
        graphdef, state = nnx.split(module)
        leaves = tuple(nnx.to_flat_state(state))
        for path, leaf in leaves:
            _refuse_other_state(nnx, path, leaf)
        return graphdef, leaves

    def init_fn(key: jax.Array) -> Tree:
        from flax import nnx

        structure()
        params: dict = {}
        for path, leaf in nnx.to_flat_state(nnx.state(make(nnx.Rngs(key)), nnx.Param)):
            _insert(
                params, [str(name) for name in path], leaf.get_value() if hasattr(leaf, "get_value") else leaf.value
            )
        return params

    def apply_fn(params: Tree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        from flax import nnx

        graphdef, leaves = structure()
        stream_key = jax.random.key(0) if key is None else key
        state: dict = {}
        for i, (path, leaf) in enumerate(leaves):
            if isinstance(leaf, nnx.RngKey):
                value = jax.random.fold_in(stream_key, i)
            elif isinstance(leaf, nnx.RngCount):
                value = jnp.zeros((), jnp.uint32)
            else:
                value = functools.reduce(lambda tree, name: tree[str(name)], path, params)
            _insert(state, path, value)
        module = nnx.merge(graphdef, state, copy=True)
        module.eval() if key is None else module.train()
        return module(x)

    return Model(init_fn, apply_fn)


def from_linen(module: Any, sample: jax.Array) -> Model:
    """A model of a flax Linen module.

    The stream `"dropout"` gets the key of `apply`. If the module's `__call__` has an argument
    `deterministic`, `train` or `training`, it is set by whether there is a key.

    Args:
      module: a `flax.linen.Module`.
      sample: [B, ...], an input to initialise with; only its shape and dtype matter.

    Returns:
      A `Model` whose params are the collection `"params"`.

    Raises:
      TypeError: if `module` is not a Linen module.
      ValueError: from `init`, if the module makes other collections (BatchNorm's `batch_stats`).

    >>> from flax import linen
    >>> model = from_linen(linen.Dense(2), jnp.ones((1, 3)))
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.ones((5, 3))).shape)
    (5, 2)
    """
    from flax import linen

    if not isinstance(module, linen.Module):
        raise TypeError(
            f"from_linen(module={type(module).__name__}): module must be a flax.linen.Module instance; "
            "use from_nnx for NNX modules and from_pair for functions."
        )
    arguments = inspect.signature(type(module).__call__).parameters

    def mode(training: bool) -> dict[str, bool]:
        flags = {"deterministic": not training, "train": training, "training": training}
        return {name: value for name, value in flags.items() if name in arguments}

    def init_fn(key: jax.Array) -> Tree:
        variables = dict(module.init(key, sample, **mode(training=False)))
        params = variables.pop("params", {})
        if variables:
            raise ValueError(
                f"from_linen({type(module).__name__}): the module makes the collections {sorted(variables)}, which are "
                "not part of params; use linen.GroupNorm or LayerNorm in place of BatchNorm."
            )
        return params

    def apply_fn(params: Tree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x, rngs=rngs, **mode(training=key is not None))

    return Model(init_fn, apply_fn)


def _is_nnx_module(value: Any) -> bool:
    from flax import nnx

    return isinstance(value, nnx.Module)


def _refuse_other_state(nnx: Any, path: tuple, leaf: Any) -> None:
    name = ".".join(str(part) for part in path)
    if isinstance(leaf, nnx.BatchStat):
        raise ValueError(
            f"from_nnx: {name} holds running statistics, which differ by client and are not part of params; "
            "use nnx.GroupNorm or nnx.LayerNorm in place of BatchNorm."
        )
    if not isinstance(leaf, nnx.Param | nnx.RngKey | nnx.RngCount):
        raise ValueError(
            f"from_nnx: {name} is a {type(leaf).__name__}, which is not part of params and would be lost; "
            "make it an nnx.Param, or compute it in __call__."
        )


def _insert(tree: dict, path: Any, value: Any) -> None:
    *parents, last = path
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value
