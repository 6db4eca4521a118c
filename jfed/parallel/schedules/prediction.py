"""Time, idle share and memory that a schedule's table foretells.

Letters: p devices, v chunks of the model on a device; F, B, W seconds of a stage's forward pass and of its gradients of
input and weights.
"""

from typing import NamedTuple

import numpy as np

from jfed import _validate
from jfed.parallel.schedules._timing import timed
from jfed.parallel.schedules.checks import check
from jfed.parallel.schedules.orders import to_orders
from jfed.parallel.schedules.table import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Schedule


class Prediction(NamedTuple):
    """What a schedule costs."""

    seconds: float  # an op starts once its device is free and what it needs has come
    bubble: float  # share of p * seconds in which devices are idle
    lockstep: float  # seconds if a tick lasts as long as its slowest op
    lockstep_bubble: float  # idle share then
    activations: np.ndarray  # [p] int32, most inputs of (chunk, microbatch) kept at once, until the weights' gradient
    waiting: np.ndarray  # [p] int32, most that had the input's gradient, and not yet the weights', at once


def predict(
    schedule: Schedule,
    *,
    forward: float = 1.0,
    input_gradient: float = 1.0,
    weight_gradient: float = 1.0,
    recompute: float = 0.0,
    message: float = 0.0,
) -> Prediction:
    """Time, idle share and memory of a schedule.

    Args:
      schedule: checked first.
      forward: F, seconds of a stage's forward pass over a microbatch; a stage is a chunk, so a v-th of a device's.
      input_gradient: B, seconds.
      weight_gradient: W, seconds.
      recompute: seconds by which BACKWARD, B + W, and INPUT_GRADIENT last longer, 0 if activations are kept.
      message: seconds from a device to another, in which both may go on; in lockstep all wait for it in each tick.

    Raises:
      ValueError: if the schedule is not one, or seconds are not finite, or negative, or 0 but for the last two.

    >>> from jfed.parallel.schedules import fused, one_f_one_b
    >>> cost = predict(fused(one_f_one_b(4, 8)))
    >>> cost.seconds, round(cost.bubble, 3), cost.lockstep, cost.waiting.tolist()
    (33.0, 0.273, 40.0, [0, 0, 0, 0])
    """
    for name, value in {
        "forward": forward,
        "input_gradient": input_gradient,
        "weight_gradient": weight_gradient,
    }.items():
        _validate.positive("predict", name, value, "give seconds")
    for name, value in {"recompute": recompute, "message": message}.items():
        _validate.at_least_zero("predict", name, value, "give seconds")
    check(schedule)
    op, p = schedule.op, schedule.op.shape[1]
    backward = input_gradient + weight_gradient
    lasts = np.array([0.0, forward, backward + recompute, input_gradient + recompute, weight_gradient])
    _, ends = timed(to_orders(schedule), schedule.chunks, lasts.tolist(), float(message))
    seconds, work = float(max(ends.values())), float(lasts[op].sum())
    lockstep = float(lasts[op].max(axis=1).sum() + (p > 1) * len(op) * message)
    done = (op == BACKWARD) | (op == WEIGHT_GRADIENT)
    return Prediction(
        seconds=seconds,
        bubble=1 - work / (p * seconds),
        lockstep=lockstep,
        lockstep_bubble=1 - work / (p * lockstep),
        activations=_peak(op == FORWARD, done),
        waiting=_peak(op == INPUT_GRADIENT, op == WEIGHT_GRADIENT),
    )


def _peak(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return (begins.astype(np.int32) - ends).cumsum(axis=0).max(axis=0).astype(np.int32)
