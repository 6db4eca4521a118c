"""Stochastic gradient push: D-PSGD on directed graphs (Assran et al. 2019, arXiv:1811.10792, Algorithm 1).

    z = x / w;    x <- P (x - eta g(z));    w <- P w

A peer splits what it has over those it reaches, as it likes: only columns of P add up to 1. Then x comes to be the mean
times a factor that w, which travels along and began as 1, has come to be as well; z, the quotient, is the peer's model.

Letters of the paper: P the mixing matrix, x what is sent, w the push-sum weight, z = x / w.
"""

import jax
import jax.numpy as jnp

from jfed.core import Algorithm, ClientWork
from jfed.gossip import mix
from jfed.gossip.decentralised import adapt_then_mix, allowed, decentralised, plus
from jfed.gossip.mix import column
from jfed.gossip.topology import graph


def push_sum(work: ClientWork | None, topology: graph.Topology, **options) -> Algorithm:
    """SGP; with `work=None` push-sum averaging alone (Kempe et al. 2003).

    `state.params` is x; `algorithm.personal` and `algorithm.params` are made of z.

    A peer keeps what it would send to one that is away. Of messages that are lost there are two views. By default
    (`mix.mass_replaced`) a peer takes its own x and w in their place, as in experiments of Vogels et al. 2021
    (arXiv:2110.04175): w stays 1 where rows add up to 1. On graphs where they do not it grows without bound, to an
    overflow in thousands of rounds with 30 % lost. With `lost=mix.mass_returned` messages are gone with what they
    weighed, as for peers that do not notice, and w goes to 0. Models are means all the while, in which some count less,
    but a step eta of x is one of eta / w of the model: training then freezes or diverges.

    Args:
      work: as in `dpsgd`.
      topology: columns must add up to 1, such as those of `topology.push`; own weights must be above 0.
      **options: those of `decentralised`.

    Raises:
      ValueError: if a column does not add up to 1, or a peer keeps nothing of its own.
    """
    graph.check_columns("push_sum", topology)
    graph.check_keeps("push_sum", topology)

    def before(net, x, memory):
        return x, _quotient(x, memory)

    def step(net, x, g, optimizer, w):
        updates, optimizer = net.descend(g)
        sent = net.mix({"model": plus(x, updates), "weight": w})
        return sent["model"], optimizer, sent["weight"]

    options = {"lost": mix.mass_replaced} | allowed("push_sum", options)
    return decentralised(
        "push_sum",
        work,
        topology,
        before=before,
        step=step,
        memory=lambda params: jnp.ones(graph.peers(topology)),
        model=_quotient,
        **options,
    )


def biased_push(work: ClientWork | None, topology: graph.Topology, **options) -> Algorithm:
    """Push-sum without its weights, to see what they are for: where rows do not add up to 1, it agrees on no mean.

    Args:
      work: as in `push_sum`.
      topology: as in `push_sum`.
      **options: those of `push_sum`.

    Raises:
      ValueError: if a column does not add up to 1.
    """
    graph.check_columns("biased_push", topology)

    return decentralised(
        "biased_push",
        work,
        topology,
        step=adapt_then_mix,
        **({"lost": mix.mass_replaced} | allowed("biased_push", options)),
    )


def _quotient(x, w):
    return jax.tree.map(lambda x: (x / (column(w, x) if jnp.ndim(w) else w)).astype(x.dtype), x)
