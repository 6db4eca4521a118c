"""A mixture of experts in place of a transformer's feed-forward layer, the experts dealt to devices.

A router sends each token to the `top` experts of E that it gives the most; their outputs are added up, weighted by
the router's softmax. So that arrays have known sizes an expert takes at most C tokens of each group of consecutive
tokens: all first choices before all second ones, earlier tokens before later. For what is over capacity the layer
adds nothing, and the token passes by on the residual. So with `top` of 2 or more a later token may take an earlier
one's place: where places run short, what a token becomes depends on tokens behind it, also in a causal model. A group
lies on one device whatever the mesh, so which tokens are dropped depends on `groups` alone, never on how many devices
there are.

Tokens go to their experts' devices and back by all-to-all, [b, E, C, H] each time, empty places included.

Source: Lepikhin et al. 2020 (arXiv:2006.16668), algorithm 1, without its random routing of second choices; Fedus et al.
2021 (arXiv:2101.03961), which is `top=1`.

Letters: b examples of T tokens on a device, H numbers each, G groups of n tokens; E experts of F hidden units, C tokens
of a group for each; k choices a token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jfed import _validate
from jfed.core import Tree
from jfed.parallel.conjugate import copied, exchanged, size, summed
from jfed.parallel.layered import Axes, divides
from jfed.parallel.products import product


class FeedForward(NamedTuple):
    """What a transformer's block may have in place of its MLP."""

    init: Callable  # (key, H) -> params of one block
    specs: Tree  # of PartitionSpecs by "tensor" and "expert", as params
    apply: Callable  # (params, h [b, T, H], Axes) -> (what is added to h [b, T, H], what is added to losses [b])
    check: Callable  # (sizes) -> None; raises ValueError where an axis of the mesh does not divide a dimension


