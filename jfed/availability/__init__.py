"""Who can take part, how much of the work they do, what data they have by then, and how long it takes.

A sampler says who is asked; here is what becomes of that. Stragglers are a cohort's `steps`, absence its
`weight` and `steps` of 0, a population that grows its `size`, and a slow device a number of seconds:
all of it data of one compiled program, whoever comes.

    stragglers   samplers around a sampler: dropping out, FedAvg's and FedProx's rules, partial work
    conditions   devices that train only at certain times, and a sampler of those available
    views        populations that grow, drift, or gain clients from round to round
    durations    seconds a client takes, and rounds that tell how long they lasted

Guarantees:
  * What a client draws depends on the key and its id, not on its place in the cohort; one that occurs
    twice draws the same both times.
  * A sampler that wraps another splits its key in two and hands the first to that other. Given one key,
    all wrappers of one sampler thus meet the same clients.
"""

from jfed.availability.conditions import Condition, all_of, available, bernoulli, diurnal, periodic
from jfed.availability.durations import Duration, exponential, half_normal, in_turn, lognormal, per_step, timed
from jfed.availability.stragglers import distributed_steps, drop, dropout, partial_work, per_client
from jfed.availability.views import View, arriving, growing, over_time, sliding

__all__ = [
    "Condition",
    "Duration",
    "View",
    "all_of",
    "arriving",
    "available",
    "bernoulli",
    "distributed_steps",
    "diurnal",
    "drop",
    "dropout",
    "exponential",
    "growing",
    "half_normal",
    "in_turn",
    "lognormal",
    "over_time",
    "partial_work",
    "per_client",
    "per_step",
    "periodic",
    "sliding",
    "timed",
]
