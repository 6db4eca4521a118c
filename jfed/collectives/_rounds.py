"""Follows a traced program and says which equation sends in which round.

Every variable has a depth: the round after which it is there. What a message brings is one deeper than what it is
made of; anything else is as deep as the deepest that it is made of. A body run again on inputs that are all deeper by
as much does all as much later, so its result is looked up.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jfed.collectives import _walk
from jfed.collectives._sends import Sent, groups, least, permuted

_KINDS = (
    dict.fromkeys(_walk.REDUCES, "reduce")
    | dict.fromkeys(_walk.SCATTERS, "scatter")
    | dict.fromkeys(_walk.EXCHANGES, "exchange")
    | dict.fromkeys(_walk.GATHERS, "gather")
)


class Followed(NamedTuple):
    """A program, or part of one."""

    depths: list[int]  # of what it returns
    events: list[tuple[int, int]]  # round, and place in the list of what was sent


class _Notes(NamedTuple):
    trips: int | None
    devices: int
    sends: list[Sent]
    places: dict[Any, int]  # in `sends`
    followed: dict[Any, Followed]
    speaks: dict[int, bool]


def devices(where: str, jaxpr: Jaxpr) -> int:
    """Of the meshes that a program runs on.

    Raises:
      ValueError: if they differ in size.
    """
    sizes = {eqn.params["mesh"].size for eqn in _walk.equations(jaxpr) if eqn.primitive.name == "shard_map"}
    if len(sizes) > 1:
        raise ValueError(f"{where}(f): its meshes have {sorted(sizes)} devices; count the parts of f one by one.")
    return sizes.pop()


def follow(jaxpr: Jaxpr, trips: int | None) -> tuple[list[Sent], list[tuple[int, int]]]:
    """What a whole program sends, and when: `Followed.events`, numbered by the list.

    Raises:
      ValueError: as `count.traced`.
    """
    notes = _Notes(trips, devices("traced", jaxpr), [], {}, {}, {})
    return notes.sends, _program(notes, jaxpr, (None, ()), [0] * len(jaxpr.invars)).events


def _program(notes: _Notes, jaxpr: Jaxpr, mapped: tuple, depths: Sequence[int]) -> Followed:
    latest = max(depths, default=0)
    key = id(jaxpr), mapped, tuple(depth - latest for depth in depths)
    if key not in notes.followed:
        notes.followed[key] = _anew(notes, jaxpr, mapped, key[2])
    found = notes.followed[key]
    return Followed(
        [depth + latest for depth in found.depths], [(when + latest, place) for when, place in found.events]
    )


def _anew(notes, jaxpr, mapped, depths):
    earliest = min(depths, default=0)
    there: dict[Any, int] = dict.fromkeys(jaxpr.constvars, earliest) | dict(zip(jaxpr.invars, depths, strict=True))
    events: list[tuple[int, int]] = []

    def depth_of(atom):
        return earliest if isinstance(atom, Literal) else there[atom]

    for eqn in jaxpr.eqns:
        came = _equation(notes, eqn, mapped, [depth_of(atom) for atom in eqn.invars], earliest)
        events += came.events
        there |= zip(eqn.outvars, came.depths, strict=True)
    return Followed([depth_of(atom) for atom in jaxpr.outvars], events)


def _equation(notes, eqn: JaxprEqn, mapped, depths, earliest) -> Followed:
    latest = max(depths, default=earliest)
    if _walk.is_collective(eqn):
        place = _sent(notes, eqn, mapped)
        if not notes.sends[place].sent.any():
            return Followed([latest] * len(eqn.outvars), [])
        return Followed([latest + 1] * len(eqn.outvars), [(latest + 1, place)])
    kind = eqn.primitive.name
    if kind == "scan":
        return _scan(notes, eqn, mapped, depths)
    if kind == "while":
        return _while(notes, eqn, mapped, depths)
    if kind == "cond":
        return _cond(notes, eqn, mapped, depths)
    body = _walk.called(eqn)
    if kind == "shard_map":
        mapped = eqn.params["mesh"], (*mapped[1], *_manual(eqn))
    if body is not None:
        return _program(notes, body, mapped, depths)
    if any(_speaks(notes, body) for body in _walk.inner(eqn)):
        raise ValueError(f"traced(f): it sends within {kind!r}, which cannot be followed; call it outside.")
    return Followed([latest] * len(eqn.outvars), [])


def _scan(notes, eqn, mapped, depths):
    body = eqn.params["jaxpr"].jaxpr
    consts, carried = _walk.scanned(eqn)
    return _again(
        lambda carry: _program(notes, body, mapped, [*depths[:consts], *carry, *depths[consts + carried :]]),
        eqn.params["length"],
        depths[consts : consts + carried],
        [max(depths, default=0)] * (len(eqn.outvars) - carried),
    )


def _again(once, times, carry, collected):
    """A body run `times` times; what it collects from all of them is there when the last of it is."""
    events: list[tuple[int, int]] = []
    for turn in range(times):
        came = once(carry)
        after, rows = came.depths[: len(carry)], came.depths[len(carry) :]
        collected = rows if turn == 0 else [max(pair) for pair in zip(collected, rows, strict=True)]
        events += came.events
        if not came.events and after == carry:
            break
        carry = after
    return Followed([*carry, *collected], events)


def _while(notes, eqn, mapped, depths):
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    sends = _speaks(notes, test) or _speaks(notes, body)
    if sends and notes.trips is None:
        raise ValueError(
            f"traced(trips=None): a while loop sends ({_walk.source(eqn) or 'unknown line'}), and how often it goes "
            "round is not known; say so by trips=, or use fori_loop with numbers that are not traced."
        )
    test_consts, consts, carry = depths[:of_test], depths[of_test : of_test + of_body], depths[of_test + of_body :]

    def once(carry):
        tested = _program(notes, test, mapped, [*test_consts, *carry])
        go = tested.depths[0]
        came = _program(notes, body, mapped, [max(depth, go) for depth in (*consts, *carry)])
        return Followed(came.depths, tested.events + came.events)

    # Depths that no message moves settle after as many turns as there are variables.
    came = _again(once, notes.trips if sends else len(carry) + 1, carry, [])
    last = _program(notes, test, mapped, [*test_consts, *came.depths])
    return Followed([max(depth, last.depths[0]) for depth in came.depths], came.events + last.events)


def _cond(notes, eqn, mapped, depths):
    go, *operands = depths
    ways = [
        _program(notes, branch.jaxpr, mapped, [max(depth, go) for depth in operands])
        for branch in eqn.params["branches"]
    ]
    if any(Counter(way.events) != Counter(ways[0].events) for way in ways):
        raise ValueError(
            f"traced(f): branches of a cond or switch send differently ({_walk.source(eqn) or 'unknown line'}); "
            "count a program with the one branch that you mean."
        )
    return Followed([max(go, *depth) for depth in zip(*(way.depths for way in ways), strict=True)], ways[0].events)


def _sent(notes: _Notes, eqn: JaxprEqn, mapped) -> int:
    """The place of what a collective sends."""
    mesh, manual = mapped
    kind, axes, among = _walk.name(eqn), _walk.axes(eqn), eqn.params.get("axis_index_groups")
    if mesh is None or not set(axes) <= set(manual):
        raise ValueError(f"traced(f): {kind} over {axes} is outside of a shard_map over them; put it in one.")
    if any(size > 1 for axis, size in dict(mesh.shape).items() if axis not in manual):
        raise ValueError(
            f"traced(f): shard_map maps only {sorted(manual)} of {tuple(mesh.shape)}; map all axes, since how arrays "
            "lie along others is not known before compilation."
        )
    k = sum(int(np.prod(atom.aval.shape)) * atom.aval.dtype.itemsize for atom in eqn.invars)
    key = kind, axes, tuple(mesh.shape.items()), k, str(among), eqn.params.get("perm")
    if key not in notes.places:
        rows = groups(dict(mesh.shape), axes)
        if kind in _walk.SENDS:
            pairs = np.asarray(eqn.params["perm"], np.int64).reshape(-1, 2)
            if pairs.size and not 0 <= pairs.min() <= pairs.max() < rows.shape[1]:
                raise ValueError(f"traced(f): ppermute over {axes} names devices it has not; see lint.check.")
            came = permuted(notes.devices, rows[:, pairs], k)
        elif kind in _KINDS:
            parts = rows if among is None else [row[list(part)] for row in rows for part in among]
            came = least(_KINDS[kind], notes.devices, parts, k)
        else:
            raise ValueError(f"traced(f): what {kind} sends is not known; use ppermute, psum or their siblings.")
        notes.places[key] = len(notes.sends)
        notes.sends.append(came)
    return notes.places[key]


def _manual(eqn: JaxprEqn) -> tuple[str, ...]:
    """The axes that a shard_map maps."""
    return tuple(eqn.params["newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"])


def _speaks(notes: _Notes, jaxpr: Jaxpr) -> bool:
    if id(jaxpr) not in notes.speaks:
        notes.speaks[id(jaxpr)] = any(_walk.is_collective(eqn) for eqn in _walk.equations(jaxpr))
    return notes.speaks[id(jaxpr)]
