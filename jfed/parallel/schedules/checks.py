"""Refusing tables that are no schedule, before anything compiles."""

import numpy as np

from jfed import _validate
from jfed.parallel.schedules._timing import DOES
from jfed.parallel.schedules.table import FORWARD, IDLE, INPUT_GRADIENT, NAMES, WEIGHT_GRADIENT, Schedule


def check(schedule: Schedule) -> None:
    """Refuses a table that is no schedule.

    Each stage must take each microbatch forward once, and back once by BACKWARD, or INPUT_GRADIENT and a later
    WEIGHT_GRADIENT; and each op must come in a later tick than what it needs: the forward pass of the stage before, the
    gradient of the stage after, the stage's own forward pass.

    Raises:
      ValueError: naming tick, device and op of the first fault, and what is missing.

    >>> from jfed.parallel.schedules import gpipe
    >>> check(gpipe(2, 2)._replace(microbatches=3))
    Traceback (most recent call last):
    ...
    ValueError: schedule(microbatch=2): device 0 never does forward of chunk 0, microbatch 2; give it a tick.
    """
    _table(schedule)
    ticks, devices, of, columns = _ops(schedule)
    stages, p = schedule.chunks * schedule.op.shape[1], schedule.op.shape[1]
    at = {}
    for done in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT):
        mine = np.flatnonzero(np.isin(of, [op for op in DOES if done in DOES[op]]))
        cells, first = np.unique(columns[mine], return_index=True)
        again = np.setdiff1d(np.arange(len(mine)), first)
        if again.size:
            k = mine[again[0]]
            before = ticks[mine[first[np.searchsorted(cells, columns[k])]]]
            raise ValueError(f"{_at(schedule, ticks[k], devices[k])}: that is done at tick {before}; drop one of them.")
        at[done] = np.full(stages * schedule.microbatches, -1)
        at[done][cells] = ticks[mine[first]]
        never = np.flatnonzero(at[done] < 0)
        if never.size:
            stage, i = divmod(int(never[0]), schedule.microbatches)
            what = f"{NAMES[done]} of chunk {stage // p}, microbatch {i}"
            raise ValueError(f"schedule(microbatch={i}): device {stage % p} never does {what}; give it a tick.")
    forward, gradient, weight = (table.reshape(stages, schedule.microbatches) for table in at.values())
    _in_turn(schedule, forward, forward, FORWARD, -1)
    _in_turn(schedule, forward, gradient, FORWARD, 0)
    _in_turn(schedule, gradient, gradient, INPUT_GRADIENT, 1)
    _in_turn(schedule, gradient, weight, INPUT_GRADIENT, 0, gap=0)  # the same tick is one of BACKWARD


def _table(schedule: Schedule) -> None:
    """Refuses what is no table of ops, chunks and microbatches."""
    _validate.at_least_one("schedule", "chunks", schedule.chunks, "1 is a stage a device")
    _validate.at_least_one("schedule", "microbatches", schedule.microbatches, "4 a device are a good start")
    limits = (len(NAMES), schedule.chunks, schedule.microbatches)
    for name, table, limit in zip(Schedule._fields, schedule, limits, strict=False):
        what = f"{table.dtype} {list(table.shape)}" if isinstance(table, np.ndarray) else type(table).__name__
        if not isinstance(table, np.ndarray) or table.dtype != np.int32 or table.ndim != 2 or not table.size:
            raise ValueError(f"schedule({name}: {what}): must be a numpy array [ticks, p] of int32; see from_table.")
        if table.shape != schedule.op.shape:
            raise ValueError(f"schedule({name}: {what}): op has shape {list(schedule.op.shape)}; give equal shapes.")
        wrong = np.argwhere((table < 0) | (table >= limit))
        if not wrong.size and name != "op":
            wrong, limit = np.argwhere((schedule.op == IDLE) & (table != 0)), 1
        if wrong.size:
            t, r = wrong[0]
            where = f"schedule({name}[{t}, {r}]={table[t, r]})"
            raise ValueError(f"{where}: tick {t} of device {r}, {_named(schedule, t, r)}, must have 0 to {limit - 1}.")


def _ops(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tick, device, op, and stage * m + microbatch of all that is done, tick by tick."""
    ticks, devices = np.nonzero(schedule.op)
    stages = schedule.chunk[ticks, devices] * schedule.op.shape[1] + devices
    cells = stages * schedule.microbatches + schedule.microbatch[ticks, devices]
    return ticks, devices, schedule.op[ticks, devices], cells


def _in_turn(schedule: Schedule, first: np.ndarray, then: np.ndarray, what: int, shift: int, gap: int = 1) -> None:
    """Refuses `then`, ticks [stages, m], that are not `gap` after the ticks `first` of the stages `shift` further."""
    p = schedule.op.shape[1]
    stages = np.arange(max(0, -shift), len(then) - max(0, shift))
    k, i = np.nonzero(then[stages] < first[stages + shift] + gap)
    if k.size:
        k, i = min(zip(stages[k].tolist(), i.tolist(), strict=True), key=lambda cell: then[cell])
        chunk, device = divmod(k + shift, p)
        raise ValueError(
            f"{_at(schedule, then[k, i], k % p)}: needs {NAMES[what]} of chunk {chunk} on device {device} in a "
            f"tick before, which is in tick {first[k + shift, i]}; put it in a later tick than that."
        )


def _at(schedule: Schedule, tick: int, device: int) -> str:
    return f"schedule(tick={tick}, device={device}, {_named(schedule, tick, device)})"


def _named(schedule: Schedule, tick: int, device: int) -> str:
    op, chunk, microbatch = (int(table[tick, device]) for table in schedule[:3])
    if not 0 < op < len(NAMES):
        return NAMES[IDLE] if op == IDLE else f"op {op}"
    return f"{NAMES[op]} of chunk {chunk}, microbatch {microbatch}"
