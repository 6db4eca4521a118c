"""Gradient tracking: each peer follows the mean of all gradients, and descends that.

    x^{t+1} = W (x^t - eta y^t)
    y^{t+1} = W y^t + g^{t+1} - g^t,    y^0 = g^0

The mean of y is the mean of g in every round, so with a constant rate peers come to rest at the optimum of all, where
D-PSGD stays away from it. Pu and Nedić 2018 (arXiv:1805.11454, equation 2), Nedić et al. 2017 (arXiv:1607.03218).

Letters: W the mixing matrix, x a peer's model, y its estimate of the mean gradient, g its own gradient.
"""

from jfed import tree
from jfed.core import Algorithm, ClientWork
from jfed.gossip.decentralised import allowed, decentralised, minus, plus
from jfed.gossip.topology import graph


def gradient_tracking(work: ClientWork, topology: graph.Topology, **options) -> Algorithm:
    """D-PSGD along tracked gradients; peers send two arrays for every one.

    A peer that does not train takes no step, and its last gradient stays in the mean. Lost messages undo what makes it
    unbiased, and so does who is away, or a link that fails, on directed graphs.

    Args:
      work: as in `dpsgd`, usually one gradient a round.
      topology: rows and columns must add up to 1.
      **options: those of `decentralised`; `optimizer` descends y.

    Raises:
      ValueError: if a row or column does not add up to 1.
    """
    graph.check_rows("gradient_tracking", topology)
    graph.check_columns("gradient_tracking", topology)

    def step(net, x, g, optimizer, memory):
        g = tree.select(net.trained, g, memory["gradient"])
        y = plus(memory["mixed"], minus(g, memory["gradient"]))
        updates, optimizer = net.descend(y)
        sent = net.mix({"model": plus(x, updates), "gradient": y})
        return sent["model"], optimizer, {"mixed": sent["gradient"], "gradient": g}

    return decentralised(
        "gradient_tracking",
        work,
        topology,
        step=step,
        memory=lambda params: {"mixed": tree.zeros(params), "gradient": tree.zeros(params)},
        **allowed("gradient_tracking", options),
    )
