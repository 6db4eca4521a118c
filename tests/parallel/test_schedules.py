"""Pipeline schedules: closed forms, a plain simulation, and every fault a table can have."""

import functools

import numpy as np
import pytest

from jfed import plot
from jfed.parallel import schedules
from jfed.parallel.schedules import BACKWARD, FORWARD, IDLE, INPUT_GRADIENT, WEIGHT_GRADIENT

SIZES = [(p, m) for p in (1, 2, 4, 8) for m in (4, 8, 16, 32)]
sizes = pytest.mark.parametrize(("p", "m"), SIZES)
GENERATORS = {
    "naive": schedules.naive,
    "gpipe": schedules.gpipe,
    "one_f_one_b": schedules.one_f_one_b,
    "one_f_one_b_lockstep": schedules.one_f_one_b_lockstep,
    "interleaved": functools.partial(schedules.interleaved, chunks=2),
    "zb_h1": schedules.zb_h1,
}


def idle(schedule):
    """The share of the table's ticks in which nothing is done."""
    return (schedule.op == IDLE).mean()


def random_orders(seed, p, m, v):
    """Any order that respects what needs what, gradients in one tick or two by chance."""
    rng = np.random.default_rng(seed)
    orders, stages = [[] for _ in range(p)], p * v
    split = rng.random((stages, m)) < 0.6
    forward, gradient = np.zeros(m, int), np.full(m, stages)  # the next stage; the last that is done
    weights = []
    for _ in range(2 * stages * m + split.sum()):
        ready = [(FORWARD, forward[i], i) for i in range(m) if forward[i] < stages]
        ready += [(INPUT_GRADIENT, gradient[i] - 1, i) for i in range(m) if forward[i] == stages and gradient[i]]
        ready += weights
        op, stage, i = ready[rng.integers(len(ready))]
        forward[i] += op == FORWARD
        gradient[i] -= op == INPUT_GRADIENT
        if op == WEIGHT_GRADIENT:
            weights.remove((op, stage, i))
        elif op == INPUT_GRADIENT and split[stage, i]:
            weights.append((WEIGHT_GRADIENT, stage, i))
        elif op == INPUT_GRADIENT:
            op = BACKWARD
        orders[stage % p].append((op, int(stage) // p, i))
    return orders


def random_schedule(seed):
    p, m, v = ((1, 3, 2), (2, 5, 1), (3, 4, 2), (4, 6, 1))[seed % 4]
    return schedules.from_orders(random_orders(seed, p, m, v), chunks=v, microbatches=m)


def simulated(schedule, lasts, message):
    """Seconds by relaxation: a table's ops start at the latest of all that they follow, until nothing moves."""
    p, v = schedule.op.shape[1], schedule.chunks
    cells = [(t, r) for t in range(len(schedule.op)) for r in range(p) if schedule.op[t, r]]
    find = {}
    for t, r in cells:
        op, stage, i = schedule.op[t, r], schedule.chunk[t, r] * p + r, schedule.microbatch[t, r]
        for kind in ("fbw"[k] for k in {FORWARD: [0], BACKWARD: [1, 2], INPUT_GRADIENT: [1], WEIGHT_GRADIENT: [2]}[op]):
            find[kind, stage, i] = (t, r)
    before = {cell: [] for cell in cells}
    for (kind, stage, i), cell in find.items():
        if kind == "f" and stage:
            before[cell].append((find["f", stage - 1, i], message * (p > 1)))
        if kind == "b":
            before[cell].append((find["f", stage, i], 0.0))
            if stage < p * v - 1:
                before[cell].append((find["b", stage + 1, i], message * (p > 1)))
        if kind == "w" and find["b", stage, i] != cell:
            before[cell].append((find["b", stage, i], 0.0))
    for r in range(p):
        line = [cell for cell in cells if cell[1] == r]
        for first, then in zip(line, line[1:], strict=False):
            before[then].append((first, 0.0))
    start, moved = dict.fromkeys(cells, 0.0), True
    while moved:
        new = {c: max([0.0, *(start[b] + lasts[schedule.op[b]] + wait for b, wait in before[c])]) for c in cells}
        moved, start = new != start, new
    return max(start[cell] + lasts[schedule.op[cell]] for cell in cells)


@sizes
@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_idle_ticks_with_gradients_in_two_ticks_are_those_of_the_closed_form(name, p, m):
    schedule = GENERATORS[name](p, m)
    expected = 2 * (p - 1) / (3 * m + 2 * (p - 1))
    assert idle(schedule) == pytest.approx(expected, abs=1e-12)
    cost = schedules.predict(schedule)
    assert (cost.bubble, cost.lockstep_bubble) == pytest.approx((expected, expected), abs=1e-12)


@sizes
@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_the_bubble_with_fused_gradients_is_that_of_the_closed_form(name, p, m):
    cost = schedules.predict(schedules.fused(GENERATORS[name](p, m)))
    assert cost.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert cost.seconds == 3 * (m + p - 1)


@pytest.mark.parametrize("v", [2, 3])
@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m % p == 0])
def test_the_bubble_of_interleaved_stages_is_smaller_by_their_number(p, m, v):
    schedule = schedules.interleaved(p, m, v)
    assert idle(schedule) == pytest.approx(2 * (p - 1) / (3 * v * m + 2 * (p - 1)), abs=1e-12)
    assert schedules.predict(schedules.fused(schedule)).bubble == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)


