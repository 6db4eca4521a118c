"""Where a pipeline's devices keep what a later tick needs: slots, given to what is kept longest in turn.

    inputs      what a stage was sent, from its arrival until its forward tick
    kept        what the forward phase leaves for the backward phases
    gradients   what a stage's output means to the loss, from its arrival until its backward tick; of the last stage the
                output itself, from its forward tick
    waiting     what the input gradient leaves for the weight gradient

Letters: p devices, v chunks a device, m microbatches.
"""

from typing import NamedTuple

import numpy as np

from jfed.parallel.schedules import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Schedule


class Slots(NamedTuple):
    """Numbers of slots, [ticks, p] int32; the last slot of a kind is where goes what nobody needs."""

    input: np.ndarray  # that a forward tick reads
    kept: np.ndarray  # that a forward tick writes and a backward tick reads
    gradient: np.ndarray  # that a backward tick reads, and the last stage's forward tick writes
    waiting: np.ndarray  # that an input gradient's tick writes and a weight gradient's reads
    got_input: np.ndarray  # where what arrives at the end of the tick goes
    got_gradient: np.ndarray
    counts: tuple[int, int, int, int]  # slots that a device has of inputs, kept, gradients, waiting; one more is spare


def assigned(schedule: Schedule) -> Slots:
    """The fewest slots that a schedule can do with."""
    ticks, p = schedule.op.shape
    last = p * schedule.chunks - 1
    when = _when(schedule)
    intervals: dict[str, list] = {name: [[] for _ in range(p)] for name in ("input", "kept", "gradient", "waiting")}
    for (stage, i), (forward, backward, weight) in when.items():
        device, key = stage % p, (stage, i)
        if stage:
            intervals["input"][device].append((when[stage - 1, i][0], forward, key))
        intervals["kept"][device].append((forward, weight, key))
        arrives = forward if stage == last else when[stage + 1, i][1]
        intervals["gradient"][device].append((arrives, backward, key))
        if weight > backward:
            intervals["waiting"][device].append((backward, weight, key))
    slot, counts = {}, []
    for name, devices in intervals.items():
        coloured = [_coloured(rows) for rows in devices]
        counts.append(max(n for _, n in coloured))
        slot[name] = {key: number for numbers, _ in coloured for key, number in numbers.items()}
    tables = {name: np.full((ticks, p), n, np.int32) for name, n in zip(intervals, counts, strict=True)}
    got = {name: np.full((ticks, p), tables[name][0, 0], np.int32) for name in ("input", "gradient")}
    for (stage, i), (forward, backward, weight) in when.items():
        device, key = stage % p, (stage, i)
        tables["kept"][[forward, backward, weight], device] = slot["kept"][key]
        tables["gradient"][backward, device] = slot["gradient"][key]
        if weight > backward:
            tables["waiting"][[backward, weight], device] = slot["waiting"][key]
        if stage:
            tables["input"][forward, device] = slot["input"][key]
            got["gradient"][backward, (stage - 1) % p] = slot["gradient"][stage - 1, i]
        if stage == last:
            tables["gradient"][forward, device] = slot["gradient"][key]
        else:
            got["input"][forward, (stage + 1) % p] = slot["input"][stage + 1, i]
    return Slots(*tables.values(), got["input"], got["gradient"], tuple(counts))


def _when(schedule: Schedule) -> dict[tuple[int, int], tuple[int, int, int]]:
    """Ticks of the forward, the input gradient and the weight gradient of every (stage, microbatch)."""
    p, columns = schedule.op.shape[1], {FORWARD: (0,), BACKWARD: (1, 2), INPUT_GRADIENT: (1,), WEIGHT_GRADIENT: (2,)}
    when: dict = {}
    for tick, device in np.argwhere(schedule.op):
        stage = int(schedule.chunk[tick, device]) * p + int(device)
        row = when.setdefault((stage, int(schedule.microbatch[tick, device])), [0, 0, 0])
        for column in columns[int(schedule.op[tick, device])]:
            row[column] = int(tick)
    return {key: tuple(row) for key, row in when.items()}


def _coloured(rows: list[tuple[int, int, tuple]]) -> tuple[dict, int]:
    """A slot for each (begin, end, key), of as few as can be; one is free again at the end of the tick it ends in."""
    numbers, ends = {}, []
    for begin, end, key in sorted(rows):
        free = next((n for n, taken in enumerate(ends) if taken <= begin), len(ends))
        ends[free : free + 1] = [end]
        numbers[key] = free
    return numbers, len(ends)
