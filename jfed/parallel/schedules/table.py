"""A schedule as a table of ticks and devices, and what must be done before what.

Letters: p devices, m microbatches, v chunks of the model on a device, T ticks.
"""

from typing import NamedTuple

import numpy as np

IDLE, FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(5)
NAMES = ("idle", "forward", "backward", "input gradient", "weight gradient")

# What is done once an op is: BACKWARD is both gradients.
DOES = {
    FORWARD: (FORWARD,),
    BACKWARD: (INPUT_GRADIENT, WEIGHT_GRADIENT),
    INPUT_GRADIENT: (INPUT_GRADIENT,),
    WEIGHT_GRADIENT: (WEIGHT_GRADIENT,),
}


class Schedule(NamedTuple):
    """What p devices do in T ticks. Chunk c on device r is stage c p + r of the model's v p."""

    op: np.ndarray  # [T, p] int32, IDLE .. WEIGHT_GRADIENT
    chunk: np.ndarray  # [T, p] int32, which of the device's v chunks; 0 where idle
    microbatch: np.ndarray  # [T, p] int32; 0 where idle
    chunks: int  # v
    microbatches: int  # m


def needs(op: int, stage: int, microbatch: int, stages: int) -> list[tuple[int, int, int]]:
    """What must be done before an op."""
    if op == FORWARD:
        return [(FORWARD, stage - 1, microbatch)] if stage else []
    if op == WEIGHT_GRADIENT:
        return [(INPUT_GRADIENT, stage, microbatch)]
    after = [(INPUT_GRADIENT, stage + 1, microbatch)] if stage + 1 < stages else []
    return [(FORWARD, stage, microbatch), *after]
