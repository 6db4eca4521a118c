"""Schedules of the literature, for any number of devices and microbatches, and one for devices in lockstep.

Each is the order in which devices do what they do, made a table.

Source: Huang et al. 2018 (arXiv:1811.06965), Narayanan et al. 2019 (doi:10.1145/3341301.3359646) and 2021
(arXiv:2104.04473), Qi et al. 2023 (arXiv:2401.10241).

Letters: p devices, r one of them, m microbatches, v chunks of the model on a device; F, B, W seconds of a stage's
forward pass and of its gradients of input and weights.
"""

import numpy as np

from jfed import _validate
from jfed.parallel.schedules.checks import check
from jfed.parallel.schedules.orders import from_orders, from_table, to_orders
from jfed.parallel.schedules.table import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Schedule


def naive(devices: int, microbatches: int) -> Schedule:
    """One device works at a time: a microbatch goes through all stages and back, then the next.

    Idle: 1 - 1 / p. Kept: 1 microbatch. Gradients are fused, as nothing else would run beside that of weights.

    Args:
      devices: p.
      microbatches: m.

    Raises:
      ValueError: if one is no whole number of at least 1.

    >>> print(naive(2, 1).op.T)
    [[1 0 0 2]
     [0 1 2 0]]
    """
    _sizes("naive", devices, microbatches)
    order = [(op, 0, i) for i in range(microbatches) for op in (FORWARD, BACKWARD)]
    return from_orders([order] * devices, chunks=1, microbatches=microbatches)


def gpipe(devices: int, microbatches: int) -> Schedule:
    """All microbatches forward, then all back (Huang et al. 2018, arXiv:1811.06965, with gradients in two ticks).

    Idle: 2 (p - 1) / (3 m + 2 (p - 1)) of equal ticks; fused, (p - 1) / (m + p - 1). Kept: m microbatches.

    Args:
      devices: p.
      microbatches: m.

    Raises:
      ValueError: if one is no whole number of at least 1.

    >>> print(gpipe(2, 2).microbatch.T)
    [[0 1 0 0 0 0 1 1]
     [0 0 1 0 0 1 1 0]]
    """
    _sizes("gpipe", devices, microbatches)
    forward = [(FORWARD, 0, i) for i in range(microbatches)]
    backward = [op for i in range(microbatches) for op in _gradients(0, i)]
    return from_orders([forward + backward] * devices, chunks=1, microbatches=microbatches)


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """After p - r - 1 forward passes, one forward and one backward in turn (1F1B).

    Idle: as `gpipe`. Kept: min(m, p - r) microbatches on device r, however many there are. Fused, it is also the order
    of PipeDream (Narayanan et al. 2019, doi:10.1145/3341301.3359646) within a batch.

    Args:
      devices: p.
      microbatches: m.

    Raises:
      ValueError: if one is no whole number of at least 1.

    >>> from jfed.parallel.schedules import predict
    >>> print(predict(one_f_one_b(4, 8)).activations)
    [4 3 2 1]
    """
    _sizes("one_f_one_b", devices, microbatches)
    orders = []
    for r in range(devices):
        forward = [[(FORWARD, 0, i)] for i in range(microbatches)]
        orders.append(_alternating(forward, [_gradients(0, i) for i in range(microbatches)], devices - r - 1))
    return from_orders(orders, chunks=1, microbatches=microbatches)


def one_f_one_b_lockstep(devices: int, microbatches: int) -> Schedule:
    """1F1B for devices that wait for each other every tick: in each, all that work go forward, or all go back.

    A tick then lasts as long for all; of a fused 1F1B some go forward while others go back, which takes longer. There
    are no ticks in which nobody has anything to do.

    Idle: (p - 1) / (m + p - 1), in lockstep too. Kept: min(m, 2 (p - 1 - r) + 1) microbatches on device r.

    Args:
      devices: p.
      microbatches: m.

    Raises:
      ValueError: if one is no whole number of at least 1.

    >>> print(one_f_one_b_lockstep(2, 2).op.T)
    [[1 1 0 0 2 2]
     [0 1 2 1 2 0]]
    """
    _sizes("one_f_one_b_lockstep", devices, microbatches)
    device, i = np.meshgrid(np.arange(devices), np.arange(microbatches))
    tables = np.zeros((3, 2 * (microbatches + 2 * (devices - 1)), devices), np.int32)
    for op, tick in ((FORWARD, 2 * (i + device)), (BACKWARD, 2 * (i + 2 * (devices - 1) - device) + 1)):
        tables[0, tick, device], tables[2, tick, device] = op, i
    tables = tables[:, tables[0].any(axis=1)]
    return from_table(*tables, chunks=1, microbatches=microbatches)


