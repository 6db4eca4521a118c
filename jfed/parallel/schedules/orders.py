"""Schedules from the order in which each device does its ops, and from tables of your own."""

from collections.abc import Iterable, Sequence

import numpy as np

from jfed import _validate
from jfed.parallel.schedules.checks import check
from jfed.parallel.schedules.table import DOES, IDLE, NAMES, Schedule, needs


def from_orders(orders: Iterable[Iterable[tuple]], *, chunks: int, microbatches: int) -> Schedule:
    """A table in which each device does its ops in an order, each in the first tick that it can.

    Args:
      orders: p lists of (op, chunk, microbatch).
      chunks: v.
      microbatches: m.

    Raises:
      ValueError: if an op is none, devices wait for each other for ever, or something is not done exactly once.

    >>> from jfed.parallel.schedules import BACKWARD, FORWARD
    >>> order = [(FORWARD, 0, 0), (BACKWARD, 0, 0)]
    >>> print(from_orders([order, order, order], chunks=1, microbatches=1).op.T)
    [[1 0 0 0 0 2]
     [0 1 0 0 2 0]
     [0 0 1 2 0 0]]
    """
    _validate.at_least_one("from_orders", "chunks", chunks, "1 is a stage a device")
    _validate.at_least_one("from_orders", "microbatches", microbatches, "4 a device are a good start")
    orders = [[tuple(entry) for entry in order] for order in orders]
    for r, order in enumerate(orders):
        for k, entry in enumerate(order):
            whole = len(entry) == 3 and all(isinstance(number, int | np.integer) for number in entry)
            if not (whole and entry[0] in DOES and 0 <= entry[1] < chunks and 0 <= entry[2] < microbatches):
                raise ValueError(
                    f"from_orders(orders[{r}][{k}]={entry}): must be (op, chunk, microbatch) with op 1 to 4, chunk "
                    f"below {chunks}, microbatch below {microbatches}; see the module's constants."
                )
    starts, _ = timed(orders, chunks, [1] * len(NAMES), 0)
    ticks = 1 + max((start for of_device in starts for start in of_device), default=-1)
    tables = np.zeros((3, ticks, len(orders)), np.int32)
    for r, order in enumerate(orders):
        for start, entry in zip(starts[r], order, strict=True):
            tables[:, start, r] = entry
    return from_table(*tables, chunks=chunks, microbatches=microbatches)


def to_orders(schedule: Schedule) -> list[list[tuple[int, int, int]]]:
    """The (op, chunk, microbatch) of each device, in order.

    >>> from jfed.parallel.schedules import gpipe
    >>> to_orders(gpipe(1, 1))
    [[(1, 0, 0), (3, 0, 0), (4, 0, 0)]]
    """
    rows = np.stack(schedule[:3], axis=-1)  # [T, p, 3]
    return [[tuple(entry) for entry in rows[rows[:, r, 0] != IDLE, r].tolist()] for r in range(rows.shape[1])]


def from_table(op: Sequence, chunk: Sequence, microbatch: Sequence, *, chunks: int, microbatches: int) -> Schedule:
    """A table of your own, checked.

    Args:
      op: [T, p] whole numbers, as are the next two; what these say where op is IDLE does not matter.
      chunk: which of the device's chunks.
      microbatch: which microbatch.
      chunks: v.
      microbatches: m.

    Raises:
      ValueError: if it is no schedule, as `check` says.

    >>> from jfed.parallel.schedules import BACKWARD, FORWARD
    >>> one = from_table([[FORWARD], [BACKWARD]], [[0], [0]], [[0], [0]], chunks=1, microbatches=1)
    """
    tables = dict(zip(Schedule._fields, map(np.asarray, (op, chunk, microbatch)), strict=False))
    for name, table in tables.items():
        if not np.issubdtype(table.dtype, np.integer):
            raise ValueError(f"from_table({name}: {table.dtype}): needs whole numbers [T, p]; give integers.")
    op, chunk, microbatch = tables.values()
    if op.shape == chunk.shape == microbatch.shape:
        chunk, microbatch = (np.where(op == IDLE, 0, table) for table in (chunk, microbatch))
    schedule = Schedule(*(table.astype(np.int32) for table in (op, chunk, microbatch)), chunks, microbatches)
    check(schedule)
    return schedule


def timed(orders: list[list[tuple]], chunks: int, lasts: Sequence, message: float) -> tuple[list[list], dict]:
    """When the ops of each device start, and when what they do is done, if each starts as soon as it can."""
    p = len(orders)
    starts: list[list] = [[] for _ in orders]
    free, ends, moved = [0] * p, {}, True
    while moved:
        moved = False
        for r, order in enumerate(orders):
            while len(starts[r]) < len(order):
                op, c, i = order[len(starts[r])]
                stage = c * p + r
                before = needs(op, stage, i, chunks * p)
                if any(need not in ends for need in before):
                    break
                came = [ends[need] + (message if need[1] % p != r else 0) for need in before]
                starts[r].append(max([free[r], *came]))
                free[r] = starts[r][-1] + lasts[op]
                ends |= {(done, stage, i): free[r] for done in DOES[op]}
                moved = True
    for r, order in enumerate(orders):
        if len(starts[r]) < len(order):
            op, c, i = order[len(starts[r])]
            done, stage, _ = next(need for need in needs(op, c * p + r, i, chunks * p) if need not in ends)
            there = any(done in DOES[other] and (d, j) == (stage // p, i) for other, d, j in orders[stage % p])
            raise ValueError(
                f"from_orders(orders[{r}]): device {r} waits for ever to do {NAMES[op]} of chunk {c}, microbatch {i}: "
                f"it needs {NAMES[done]} of chunk {stage // p} on device {stage % p}; "
                f"{'move that up, or this down' if there else 'put that in'}."
            )
    return starts, ends
