"""Schedules from the order in which each device does its ops, and from tables of your own.

Letters: p devices, m microbatches, v chunks of the model on a device, T ticks.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jfed import _validate
from jfed.parallel.schedules._timing import DOES, timed
from jfed.parallel.schedules.checks import check
from jfed.parallel.schedules.table import IDLE, NAMES, Schedule


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
