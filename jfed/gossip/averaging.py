"""Gossip averaging alone: peers agree on the mean of what each began with, `x <- W x`.

What a topology is worth is seen here: the consensus distance shrinks by `1 - spectral gap` a round.
Xiao and Boyd 2004 (Fast linear iterations for distributed averaging).
"""

from jfed.core import Algorithm
from jfed.gossip.decentralised import adapt_then_mix, allowed, decentralised
from jfed.gossip.topology import graph


def averaging(topology: graph.Topology, **options) -> Algorithm:
    """Peers mix and do not train; `state._replace(params=...)`, leaves [n, ...], gives them different models to begin.

    Args:
      topology: rows must add up to 1; the mean is kept if columns do, too.
      **options: those of `decentralised` but what only training needs.

    Raises:
      ValueError: if a row does not add up to 1.

    >>> import jax, jax.numpy as jnp
    >>> from jfed import core
    >>> from jfed.gossip import topology
    >>> algorithm = averaging(topology.one_peer_exponential(4))
    >>> population = core.Population((), jnp.arange(4), jnp.ones(4, int))
    >>> everyone = core.make_cohort(population, jnp.arange(4), steps=lambda size: size)
    >>> state = algorithm.init(jnp.array(0.0))._replace(params=jnp.array([1.0, 2.0, 3.0, 6.0]))
    >>> for t in range(2):
    ...     state, metrics = algorithm.round(state, everyone, jax.random.key(t))
    >>> print(state.params, metrics["consensus"])
    [3. 3. 3. 3.] 0.0
    """
    graph.check_rows("averaging", topology)

    return decentralised("averaging", None, topology, step=adapt_then_mix, **allowed("averaging", options))