@sizes
def test_the_bubble_of_zb_h1_is_that_of_the_closed_form(p, m):
    schedule = schedules.zb_h1(p, m)
    # With fewer microbatches than devices no order reaches it: the first waits 2 p - 1 ticks, then has 2 m to do.
    expected = (p - 1) / (3 * m + p - 1) if m >= p else (2 * p - m - 1) / (2 * m + 2 * p - 1)
    assert idle(schedule) == pytest.approx(expected, abs=1e-12)
    assert schedules.predict(schedule).bubble == pytest.approx(expected, abs=1e-12)


@sizes
def test_1f1b_for_lockstep_idles_as_long_however_much_longer_gradients_take(p, m):
    schedule = schedules.one_f_one_b_lockstep(p, m)
    expected = (p - 1) / (m + p - 1)
    assert idle(schedule) == pytest.approx(expected, abs=1e-12)
    cost = schedules.predict(schedule, forward=1.0, input_gradient=1.5, weight_gradient=2.0, recompute=1.0)
    assert cost.lockstep_bubble == pytest.approx(expected, abs=1e-12)
    assert cost.activations.tolist() == [min(m, 2 * (p - 1 - r) + 1) for r in range(p)]
    for ops in schedule.op:  # no tick in which some go forward and others back
        assert len(set(ops.tolist()) - {IDLE}) == 1


@sizes
def test_naive_leaves_all_devices_but_one_idle(p, m):
    schedule = schedules.naive(p, m)
    assert ((schedule.op != IDLE).sum(axis=1) == 1).all()
    assert schedules.predict(schedule).bubble == pytest.approx(1 - 1 / p, abs=1e-12)
    assert (schedules.predict(schedule).activations == 1).all()


@pytest.mark.parametrize("seconds", [(1, 1, 1), (2, 2, 1), (1, 2, 1), (3, 4, 2), (1, 1, 2), (2, 3, 3), (4, 1, 2)])
def test_zb_h1_takes_the_papers_time_just_where_weights_take_no_longer_than_the_rest(seconds):
    f, b, w = seconds
    cost = schedules.predict(schedules.zb_h1(4, 8), forward=f, input_gradient=b, weight_gradient=w)
    expected = 8 * (f + b + w) + 3 * (f + b - w)
    assert cost.seconds == expected if w <= min(f, b) else cost.seconds > expected


