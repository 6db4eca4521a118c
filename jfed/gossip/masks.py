"""Gossip in which nobody sees another's model: messages are masked, and the masks cancel where they are added up.

For each peer that hears them, neighbours j and k agree on a mask, as long as a model: one adds it to what it sends, the
other takes it off. So the sum over a neighbourhood is all that a peer learns. Models travel weighted, as fixed-point
numbers modulo 2^32, in which every mask is equally likely, and sums are exact. Secure aggregation (Bonawitz et al.
2017, doi:10.1145/3133956.3133982) came to neighbourhoods with DecentralizePy (Dhasade et al. 2023, arXiv:2304.08322);
see also CESAR (Biswas et al. 2024, arXiv:2405.07708).

Here masks are drawn from the round's key by Threefry. Peers that do not trust each other would agree on a key once for
each pair (Diffie-Hellman), and expand it by a cipher such as ChaCha20.

What is still seen: the weighted sum of one's neighbours, and how it changes. Of two neighbours, either can be told from
the sum by whoever knows the other; so can any by all others together.

Letters: n peers, S slots, D numbers of a model, i who hears, j and k whom it hears.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfed import _noise, _validate
from jfed.core import Tree
from jfed.gossip import mix
from jfed.gossip.topology import graph


def masked(mixing: mix.Mixing, *, bound: float) -> mix.Mixing:
    """A mixing in which each peer learns the weighted sum of its neighbours' models, and no model.

    Guarantees:
      * Of the messages that a peer receives, all but any one are uniform and independent, whatever the models.
      * Without losses it is the plain mixing, but for rounding: by `bound` 2^-30 at most, and a float's own, for each
        that is heard.
      * A peer that does not hear all its neighbours, because one is away or its message was lost, cannot take off the
        masks, and keeps its model in that round.
      * On a mesh only what `mixing` itself would permute travels, in uint32 all of it.

    A message of S neighbours takes S - 1 masks to make, so a peer draws S (S - 1) D numbers a round. Epidemic methods,
    in which only some of many possible neighbours send, come never to hear all.

    Args:
      mixing: brings the messages: `mix.sparse()`, `mix.on_mesh(...)`.
      bound: the largest size of a number in a model. What is beyond is sent as the bound, and a NaN as 0.

    Raises:
      ValueError: if `bound` is not in [1e-18, 1e18]; with a topology, if a row does not add up to 1 or a peer hears
        exactly one other, whose model it would see; when traced, if models are not of floats, or by a method that
        sends compressed changes or looks at single messages.

    >>> from jfed import core
    >>> from jfed.gossip import averaging, topology
    >>> algorithm = averaging(topology.ring(4), mixing=masked(mix.sparse(), bound=8.0))
    >>> population = core.Population((), jnp.arange(4), jnp.ones(4, int))
    >>> everyone = core.make_cohort(population, jnp.arange(4), steps=lambda size: size)
    >>> state = algorithm.init(jnp.array(0.0))._replace(params=jnp.array([0.0, 3.0, 6.0, 3.0]))
    >>> print(algorithm.round(state, everyone, jax.random.key(0))[0].params.round(6))
    [2. 3. 4. 3.]
    """
    scale = _scale("masked", bound)

    def mixing_fn(topology: graph.Topology) -> mix.Mixer:
        plan, mixer = _plan_of("masked", topology), mixing(topology)

        def combine(own: Tree, sent: Tree, weights: mix.Weights, key: jax.Array) -> Tree:
            if sent is not own:
                raise ValueError("masked: this method sends codes or changes, and masks are for models; take another.")
            now, models = _of_round(plan, weights.round), _flat(own)
            total = jnp.zeros(models.shape, jnp.uint32)
            for s in range(topology.source.shape[1]):
                heard = mixer.hear(_message(now, s, models, bound, scale, key), s, weights.round)
                total += jnp.where(now.hears[s][:, None], heard, jnp.uint32(0))
            neighbours = _unflat(lax.bitcast_convert_type(total, jnp.int32).astype(jnp.float32) / scale, own)
            complete = jnp.all(weights.came | ~now.hears, axis=0)

            def one(x, h):
                mixed = mix.column(now.own, x) * x.astype(jnp.float32) + h
                return jnp.where(mix.column(complete, x), mixed.astype(x.dtype), x)

            return jax.tree.map(one, own, neighbours)

        return mixer._replace(combine=combine, hear=_hears_nothing, nbytes=_nbytes)

    return mixing_fn


def masked_messages(
    topology: graph.Topology, params: Tree, key: jax.Array, *, bound: float, round: int | jax.Array = 0
) -> jax.Array:
    """What each peer gets to see in each slot of a round: `masked` with everybody present.

    Args:
      topology: as for `masked`.
      params: leaves [n, ...], models of all peers.
      key: of the masks.
      bound: as for `masked`.
      round: t.

    Returns:
      [S, n, D] uint32; 0 where nobody is heard. Its sum over slots, taken as int32, is the fixed-point sum.

    Raises:
      ValueError: as `masked`.

    >>> from jfed.gossip.topology import ring
    >>> seen = masked_messages(ring(3), jnp.ones((3, 1)), jax.random.key(0), bound=1.0)
    >>> seen.dtype, seen.shape, jnp.abs(seen.sum(0).view(jnp.int32) / 2**30 - 2 / 3).max() < 1e-6
    (dtype('uint32'), (2, 3, 1), Array(True, dtype=bool))
    """
    scale = _scale("masked_messages", bound)
    now, models = _of_round(_plan_of("masked_messages", topology), jnp.asarray(round)), _flat(params)

    def heard(s):
        source = jnp.asarray(topology.source[:, s])[round % graph.period(topology)]
        return jnp.where(now.hears[s][:, None], _message(now, s, models, bound, scale, key)[source], jnp.uint32(0))

    return jnp.stack([heard(s) for s in range(topology.source.shape[1])])


class _Plan(NamedTuple):
    """What peers know of a round; without the first axis, of one."""

    own: np.ndarray  # [P, n] float32
    hears: np.ndarray  # [P, S, n] bool, whether a peer hears anybody in a slot
    hearer: np.ndarray  # [P, S, n] int32, who hears a peer in a slot; itself: nobody
    weight: np.ndarray  # [P, S, n] float32, the weight that the one who hears gives to it
    others: np.ndarray  # [P, S, S, n] bool, in which other slots that one hears anybody


def _plan_of(where: str, topology: graph.Topology) -> _Plan:
    graph.check_rows(where, topology)
    rounds, slots, n = topology.source.shape
    hears = topology.source != np.arange(n)
    for t, i in np.ndindex(rounds, n):
        heard = set(topology.source[t, :, i][hears[t, :, i] & (topology.weight[t, :, i] > 0)].tolist())
        if len(heard) == 1:
            when = f" in round {t}" if rounds > 1 else ""
            raise ValueError(
                f"{where}(topology={topology.name!r}): peer {i} hears peer {heard.pop()} alone{when}, and would see "
                "its model; take a graph in which everybody hears two or more, such as topology.ring."
            )
    hearer = np.broadcast_to(np.arange(n, dtype=np.int32), (rounds, slots, n)).copy()
    t, s, i = np.nonzero(hears)
    hearer[t, s, topology.source[t, s, i]] = i
    weight = np.take_along_axis(topology.weight, hearer, 2)
    others = np.take_along_axis(hears[:, None], hearer[:, :, None], 3) & ~np.eye(slots, dtype=bool)[None, :, :, None]
    others &= (hearer != np.arange(n))[:, :, None]
    return _Plan(topology.own.astype(np.float32), hears, hearer, weight.astype(np.float32), others)


def _of_round(plan: _Plan, round: jax.Array) -> _Plan:
    return _Plan(*(jnp.asarray(x)[round % plan.own.shape[0]] for x in plan))


def _message(now: _Plan, slot: int, models: jax.Array, bound: float, scale: float, key: jax.Array) -> jax.Array:
    """What peers send in a slot, [n, D] uint32; of those whom nobody hears, what is not sent."""
    slots = now.hears.shape[0]
    models = jnp.clip(jnp.nan_to_num(models, posinf=bound, neginf=-bound), -bound, bound)
    fixed = jnp.round(now.weight[slot][:, None] * models * scale).astype(jnp.int32).astype(jnp.uint32)

    def add(k, message):
        # The pair's mask is that of two slots of who hears, rather than of those who speak there.
        other = k + (k >= slot)
        pair = jnp.minimum(slot, other) * slots + jnp.maximum(slot, other)
        words = jax.vmap(lambda i: _mask(key, i, pair, models.shape[1]))(now.hearer[slot])
        sign = jnp.where(slot < other, jnp.uint32(1), jnp.uint32(2**32 - 1))
        return message + jnp.where(now.others[slot, other], sign, jnp.uint32(0))[:, None] * words

    return lax.fori_loop(0, slots - 1, add, fixed)


def _mask(key: jax.Array, hearer: jax.Array, pair: jax.Array, d: int) -> jax.Array:
    """[D] uint32, the same at both ends of a pair: Threefry gives the same under any `vmap`, others need not."""
    words = jax.random.wrap_key_data(_noise.words(key), impl="threefry2x32")
    return jax.random.bits(jax.random.fold_in(jax.random.fold_in(words, hearer), pair), (d,), jnp.uint32)


def _scale(where: str, bound: float) -> float:
    """The power of two by which numbers become fixed-point: a weighted mean of them is below 2^30, half of the room."""
    _validate.within(where, "bound", bound, 1e-18, 1e18, "it is the largest size of a number in a model")
    return 2.0 ** (30 - math.ceil(math.log2(bound)))


def _flat(params: Tree) -> jax.Array:
    """Models [n, ...] as float32 rows [n, D]."""
    leaves = jax.tree.leaves(params)
    for x in leaves:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"masked: a leaf of {x.dtype} cannot be masked; models must be of floats.")
    return jnp.concatenate([x.reshape(x.shape[0], -1).astype(jnp.float32) for x in leaves], axis=1)


def _unflat(rows: jax.Array, like: Tree) -> Tree:
    """Rows [n, D] as a float32 tree of leaves [n, ...]."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(x.shape[1:]) for x in leaves])[:-1].tolist()
    parts = jnp.split(rows, ends, axis=1)
    return jax.tree.unflatten(structure, [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)])


def _hears_nothing(sent: Tree, slot: int, round: jax.Array) -> Tree:
    raise ValueError("masked: this method or rule looks at single messages, which masks hide; take one or the other.")


def _nbytes(sent: Tree) -> int:
    return 4 * sum(x.size for x in jax.tree.leaves(sent))
