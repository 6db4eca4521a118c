"""Along which axes each variable of a traced program may differ from device to device, and what is a sum over them.

An abstract interpretation. An `axis_index` differs, and so does an input that `shard_map` cuts; a sum, maximum or
gather over an axis is the same along it. Anything else differs where one of its operands does, or the predicate of the
branch or loop that it comes from. Loops are run until nothing changes.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jfed.collectives import _walk

_ADDITIONS = {"add", "add_any", "sub"}
_PRODUCTS = {"mul", "div", "dot_general"}
_LINEAR = {"neg", "convert_element_type", "reduce_precision", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"}
_LINEAR |= {"transpose", "rev", "slice", "dynamic_slice", "dynamic_update_slice", "concatenate", "split", "pad", "copy"}
_LINEAR |= {"tile", "select_n", "reduce_sum", "optimization_barrier", "pvary", "pcast"}
"""Primitives through which the gradient of a sum stays one, until it is summed itself."""

_KINDS = ("all_reduce", "reduce_scatter", "all_gather")
_HERE = str(pathlib.Path(__file__).parent)


class Value(NamedTuple):
    """What is known of a variable."""

    differs: frozenset[str] = frozenset()  # along which axes
    summed: frozenset[str] = frozenset()  # over which it was summed or gathered, and is the same
    derived: frozenset[str] = frozenset()  # of these, those over which JAX summed it in a derivative
    of_sum: frozenset[str] = frozenset()  # over which what it is the gradient of was summed: n times a device's part
    zero: bool = False  # whether it is zeros, such as a sum of gradients starts from


class Context(NamedTuple):
    """What surrounds an equation."""

    sizes: dict[str, int]  # of the axes of its mesh
    call: str  # the line that calls the program of the kit that it is in; empty outside of them
    backward: bool  # whether it belongs to the backward pass of a derivative

    def line(self, eqn: JaxprEqn) -> str:
        """The user's line that an equation comes from."""
        return self.call or _walk.source(eqn)


Visit = Callable[[JaxprEqn, Jaxpr, list[Value], frozenset[str], Context], None]
"""Called once for each equation: with the program it belongs to, its operands, the axes along which devices may
disagree on whether to run its bodies, and its context."""


def interpret(jaxpr: Jaxpr, visit: Visit) -> None:
    """Calls `visit` on each equation of a whole program, those of bodies too."""
    _program(jaxpr, [Value()] * len(jaxpr.invars), Context({}, "", False), visit)


def within(eqn: JaxprEqn, context: Context) -> Context:
    """The context of the bodies of an equation."""
    if eqn.primitive.name == "shard_map":
        context = context._replace(sizes=dict(eqn.params["mesh"].shape))
    if of_the_kit(eqn)[0]:  # traced once: what it names as the line that calls it is that of the first call
        context = context._replace(call=context.line(eqn))
    return context


def of_the_kit(eqn: JaxprEqn) -> tuple[str, tuple[str, ...]]:
    """The kind (one of `_KINDS`) and the axes of a call of one of the kit's collectives; of anything else "" and ().

    A program is the kit's if JAX has noted a file of this package as its function's, whatever its name.
    """
    if eqn.primitive.name not in ("jit", "pjit"):
        return "", ()
    (body,) = _walk.inner(eqn)
    kind = next((kind for kind in _KINDS if eqn.params["name"].endswith(f"_{kind}")), "")
    if not kind or _HERE not in str(getattr(body.debug_info, "func_src_info", "")):
        return "", ()
    axes = next((_walk.axes(one) for one in _walk.equations(body) if _walk.is_collective(one)), ())
    return (kind, axes) if axes else ("", ())


def _program(jaxpr: Jaxpr, values: Sequence[Value], context: Context, visit: Visit | None) -> list[Value]:
    """What is known of what a program returns; `visit` is None while a loop around it has not settled."""
    known: dict[Any, Value] = dict.fromkeys(jaxpr.constvars, Value()) | dict(zip(jaxpr.invars, values, strict=True))

    def of(atom):
        return Value(zero=not np.any(np.asarray(atom.val))) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        ins, here = [of(atom) for atom in eqn.invars], _at(eqn, context)
        outs, disagreed = _equation(eqn, jaxpr, ins, here, visit)
        if visit is not None:
            visit(eqn, jaxpr, ins, disagreed, here)
        known |= zip(eqn.outvars, outs, strict=True)
    return [of(atom) for atom in jaxpr.outvars]


def _at(eqn: JaxprEqn, context: Context) -> Context:
    """The context of an equation itself."""
    names = str(eqn.source_info.name_stack)
    if "rematted_computation" in names:  # the forward pass, once more
        return context._replace(backward=False)
    return context._replace(backward=context.backward or "transpose(" in names)


def _equation(eqn, jaxpr, ins, context, visit) -> tuple[list[Value], frozenset[str]]:
    """Its results, and the axes along which devices may disagree on whether to run its bodies."""
    kind, body, inner, nowhere = eqn.primitive.name, _walk.called(eqn), within(eqn, context), frozenset()
    if kind == "scan":
        return _scan(eqn, ins, inner, visit), nowhere
    if kind == "while":
        return _while(eqn, ins, inner, visit)
    if kind == "cond":
        which, *operands = ins
        branches = [_program(branch.jaxpr, operands, inner, visit) for branch in eqn.params["branches"]]
        return [_differing(_any_of(values), which.differs) for values in zip(*branches, strict=True)], which.differs
    if kind == "shard_map":
        cut = [_named_in(spec) for spec in eqn.params["in_specs"]]
        _program(body, [_differing(value, axes) for value, axes in zip(ins, cut, strict=True)], inner, visit)
        return [Value()] * len(eqn.outvars), nowhere
    if _walk.axes(eqn):
        each = ins if len(ins) == len(eqn.outvars) else [_any_of(ins)] * len(eqn.outvars)
        return [_collective(eqn, value, context) for value in each], nowhere
    if body is None:
        return [_computed(eqn, jaxpr, ins, context)] * len(eqn.outvars), nowhere
    return _called(eqn, ins, _program(body, ins, inner, visit), context), nowhere


