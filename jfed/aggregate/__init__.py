"""Aggregators: one message out of many, some of which may be wrong or malicious.

An aggregator is an optax transform of the server that sees all messages at once:

    init(params) -> state                       params: the shapes of one message
    update(stack, state, params, *, weights, ids, key, round) -> (aggregate, state)

`stack` has leaves [C, ...], one row a slot of the cohort; `weights` [C] float32, 0 for a slot that is
empty or whose client is absent or dropped. Such a row is treated as not there, whatever finite numbers
it holds: m is the number of clients present, and C never enters. If nobody is present the aggregate
is zero. Sums are in float32 or better, and the dtypes of the stack come back. Everything may be
traced; the number present may change without a new program.

    mean         the weighted mean
    coordinates  median and trimmed mean of each coordinate
    krum         the messages with the nearest neighbours
    distances    means in which the far counts less: geometric median, centred clipping
    buckets      any aggregator, of the means of random buckets
    attacks      any aggregator, with some clients sending what an attacker would

The robust rules count every client present alike, whatever its weight: a size that a client states of
itself is one more thing to lie about. The geometric median alone is weighted, as in its paper.

Letters: C slots, m clients present, f of them malicious; D numbers in a message.
"""

from jfed.aggregate.attacks import Attack, alie, alie_z, attacked, ipm, mimic, sign_flip
from jfed.aggregate.buckets import bucketing
from jfed.aggregate.coordinates import median, trimmed_mean
from jfed.aggregate.distances import ClippingState, centred_clipping, geometric_median
from jfed.aggregate.krum import krum, multi_krum
from jfed.aggregate.mean import mean

__all__ = [
    "Attack",
    "ClippingState",
    "alie",
    "alie_z",
    "attacked",
    "bucketing",
    "centred_clipping",
    "geometric_median",
    "ipm",
    "krum",
    "mean",
    "median",
    "mimic",
    "multi_krum",
    "sign_flip",
    "trimmed_mean",
]
