"""How peers hear each other: every peer's model becomes a weighted sum of its own and of those it hears.

A mixing maps a `Topology` to a `Mixer`, which does one round of it: as a product of matrices (`dense`), by gathering
rows (`sparse`), or by collective permutes between devices with one peer each, or a block of them (`on_mesh`). All give
the same result. What came through in a round, and with which weights, is data (`weights_of`), so links may fail and
peers leave within one compiled program. Sums are taken of differences, `x_i + sum_j w_ij (x_j - x_i)` where weights add
up to 1, so that peers who agree stay where they are to the last bit.

Letters: n peers, S slots, P rounds until the topology repeats, m devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfed import _axis, compress
from jfed import mesh as meshes
from jfed.core import Tree
from jfed.gossip._blocks import Blocks, blocks_of
from jfed.gossip.topology.graph import TOLERANCE, Topology, peers, period
from jfed.tree import total


class Weights(NamedTuple):
    """What a round's messages weigh."""

    own: jax.Array  # [n] float32, a peer's own model
    heard: jax.Array  # [S, n] float32, what a peer hears in each slot; 0 where nothing came
    came: jax.Array  # [S, n] bool, whether something did
    sent: jax.Array  # [S, n] bool, whether something was sent, that may be lost
    round: jax.Array  # [] int32
    total: jax.Array  # [n] float32, of all that a peer has or hears; 1 but for directed graphs


def _as_it_is(tree: Tree) -> Tree:
    return tree


def _average(tree: Tree) -> Tree:
    return jax.tree.map(lambda x, s: (s / x.shape[0]).astype(x.dtype), tree, total(tree))


class Mixer(NamedTuple):
    """One topology, ready to mix."""

    topology: Topology
    combine: Callable  # (own, sent, weights, key) -> own_i own + sum_s heard_si decode(sent_j), leaves [n, ...]
    hear: Callable  # (tree, slot, round) -> what each peer hears in a slot, its own row where nobody; leaves [n, ...]
    place: Callable = _as_it_is  # tree -> the same, leaves [n, ...] where their peers are, others everywhere
    alike: Callable = _as_it_is  # small tree -> the same on all devices, in a program
    apart: Callable = _as_it_is  # leaves [n, ...] -> the same, rows with their peers, in a program
    average: Callable = _average  # leaves [n, ...] -> their mean, leaves [...]


Mixing = Callable[[Topology], Mixer]


class Coming(NamedTuple):
    """What came in a round, and what did not."""

    source: jax.Array  # [S, n] int32, whom a peer hears in each slot; itself where nobody
    came: jax.Array  # [S, n] bool; also where nobody was to be heard
    linked: jax.Array  # [S, n] bool, whether both ends are present: what comes not then was lost on its way


Lost = Callable[[jax.Array, jax.Array, Coming], tuple[jax.Array, jax.Array]]
"""`(own [n], heard [S, n], coming) -> (own, heard)`: the weights of a round in which not everything came."""


