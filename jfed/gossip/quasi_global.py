"""Quasi-global momentum: each peer's momentum follows where all models go (Lin et al. 2021, arXiv:2102.04761).

    x^{t+1/2} = x^t - eta (beta m^t + g^t)
    x^{t+1}   = W x^{t+1/2}
    m^{t+1}   = mu m^t + (1 - mu) (x^t - x^{t+1}) / eta

Where peers' data differ, momentum of a peer's own gradients leads it away from the others; the difference of two mixed
models is nearer to what all would descend. This is Algorithm 1, QG-DSGDm, in which mu = beta; QG-DSGDm-N looks ahead
as Nesterov does, along `beta (beta m + g) + g`.

Letters of the paper: W the mixing matrix, x a peer's model, m its momentum buffer, eta the rate.
"""

import jax

from jfed import _validate, tree
from jfed.core import Algorithm, ClientWork
from jfed.gossip.decentralised import allowed, decentralised
from jfed.gossip.topology import graph


def quasi_global(
    work: ClientWork,
    topology: graph.Topology,
    *,
    learning_rate: float,
    momentum: float = 0.9,
    buffer_momentum: float | None = None,
    nesterov: bool = False,
    **options,
) -> Algorithm:
    """D-PSGD (adapt, then combine) with quasi-global momentum; it sends no more bytes.

    Args:
      work: as in `dpsgd`, usually one gradient a round.
      topology: rows must add up to 1.
      learning_rate: eta; it may be traced.
      momentum: beta, in [0, 1).
      buffer_momentum: mu, in [0, 1); by default beta.
      nesterov: whether to look ahead, as in the paper's experiments.
      **options: those of `decentralised` but `optimizer`, which this replaces.

    Raises:
      ValueError: if a number is out of range, a row does not add up to 1, or an optimizer is given.
    """
    where = "quasi_global"
    mu = momentum if buffer_momentum is None else buffer_momentum
    _validate.positive(where, "learning_rate", learning_rate, "0.1 is usual")
    _validate.within(where, "momentum", momentum, 0, 1, "0.9 is usual")
    _validate.within(where, "buffer_momentum", mu, 0, 1, "leave it out for that of the paper")
    _validate.flags(where, nesterov=nesterov)
    for name, value in (("momentum", momentum), ("buffer_momentum", mu)):
        if _validate.is_concrete(value) and value >= 1:
            raise ValueError(f"{where}({name}={value!r}): {name} must be below 1; 0.9 is usual.")
    graph.check_rows(where, topology)
    eta = learning_rate

    def step(net, x, g, optimizer, m):
        def ahead(x, g, m):
            direction = momentum * m + g
            direction = momentum * direction + g if nesterov else direction
            return (x - eta * direction).astype(x.dtype)

        half = tree.select(net.trained, jax.tree.map(ahead, x, g, m), x)
        new = net.mix(half)
        m = jax.tree.map(lambda m, x, n: (mu * m + (1 - mu) * (x - n) / eta).astype(m.dtype), m, x, new)
        return new, optimizer, m

    return decentralised(
        where, work, topology, step=step, memory=tree.zeros, **allowed(where, options, without=("optimizer",))
    )
