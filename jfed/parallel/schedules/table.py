"""A schedule as a table of ticks and devices.

Letters: p devices, m microbatches, v chunks of the model on a device, T ticks.
"""

from typing import NamedTuple

import numpy as np

IDLE, FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(5)
NAMES = ("idle", "forward", "backward", "input gradient", "weight gradient")


class Schedule(NamedTuple):
    """What p devices do in T ticks. Chunk c on device r is stage c p + r of the model's v p."""

    op: np.ndarray  # [T, p] int32, IDLE .. WEIGHT_GRADIENT
    chunk: np.ndarray  # [T, p] int32, which of the device's v chunks; 0 where idle
    microbatch: np.ndarray  # [T, p] int32; 0 where idle
    chunks: int  # v
    microbatches: int  # m
