"""How many lanes: measured, remembered, explained.

More lanes keep an accelerator busier until its memory or its arithmetic is full; on a CPU, whose
matrix products are fast one at a time, they mostly cost cache. The right number depends on model,
batch and machine, so `lanes(width="auto")` times the client's own step at a few widths on data of the
right shapes, leaves out widths whose compiled program does not fit the memory, and remembers the
choice by what was compiled, for which device, with which versions. `explain` shows the whole table.

Letters: C clients in the cohort, L lanes, E examples.
"""

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfed import _machine, _validate
from jfed.core import ClientWork, Cohort, Shared, Tree

WIDTHS = (1, 4, 16, 64)
_STEPS = 8  # local steps of a measurement
_ROWS = 4096  # examples of a measurement, at most
_remembered: dict[str, int] = {}


def over_lanes(function, in_axes: tuple, width: int):
    """`jax.vmap`, except that a single lane runs the function itself.

    A batch axis of one still turns convolutions with a kernel per client into grouped ones, which
    compilers run slowly.
    """
    if width > 1:
        return jax.vmap(function, in_axes)

    def single(*args):
        args = [a if axis is None else jax.tree.map(lambda x: x[0], a) for a, axis in zip(args, in_axes, strict=True)]
        return jax.tree.map(lambda x: jnp.asarray(x)[None], function(*args))

    return single