@pytest.mark.parametrize("seconds", [(1, 1, 1), (2, 3, 1), (1, 2, 4)])
@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_the_split_of_gradients_takes_the_weights_share_out_of_the_bubble(name, seconds):
    f, b, w = seconds
    schedule = GENERATORS[name](4, 8)
    predict = functools.partial(schedules.predict, forward=f, input_gradient=b, weight_gradient=w)
    assert predict(schedule).seconds == 8 * (f + b + w) + 3 * (f + b)
    assert predict(schedules.fused(schedule)).seconds == 8 * (f + b + w) + 3 * (f + b + w)


@pytest.mark.parametrize(
    ("name", "kept", "waiting"),
    [
        ("naive", [1, 1, 1, 1], [0, 0, 0, 0]),
        ("gpipe", [8, 8, 8, 8], [1, 1, 1, 1]),
        ("one_f_one_b", [4, 3, 2, 1], [1, 1, 1, 1]),
        ("one_f_one_b_lockstep", [7, 5, 3, 1], [0, 0, 0, 0]),
        ("interleaved", [11, 9, 7, 5], [1, 1, 1, 1]),
        ("zb_h1", [4, 4, 4, 4], [1, 2, 3, 4]),
    ],
)
def test_what_four_devices_keep_of_eight_microbatches(name, kept, waiting):
    cost = schedules.predict(GENERATORS[name](4, 8))
    assert cost.activations.tolist() == kept
    assert cost.waiting.tolist() == waiting


@pytest.mark.parametrize("name", GENERATORS)
def test_only_gpipe_keeps_more_of_more_microbatches(name):
    few, many = (schedules.predict(GENERATORS[name](4, m)).activations for m in (16, 32))
    assert (many == (2 * few if name == "gpipe" else few)).all()


@sizes
def test_zb_h1_keeps_no_more_than_1f1b_on_its_first_device(p, m):
    most = schedules.predict(schedules.zb_h1(p, m)).activations.max()
    assert most == schedules.predict(schedules.one_f_one_b(p, m)).activations[0] == min(p, m)