def own_instead(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """A peer takes its own model in the place of one that did not come: rows still add up to 1."""
    return own + jnp.sum(jnp.where(coming.came, 0.0, heard), 0), jnp.where(coming.came, heard, 0.0)


def renormalised(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """The weights of what did come are scaled so that they add up to what all would have; own ones must be above 0."""
    left = jnp.where(coming.came, heard, 0.0)
    scale = (own + jnp.sum(heard, 0)) / (own + jnp.sum(left, 0))
    return own * scale, left * scale[None]


def nothing_instead(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """A message that was lost counts as zeros, as for peers that do not notice; who is away is noticed."""
    own, heard = own_instead(own, heard, coming._replace(came=coming.linked))
    return own, jnp.where(coming.came, heard, 0.0)


def nothing(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """What did not come counts as zeros, whether it was lost or nobody was there: for changes, rather than models."""
    return own, jnp.where(coming.came, heard, 0.0)


def mass_returned(own: jax.Array, heard: jax.Array, coming: Coming) -> tuple[jax.Array, jax.Array]:
    """For shares of what a peer has, columns: it keeps what it would send to one away; what is lost is lost."""
    kept = jnp.zeros_like(own).at[coming.source].add(jnp.where(coming.linked, 0.0, heard))
    return own + kept, jnp.where(coming.came, heard, 0.0)


def weights_of(
    topology: Topology,
    round: jax.Array,
    *,
    present: jax.Array,
    arrives: jax.Array | None = None,
    links: jax.Array | None = None,
    lost: Lost,
) -> Weights:
    """The weights of a round in which some peers are away, and some messages are lost.

    Args:
      topology: who is to hear whom.
      round: [] int32.
      present: [n] bool; a peer that is away neither sends nor hears, and keeps its model.
      arrives: [n, n] bool, `arrives[i, j]`: what j sends gets through to i; by default all does.
      links: [n, n] bool, `links[i, j]`: j sends to i in this round; by default all do that are to be heard.
      lost: what replaces a message.
    """
    t = round % period(topology)
    own = jnp.asarray(topology.own, jnp.float32)[t]
    heard = jnp.asarray(topology.weight, jnp.float32)[t]
    source = jnp.asarray(topology.source)[t]
    me = jnp.arange(peers(topology))[None]
    nobody = source == me
    linked = present[None] & present[source]
    linked = nobody | (linked if links is None else linked & links[me, source])
    came = linked if arrives is None else linked & (nobody | arrives[me, source])
    own, heard = lost(own, heard, Coming(source, came, linked))
    own = jnp.where(present, own, 1.0)
    whole = own + jnp.sum(heard, 0)
    whole = jnp.where(jnp.abs(whole - 1) < TOLERANCE, 1.0, whole)
    return Weights(own, heard, came & ~nobody, linked & ~nobody, round, whole)


def dense() -> Mixing:
    """A product with the mixing matrix: for graphs in which most peers hear each other. On one device."""

    def mixing(topology: Topology) -> Mixer:
        n = peers(topology)

        def combine(own: Tree, sent: Tree, weights: Weights, key: jax.Array) -> Tree:
            del key
            source = jnp.asarray(topology.source)[weights.round % period(topology)]
            me = jnp.broadcast_to(jnp.arange(n)[None], source.shape)
            matrix = jnp.zeros((n, n)).at[me, source].add(weights.heard)

            def product(x):
                rows = jnp.matmul(matrix, x.reshape(n, -1), precision=lax.Precision.HIGHEST)
                return rows.reshape(x.shape)

            def one(x, y):
                if sent is own:  # of differences to anybody's, which are 0 where all agree
                    y = x - x[:1]
                    mixed = column(weights.total, x) * x - column(jnp.sum(weights.heard, 0), x) * y + product(y)
                else:
                    mixed = column(weights.own, x) * x + product(y)
                return mixed.astype(x.dtype)

            return jax.tree.map(one, own, own if sent is own else decoded(sent))

        return Mixer(topology, combine, _by_rows(topology))

    return mixing


def sparse() -> Mixing:
    """Slot by slot, by gathering the rows that are heard: for graphs of few neighbours. On one device."""

    def mixing(topology: Topology) -> Mixer:
        def combine(own: Tree, sent: Tree, weights: Weights, key: jax.Array) -> Tree:
            del key
            source = _of_round(topology, weights.round)
            what = own if sent is own else decoded(sent)

            def one(x, y):
                mixed = column(weights.total, x) * x

                def add(s, mixed):
                    return mixed + column(weights.heard[s], y) * (jnp.take(y, source[s], axis=0) - x)

                slots = source.shape[0]
                if slots > _UNROLLED:
                    return lax.fori_loop(0, slots, lambda s, mixed: add(s, mixed), mixed).astype(x.dtype)
                for s in range(slots):
                    mixed = add(s, mixed)
                return mixed.astype(x.dtype)

            return jax.tree.map(one, own, what)

        return Mixer(topology, combine, _by_rows(topology))

    return mixing


def automatic() -> Mixing:
    """`dense` where peers hear more than an eighth of all, `sparse` where they hear fewer. On one device."""

    def mixing(topology: Topology) -> Mixer:
        return (dense() if topology.source.shape[1] * 8 > peers(topology) else sparse())(topology)

    return mixing


def on_mesh(mesh: Mesh, *, axis: str = "peers") -> Mixing:
    """By collective permutes between the devices along one mesh axis, each with a block of n / m peers.

    A device is sent each row once, however many of its peers hear it; with one peer a device, a slot is a permute. A
    message of `jfed.compress` travels as it is packed and is decoded where it is heard. For a topology that changes,
    the permutes of all its rounds are in the program, and one branch of them runs.

    Args:
      mesh: from `jfed.mesh.make`; may span processes.
      axis: name of the mesh axis.

    Raises:
      ValueError: if the mesh has no such axis; at construction of a method, if peers are no multiple of devices.
    """
    m = meshes.devices_along("on_mesh", mesh, axis)

    def mixing(topology: Topology) -> Mixer:
        n = peers(topology)
        if n % m:
            raise ValueError(f"on_mesh(mesh of {m} devices): {n} peers are no multiple of it; take {-(-n // m) * m}.")
        rounds = [blocks_of(source, m) for source in topology.source]
        split, alike = PartitionSpec(axis), PartitionSpec()

        def combine(own: Tree, sent: Tree, weights: Weights, key: jax.Array) -> Tree:
            del key

            @meshes.shard_map(
                mesh=mesh, in_specs=(split, split, split, PartitionSpec(None, axis), alike), out_specs=split
            )
            def on_each(own, sent, whole, heard, t):
                def of(blocks):
                    return lambda sent: _mixed(blocks, own, sent, whole, heard, axis)

                return _branch(t, [of(blocks) for blocks in rounds], sent)

            return on_each(own, sent, weights.total, weights.heard, weights.round)

        def hear(tree: Tree, slot: int, round: jax.Array) -> Tree:
            @meshes.shard_map(mesh=mesh, in_specs=(split, alike), out_specs=split)
            def on_each(tree, t):
                def of(blocks):
                    return lambda tree: _at(_table(blocks, tree, axis), _mine(blocks.place, axis)[0])

                return _branch(t, [of(blocks_of(source[slot : slot + 1], m)) for source in topology.source], tree)

            return on_each(tree, round)

        def place(tree: Tree) -> Tree:
            def one(x):
                spec = split if jnp.ndim(x) and jnp.shape(x)[0] == n else alike
                x, sharding = np.asarray(x), NamedSharding(mesh, spec)
                return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

            return jax.tree.map(one, tree)

        def everywhere(tree: Tree) -> Tree:
            return lax.with_sharding_constraint(tree, NamedSharding(mesh, alike))

        def apart(tree: Tree) -> Tree:
            return lax.with_sharding_constraint(tree, NamedSharding(mesh, split))

        @meshes.shard_map(mesh=mesh, in_specs=split, out_specs=alike)
        def average(tree: Tree) -> Tree:
            sums = lax.psum(total(tree), axis)
            return jax.tree.map(lambda x, s: (s / n).astype(x.dtype), tree, sums)

        return Mixer(topology, combine, hear, place, everywhere, apart, average)

    return mixing


def decoded(sent: Tree) -> Tree:
    """Messages of all peers, leaves [n, ...], as the arrays that they stand for."""
    return jax.vmap(compress.decode)(sent) if compress.nodes(sent) else sent


def column(weights: jax.Array, x: jax.Array) -> jax.Array:
    """[n] as [n, 1, ...], to be multiplied with x [n, ...]."""
    return weights.reshape(weights.shape + (1,) * (jnp.ndim(x) - 1))


_UNROLLED = 16  # slots; more are a loop, so that programs stay small


def _of_round(topology: Topology, round: jax.Array) -> jax.Array:
    """[S, n], whom peers hear."""
    if period(topology) == 1:
        return jnp.asarray(topology.source[0])
    return jnp.asarray(topology.source)[round % period(topology)]


def _by_rows(topology: Topology) -> Callable:
    def hear(tree: Tree, slot: int, round: jax.Array) -> Tree:
        return jax.tree.map(lambda x: jnp.take(x, _of_round(topology, round)[slot], axis=0), tree)

    return hear


def _branch(t: jax.Array, branches: list[Callable], x: Tree) -> Tree:
    """The branch of round t; all devices take the same, so that permutes in it meet."""
    return branches[0](x) if len(branches) == 1 else lax.switch(t % len(branches), branches, x)


def _mine(table: np.ndarray, axis: str) -> jax.Array:
    """A device's row of a table [m, ...]."""
    return jnp.asarray(table)[lax.axis_index(axis)]


def _table(blocks: Blocks, tree: Tree, axis: str) -> list[Tree]:
    """A device's own rows, and those that each transfer brings it."""
    (b,) = {x.shape[0] for x in jax.tree.leaves(tree)}
    parts = [tree]
    for transfer in blocks.transfers:
        rows = tree if b == 1 else _at([tree], _mine(transfer.rows, axis))
        parts.append(_axis.joined(lambda x, pairs=transfer.pairs: _axis.permute(x, axis, pairs), rows, lead=1))
    return parts


def _at(parts: list[Tree], index: jax.Array) -> Tree:
    """Rows of parts laid end to end."""
    return jax.tree.map(lambda *x: jnp.take(jnp.concatenate(x) if len(x) > 1 else x[0], index, axis=0), *parts)


def _mixed(blocks: Blocks, own: Tree, sent: Tree, whole: jax.Array, heard: jax.Array, axis: str) -> Tree:
    """A device's rows [b, ...] after mixing."""
    parts = [decoded(part) for part in _table(blocks, sent, axis)]
    place = _mine(blocks.place, axis)  # [S, b]

    def one(x, *parts):
        mixed = column(whole, x) * x
        rows = parts[1:] if x.shape[0] == 1 else jnp.concatenate(parts)
        for s in range(heard.shape[0]):
            row = rows[s] if x.shape[0] == 1 else jnp.take(rows, place[s], axis=0)
            mixed = mixed + column(heard[s], x) * (row - x)
        return mixed.astype(x.dtype)

    return jax.tree.map(one, own, *parts)
