"""Learning together with no server: peers that each have a model, and average with their neighbours.

    topology                                        who hears whom, with which weights; spectral gaps
    mix                                             how: matrix, rows, permutes between devices; what is lost
    conditions                                      lost messages, failed links, peers that join and leave
    dpsgd  adapt_then_combine  combine_then_adapt   Lian et al. 2017; diffusion
    d2  gradient_tracking                           not biased by data that differ
    push_sum  biased_push                           directed graphs
    quasi_global                                    momentum for data that differ
    choco  choco_gossip  choco_step_size            compressed differences
    relay                                           sums of models along a tree
    ad_psgd                                         asynchronous pairs
    epidemic  epidemic_oracle                       random peers, drawn every round
    personalised                                    a part of each model is a peer's own
    robust                                          peers that lie: clipped gossip, any aggregator, attacks
    masks                                           sums of neighbours' models, and no model seen
    averaging                                       mixing alone
    decentralised  PeersState  Net                  the round they share, to build others

All are `core.Algorithm`s, for `jfed.run`: `algorithm.params(state)` is the average of all peers' models,
`algorithm.personal(state, i)` peer i's own, `run.evaluate_peers` judges every one of them.
"""

from jfed.gossip import conditions, masks, mix, robust, topology
from jfed.gossip.ad_psgd import PairsState, ad_psgd
from jfed.gossip.averaging import averaging
from jfed.gossip.choco import choco, choco_gossip, choco_step_size
from jfed.gossip.d2 import d2
from jfed.gossip.decentralised import Net, PeersState, consensus_distance, decentralised
from jfed.gossip.dpsgd import adapt_then_combine, combine_then_adapt, dpsgd
from jfed.gossip.epidemic import epidemic, epidemic_oracle
from jfed.gossip.gradient_tracking import gradient_tracking
from jfed.gossip.personalised import personalised
from jfed.gossip.push_sum import biased_push, push_sum
from jfed.gossip.quasi_global import quasi_global
from jfed.gossip.relay import relay

__all__ = [
    "Net",
    "PairsState",
    "PeersState",
    "ad_psgd",
    "adapt_then_combine",
    "averaging",
    "biased_push",
    "choco",
    "choco_gossip",
    "choco_step_size",
    "combine_then_adapt",
    "conditions",
    "consensus_distance",
    "d2",
    "decentralised",
    "dpsgd",
    "epidemic",
    "epidemic_oracle",
    "gradient_tracking",
    "masks",
    "mix",
    "personalised",
    "push_sum",
    "quasi_global",
    "relay",
    "robust",
    "topology",
]