@pytest.mark.parametrize("name", GENERATORS)
def test_each_device_takes_each_microbatch_through_each_chunk_in_the_same_number_of_ticks(name):
    schedule = GENERATORS[name](4, 8)
    ops = {op: int((schedule.op == op).sum()) for op in range(1, 5)}
    n = 4 * 8 * schedule.chunks
    expected = {FORWARD: n, BACKWARD: n, INPUT_GRADIENT: 0, WEIGHT_GRADIENT: 0}
    if name not in ("naive", "one_f_one_b_lockstep"):
        expected |= {BACKWARD: 0, INPUT_GRADIENT: n, WEIGHT_GRADIENT: n}
    assert ops == expected


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("message", [0.0, 0.7])
def test_seconds_are_those_of_a_plain_simulation(seed, message):
    schedule = random_schedule(seed)
    lasts = np.array([0.0, 1.0, 1.5 + 0.7 + 0.3, 1.5 + 0.3, 0.7])
    cost = schedules.predict(
        schedule, forward=1.0, input_gradient=1.5, weight_gradient=0.7, recompute=0.3, message=message
    )
    p = schedule.op.shape[1]
    busy = sum(lasts[op] for op in schedule.op.ravel())
    lockstep = sum(max(lasts[op] for op in row) + (message if p > 1 else 0.0) for row in schedule.op)
    assert cost.seconds == pytest.approx(simulated(schedule, lasts, message), rel=1e-12)
    assert cost.lockstep == pytest.approx(lockstep, rel=1e-12)
    assert cost.bubble == pytest.approx(1 - busy / (p * cost.seconds), abs=1e-12)
    assert cost.lockstep_bubble == pytest.approx(1 - busy / (p * lockstep), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_memory_is_that_of_a_plain_count(seed):
    schedule = random_schedule(seed)
    cost = schedules.predict(schedule)
    for r, order in enumerate(schedules.to_orders(schedule)):
        kept, waiting, most_kept, most_waiting = set(), set(), 0, 0
        for op, *which in order:
            which = tuple(which)
            kept |= {which} if op == FORWARD else set()
            waiting |= {which} if op == INPUT_GRADIENT else set()
            most_kept, most_waiting = max(most_kept, len(kept)), max(most_waiting, len(waiting))
            if op in (BACKWARD, WEIGHT_GRADIENT):
                kept, waiting = kept - {which}, waiting - {which}
        assert (cost.activations[r], cost.waiting[r]) == (most_kept, most_waiting)


def test_a_message_is_waited_for_at_every_change_of_device():
    cost = schedules.predict(schedules.naive(4, 5), message=0.25)
    assert cost.seconds == 5 * (4 * 3 + 2 * 3 * 0.25)
    assert cost.lockstep == 5 * (4 * 3 + 2 * 4 * 0.25)
    alone = schedules.interleaved(1, 4, 2)
    assert schedules.predict(alone, message=9.0).seconds == schedules.predict(alone).seconds


@pytest.mark.parametrize("seed", range(12))
def test_tables_of_any_order_that_respects_needs_pass_with_idle_ticks_anywhere(seed):
    schedule = random_schedule(seed)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(2 * len(schedule.op), len(schedule.op), replace=False))
    tables = [np.full((2 * len(schedule.op), schedule.op.shape[1]), filler) for filler in (IDLE, -1, 7)]
    for table, given in zip(tables, schedule[:3], strict=True):
        table[rows] = np.where(schedule.op == IDLE, table[rows], given)
    padded = schedules.from_table(*tables, chunks=schedule.chunks, microbatches=schedule.microbatches)
    again = schedules.from_orders(
        schedules.to_orders(padded), chunks=schedule.chunks, microbatches=schedule.microbatches
    )
    for one, other in zip(schedule, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("seed", range(8))
def test_fused_keeps_the_order(seed):
    schedule = random_schedule(seed)
    once = schedules.fused(schedule)
    for before, after in zip(schedules.to_orders(schedule), schedules.to_orders(once), strict=True):
        pulled = []
        for k, (op, *which) in enumerate(after):
            pair = [(INPUT_GRADIENT, *which), (WEIGHT_GRADIENT, *which)]
            was = op == BACKWARD and (BACKWARD, *which) not in before
            pulled += pair if was else [after[k]]
            assert op != INPUT_GRADIENT or after[k + 1 : k + 2] != pair[1:]
        assert pulled == before
    np.testing.assert_array_equal(schedules.fused(once).op, once.op)


BASE = schedules.one_f_one_b(3, 4)  # device 2 does the forward and both gradients of microbatch 0 in ticks 2 to 4


def with_cell(tick, device, **values):
    """The base, one cell changed."""
    tables = {name: getattr(BASE, name).copy() for name in ("op", "chunk", "microbatch")}
    for name, value in values.items():
        tables[name][tick, device] = value
    return BASE._replace(**tables)


def with_swap(one, other):
    """The base, two cells exchanged."""
    tables = {name: getattr(BASE, name).copy() for name in ("op", "chunk", "microbatch")}
    for table in tables.values():
        table[one], table[other] = table[other], table[one]
    return BASE._replace(**tables)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (with_cell(2, 2, op=IDLE, microbatch=0), "device 2 never does forward of chunk 0, microbatch 0"),
        (with_cell(3, 2, op=IDLE, microbatch=0), "device 2 never does input gradient of chunk 0, microbatch 0"),
        (with_cell(4, 2, op=IDLE, microbatch=0), "device 2 never does weight gradient of chunk 0, microbatch 0"),
        (with_cell(4, 2, op=BACKWARD), "tick=4, device=2, backward of chunk 0, microbatch 0): that is done at tick 3"),
        (with_cell(3, 2, op=FORWARD), "tick=3, device=2, forward of chunk 0, microbatch 0): that is done at tick 2"),
        (with_cell(0, 2, op=FORWARD), "tick=2, device=2, forward of chunk 0, microbatch 0): that is done at tick 0"),
        (
            with_cell(0, 2, op=WEIGHT_GRADIENT),
            "tick=4, device=2, weight gradient of chunk 0, microbatch 0): that is done at tick 0",
        ),
        (
            with_swap((2, 2), (1, 2)),
            "tick=1, device=2, forward of chunk 0, microbatch 0): needs forward of chunk 0 on device 1 in a tick "
            "before, which is in tick 1",
        ),
        (
            with_swap((2, 2), (3, 2)),
            "tick=2, device=2, input gradient of chunk 0, microbatch 0): needs forward of chunk 0 on device 2 in a "
            "tick before, which is in tick 3",
        ),
        (
            with_swap((4, 1), (3, 1)),
            "tick=3, device=1, input gradient of chunk 0, microbatch 0): needs input gradient of chunk 0 on device 2 "
            "in a tick before, which is in tick 3",
        ),
        (
            with_swap((5, 0), (6, 0)),
            "tick=5, device=0, weight gradient of chunk 0, microbatch 0): needs input gradient of chunk 0 on device 0",
        ),
        (BASE._replace(microbatches=5), "schedule(microbatch=4): device 0 never does forward of chunk 0"),
        (BASE._replace(chunks=2), "device 0 never does forward of chunk 1, microbatch 0"),
        (BASE._replace(microbatches=3), "must have 0 to 2"),
        (BASE._replace(chunks=0), "chunks must be a whole number of at least 1"),
        (with_cell(0, 0, op=5), "schedule(op[0, 0]=5): tick 0 of device 0, op 5, must have 0 to 4"),
        (with_cell(0, 0, chunk=1), "schedule(chunk[0, 0]=1): tick 0 of device 0, forward of chunk 1, microbatch 0"),
        (with_cell(0, 0, microbatch=-1), "schedule(microbatch[0, 0]=-1)"),
        (with_cell(0, 2, microbatch=1), "schedule(microbatch[0, 2]=1): tick 0 of device 2, idle, must have 0 to 0"),
        (BASE._replace(op=BASE.op.astype(np.int64)), "schedule(op: int64 "),
        (BASE._replace(op=BASE.op.tolist()), "schedule(op: list): must be a numpy array [ticks, p] of int32"),
        (BASE._replace(op=BASE.op[0]), "must be a numpy array [ticks, p] of int32"),
        (BASE._replace(op=BASE.op[:0]), "must be a numpy array [ticks, p] of int32"),
        (BASE._replace(microbatch=BASE.microbatch[1:]), "give equal shapes"),
    ],
)
def test_a_broken_table_is_refused_in_one_line_that_names_the_fault(broken, message):
    schedules.check(BASE)
    with pytest.raises(ValueError) as caught:
        schedules.check(broken)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (
            [[(BACKWARD, 0, 0), (FORWARD, 0, 0)]],
            "device 0 waits for ever to do backward of chunk 0, microbatch 0: it needs forward of chunk 0 on device 0; "
            "move that up",
        ),
        (
            [[(FORWARD, 0, 0), (BACKWARD, 0, 0), (FORWARD, 0, 1), (BACKWARD, 0, 1)]]
            + [[(FORWARD, 0, 0), (FORWARD, 0, 1), (BACKWARD, 0, 0), (BACKWARD, 0, 1)]],
            "device 0 waits for ever to do backward of chunk 0, microbatch 0: it needs input gradient of chunk 0 on "
            "device 1",
        ),
        ([[(FORWARD, 0, 0), (BACKWARD, 0, 0)], []], "it needs input gradient of chunk 0 on device 1; put that in"),
        ([[(FORWARD, 0, 0)]], "device 0 never does input gradient"),
        ([[(FORWARD, 0, 0), (FORWARD, 0, 0), (BACKWARD, 0, 0)]], "that is done at tick 0; drop one"),
        ([[(IDLE, 0, 0)]], "orders[0][0]=(0, 0, 0)): must be (op, chunk, microbatch) with op 1 to 4"),
        ([[(FORWARD, 1, 0)]], "chunk below 1"),
        ([[(FORWARD, 0, 1)]], "microbatch below 1"),
        ([[(FORWARD, 0.5, 0)]], "must be (op, chunk, microbatch)"),
        ([[(FORWARD, 0)]], "must be (op, chunk, microbatch)"),
        ([], "must be a numpy array [ticks, p]"),
    ],
)
def test_orders_that_make_no_table_are_refused(orders, message):
    with pytest.raises(ValueError) as caught:
        schedules.from_orders(orders, chunks=1, microbatches=2 if len(orders) > 1 and orders[1] else 1)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.gpipe(0, 4), "gpipe(devices=0)"),
        (lambda: schedules.naive(2, 0), "naive(microbatches=0)"),
        (lambda: schedules.one_f_one_b(2, 1.5), "one_f_one_b(microbatches=1.5)"),
        (lambda: schedules.zb_h1(True, 4), "zb_h1(devices=True)"),
        (
            lambda: schedules.interleaved(4, 6, 2),
            "interleaved(microbatches=6): the 4 devices must divide microbatches; take 8",
        ),
        (lambda: schedules.interleaved(4, 8, 1), "interleaved(chunks=1)"),
        (lambda: schedules.from_orders([[]], chunks=1, microbatches=0), "from_orders(microbatches=0)"),
        (lambda: schedules.from_table([[1.0]], [[0]], [[0]], chunks=1, microbatches=1), "from_table(op: float64)"),
        (lambda: schedules.from_table([[1], [2]], [[0]], [[0], [0]], chunks=1, microbatches=1), "give equal shapes"),
        (lambda: schedules.predict(BASE, forward=0.0), "predict(forward=0.0)"),
        (lambda: schedules.predict(BASE, message=-1.0), "predict(message=-1.0)"),
        (lambda: schedules.predict(BASE._replace(chunks=2)), "never does"),
        (lambda: schedules.fused(BASE._replace(chunks=2)), "never does"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_picture_has_a_box_for_each_op_and_a_number_for_its_microbatch(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("jfed.plot.schedules.save", lambda figure, path: drawn.append(figure))
    schedule = schedules.interleaved(2, 4, 2)
    plot.plot_schedule(tmp_path / "x.png", {"one": schedule[:3], "two": BASE[:3]}, title="", lasts=(0, 1, 3, 2, 1))
    for axes, table in zip(drawn[0].axes, (schedule, BASE), strict=True):
        done = table.op != IDLE
        assert len(axes.patches) == done.sum()
        assert [text.get_text() for text in axes.texts] == [str(i + 1) for i in table.microbatch[done]]
        assert [box.get_width() for box in axes.patches] == [(0, 1, 3, 2, 1)[op] for op in table.op[done]]
        cost = schedules.predict(table, input_gradient=2.0)
        assert max(box.get_x() + box.get_width() for box in axes.patches) == cost.lockstep
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "forward",
        "input gradient",
        "weight gradient",
    ]


def test_a_picture_of_schedules_is_written(tmp_path):
    plot.plot_schedule(tmp_path / "new" / "x.png", {"1F1B": BASE[:3]}, title="Ticks")
    assert (tmp_path / "new" / "x.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedules": {}}, "needs at least one schedule"),
        ({"lasts": (1.0,)}, "one for each of the 5 names"),
        ({"schedules": {"x": (BASE.op, BASE.chunk, BASE.microbatch[1:])}}, "three tables of a shape"),
        ({"schedules": {"x": (BASE.op + 3, BASE.chunk, BASE.microbatch)}}, "must be 0 to 4"),
    ],
)
def test_no_picture_without_tables_that_fit(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.plot_schedule(tmp_path / "x.png", **({"schedules": {"x": BASE[:3]}, "title": ""} | given))
    assert not (tmp_path / "x.png").exists()
