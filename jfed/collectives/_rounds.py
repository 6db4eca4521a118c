"""Follows a traced program and says which equation sends in which round.

Every variable has a depth, the number of rounds after which its value is known. The result of a collective is one
round deeper than its operand; the result of any other equation is as deep as its deepest operand. If all inputs of a
body are later by the same number of rounds, so is all that happens in it, so each body is followed once for each
pattern of depths.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jfed.collectives import _walk
from jfed.collectives._sends import COLLECTIVES, Sent, groups, least, permuted, unknown


class Followed(NamedTuple):
    """A program, or part of one."""

    depths: list[int]  # of what it returns
    events: list[tuple[int, int]]  # round, and place in the list of what was sent


class _Analysis(NamedTuple):
    """What is asked of a program, and what is known of it so far."""

    trips: int | None
    devices: int
    sends: list[Sent]
    places: dict[Any, int]  # in `sends`, of collectives met before
    followed: dict[Any, Followed]
    communicates: dict[int, bool]  # by `id` of a body


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
    analysis = _Analysis(trips, devices("traced", jaxpr), [], {}, {}, {})
    return analysis.sends, _program(analysis, jaxpr, (None, ()), [0] * len(jaxpr.invars)).events


def _program(analysis: _Analysis, jaxpr: Jaxpr, mapped: tuple, depths: Sequence[int]) -> Followed:
    latest = max(depths, default=0)
    key = id(jaxpr), mapped, tuple(depth - latest for depth in depths)
    if key not in analysis.followed:
        analysis.followed[key] = _anew(analysis, jaxpr, mapped, key[2])
    found = analysis.followed[key]
    return Followed(
        [depth + latest for depth in found.depths], [(when + latest, place) for when, place in found.events]
    )


def _anew(analysis, jaxpr, mapped, depths):
    earliest = min(depths, default=0)
    there: dict[Any, int] = dict.fromkeys(jaxpr.constvars, earliest) | dict(zip(jaxpr.invars, depths, strict=True))
    events: list[tuple[int, int]] = []

    def depth_of(atom):
        return earliest if isinstance(atom, Literal) else there[atom]

    for eqn in jaxpr.eqns:
        came = _equation(analysis, eqn, mapped, [depth_of(atom) for atom in eqn.invars], earliest)
        events += came.events
        there |= zip(eqn.outvars, came.depths, strict=True)
    return Followed([depth_of(atom) for atom in jaxpr.outvars], events)


def _equation(analysis, eqn: JaxprEqn, mapped, depths, earliest) -> Followed:
    latest = max(depths, default=earliest)
    if _walk.is_collective(eqn):
        place = _sent(analysis, eqn, mapped)
        if not analysis.sends[place].sent.any():
            return Followed([latest] * len(eqn.outvars), [])
        return Followed([latest + 1] * len(eqn.outvars), [(latest + 1, place)])
    kind = eqn.primitive.name
    if kind == "scan":
        return _scan(analysis, eqn, mapped, depths)
    if kind == "while":
        return _while(analysis, eqn, mapped, depths)
    if kind == "cond":
        return _cond(analysis, eqn, mapped, depths)
    body = _walk.called(eqn)
    if kind == "shard_map":
        mapped = eqn.params["mesh"], (*mapped[1], *_manual(eqn))
    if body is not None:
        return _program(analysis, body, mapped, depths)
    if any(_communicates(analysis, body) for body in _walk.inner(eqn)):
        raise ValueError(f"traced(f): it sends within {kind!r}, which cannot be followed; call it outside.")
    return Followed([latest] * len(eqn.outvars), [])


def _scan(analysis, eqn, mapped, depths):
    body = eqn.params["jaxpr"].jaxpr
    consts, carried = _walk.scanned(eqn)
    return _again(
        lambda carry: _program(analysis, body, mapped, [*depths[:consts], *carry, *depths[consts + carried :]]),
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


def _while(analysis, eqn, mapped, depths):
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    sends = _communicates(analysis, test) or _communicates(analysis, body)
    if sends and analysis.trips is None:
        raise ValueError(
            f"traced(trips=None): a while loop sends ({_walk.source(eqn) or 'unknown line'}), and how often it goes "
            "round is not known; say so by trips=, or use fori_loop with numbers that are not traced."
        )
    test_consts, consts, carry = depths[:of_test], depths[of_test : of_test + of_body], depths[of_test + of_body :]

    def once(carry):
        tested = _program(analysis, test, mapped, [*test_consts, *carry])
        go = tested.depths[0]
        came = _program(analysis, body, mapped, [max(depth, go) for depth in (*consts, *carry)])
        return Followed(came.depths, tested.events + came.events)

    # Depths that no message moves settle after as many turns as there are variables.
    came = _again(once, analysis.trips if sends else len(carry) + 1, carry, [])
    last = _program(analysis, test, mapped, [*test_consts, *came.depths])
    return Followed([max(depth, last.depths[0]) for depth in came.depths], came.events + last.events)


def _cond(analysis, eqn, mapped, depths):
    go, *operands = depths
    branches = [
        _program(analysis, branch.jaxpr, mapped, [max(depth, go) for depth in operands])
        for branch in eqn.params["branches"]
    ]
    if any(Counter(one.events) != Counter(branches[0].events) for one in branches):
        raise ValueError(
            f"traced(f): branches of a cond or switch send differently ({_walk.source(eqn) or 'unknown line'}); "
            "count a program with the one branch that you mean."
        )
    return Followed(
        [max(go, *depth) for depth in zip(*(one.depths for one in branches), strict=True)], branches[0].events
    )


def _sent(analysis: _Analysis, eqn: JaxprEqn, mapped) -> int:
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
    if key not in analysis.places:
        if kind in _walk.SENDS:  # numbered in the mesh's order, whatever that of the axes; jax 0.12 refuses others
            rows = groups(dict(mesh.shape), sorted(axes, key=tuple(mesh.shape).index))
            pairs = np.asarray(eqn.params["perm"], np.int64).reshape(-1, 2)
            if pairs.size and not 0 <= pairs.min() <= pairs.max() < rows.shape[1]:
                raise ValueError(f"traced(f): ppermute over {axes} names devices it has not; see lint.check.")
            came = permuted(analysis.devices, rows[:, pairs], k)
        elif (collective := "all_reduce" if kind in _walk.REDUCES else kind.removesuffix("_invariant")) in COLLECTIVES:
            rows = groups(dict(mesh.shape), axes)
            parts = rows if among is None else [row[list(part)] for row in rows for part in among]
            came = least(collective, analysis.devices, parts, k)
        else:
            raise unknown("traced(f)", kind)
        analysis.places[key] = len(analysis.sends)
        analysis.sends.append(came)
    return analysis.places[key]


def _manual(eqn: JaxprEqn) -> tuple[str, ...]:
    """The axes that a shard_map maps."""
    return tuple(eqn.params["newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"])


def _communicates(analysis: _Analysis, jaxpr: Jaxpr) -> bool:
    if id(jaxpr) not in analysis.communicates:
        analysis.communicates[id(jaxpr)] = any(_walk.is_collective(eqn) for eqn in _walk.equations(jaxpr))
    return analysis.communicates[id(jaxpr)]
