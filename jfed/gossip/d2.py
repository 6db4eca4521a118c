"""D2: D-PSGD that is not biased by how much peers' data differ (Tang et al. 2018, arXiv:1803.07068, Algorithm 1).

    x^1     = W (x^0 - eta g^0)
    x^{t+1} = W (2 x^t - x^{t-1} - eta (g^t - g^{t-1}))

The difference of two steps takes the place of a step, so that at rest gradients cancel over peers and not at each. With
`c^t = x^t - x^{t-1} - u^{t-1}`, u = -eta g, and `z^t = x^t + u^t + c^t` this reads

    x^{t+1} = W z^t,   c^{t+1} = c^t + (x^{t+1} - z^t)

in which rounding errors do not add up: as peers come to agree the bracket goes to 0.

Letters: W the mixing matrix, x a peer's model, u its update, c its correction.
"""

from jfed import tree
from jfed.core import Algorithm, ClientWork
from jfed.gossip.decentralised import allowed, decentralised, minus, plus
from jfed.gossip.topology import graph, measures


def d2(work: ClientWork, topology: graph.Topology, **options) -> Algorithm:
    """D-PSGD with the difference to the round before; it costs the bytes of D-PSGD and twice its memory.

    A peer that does not train repeats its last update. Lost messages and peers that leave undo what makes it unbiased.

    Args:
      work: as in `dpsgd`, usually one gradient a round.
      topology: undirected and static, with eigenvalues above -1/3; `topology.lazy` makes them so.
      **options: those of `decentralised`; the rate of `optimizer` must not change.

    Raises:
      ValueError: if the topology is none of these.
    """
    graph.check_rows("d2", topology)
    graph.check_static("d2", topology)
    graph.check_symmetric("d2", topology)
    smallest = measures.smallest_eigenvalue(topology)
    if smallest <= -1 / 3 + graph.TOLERANCE:
        raise ValueError(
            f"d2(topology={topology.name!r}): its smallest eigenvalue is {smallest:.4g} and must be above -1/3; "
            "take topology.lazy(topology)."
        )

    def step(net, x, g, optimizer, memory):
        updates, optimizer = net.descend(g)
        u = tree.select(net.trained, updates, memory["update"])
        ahead = plus(x, u, memory["correction"])
        new = net.mix(ahead)
        return new, optimizer, {"correction": plus(memory["correction"], minus(new, ahead)), "update": u}

    return decentralised(
        "d2",
        work,
        topology,
        step=step,
        memory=lambda params: {"correction": tree.zeros(params), "update": tree.zeros(params)},
        **allowed("d2", options),
    )
