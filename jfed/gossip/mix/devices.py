"""Mixing by collective permutes between devices, each with a block of peers.

Letters: n peers, S slots, m devices, b = n / m peers of each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfed import _axis
from jfed import mesh as meshes
from jfed.core import Tree
from jfed.gossip.mix._blocks import Blocks, blocks_of
from jfed.gossip.mix.mixer import Mixer, Mixing, column, decoded
from jfed.gossip.mix.weights import Weights
from jfed.gossip.topology.graph import Topology, peers
from jfed.tree import total


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
                if isinstance(x, jax.core.Tracer):
                    return apart(x) if x.ndim and x.shape[0] == n else everywhere(x)
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

        return Mixer(topology, combine, hear, place, everywhere, apart, average=average)

    return mixing


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
            weight = column(heard[s], x)
            mixed = mixed + jnp.where(weight != 0, weight * (row - x), 0)
        return mixed.astype(x.dtype)

    return jax.tree.map(one, own, *parts)
