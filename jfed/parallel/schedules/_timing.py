"""What must be done before what, and when the ops of each device then start and end."""

from collections.abc import Sequence

from jfed.parallel.schedules.table import BACKWARD, FORWARD, INPUT_GRADIENT, NAMES, WEIGHT_GRADIENT

# What is done once an op is: BACKWARD is both gradients.
DOES = {
    FORWARD: (FORWARD,),
    BACKWARD: (INPUT_GRADIENT, WEIGHT_GRADIENT),
    INPUT_GRADIENT: (INPUT_GRADIENT,),
    WEIGHT_GRADIENT: (WEIGHT_GRADIENT,),
}


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


def needs(op: int, stage: int, microbatch: int, stages: int) -> list[tuple[int, int, int]]:
    """What must be done before an op."""
    if op == FORWARD:
        return [(FORWARD, stage - 1, microbatch)] if stage else []
    if op == WEIGHT_GRADIENT:
        return [(INPUT_GRADIENT, stage, microbatch)]
    after = [(INPUT_GRADIENT, stage + 1, microbatch)] if stage + 1 < stages else []
    return [(FORWARD, stage, microbatch), *after]
