"""Pruning a model by magnitude: small weights become zero and stay so, and zeros need not be sent.

    server = optax.chain(optax.sgd(1.0), prune(cubic(0.9, begin=50, end=150)))
    client = optax.chain(frozen_zeros(), optax.sgd(0.1))
    uplink = nonzeros(params)  # once the mask stays

Source: Zhu and Gupta 2017 (arXiv:1710.01878); magnitudes as in Han et al. 2015 (arXiv:1506.02626).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfed import _validate
from jfed.compress import _select
from jfed.compress.sparse import threshold
from jfed.core import Tree


class PruneState(NamedTuple):
    """What was pruned so far."""

    count: jax.Array  # [] int32, updates seen
    kept: Tree  # bool as params: False where a weight is zero for good


def kernels(params: Tree) -> Tree:
    """Whether each leaf is pruned: those of two axes and more are, biases and scales of normalisation are not."""
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)


def cubic(final: float, *, begin: int, end: int, initial: float = 0.0) -> Callable[[jax.Array], jax.Array]:
    """Sparsity that rises quickly at first: s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3.

    Args:
      final: s_f, the share of zeros from update `end` on, in [0, 1).
      begin: t_0, the update before which it is `initial`.
      end: t_1.
      initial: s_i.

    Raises:
      ValueError: if a share is out of range, or `end` does not come after `begin`.

    >>> rising = cubic(0.8, begin=0, end=10)
    >>> print([round(float(rising(t)), 2) for t in (0, 5, 10, 20)])
    [0.0, 0.7, 0.8, 0.8]
    """
    for name, value in (("final", final), ("initial", initial)):
        _share("cubic", name, value)
    if end <= begin:
        raise ValueError(f"cubic(begin={begin}, end={end}): end must come after begin; raise it.")
    return optax.polynomial_schedule(initial, final, power=3, transition_steps=end - begin, transition_begin=begin)


def prune(
    sparsity: float | Callable[[jax.Array], jax.Array], *, every: int = 1, which: Callable[[Tree], Tree] = kernels
) -> optax.GradientTransformation:
    """The last link of an optimizer: sets the smallest weights of the whole model to zero, for good.

    After update t the model has `sparsity(t)` zeros among the weights it prunes, to the nearest weight, or more if it
    had more: a weight that was pruned stays zero. Of equal weights those that come last go; one weight stays.

    Args:
      sparsity: the share of zeros, in [0, 1), or a schedule of it, such as `cubic`.
      every: updates between prunings; the mask stays in between.
      which: `params -> ` whether each leaf is pruned.

    Raises:
      ValueError: if `sparsity` is a number out of range, or `every` not a whole number of at least 1; at `init`, if
        nothing is to be pruned.

    >>> half = prune(0.5)
    >>> w = jnp.array([[1.0, -3.0], [2.0, 0.5]])
    >>> update, _ = half.update(jnp.zeros((2, 2)), half.init(w), w)
    >>> print(w + update)
    [[ 0. -3.]
     [ 2.  0.]]
    """
    if not callable(sparsity):
        _share("prune", "sparsity", sparsity)
    _validate.at_least_one("prune", "every", every, "1 prunes at each update")
    share = sparsity if callable(sparsity) else lambda t: sparsity

    def init_fn(params: Tree) -> PruneState:
        if not any(jax.tree.leaves(which(params))):
            raise ValueError("prune(which=...): it names no leaf of these params; a leaf of two axes is one to prune.")
        return PruneState(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.ones(jnp.shape(x), bool), params))

    def update_fn(updates, state, params=None):
        _with_params("prune", params)
        chosen = which(params)
        after = jax.tree.map(lambda w, u, kept: jnp.where(kept, w + u, 0), params, updates, state.kept)
        leaves, structure = jax.tree.flatten(after)
        leaves = [x for x, yes in zip(leaves, jax.tree.leaves(chosen), strict=True) if yes]
        weights = jnp.concatenate([x.reshape(-1) for x in leaves])

        def anew(kept):
            zeros = jnp.floor(share(state.count) * weights.size + 0.5).astype(jnp.int32)
            stay = _select.among_largest(weights, jnp.maximum(weights.size - zeros, 1))
            return jax.tree.unflatten(structure, list(_cut(stay, jax.tree.leaves(kept), jax.tree.leaves(chosen))))

        kept = jax.lax.cond(state.count % every == 0, anew, lambda kept: kept, state.kept)
        updates = jax.tree.map(lambda w, u, k: jnp.where(k, u, -w).astype(u.dtype), params, updates, kept)
        return updates, PruneState(state.count + 1, kept)

    return optax.GradientTransformation(init_fn, update_fn)


def _cut(stay: jax.Array, kept: list[jax.Array], chosen: list[bool]) -> Iterator[jax.Array]:
    """What is kept of each leaf; `stay` has a flag for each number of those chosen, one leaf after the other."""
    first = 0
    for k, yes in zip(kept, chosen, strict=True):
        yield k & stay[first : first + k.size].reshape(k.shape) if yes else k
        first += k.size if yes else 0


def frozen_zeros(*, which: Callable[[Tree], Tree] = kernels) -> optax.GradientTransformation:
    """The first link of a client's optimizer: weights that are zero have no gradient, and stay zero.

    Args:
      which: `params -> ` whether each leaf is pruned, as in `prune`.
    """

    def one(g, w, yes):
        return jnp.where(w == 0, 0, g).astype(g.dtype) if yes else g

    def update_fn(updates, state, params=None):
        _with_params("frozen_zeros", params)
        return jax.tree.map(one, updates, params, which(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def nonzeros(params: Tree, *, which: Callable[[Tree], Tree] = kernels) -> optax.GradientTransformation:
    """Sends of each pruned array what is not zero, by `threshold`, with room for as many numbers as `params` has.

    Guarantees:
      * Whatever is zero wherever `params` is zero comes through unchanged: the model, its changes, its updates from
        clients with `frozen_zeros`.

    On the wire: the numbers that are not zero, and their positions; an array without zeros as it is.

    Args:
      params: the pruned model, not traced; its zeros are counted, and not kept.
      which: `params -> ` whether each leaf is pruned, as in `prune`.

    Raises:
      ValueError: at `update`, if the tree is another than that of `params`.

    >>> from jfed.compress import decode
    >>> link = nonzeros({"w": jnp.array([[0.0, 2.0], [0.0, 0.0]])})
    >>> change = {"w": jnp.array([[0.0, 0.5], [0.0, 0.0]])}
    >>> message, _ = link.update(change, link.init(change))
    >>> print(message["w"].payload["values"], decode(message)["w"][0])
    [0.5] [0.  0.5]
    """
    leaves, structure = jax.tree.flatten(params)
    rooms = [
        int(jnp.count_nonzero(x)) if yes else x.size
        for x, yes in zip(leaves, jax.tree.leaves(which(params)), strict=True)
    ]
    links = [
        optax.identity() if room == x.size else threshold(0.0, capacity=max(room, 1) / x.size)
        for x, room in zip(leaves, rooms, strict=True)
    ]

    def update_fn(updates, state, params=None):
        del params
        if jax.tree.structure(updates) != structure:
            raise ValueError(
                f"nonzeros(params).update({jax.tree.structure(updates)}): it was made for {structure}; make it of the "
                "model that is sent."
            )
        found = [link.update(x, optax.EmptyState())[0] for link, x in zip(links, jax.tree.leaves(updates), strict=True)]
        return jax.tree.unflatten(structure, found), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def _with_params(where: str, params: Tree) -> None:
    if params is None:
        raise ValueError(f"{where}(...).update(params=None): it looks at the weights; pass params.")


def _share(where: str, name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{where}({name}={value!r}): {name} must lie in [0, 1); 0.9 leaves a tenth of the weights.")