def interleaved(devices: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B with v smaller stages a device, passed through in groups of p microbatches.

    Idle: 2 (p - 1) / (3 v m + 2 (p - 1)) of equal ticks; fused, (p - 1) / (v m + p - 1). Kept: 2 (p - r - 1) +
    (v - 1) p + 1 inputs of chunks on device r, or all v m if these are fewer (Narayanan et al. 2021, arXiv:2104.04473,
    section 2.2).

    Args:
      devices: p.
      microbatches: m, a multiple of p.
      chunks: v, at least 2; with one it would be 1F1B that keeps more.

    Raises:
      ValueError: if one is no such whole number.

    >>> from jfed.parallel.schedules import predict
    >>> print(predict(interleaved(4, 8, 2)).activations)
    [11  9  7  5]
    """
    _sizes("interleaved", devices, microbatches)
    _validate.at_least_one("interleaved", "chunks", chunks, "2 is usual")
    if chunks == 1:
        raise ValueError("interleaved(chunks=1): chunks must be at least 2; one_f_one_b is the schedule of one.")
    if microbatches % devices:
        raise ValueError(
            f"interleaved(microbatches={microbatches}): the {devices} devices must divide microbatches; "
            f"take {-(-microbatches // devices) * devices}."
        )
    groups = range(0, microbatches, devices)
    in_turn = [(c, first + i) for first in groups for c in range(chunks) for i in range(devices)]
    forward = [[(FORWARD, c, i)] for c, i in in_turn]
    backward = [_gradients(chunks - 1 - c, i) for c, i in in_turn]
    ahead = [2 * (devices - r - 1) + (chunks - 1) * devices for r in range(devices)]
    orders = [_alternating(forward, backward, n) for n in ahead]
    return from_orders(orders, chunks=chunks, microbatches=microbatches)


def zb_h1(devices: int, microbatches: int) -> Schedule:
    """1F1B in which device r puts off gradients of weights by r microbatches, to when it would be idle.

    Idle: (p - 1) / (3 m + p - 1) of equal ticks if m >= p, else (2 p - m - 1) / (2 m + 2 p - 1). It takes
    m (F + B + W) + (p - 1) (F + B - W) seconds if m >= p, F >= W and B >= W. Kept: min(m, p) microbatches on every
    device, no more than 1F1B keeps on its first (Qi et al. 2023, arXiv:2401.10241, section 2.1 and figure 3).

    Args:
      devices: p.
      microbatches: m.

    Raises:
      ValueError: if one is no whole number of at least 1.

    >>> from jfed.parallel.schedules import predict
    >>> print(predict(zb_h1(4, 8)).activations)
    [4 4 4 4]
    """
    _sizes("zb_h1", devices, microbatches)
    orders = []
    for r in range(devices):
        forward = [[(FORWARD, 0, i)] for i in range(microbatches)]
        backward = [[(INPUT_GRADIENT, 0, i)] + [(WEIGHT_GRADIENT, 0, i - r)] * (i >= r) for i in range(microbatches)]
        rest = [(WEIGHT_GRADIENT, 0, i) for i in range(max(0, microbatches - r), microbatches)]
        orders.append(_alternating(forward, backward, devices - r - 1) + rest)
    return from_orders(orders, chunks=1, microbatches=microbatches)


def fused(schedule: Schedule) -> Schedule:
    """The same order, where a gradient of weights comes right after that of the input both in one tick.

    Args:
      schedule: gradients that something stands between stay as they are.

    Raises:
      ValueError: if the schedule is not one, as `check` says.

    >>> print(fused(gpipe(2, 1)).op.T)
    [[1 0 0 2]
     [0 1 2 0]]
    """
    check(schedule)
    orders = []
    for order in to_orders(schedule):
        orders.append([])
        for op, *which in order:
            if op == WEIGHT_GRADIENT and orders[-1][-1] == (INPUT_GRADIENT, *which):
                orders[-1][-1] = (BACKWARD, *which)
            else:
                orders[-1].append((op, *which))
    return from_orders(orders, chunks=schedule.chunks, microbatches=schedule.microbatches)


def _sizes(where: str, devices: int, microbatches: int) -> None:
    _validate.at_least_one(where, "devices", devices, "give those along the mesh's axis")
    _validate.at_least_one(where, "microbatches", microbatches, "4 a device are a good start")


def _gradients(chunk: int, microbatch: int) -> list[tuple]:
    return [(INPUT_GRADIENT, chunk, microbatch), (WEIGHT_GRADIENT, chunk, microbatch)]


def _alternating(forward: list[list], backward: list[list], ahead: int) -> list[tuple]:
    """`ahead` of the first, then one of each in turn, then what is left of the second."""
    ahead = min(ahead, len(forward))
    turns = [turn for k in range(len(backward)) for turn in (*forward[ahead + k : ahead + k + 1], backward[k])]
    return [op for turn in (*forward[:ahead], *turns) for op in turn]
