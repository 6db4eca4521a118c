"""RelaySGD: on a tree, sums of models are relayed, so that everybody's gets everywhere (Vogels et al. 2021).

Instead of averaging with its neighbours, a peer passes on to each of them the sum of its own model and of what the
others told it, with the number of models in it. After as many rounds as the tree is long, all see the same mean of
models, some of them late. Nothing is weakened on its way, so how much peers' data differ matters no more than delay.

    m_{i->j} = x_i^{t+1/2} + sum_{k != j} m_{k->i},   n_{i->j} = 1 + sum_{k != j} n_{k->i}   (of the round before)
    x_i      = (x_i^{t+1/2} + sum_j m_{j->i} + (n - n_i) x_i^t) / n,   n_i = 1 + sum_j n_{j->i}

arXiv:2110.04175, Algorithm 1, with the rule of its section on unreliable networks, as in its published code: the model
that a peer had takes the place of those that did not come, as in the first rounds, while sums are on their way.

Letters of the paper: n peers, m messages, n_{i->j} models in one; S slots, by which a peer keeps what it heard.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jfed.core import Algorithm, ClientWork
from jfed.gossip.decentralised import allowed, decentralised, plus
from jfed.gossip.mix import column
from jfed.gossip.topology import graph


def relay(work: ClientWork, topology: graph.Topology, **options) -> Algorithm:
    """RelaySGD; it sends as many bytes as D-PSGD, and a number with each message.

    What is remembered takes the memory of all models times the most neighbours that anybody has: little on a chain, and
    much on a star. Sums are of float32 or better.

    Args:
      work: as in `dpsgd`.
      topology: a tree, such as `chain`, `star`, `binary_tree`; its weights are not used.
      **options: those of `decentralised` but `lost`.

    Raises:
      ValueError: if the topology is no static tree, or `lost` is given.
    """
    graph.check_static("relay", topology)
    n, slots = graph.peers(topology), topology.source.shape[1]
    reverse = _reverse(topology)

    def step(net, x, g, optimizer, memory):
        updates, optimizer = net.descend(g)
        half = plus(x, updates)
        said, counted = memory["said"], memory["count"]  # [n, S, ...], [n, S]
        all_said, all_counted = jax.tree.map(lambda m: jnp.sum(m, 1), said), jnp.sum(counted, 1)
        told, numbers = [], []
        for s in range(slots):
            # What the one that is told this has said itself is left out.
            back = jnp.asarray(reverse[s])
            mine = jnp.take_along_axis(counted, back[:, None], 1)[:, 0]
            less = jax.tree.map(lambda m, back=back: _row(m, back), said)
            out = jax.tree.map(lambda h, a, m: h + (a - m), half, all_said, less)
            got, number = net.hear((out, 1.0 + all_counted - mine), s)
            came = net.weights.came[s]
            told.append(jax.tree.map(lambda m, came=came: jnp.where(column(came, m), m, 0).astype(m.dtype), got))
            numbers.append(jnp.where(came, number, 0.0))
        said = jax.tree.map(lambda h, *m: jnp.stack(m, 1) if m else h[:, None][:, :0], half, *told)
        counted = jnp.stack(numbers, 1) if numbers else counted

        missing = n - 1.0 - jnp.sum(counted, 1)

        def mean(h, m, x):
            return ((h + jnp.sum(m, 1) + column(missing, x) * x) / n).astype(h.dtype)

        return jax.tree.map(mean, half, said, x), optimizer, {"said": said, "count": counted}

    def memory(params):
        said = jax.tree.map(
            lambda x: jnp.zeros((n, slots, *x.shape[1:]), jnp.promote_types(x.dtype, jnp.float32)), params
        )
        return {"said": said, "count": jnp.zeros((n, slots))}

    return decentralised(
        "relay", work, topology, step=step, memory=memory, **allowed("relay", options, without=("lost",))
    )


def _row(m: jax.Array, slot: jax.Array) -> jax.Array:
    """[n, S, ...] at a slot of each peer, [n, ...]."""
    index = slot.reshape(slot.shape + (1,) * (m.ndim - 1))
    return jnp.take_along_axis(m, index, 1)[:, 0]


def _reverse(topology: graph.Topology) -> np.ndarray:
    """[S, n] int32: in which slot a sender hears the one that it tells something in slot s; any where it tells nobody.

    Raises:
      ValueError: if the graph is no tree.
    """
    source, n = topology.source[0], graph.peers(topology)
    heard = [(int(source[s, i]), i, s) for s in range(source.shape[0]) for i in range(n) if source[s, i] != i]
    slot = {(j, i): s for j, i, s in heard}
    oneway = [(j, i) for j, i in slot if (i, j) not in slot]
    group = list(range(n))
    for j, i in slot:
        group = [group[i] if g == group[j] else g for g in group]
    if oneway or len(heard) != 2 * (n - 1) or len(set(group)) != 1:
        raise ValueError(
            f"relay(topology={topology.name!r}): it is no tree, with one way between any two peers; take chain, star "
            "or binary_tree."
        )
    reverse = np.zeros((source.shape[0], n), np.int32)
    for j, i, s in heard:
        reverse[s, j] = slot[i, j]
    return reverse
