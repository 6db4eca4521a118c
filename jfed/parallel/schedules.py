"""Pipeline schedules as tables: what each device does in each tick, checked before anything compiles.

A model is cut into v p stages, dealt to p devices in turns, and a batch into m microbatches. Each stage takes each
microbatch forward, and later backward: the gradient of its input, which the stage before waits for, and that of its
weights, which nothing waits for. Messages sent at the end of a tick can be used from the next on.

    schedule       order on a device                              idle share (F = B = W, m >= p)     inputs kept
    naive          a microbatch forward and back, then the next   1 - 1 / p                          1
    gpipe          all forward, then all back                     2 (p - 1) / (3 m + 2 (p - 1))      m
    one_f_one_b    back as soon as can be, one by one             2 (p - 1) / (3 m + 2 (p - 1))      p - r
    interleaved    the same, with v small stages a device         2 (p - 1) / (3 v m + 2 (p - 1))    (v + 1) p - 2 r - 1
    zb_h1          gradients of weights fill idle ticks           (p - 1) / (3 m + p - 1)            p

Both gradients at once, as `jax.vjp` has them, make one tick of two: `fused`. Any other order goes by `from_orders`, any
other table by `from_table`.

Source: Huang et al. 2018 (arXiv:1811.06965), GPipe; Narayanan et al. 2019 (doi:10.1145/3341301.3359646), 1F1B, and 2021
(arXiv:2104.04473), interleaved; Qi et al. 2023 (arXiv:2401.10241), the backward pass in two, and ZB-H1.

Letters: p devices, r one of them, m microbatches, v chunks of the model on a device, T ticks; F, B, W seconds of a
stage's forward pass and of its gradients of input and weights.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jfed import _validate

IDLE, FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(5)
NAMES = ("idle", "forward", "backward", "input gradient", "weight gradient")

# What is done once an op is: BACKWARD is both gradients.
_DOES = {
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


class Prediction(NamedTuple):
    """What a schedule costs."""

    seconds: float  # an op starts once its device is free and what it needs has come
    bubble: float  # share of p * seconds in which devices are idle
    lockstep: float  # seconds if a tick lasts as long as its slowest op
    lockstep_bubble: float  # idle share then
    activations: np.ndarray  # [p] int32, most inputs of (chunk, microbatch) kept at once, until the weights' gradient
    waiting: np.ndarray  # [p] int32, most that had the input's gradient, and not yet the weights', at once


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

    >>> print(predict(one_f_one_b(4, 8)).activations)
    [4 3 2 1]
    """
    _sizes("one_f_one_b", devices, microbatches)
    orders = []
    for r in range(devices):
        forward = [[(FORWARD, 0, i)] for i in range(microbatches)]
        orders.append(_alternating(forward, [_gradients(0, i) for i in range(microbatches)], devices - r - 1))
    return from_orders(orders, chunks=1, microbatches=microbatches)


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


def from_orders(orders: Iterable[Iterable[tuple]], *, chunks: int, microbatches: int) -> Schedule:
    """A table in which each device does its ops in an order, each in the first tick that it can.

    Args:
      orders: p lists of (op, chunk, microbatch).
      chunks: v.
      microbatches: m.

    Raises:
      ValueError: if an op is none, devices wait for each other for ever, or something is not done exactly once.

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
            if not (whole and entry[0] in _DOES and 0 <= entry[1] < chunks and 0 <= entry[2] < microbatches):
                raise ValueError(
                    f"from_orders(orders[{r}][{k}]={entry}): must be (op, chunk, microbatch) with op 1 to 4, chunk "
                    f"below {chunks}, microbatch below {microbatches}; see the module's constants."
                )
    starts, _ = _timed(orders, chunks, [1] * len(NAMES), 0)
    ticks = 1 + max((start for of_device in starts for start in of_device), default=-1)
    tables = np.zeros((3, ticks, len(orders)), np.int32)
    for r, order in enumerate(orders):
        for start, entry in zip(starts[r], order, strict=True):
            tables[:, start, r] = entry
    return from_table(*tables, chunks=chunks, microbatches=microbatches)


def to_orders(schedule: Schedule) -> list[list[tuple[int, int, int]]]:
    """The (op, chunk, microbatch) of each device, in order.

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


def check(schedule: Schedule) -> None:
    """Refuses a table that is no schedule.

    Each stage must take each microbatch forward once, and back once by BACKWARD, or INPUT_GRADIENT and a later
    WEIGHT_GRADIENT; and each op must come in a later tick than what it needs: the forward pass of the stage before, the
    gradient of the stage after, the stage's own forward pass.

    Raises:
      ValueError: naming tick, device and op of the first fault, and what is missing.

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
        mine = np.flatnonzero(np.isin(of, [op for op in _DOES if done in _DOES[op]]))
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
    _, ends = _timed(to_orders(schedule), schedule.chunks, lasts.tolist(), float(message))
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


def _needs(op: int, stage: int, microbatch: int, stages: int) -> list[tuple[int, int, int]]:
    """What must be done before an op."""
    if op == FORWARD:
        return [(FORWARD, stage - 1, microbatch)] if stage else []
    if op == WEIGHT_GRADIENT:
        return [(INPUT_GRADIENT, stage, microbatch)]
    after = [(INPUT_GRADIENT, stage + 1, microbatch)] if stage + 1 < stages else []
    return [(FORWARD, stage, microbatch), *after]


def _timed(orders: list[list[tuple]], chunks: int, lasts: Sequence, message: float) -> tuple[list[list], dict]:
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
                needs = _needs(op, stage, i, chunks * p)
                if any(need not in ends for need in needs):
                    break
                came = [ends[need] + (message if need[1] % p != r else 0) for need in needs]
                starts[r].append(max([free[r], *came]))
                free[r] = starts[r][-1] + lasts[op]
                ends |= {(done, stage, i): free[r] for done in _DOES[op]}
                moved = True
    for r, order in enumerate(orders):
        if len(starts[r]) < len(order):
            op, c, i = order[len(starts[r])]
            done, stage, _ = next(need for need in _needs(op, c * p + r, i, chunks * p) if need not in ends)
            there = any(done in _DOES[other] and (d, j) == (stage // p, i) for other, d, j in orders[stage % p])
            raise ValueError(
                f"from_orders(orders[{r}]): device {r} waits for ever to do {NAMES[op]} of chunk {c}, microbatch {i}: "
                f"it needs {NAMES[done]} of chunk {stage // p} on device {stage % p}; "
                f"{'move that up, or this down' if there else 'put that in'}."
            )
    return starts, ends


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


def _peak(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return (begins.astype(np.int32) - ends).cumsum(axis=0).max(axis=0).astype(np.int32)
