"""Peers that lie, and rules by which honest ones bear it: instead of the weighted mean, any function of what one hears.

A rule looks at what one peer received and gives its new model; an attack looks at the same, and writes what liars sent
instead. `robust` puts both into a mixing, under any method. ClippedGossip (He, Karimireddy and Jaggi 2022,
arXiv:2202.01545) trusts itself: a peer moves towards what it hears, by no more than a radius for each message.

Liars train, mix and are counted like all others, and only what they send to honest peers is replaced; what they hold
means nothing. Judge the rows of honest peers alone, `state.params[honest]`: the method's own average and consensus
distance are of everybody.

Letters of the paper: i a peer, x_i its model, W_ij the weight of what it hears from j, tau_i its radius, S slots.

    mixing     robust: both put into a mixing
    rules      clipped  clipped_adaptive  by
    attacks    dissensus  gaussian  sending
    received   what they look at
"""

from jfed.gossip.robust.attacks import Attack, dissensus, gaussian, sending
from jfed.gossip.robust.mixing import robust
from jfed.gossip.robust.received import Received
from jfed.gossip.robust.rules import Rule, by, clipped, clipped_adaptive

__all__ = [
    "Attack",
    "Received",
    "Rule",
    "by",
    "clipped",
    "clipped_adaptive",
    "dissensus",
    "gaussian",
    "robust",
    "sending",
]