def choose(work: ClientWork, shared: Tree, clients: Cohort) -> int:
    """The width whose measured time of a client's step is least, among those that fit the memory.

    `shared` and `clients` may be traced: only their shapes are looked at. The choice is kept in the
    process and in `widths.json` of the cache folder (`$JFED_CACHE`, or jfed in the user's cache), so
    that a run taken up again on the same machine, with that file, has the width it had.

    Raises:
      ValueError: if there are several processes, each of which could choose another width.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "lanes(width='auto'): with several processes each could choose another width; give a number, "
            "which clients.explain shows in one process."
        )
    found: list[Any] = []
    device = jax.config.jax_default_device  # a context manager sets it for one thread

    def elsewhere():
        """Nothing of a trace under way, in which this may be called, reaches another thread."""
        try:
            with jax.default_device(device):
                found.append(_choice(work, shared, clients))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=elsewhere, name="jfed width")
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Explanation(NamedTuple):
    """What `explain` found; printing it shows the table."""

    rows: list[dict[str, Any]]  # one a width: seconds, memory and use of the lanes
    auto: int  # the width that `lanes(width="auto")` takes

    def __str__(self) -> str:
        head = ["width", "round, ms", "a step, us", "lanes in use", "predicted, MB", "peak grew, MB"]
        cells = [
            [
                f"{row['width']}{' auto' if row['width'] == self.auto else ''}",
                f"{1e3 * row['seconds']:.1f}",
                f"{1e6 * row['seconds_per_step']:.1f}",
                f"{row['in_use']:.3f}",
                f"{row['predicted_bytes'] / 1e6:.1f}",
                f"{row['peak_growth_bytes'] / 1e6:.1f}",
            ]
            for row in self.rows
        ]
        across = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(n) for cell, n in zip(line, across, strict=True)) for line in [head, *cells]
        )


def explain(
    work: ClientWork,
    params: Tree,
    cohort: Cohort,
    *,
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    repeats: int = 3,
) -> Explanation:
    """Runs a cohort's clients at several widths and says what each costs.

    A row holds `width`; `seconds` of all clients' work, the best of the repeats; `seconds_per_step`,
    that over local steps; `in_use`, the share of executed lane-steps that some client needed;
    `predicted_bytes`, temporaries and results of the compiled program; and `peak_growth_bytes`, by how
    much running it raised the highest memory seen: of the device where that is told, else of the process.

    Args:
      work: what a client does.
      params: the model.
      cohort: from a sampler or `core.make_cohort`; may not be traced.
      widths: numbers of lanes to try beside the automatic one; those above the number of clients are left out.
      repeats: timed runs of each, after one that compiles.

    Raises:
      ValueError: if a width or `repeats` is not a whole number of at least 1, or there are several processes.

    >>> from jfed import core, local
    >>> import optax
    >>> work = local.sgd(lambda w, x, key: (w - x) ** 2, optax.sgd(0.1), batch_size=1)
    >>> population = core.Population(jnp.arange(6.0), jnp.array([0, 1, 2]), jnp.array([1, 1, 4]))
    >>> cohort = core.make_cohort(population, jnp.arange(3), steps=work.steps)
    >>> print([row["in_use"] for row in explain(work, jnp.array(0.0), cohort, widths=(1, 2)).rows])
    [1.0, 0.75]
    """
    from jfed.clients.lanes import lanes

    _validate.at_least_one("explain", "repeats", repeats, "3 is usual")
    for width in widths:
        _validate.at_least_one("explain", "width", width, "try powers of two")
    shared = Shared(params, cohort.examples, jax.random.key(0), jnp.zeros((), jnp.int32))
    clients = cohort._replace(examples=())
    steps = np.asarray(clients.steps)
    rows, auto = [], choose(work, shared, clients)
    for width in sorted({auto, *(w for w in widths if w <= len(steps))}):
        program = jax.jit(lambda shared, clients, w=width: lanes(w)(work, shared, clients))
        compiled = program.lower(shared, clients).compile()
        before, seconds = _machine.peak_memory(), []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            jax.block_until_ready(compiled(shared, clients))
            seconds.append(time.perf_counter() - began)
        needed = compiled.memory_analysis()
        rows.append(
            {
                "width": width,
                "seconds": min(seconds[1:]),
                "seconds_per_step": min(seconds[1:]) / max(int(steps.sum()), 1),
                "in_use": in_use(steps, width),
                "predicted_bytes": needed.temp_size_in_bytes + needed.output_size_in_bytes,
                "peak_growth_bytes": _machine.peak_memory() - before,
            }
        )
    return Explanation(rows, auto)


def in_use(steps: np.ndarray, width: int) -> float:
    """Useful lane-steps over executed ones when clients of `steps` [C] run on `width` lanes, longest first.

    >>> in_use(np.array([4, 2, 2]), 2)
    1.0
    """
    free = np.zeros(min(width, len(steps)), np.int64)  # when each lane falls free
    for client_steps in np.sort(steps)[::-1]:
        free[np.argmin(free)] += client_steps
    return float(steps.sum() / max(free.max() * len(free), 1))


def _choice(work: ClientWork, shared: Tree, clients: Cohort) -> int:
    if isinstance(shared, Shared):
        rows = [min(x.shape[0], _ROWS) for x in jax.tree.leaves(shared.examples)]
        size = min(rows, default=1)
        shared = shared._replace(examples=jax.tree.map(lambda x: _struct((size, *x.shape[1:]), x), shared.examples))
    else:
        size = 1
    shared = jax.tree.map(_stand_in, shared)
    one = jax.tree.map(lambda x: _stand_in(_struct(x.shape[1:], x)), clients)
    one = one._replace(start=jnp.int32(0), size=jnp.int32(size), steps=jnp.int32(_STEPS), weight=jnp.float32(1))

    widths = [w for w in WIDTHS if w <= clients.ids.shape[0]] or [1]
    program, _ = _program(work, shared, one, width=1)
    name = _name(program, widths)
    if name not in _remembered:
        _remembered[name] = _read(name) or _write(name, _measure(work, shared, one, widths))
    return _remembered[name]


def _measure(work: ClientWork, shared: Tree, client: Cohort, widths: list[int]) -> int:
    """The fastest of `widths`, or the last before one that is slower: wider ones are not tried."""
    times: dict[int, float] = {}
    for width in widths:
        program, values = _program(work, shared, client, width)
        compiled = jax.jit(jax.extend.core.jaxpr_as_fun(program)).lower(*values).compile()
        needed = compiled.memory_analysis().temp_size_in_bytes
        if width > 1 and needed > _machine.free_memory():
            break
        seconds = []
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            jax.block_until_ready(compiled(*values))
            seconds.append(time.perf_counter() - began)
        times[width] = min(seconds[1:]) / width
        if times[width] > min(times.values()):
            break
    return min(times, key=times.get)


def _program(work: ClientWork, shared: Tree, client: Cohort, width: int) -> tuple[Any, list[jax.Array]]:
    """A few steps of `width` clients as a closed jaxpr, and values for its arguments.

    What the work closes over may belong to a trace under way, such as a sweep's learning rate; it gets
    a stand-in.
    """

    def run(shared, clients):
        carry = over_lanes(work.start, (None, 0), width)(shared, clients)
        step = over_lanes(work.step, (None, 0, 0, 0), width)
        return lax.fori_loop(0, _STEPS, lambda t, c: step(shared, clients, c, jnp.full(width, t)), carry)

    clients = jax.tree.map(lambda x: jnp.broadcast_to(x, (width, *x.shape)), client)
    closed = jax.make_jaxpr(run)(shared, clients)
    consts = [_stand_in(c) if isinstance(c, jax.core.Tracer) else c for c in closed.consts]
    return jax.extend.core.ClosedJaxpr(closed.jaxpr, consts), jax.tree.leaves((shared, clients))


def _struct(shape: tuple[int, ...], like: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, like.dtype)


def _stand_in(x: Any) -> jax.Array:
    """An array of the shape and dtype of `x`: small numbers, zeros, or a key."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(x)), x.shape)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.asarray(0.1 * np.random.default_rng(0).standard_normal(x.shape), x.dtype)


def _name(program: Any, widths: list[int]) -> str:
    """What a choice is remembered by: the program, what there was to choose from, the machine, the versions."""
    text = re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr))  # addresses of functions differ by process
    (device,) = jnp.zeros(()).devices()
    where = (device.platform, device.device_kind, jax.local_device_count(), os.cpu_count())
    return hashlib.sha256(repr((text, widths, where, jax.__version__, _machine.version())).encode()).hexdigest()


def _file() -> Path:
    return _machine.cache_folder() / "widths.json"


def _read(name: str) -> int | None:
    try:
        width = json.loads(_file().read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no cache, or not one of ours: measure again
    return width if width in WIDTHS else None


def _write(name: str, width: int) -> int:
    """Adds a choice to the file, if it can be written, and returns the one in force: the first that was written."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        partial.write_text(json.dumps({name: width} | held), encoding="utf-8")
        partial.replace(path)
        return held.get(name, width)
    except (OSError, ValueError, TypeError):
        return width  # the next process measures again