def mixture_of_experts(
    num_experts: int,
    *,
    hidden: int | None = None,
    top: int = 2,
    capacity_factor: float = 1.25,
    balance: float = 0.01,
    groups: int = 1,
) -> FeedForward:
    """Experts, each two dense layers without bias and a GELU between them.

    Gates are the router's probabilities: of the one expert with `top=1`, else divided by their sum over those chosen,
    dropped or not. The router computes in float32, and C = ceil(capacity_factor k n / E), n at most.

    The loss of an example that keeps experts equally used is `balance * E * sum_e f_e p_e`, where f_e is the share of
    its choices that fell on e, before any is dropped, and p_e the mean probability of e; the mean of its groups. It is
    `balance` if all p are equal, and `balance * E` if one expert gets everything.

    `apply` takes a device's part of the batch (split over "expert" as well), of the tokens (over "sequence") and of the
    experts (over "expert" and "tensor"); `h` and what it returns are alike along "tensor". It communicates

      * along "expert" [b G, E, C, H] all-to-all, twice forward and twice backward;
      * along "tensor" a sum of [b, T, H] forward; backward one, and one of [b, T, k] float32;
      * along "sequence" a sum of [b] forward.

    Gradients are those of the device's own losses; of a parameter that all devices of an axis hold, the trainer sums
    them along "expert" and "sequence". Along "tensor" they are whole.

    Args:
      num_experts: E, a multiple of the devices along "expert".
      hidden: F, a multiple of the devices along "tensor"; by default 4 H.
      top: k.
      capacity_factor: room for that many times the tokens that an expert gets if all are equally used.
      balance: weight of the balancing loss.
      groups: G, into which each example's tokens are dealt; a divisor of T, a multiple of the devices along
        "sequence".

    Returns:
      A `FeedForward`; params are the kernels of "router" [H, E], "in" [E, H, F] and "out" [E, F, H].

    Raises:
      ValueError: if a value is out of its bounds; from `check`, for sizes that do not divide; from `apply`, when
        traced, if T is no multiple of `groups`.

    >>> layer = mixture_of_experts(4, hidden=16, top=1)
    >>> h = jax.random.normal(jax.random.key(0), (2, 8, 5))
    >>> out, loss = layer.apply(layer.init(jax.random.key(1), 5), h, Axes())
    >>> out.shape, loss.shape
    ((2, 8, 5), (2,))
    """
    where = "mixture_of_experts"
    _validate.at_least_one(where, "num_experts", num_experts, "a good start is 8")
    if hidden is not None:
        _validate.at_least_one(where, "hidden", hidden, "leave it out for four times the width")
    _validate.at_least_one(where, "top", top, "1 and 2 are usual")
    if top > num_experts:
        raise ValueError(f"{where}(top={top}): there are {num_experts} experts to choose; take at most as many.")
    _validate.positive(where, "capacity_factor", capacity_factor, "a good start is 1.25")
    _validate.at_least_zero(where, "balance", balance, "a good start is 0.01, and 0 leaves the loss out")
    _validate.at_least_one(where, "groups", groups, "1 counts capacity over whole examples")

    def init_fn(key: jax.Array, width: int) -> Tree:
        for_router, for_in, for_out = jax.random.split(key, 3)
        f, normal = hidden or 4 * width, jax.nn.initializers.lecun_normal
        each = normal(batch_axis=0)
        return {
            "router": {"kernel": normal()(for_router, (width, num_experts))},
            "in": {"kernel": each(for_in, (num_experts, width, f))},
            "out": {"kernel": each(for_out, (num_experts, f, width))},
        }

    def apply_fn(params: Tree, h: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
        here = _groups_here(groups, h.shape[1], axes)
        rows = h.reshape(-1, h.shape[1] // here, h.shape[2])
        share = capacity_factor * top * rows.shape[1] / num_experts
        room = min(rows.shape[1], max(1, math.ceil(share - 1e-6)))  # a whole number is one, however it is rounded
        gates, places, uneven = _route(params["router"]["kernel"], rows, top, room)
        x = _dealt(copied(rows, axes.tensor), places, num_experts * room)
        y = _experts(params, x.reshape(len(rows), num_experts, room, -1), axes).reshape(x.shape)
        out = jnp.einsum("rnk,rnkh->rnh", copied(gates, axes.tensor), _taken(y, places))
        loss = balance * uneven.reshape(-1, here).sum(1) / groups
        return summed(out.astype(h.dtype), axes.tensor).reshape(h.shape), summed(loss, axes.sequence)

    def check_fn(sizes: dict[str, int]) -> None:
        divides(where, sizes, "expert", num_experts=num_experts)
        divides(where, sizes, "sequence", groups=groups)
        if hidden is not None:
            divides(where, sizes, "tensor", hidden=hidden)

    specs = {
        "router": {"kernel": PartitionSpec()},
        "in": {"kernel": PartitionSpec("expert", None, "tensor")},
        "out": {"kernel": PartitionSpec("expert", "tensor", None)},
    }
    return FeedForward(init_fn, specs, apply_fn, check_fn)


def _groups_here(groups: int, tokens: int, axes: Axes) -> int:
    """Of an example's groups, those on this device."""
    parts = size(axes.sequence)
    if groups % parts or tokens * parts % groups:
        raise ValueError(
            f"mixture_of_experts(groups={groups}): the {parts} devices of the axis of tokens must divide it, and it "
            f"the {tokens * parts} tokens; take another multiple of {parts}."
        )
    return groups // parts


def _route(kernel: jax.Array, rows: jax.Array, top: int, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which expert takes which token.

    Args:
      kernel: [H, E].
      rows: [r, n, H], groups of tokens.
      top: k.
      room: C.

    Returns:
      Gates [r, n, k] float32; places [r, n, k] int32, e C + i for the i-th token of expert e, E C if it was full; and
      E sum_e f_e p_e, [r].
    """
    (r, n, _), num_experts = rows.shape, kernel.shape[1]
    logits = jnp.einsum("rnh,he->rne", rows.astype(jnp.float32), kernel.astype(jnp.float32))
    probabilities = jax.nn.softmax(logits)
    gates, chosen = jax.lax.top_k(probabilities, top)
    if top > 1:
        gates = gates / gates.sum(-1, keepdims=True)
    in_turn = jnp.swapaxes(chosen, 1, 2).reshape(r, top * n)
    falls_on = jax.nn.one_hot(in_turn, num_experts, dtype=jnp.int32)
    before = (jnp.cumsum(falls_on, axis=1) * falls_on).sum(-1) - 1
    places = jnp.where(before < room, in_turn * room + before, num_experts * room)
    uneven = num_experts * (falls_on.mean(1, dtype=jnp.float32) * probabilities.mean(1)).sum(-1)
    return gates, jnp.swapaxes(places.reshape(r, top, n), 1, 2), uneven


def _dealt(rows: jax.Array, places: jax.Array, count: int) -> jax.Array:
    """The tokens [r, n, H] at their places: [r, count, H], zeros where no token is."""
    r, n, top = places.shape
    tokens = jnp.repeat(jnp.arange(n), top)
    sources = jax.vmap(lambda at: jnp.full(count, n).at[at].set(tokens, mode="drop"))(places.reshape(r, -1))
    return _taken(rows, sources)


def _taken(x: jax.Array, where: jax.Array) -> jax.Array:
    """Rows of x [r, m, H] by number, [r, ...] int: [r, ..., H], zeros for number m."""
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(x, where)


def _experts(params: Tree, x: jax.Array, axes: Axes) -> jax.Array:
    """What the experts make of theirs, [r, E, C, H] to the same; along "tensor" each device's share of a sum."""
    x = exchanged(jnp.swapaxes(x, 0, 1), axes.expert, 0, 1)
    each = jax.vmap(product)
    inside = jax.nn.gelu(each(x.reshape(len(x), -1, x.shape[-1]), params["in"]["kernel"]))
    y = each(inside.astype(x.dtype), params["out"]["kernel"]).astype(x.dtype)
    return jnp.swapaxes(exchanged(y.reshape(x.shape), axes.expert, 1, 0), 0, 1)
