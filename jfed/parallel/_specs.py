"""PartitionSpecs: which axes of a mesh an array is split over, and trees of them."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jfed.core import Tree


def is_spec(x: Any) -> bool:
    """Whether this is a leaf of a tree of PartitionSpecs."""
    return isinstance(x, P)


def axes_of(spec: P) -> list[tuple[str, ...]]:
    """The axes that each dimension is split over."""
    return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]


def shortest(axes: list[tuple[str, ...]]) -> P:
    """The spec as JAX writes it; programs are found again by how arrays lie, to the letter."""
    entries = [None if not names else names[0] if len(names) == 1 else names for names in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def shardings_of(specs: Tree, mesh: Mesh) -> Tree:
    """`NamedSharding`s of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def specs_like(tree: Tree, params: Tree, specs: Tree) -> Tree:
    """How to split a tree that holds things of the shape of params.

    Args:
      tree: of arrays or their shapes.
      params: likewise.
      specs: a tree like params, of `PartitionSpec`s.

    Returns:
      A tree like `tree`. A leaf whose path ends in that of a parameter, and whose shape ends in its shape, has the
      parameter's spec for these last axes; any other, and all axes before, are not split.

    >>> import optax
    >>> params = {"w": jax.numpy.zeros((4, 6)), "b": jax.numpy.zeros(6)}
    >>> momenta = optax.adam(0.1).init(params)
    >>> print(*specs_like(momenta, params, {"w": P(None, "model"), "b": P("model")})[0].mu["w"])
    None model
    """
    flat = jax.tree.leaves(specs, is_leaf=is_spec)
    known = [(path, x.shape, spec) for (path, x), spec in zip(jax.tree.leaves_with_path(params), flat, strict=True)]
    known.sort(key=lambda one: -len(one[0]))  # the longest path that fits

    def one(path, leaf):
        for ending, shape, spec in known:
            lead = len(leaf.shape) - len(shape)
            if lead >= 0 and leaf.shape[lead:] == shape and path[len(path) - len(ending) :] == ending:
                return shortest([()] * lead + axes_of(spec))
        return P()

    return jax.tree_util.tree_map_with_path(one, tree)
