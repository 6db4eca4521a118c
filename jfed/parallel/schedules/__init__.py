"""Pipeline schedules as tables: what each device does in each tick, checked before anything compiles.

A model is cut into v p stages, dealt to p devices in turns, and a batch into m microbatches. Each stage takes each
microbatch forward, and later backward: the gradient of its input, which the stage before waits for, and that of its
weights, which nothing waits for. Messages sent at the end of a tick can be used from the next on.

    schedule                order on a device                     idle share (F = B = W)           inputs kept
    naive                   one microbatch forward and back       1 - 1 / p                        1
    gpipe                   all forward, then all back            2 (p - 1) / (3 m + 2 (p - 1))    m
    one_f_one_b             back as soon as can be                2 (p - 1) / (3 m + 2 (p - 1))    p - r
    one_f_one_b_lockstep    all forward in a tick, or all back    (p - 1) / (m + p - 1)            2 (p - r) - 1
    interleaved             1F1B, v small stages a device         2 (p - 1) / (3 v m + 2 (p - 1))  (v + 1) p - 2 r - 1
    zb_h1                   gradients of weights fill gaps        (p - 1) / (3 m + p - 1)          p

These are of many microbatches, 2 p at least; each function says what holds of fewer.

Both gradients at once, as `jax.vjp` has them, make one tick of two: `fused`. Devices that exchange messages after every
tick wait for the slowest, and in a fused 1F1B some go forward while others go back, which takes longer; in
`one_f_one_b_lockstep` all do the same. Any other order goes by `from_orders`, any other table by `from_table`.

Source: Huang et al. 2018 (arXiv:1811.06965), GPipe; Narayanan et al. 2019 (doi:10.1145/3341301.3359646), 1F1B, and 2021
(arXiv:2104.04473), interleaved; Qi et al. 2023 (arXiv:2401.10241), the backward pass in two, and ZB-H1.

Letters: p devices, r one of them, m microbatches, v chunks of the model on a device, T ticks; F, B, W seconds of a
stage's forward pass and of its gradients of input and weights.
"""

from jfed.parallel.schedules.checks import check
from jfed.parallel.schedules.kinds import fused, gpipe, interleaved, naive, one_f_one_b, one_f_one_b_lockstep, zb_h1
from jfed.parallel.schedules.orders import from_orders, from_table, to_orders
from jfed.parallel.schedules.prediction import Prediction, predict
from jfed.parallel.schedules.table import BACKWARD, FORWARD, IDLE, INPUT_GRADIENT, NAMES, WEIGHT_GRADIENT, Schedule

__all__ = [
    "BACKWARD",
    "FORWARD",
    "IDLE",
    "INPUT_GRADIENT",
    "NAMES",
    "WEIGHT_GRADIENT",
    "Prediction",
    "Schedule",
    "check",
    "from_orders",
    "from_table",
    "fused",
    "gpipe",
    "interleaved",
    "naive",
    "one_f_one_b",
    "one_f_one_b_lockstep",
    "predict",
    "to_orders",
    "zb_h1",
]
