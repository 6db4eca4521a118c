"""Decentralised personalised learning: a part of the model is shared by gossip, the rest is a peer's own.

As in federated methods with local parts (`algorithms.partially_local`), one mask says which leaves never leave a peer,
such as the last layer; the others are averaged with neighbours. Both are trained together.
"""

from collections.abc import Callable

import jax

from jfed import tree
from jfed.core import Algorithm, ClientWork, Tree
from jfed.gossip.decentralised import allowed, decentralised, plus
from jfed.gossip.topology import graph


def personalised(
    work: ClientWork, topology: graph.Topology, *, is_local: Callable[[str], bool], **options
) -> Algorithm:
    """Adapt, then combine, over the leaves that are not local.

    Local leaves cost no bytes. `algorithm.personal` is a peer's own model; `algorithm.params` has the average of local
    leaves, too, and `"consensus"` is of all leaves.

    Args:
      work: as in `dpsgd`.
      topology: rows must add up to 1.
      is_local: whether a leaf is local, by its path, names joined by `/`.
      **options: those of `decentralised`.

    Raises:
      ValueError: if a row does not add up to 1; at `init`, if no leaf is local, or all are.
    """
    graph.check_rows("personalised", topology)

    def local_leaves(params: Tree) -> list[bool]:
        return [bool(is_local(tree.name_of(path))) for path, _ in jax.tree.leaves_with_path(params)]

    def step(net, x, g, optimizer, memory):
        updates, optimizer = net.descend(g)
        x = plus(x, updates)
        leaves, structure = jax.tree.flatten(x)
        flags = local_leaves(x)
        mixed = iter(net.mix([leaf for leaf, local in zip(leaves, flags, strict=True) if not local]))
        leaves = [leaf if local else next(mixed) for leaf, local in zip(leaves, flags, strict=True)]
        return jax.tree.unflatten(structure, leaves), optimizer, memory

    algorithm = decentralised("personalised", work, topology, step=step, **allowed("personalised", options))

    def init_fn(params: Tree):
        flags = local_leaves(params)
        if all(flags) or not any(flags):
            names = [tree.name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
            raise ValueError(
                f"personalised(is_local): it holds for {sum(flags)} of the leaves {names}; some must be local and some "
                "shared."
            )
        return algorithm.init(params)

    return algorithm._replace(init=init_fn)
