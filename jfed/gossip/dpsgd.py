"""D-PSGD: peers descend their own gradients and average with their neighbours, in one order or another.

    dpsgd               x <- W x - eta g(x)      Lian et al. 2017, arXiv:1705.09056, Algorithm 1
    adapt_then_combine  x <- W (x - eta g(x))    diffusion, Chen and Sayed 2012, arXiv:1111.0034
    combine_then_adapt  x <- W x - eta g(W x)

In the first, models travel while gradients are computed. Where peers' data differ and the rate is constant, all three
come to rest away from the optimum, farther the worse the graph: see `d2`, `gradient_tracking`, `relay`.

Letters: W the mixing matrix, x_i a peer's model, g_i its gradient, eta the rate.
"""

from jfed.core import Algorithm, ClientWork
from jfed.gossip.decentralised import adapt_then_mix, allowed, decentralised, plus
from jfed.gossip.topology import graph


def dpsgd(work: ClientWork, topology: graph.Topology, **options) -> Algorithm:
    """Every peer averages its neighbours' models and descends the gradient that it found at its own.

    Gradients are found at models that have not met yet, also on the complete graph, where the other two orders are
    synchronous data-parallel SGD.

    Args:
      work: `local.sgd(...)` for local steps, or `local.stochastic_gradient(...)` for one gradient a round that
        `optimizer` descends.
      topology: rows must add up to 1; where columns do not, peers agree on a weighted mean.
      **options: those of `decentralised`: `optimizer`, `client_map`, `mixing`, `lost`.

    Raises:
      ValueError: if a row does not add up to 1.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jfed import core, local
    >>> from jfed.gossip import topology
    >>> work = local.gradient(lambda w, x, key: (w - x) ** 2 / 2)
    >>> algorithm = dpsgd(work, topology.ring(3), optimizer=optax.sgd(0.5))
    >>> population = core.Population(jnp.array([0.0, 3.0, 6.0]), jnp.arange(3), jnp.ones(3, int))
    >>> cohort = core.make_cohort(population, jnp.arange(3), steps=work.steps)
    >>> state, metrics = algorithm.round(algorithm.init(jnp.array(0.0)), cohort, jax.random.key(0))
    >>> print(state.params, algorithm.params(state))
    [0.  1.5 3. ] 1.5
    """
    graph.check_rows("dpsgd", topology)

    def step(net, x, g, optimizer, memory):
        updates, optimizer = net.descend(g)
        return plus(net.mix(x), updates), optimizer, memory

    return decentralised("dpsgd", work, topology, step=step, **allowed("dpsgd", options))


def adapt_then_combine(work: ClientWork, topology: graph.Topology, **options) -> Algorithm:
    """Every peer descends its gradient, then averages its neighbours' models.

    With `topology.complete` it is FedAvg in which everybody takes part and weighs alike; with one gradient a round,
    synchronous data-parallel SGD.

    Args:
      work: as in `dpsgd`.
      topology: as in `dpsgd`.
      **options: those of `decentralised`.

    Raises:
      ValueError: if a row does not add up to 1.
    """
    graph.check_rows("adapt_then_combine", topology)

    return decentralised(
        "adapt_then_combine", work, topology, step=adapt_then_mix, **allowed("adapt_then_combine", options)
    )


def combine_then_adapt(work: ClientWork, topology: graph.Topology, **options) -> Algorithm:
    """Every peer averages its neighbours' models, then descends its gradient there.

    Args:
      work: as in `dpsgd`.
      topology: as in `dpsgd`.
      **options: those of `decentralised`.

    Raises:
      ValueError: if a row does not add up to 1.
    """
    graph.check_rows("combine_then_adapt", topology)

    def step(net, x, g, optimizer, memory):
        updates, optimizer = net.descend(g)
        return plus(x, updates), optimizer, memory

    def before(net, x, memory):
        x = net.mix(x)
        return x, x

    return decentralised(
        "combine_then_adapt", work, topology, before=before, step=step, **allowed("combine_then_adapt", options)
    )
