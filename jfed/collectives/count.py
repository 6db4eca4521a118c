"""What a program sends, read off the program: every message of every device, at three stages of compilation.

    traced     the jaxpr: bytes, rounds and the messages themselves, on meshes of devices that need not exist
    lowered    StableHLO: bytes, of what the compiler is handed
    compiled   optimised HLO: bytes, of what the compiler made of it, and how many sends are asynchronous

Only what goes from one device to another counts. A permute is counted pair by pair. For collectives that XLA makes
by means of its own, the least that they must send stands in, all devices taking equal shares (Patarasuk and Yuan
2009, J. Parallel Distrib. Comput. 69, pp. 117-124): of k bytes that a device puts in, in groups of g devices,

    sum, maximum, minimum   2 k (g - 1) / g, rounded up
    sum and scatter         k (g - 1) / g
    exchange                k (g - 1) / g
    gather                  k (g - 1)

An array counts with its bytes in JAX, where a number of fewer than 8 bits, such as an int4, takes a whole byte; a
compiler may pack several into one.

Letters: n devices, k bytes.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jfed import _validate
from jfed.collectives import _hlo, _rounds, _stablehlo, _walk
from jfed.collectives._sends import Sent
from jfed.core import Tree


class Step(NamedTuple):
    """Rounds in which the same messages travel."""

    pairs: np.ndarray  # [m, 2] int, from and to
    bytes: np.ndarray  # [m] int64, of each message
    times: int  # rounds, one after another


class Counted(NamedTuple):
    """What n devices send and receive."""

    sent: np.ndarray  # [n] int64, bytes from each device to others
    received: np.ndarray  # [n] int64
    rounds: int | None  # the longest chain of messages that wait for one another; None where it was not followed
    steps: tuple[Step, ...] | None  # the messages in the order of rounds; of XLA's own collectives none
    opaque: int  # bytes of `sent`, over all devices, that stand for XLA's own collectives
    permutes: int  # collective permutes run, those of loops each time
    asynchronous: int | None  # of them, those with a start and a done of their own; None before compilation


def total(counted: Counted) -> int:
    """Bytes sent by all devices together."""
    return int(counted.sent.sum())


def over(f: Callable, n: int, x: Tree) -> tuple[Callable, Tree]:
    """`f(x, "devices")` as a program of n devices that need not exist, and the shapes of what all of them hold.

    Args:
      f: maps a device's tree and the name of the axis to a tree.
      n: devices.
      x: what one device holds: a tree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      `(program, shapes)`, for `traced(program, shapes)` and for the other counters, lints and compilers.

    Raises:
      ValueError: if n is not a whole number of at least 1.
    """
    _validate.at_least_one("over", "n", n, "a good start is 8")
    devices = AbstractMesh((int(n),), ("devices",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("devices")

    def local(rows):
        return jax.tree.map(lambda y: y[None], f(jax.tree.map(lambda y: y[0], rows), "devices"))

    program = jax.shard_map(local, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    return program, jax.tree.map(lambda y: jax.ShapeDtypeStruct((n, *jnp.shape(y)), jnp.result_type(y)), x)


def all_reduce(f: Callable, n: int, x: Tree) -> Counted:
    """What an all-reduce sends, or anything else called as `f(x, axis_name)`, on n devices that need not exist.

    Args:
      f: as in `over`.
      n: devices.
      x: what one device holds.

    Raises:
      ValueError: as `over` and `traced`.

    >>> from jfed.collectives import ring_all_reduce
    >>> counted = all_reduce(ring_all_reduce, 4, jax.ShapeDtypeStruct((100,), jnp.float32))
    >>> print(counted.sent, counted.rounds)
    [600 600 600 600] 6
    """
    return traced(*over(f, n, x))


def traced(f: Callable, *args: Any, trips: int | None = None) -> Counted:
    """What a program sends according to its jaxpr, where loops, calls and branches are followed.

    Rounds follow from data dependence: a message is sent in the round after the last message that its data depends
    on, so independent messages share a round. Constants of a loop or call are ready when its earliest input is. A
    collective of XLA's own takes one round.

    What a compiler adds where arrays are sharded without `shard_map` is seen by `compiled` alone.

    Args:
      f: a function with a `jax.shard_map` in it, over a mesh or an `AbstractMesh`, of all its axes.
      *args: its arguments; `jax.ShapeDtypeStruct`s will do.
      trips: how often each `while` whose body sends goes round, which no program says.

    Raises:
      ValueError: if there is no `shard_map`, meshes differ in size, only some axes of a mesh are mapped, branches of a
        `cond` send differently, a `while` sends and `trips` is not given, or something sends that is not known here.

    >>> from jfed import mesh
    >>> @mesh.shard_map(mesh=mesh.make((1,)), in_specs=PartitionSpec("clients"), out_specs=PartitionSpec("clients"))
    ... def alone(x):
    ...     return jax.lax.psum(x, "clients")
    >>> traced(alone, jnp.ones(3)).sent
    array([0])
    """
    if trips is not None:
        _validate.at_least_one("traced", "trips", trips, "leave it out if nothing sends in a while loop")
    jaxpr = _walk.trace("traced", f, args)
    sends, events = _rounds.follow(jaxpr, trips)
    by_round: dict[int, list[int]] = {}
    for when, place in events:
        by_round.setdefault(when, []).append(place)
    times = np.bincount([place for _, place in events], minlength=len(sends))
    counted = _added(_rounds.devices("traced", jaxpr), zip(sends, times.tolist(), strict=True))
    return counted._replace(rounds=max(by_round, default=0), steps=_steps(sends, by_round))


def lowered(f: Callable, *args: Any, platform: str = "tpu") -> Counted:
    """What a program sends according to the StableHLO that a compiler is handed, for devices that need not exist.

    Loops go round as often as their counter says. Rounds are not followed.

    Args:
      f: as in `traced`.
      *args: as in `traced`.
      platform: lowered for it: "tpu", "cuda" or "cpu".

    Raises:
      ValueError: if there is no `shard_map`, branches send differently, a loop sends that does not count, or
        something sends that is not known here.

    >>> from jfed.collectives import ring_all_reduce
    >>> print(lowered(*over(ring_all_reduce, 4, jax.ShapeDtypeStruct((100,), jnp.float32))).sent)
    [600 600 600 600]
    """
    n = _rounds.devices("lowered", _walk.trace("lowered", f, args))
    module = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).compiler_ir()
    return _added(n, _stablehlo.sends(n, module))


def compiled(text: str, *, trips: int | None = None) -> Counted:
    """What a program sends according to the text of its optimised HLO, by the compiler of CPU, GPU or TPU.

    Rounds are not followed: the schedule is the compiler's.
    Numbers that it has made wider, as that of CPUs does with bfloat16, count with their new width.

    Args:
      text: `jax.jit(f).lower(x).compile().as_text()`.
      trips: how often each loop goes round that sends, and whose text says not how often.

    Raises:
      ValueError: if it is no such text, branches send differently, a loop sends whose turns are not known, or
        something sends that is not known here.

    >>> from jfed import mesh
    >>> one = mesh.shard_map(mesh=mesh.make((1,)), in_specs=PartitionSpec("clients"), out_specs=PartitionSpec())
    >>> program = jax.jit(one(lambda x: jax.lax.psum(x, "clients")))
    >>> compiled(program.lower(jnp.ones(3)).compile().as_text()).sent
    array([0])
    """
    if trips is not None:
        _validate.at_least_one("compiled", "trips", trips, "leave it out if the text says how often loops go round")
    n, sends = _hlo.sends(text, trips)
    asynchronous = sum(times for send, times in sends if send.pairs is not None and not send.waits)
    return _added(n, sends)._replace(asynchronous=asynchronous)


def _added(n: int, sends: Iterable[tuple[Sent, int]]) -> Counted:
    """What operations send, each so many times."""
    sent, received, opaque, permutes = np.zeros(n, np.int64), np.zeros(n, np.int64), 0, 0
    for send, times in sends:
        sent += send.sent * times
        received += send.received * times
        permutes += times * (send.pairs is not None)
        opaque += times * int(send.sent.sum()) * (send.pairs is None)
    return Counted(sent, received, None, None, opaque, permutes, None)


def _steps(sends: list[Sent], by_round: dict[int, list[int]]) -> tuple[Step, ...]:
    steps = []
    for _, equal in itertools.groupby(sorted(by_round), key=lambda when: sorted(by_round[when])):
        rounds = list(equal)
        messages = [sends[place] for place in by_round[rounds[0]] if sends[place].pairs is not None]
        if messages:
            pairs = np.concatenate([message.pairs for message in messages])
            sizes = np.repeat([message.size for message in messages], [len(message.pairs) for message in messages])
            steps.append(Step(pairs, sizes.astype(np.int64), len(rounds)))
    return tuple(steps)