def _collective(eqn: JaxprEqn, given: Value, context: Context) -> Value:
    """The result of an equation that names axes of devices."""
    kind, axes = _walk.name(eqn), frozenset(_walk.axes(eqn))
    if kind in _walk.NO_MESSAGES - {"axis_index"}:
        return given
    if kind in _walk.REDUCES | _walk.GATHERS and not eqn.params.get("axis_index_groups"):
        if kind in _walk.REDUCES - _walk.SUMS:
            return given._replace(differs=given.differs - axes)
        return _summed(given, axes, context) if kind in _walk.SUMS else _same(given, axes)
    if kind in _walk.SENDS and not given.differs & axes:
        everybody = {receiver for _, receiver in eqn.params["perm"]} >= set(range(devices_along(axes, context)))
        return given if everybody else _differing(given, axes)
    return _differing(given, axes)


def _called(eqn: JaxprEqn, ins: list[Value], outs: list[Value], context: Context) -> list[Value]:
    """The results of a call, those of its program being known."""
    (kind, axes), name = of_the_kit(eqn), eqn.params.get("name")
    if kind == "all_reduce" and context.backward:  # whose last operand is the cotangent
        of_sum = _summed(ins[-1], frozenset(axes), context).of_sum
        return [_same(value, frozenset(axes))._replace(of_sum=of_sum) for value in outs]
    if kind in ("all_reduce", "all_gather") and not context.backward and name != "_dedicated_servers_all_reduce":
        return [_same(value, frozenset(axes)) for value in outs]  # servers that hold no data get zeros
    return outs


def _summed(given: Value, axes: frozenset[str], context: Context) -> Value:
    """The sum over axes. In a backward pass it is of cotangents: of one that is the same on all if a loss is a sum."""
    if not context.backward:
        return _same(given, axes)
    of_sum = given.of_sum | (frozenset() if given.zero else axes - given.differs)
    return _same(given, axes)._replace(derived=given.derived | (axes - of_sum), of_sum=of_sum)


def _computed(eqn: JaxprEqn, jaxpr: Jaxpr, ins: list[Value], context: Context) -> Value:
    """The result of an equation on the device itself."""
    made, kind = _made_of(ins), eqn.primitive.name
    if context.backward or not made.of_sum:
        return made
    of_sums = [value for value in ins if value.of_sum]
    n = devices_along(made.of_sum, context)
    if kind in _ADDITIONS:
        return made._replace(of_sum=_any_of(ins).of_sum)
    if kind in _PRODUCTS:
        divided = any(_walk.divides(eqn, atom, n, jaxpr) for atom in eqn.invars)
        return made if len(of_sums) == 1 and not divided else made._replace(of_sum=frozenset())
    return made if kind in _LINEAR else made._replace(of_sum=frozenset())


def devices_along(axes: Sequence[str] | frozenset[str], context: Context) -> int:
    """How many devices there are along axes together."""
    return int(np.prod([context.sizes.get(axis, 1) for axis in axes]))


def _scan(eqn, ins, context, visit):
    body = eqn.params["jaxpr"].jaxpr
    consts, carried = _walk.scanned(eqn)
    before, carry, rows = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
    carry = _settled(lambda carry: _program(body, [*before, *carry, *rows], context, None)[:carried], carry)
    outs = _program(body, [*before, *carry, *rows], context, visit)
    return outs if eqn.params["length"] else [*carry, *outs[carried:]]


def _while(eqn, ins, context, visit):
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    test_consts, consts, carry = ins[:of_test], ins[of_test : of_test + of_body], ins[of_test + of_body :]

    def once(carry):
        disagreed = _program(test, [*test_consts, *carry], context, None)[0].differs
        return [_differing(value, disagreed) for value in _program(body, [*consts, *carry], context, None)]

    carry = _settled(once, carry)
    disagreed = _program(test, [*test_consts, *carry], context, visit)[0].differs
    _program(body, [*consts, *carry], context, visit)
    return carry, disagreed


def _settled(once: Callable[[list[Value]], list[Value]], carry: list[Value]) -> list[Value]:
    """What holds of the variables of a loop however often it goes round."""
    while True:
        after = [_any_of(pair) for pair in zip(carry, once(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _named_in(spec: Sequence) -> frozenset[str]:
    """Axes along which an input of such a specification is cut."""
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return frozenset(name for part in parts for name in part if isinstance(name, str))


def _made_of(values: Sequence[Value]) -> Value:
    """The result of an operation on values."""
    differs, summed, derived, of_sum = (frozenset().union(*(value[i] for value in values)) for i in range(4))
    zero = bool(values) and all(value.zero for value in values)
    return Value(differs, summed - differs, derived - differs, of_sum, zero)


def _any_of(values: Sequence[Value]) -> Value:
    """What holds of whichever of several values it is."""
    of_sums = [value.of_sum for value in values if not value.zero]
    return _made_of(values)._replace(of_sum=frozenset.intersection(*of_sums) if of_sums else frozenset())


def _same(value: Value, axes: frozenset[str]) -> Value:
    """Made the same along axes by a sum or a gather."""
    return Value(value.differs - axes, value.summed | axes, value.derived - axes, value.of_sum - axes, value.zero)


def _differing(value: Value, axes: frozenset[str]) -> Value:
    return Value(value.differs | axes, value.summed - axes, value.derived - axes, value.of_sum - axes, value.zero)
