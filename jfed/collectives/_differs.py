"""Along which axes each variable of a traced program may differ from device to device, and what is a sum over them.

An abstract interpretation: `axis_index` differs, and so does an input that `shard_map` cuts; a sum, maximum or gather
over an axis is the same along it; anything else differs where what it is made of does, or what decided that it was
made. Loops are run until nothing changes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jfed.collectives import _walk


class Value(NamedTuple):
    """What is known of a variable."""

    differs: frozenset[str] = frozenset()  # along which axes
    summed: frozenset[str] = frozenset()  # over which it was summed or gathered, and is the same
    derived: frozenset[str] = frozenset()  # of these, those over which JAX summed it in a derivative


class Place(NamedTuple):
    """Where a program stands."""

    sizes: dict[str, int]  # of the axes of its mesh
    call: str  # the line that calls it, if it is one of the kit's all-reduces
    backward: bool  # whether it is a derivative's

    def line(self, eqn: JaxprEqn) -> str:
        """The user's line that an equation comes from."""
        return self.call or _walk.source(eqn)


Visit = Callable[[JaxprEqn, Jaxpr, list[Value], frozenset[str], Place], None]
"""Is shown each equation once, with its program, what it is given, axes along which devices may not enter its bodies
alike, and where it stands."""


def interpret(jaxpr: Jaxpr, visit: Visit) -> None:
    """Shows each equation of a whole program to `visit`, those of bodies too."""
    _program(jaxpr, [Value()] * len(jaxpr.invars), Place({}, "", False), visit)


def at(eqn: JaxprEqn, place: Place) -> Place:
    """Where the bodies of an equation stand."""
    if eqn.primitive.name == "shard_map":
        place = place._replace(sizes=dict(eqn.params["mesh"].shape))
    if all_reduced_over(eqn):  # traced once: what it names as the line that calls it is that of the first call
        place = place._replace(call=place.line(eqn))
    return place._replace(backward=place.backward or "transpose(" in str(eqn.source_info.name_stack))


def all_reduced_over(eqn: JaxprEqn) -> tuple[str, ...]:
    """The axes of a call of one of the kit's all-reduces, which are programs of their own name; of anything else ()."""
    called = eqn.params.get("name", "") if eqn.primitive.name in ("jit", "pjit") else ""
    if not (called.startswith("_") and called.endswith("_all_reduce")):
        return ()
    inside = (_walk.axes(one) for body in _walk.inner(eqn) for one in _walk.equations(body) if _walk.is_collective(one))
    return next(inside, ())


def _program(jaxpr: Jaxpr, values: Sequence[Value], place: Place, visit: Visit | None) -> list[Value]:
    """What is known of what a program returns; `visit` is None while a loop around it has not settled."""
    known: dict[Any, Value] = dict.fromkeys(jaxpr.constvars, Value()) | dict(zip(jaxpr.invars, values, strict=True))

    def of(atom):
        return Value() if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        ins = [of(atom) for atom in eqn.invars]
        outs, apart = _equation(eqn, ins, at(eqn, place), visit)
        if visit is not None:
            visit(eqn, jaxpr, ins, apart, at(eqn, place))
        known |= zip(eqn.outvars, outs, strict=True)
    return [of(atom) for atom in jaxpr.outvars]


def _equation(eqn, ins, place, visit) -> tuple[list[Value], frozenset[str]]:
    """What it makes, and along which axes devices may not enter its bodies alike."""
    kind, body, alike = eqn.primitive.name, _walk.called(eqn), frozenset()
    if kind == "scan":
        return _scan(eqn, ins, place, visit), alike
    if kind == "while":
        return _while(eqn, ins, place, visit)
    if kind == "cond":
        which, *operands = ins
        ways = [_program(branch.jaxpr, operands, place, visit) for branch in eqn.params["branches"]]
        return [_differing(_made_of(values), which.differs) for values in zip(*ways, strict=True)], which.differs
    if kind == "shard_map":
        cut = [_named_in(spec) for spec in eqn.params["in_specs"]]
        _program(body, [_differing(value, axes) for value, axes in zip(ins, cut, strict=True)], place, visit)
        return [Value()] * len(eqn.outvars), alike
    if _walk.axes(eqn):
        return [_spoken(eqn, _made_of(ins), place)] * len(eqn.outvars), alike
    if body is None:
        return [_made_of(ins)] * len(eqn.outvars), alike
    outs, axes = _program(body, ins, place, visit), frozenset(all_reduced_over(eqn))
    if axes and eqn.params["name"] != "_dedicated_servers_all_reduce":  # whose servers have zeros
        outs = [_same(value, axes) for value in outs]
    return outs, alike


def _spoken(eqn: JaxprEqn, given: Value, place: Place) -> Value:
    """What an equation makes that names axes of devices."""
    kind, axes = _walk.name(eqn), frozenset(_walk.axes(eqn))
    if kind in _walk.SILENT - {"axis_index"}:
        return given
    if kind in _walk.REDUCES | _walk.GATHERS and not eqn.params.get("axis_index_groups"):
        if kind in _walk.REDUCES - _walk.SUMS:
            return given._replace(differs=given.differs - axes)
        derived = axes if kind in _walk.SUMS and place.backward else frozenset()
        return _same(given, axes)._replace(derived=(given.derived - axes) | derived)
    if kind in _walk.SENDS and not given.differs & axes:
        everybody = {receiver for _, receiver in eqn.params["perm"]} >= set(range(devices_along(axes, place)))
        return given if everybody else _differing(given, axes)
    return _differing(given, axes)


def devices_along(axes: Sequence[str] | frozenset[str], place: Place) -> int:
    """How many devices there are along axes together."""
    return int(np.prod([place.sizes.get(axis, 1) for axis in axes]))


def _scan(eqn, ins, place, visit):
    body = eqn.params["jaxpr"].jaxpr
    consts, carried = _walk.scanned(eqn)
    before, carry, rows = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
    carry = _settled(lambda carry: _program(body, [*before, *carry, *rows], place, None)[:carried], carry)
    outs = _program(body, [*before, *carry, *rows], place, visit)
    return outs if eqn.params["length"] else [*carry, *outs[carried:]]


def _while(eqn, ins, place, visit):
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    test_consts, consts, carry = ins[:of_test], ins[of_test : of_test + of_body], ins[of_test + of_body :]

    def once(carry):
        apart = _program(test, [*test_consts, *carry], place, None)[0].differs
        return [_differing(value, apart) for value in _program(body, [*consts, *carry], place, None)]

    carry = _settled(once, carry)
    apart = _program(test, [*test_consts, *carry], place, visit)[0].differs
    _program(body, [*consts, *carry], place, visit)
    return carry, apart


def _settled(once: Callable[[list[Value]], list[Value]], carry: list[Value]) -> list[Value]:
    """What holds of the variables of a loop however often it goes round."""
    while True:
        after = [_made_of(pair) for pair in zip(carry, once(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _named_in(spec: Sequence) -> frozenset[str]:
    """Axes along which an input of such a specification is cut."""
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return frozenset(name for part in parts for name in part if isinstance(name, str))


def _made_of(values: Sequence[Value]) -> Value:
    differs, summed, derived = (frozenset().union(*(value[i] for value in values)) for i in range(3))
    return Value(differs, summed - differs, derived - differs)


def _same(value: Value, axes: frozenset[str]) -> Value:
    """Made the same along axes by a sum or a gather."""
    return value._replace(differs=value.differs - axes, summed=value.summed | axes)


def _differing(value: Value, axes: frozenset[str]) -> Value:
    return Value(value.differs | axes, value.summed - axes, value.derived - axes)
