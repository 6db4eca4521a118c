"""What goes wrong in programs of many devices and raises no error: found in the traced program, before it runs.

    divergent collective   in a branch or loop that some devices may enter and others not, where they wait for ever
    not a permutation      a `ppermute` with a source or destination twice, or one that is no device of the axis
    summed twice           a sum over devices of what a sum over them already made the same on all, n times too much,
                           as when JAX has summed a gradient of replicated parameters (`check_vma=True`) already

Each variable is known by the axes along which it may differ from device to device. Values that are the same though
nothing says so, as a compressed all-reduce gives, count as differing; `lax.pmax` says so. A permutation that leaves
devices out is no finding: they receive zeros, on which trees and folds build. Nor is the mean over devices of what is
the same on all, which changes nothing, unless JAX made it so in a derivative, by a sum. The derivative of a sum over
devices, which is again one, is taken as meant.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jfed.collectives import _walk
from jfed.collectives._differs import Place, Value, all_reduced_over, at, devices_along, interpret


class Finding(NamedTuple):
    """One thing that is wrong."""

    kind: str  # "divergent collective", "not a permutation" or "summed twice"
    message: str  # what is wrong, and the cure, in one line
    where: str  # `file:line` of the program; empty where it is not known


def check(f: Callable, *args: Any) -> list[Finding]:
    """What is wrong with the messages of a program; an empty list if nothing is.

    Args:
      f: a function with a `jax.shard_map` in it, over a mesh or an `AbstractMesh`.
      *args: its arguments; `jax.ShapeDtypeStruct`s will do.

    Raises:
      ValueError: if there is no `shard_map` in it.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> from jfed import mesh
    >>> @mesh.shard_map(mesh=mesh.make((1,)), in_specs=P("clients"), out_specs=P())
    ... def twice(x):
    ...     return jax.lax.psum(jax.lax.psum(x, "clients") / 8, "clients")
    >>> [finding.kind for finding in check(twice, jnp.ones(8))]
    ['summed twice']
    """
    findings: list[Finding] = []

    def visit(eqn, jaxpr, ins, apart, place):
        findings.extend(_divergent(eqn, apart, place))
        findings.extend(_not_a_permutation(eqn, place))
        findings.extend(_summed_twice(eqn, jaxpr, ins, place))

    interpret(_walk.trace("check", f, args), visit)
    return list(dict.fromkeys(findings))


def require(f: Callable, *args: Any) -> None:
    """Raises if something is wrong with the messages of a program, as a test or a script may before it runs it.

    Args:
      f: as in `check`.
      *args: as in `check`.

    Raises:
      ValueError: with all findings, one a line; or as `check`.
    """
    if findings := check(f, *args):
        raise ValueError("\n".join(f"{one.where or 'unknown line'}: {one.kind}: {one.message}" for one in findings))


def _divergent(eqn: JaxprEqn, apart: frozenset[str], place: Place) -> Iterator[Finding]:
    """Collectives in bodies that devices may not enter alike."""
    what = "a while loop whose turns" if eqn.primitive.name == "while" else "a cond or switch whose predicate"
    for body in _walk.inner(eqn) if apart else ():
        for one, line in _collectives(body, place):
            if waiting := apart & {*_walk.axes(one)}:
                yield Finding(
                    "divergent collective",
                    f"{_walk.word(one)} over {_listed(_walk.axes(one))} in {what} may differ along {_listed(waiting)}, "
                    "so that some devices wait for others for ever; send outside and choose by jnp.where, or decide "
                    "alike, by lax.pmax over the axis.",
                    line,
                )


def _collectives(jaxpr: Jaxpr, place: Place) -> Iterator[tuple[JaxprEqn, str]]:
    """All that send in a program, and the user's lines."""
    for eqn in jaxpr.eqns:
        if _walk.is_collective(eqn):
            yield eqn, place.line(eqn)
        for body in _walk.inner(eqn):
            yield from _collectives(body, at(eqn, place))


def _not_a_permutation(eqn: JaxprEqn, place: Place) -> Iterator[Finding]:
    if _walk.name(eqn) not in _walk.SENDS:
        return
    axes, n = _walk.axes(eqn), devices_along(_walk.axes(eqn), place)
    pairs = np.asarray(eqn.params["perm"], np.int64).reshape(-1, 2)
    for devices, word in ((pairs[:, 0], "sends"), (pairs[:, 1], "receives")):
        numbers, times = np.unique(devices, return_counts=True)
        if twice := numbers[times > 1].tolist():
            yield Finding(
                "not a permutation",
                f"in a ppermute over {_listed(axes)} device {_listed(twice)} {word} more than once; "
                "take turns, one ppermute each.",
                place.line(eqn),
            )
    if strange := np.unique(pairs[(pairs < 0) | (pairs >= n)]).tolist():
        yield Finding(
            "not a permutation",
            f"a ppermute over {_listed(axes)} names device {_listed(strange)} of {n}, which are numbered from 0; "
            "take numbers modulo lax.axis_size.",
            place.line(eqn),
        )


def _summed_twice(eqn: JaxprEqn, jaxpr: Jaxpr, ins: list[Value], place: Place) -> Iterator[Finding]:
    axes = _sums_over(eqn)
    again = axes & frozenset().union(*(value.summed for value in ins))
    derived = axes & frozenset().union(*(value.derived for value in ins))
    if place.backward or not again or (not derived and _is_mean(eqn, jaxpr, devices_along(axes, place))):
        return
    if derived:
        what = "a gradient that JAX has summed over it already, since its parameters are the same on all devices"
        cure = "differentiate by lax.pcast(parameters, axis, to='varying'), or leave it out"
    else:
        what, cure = "what a sum or gather over it has made the same on all devices", "leave it out"
    called = eqn.params["name"].lstrip("_") if all_reduced_over(eqn) else _walk.word(eqn)
    yield Finding("summed twice", f"{called} over {_listed(derived or again)} of {what}; {cure}.", place.line(eqn))


def _sums_over(eqn: JaxprEqn) -> frozenset[str]:
    """The axes over which an equation sums: one of XLA's own, or a call of one of the kit's all-reduces."""
    if _walk.name(eqn) in _walk.SUMS | _walk.SCATTERS and not eqn.params.get("axis_index_groups"):
        return frozenset(_walk.axes(eqn))
    return frozenset(all_reduced_over(eqn))


def _is_mean(eqn: JaxprEqn, jaxpr: Jaxpr, n: int) -> bool:
    """Whether a sum over n devices is divided by n and not used otherwise, as in `lax.pmean`."""

    def number(atom):
        if isinstance(atom, Literal):
            return np.asarray(atom.val).item() if np.ndim(atom.val) == 0 else None
        made_by = next((other for other in jaxpr.eqns if atom in other.outvars), None)
        casts = made_by is not None and made_by.primitive.name in ("pvary", "pcast", "convert_element_type")
        return number(made_by.invars[0]) if casts else None

    def divides(user, out):
        return user.primitive.name == "div" and user.invars[0] is out and number(user.invars[1]) == n

    for out in eqn.outvars:
        users = [user for user in jaxpr.eqns if any(atom is out for atom in user.invars)]
        if any(atom is out for atom in jaxpr.outvars) or not all(divides(user, out) for user in users):
            return False
    return True


def _listed(names: Sequence | frozenset) -> str:
    return ", ".join(repr(name) for name in (sorted(names) if isinstance(names, frozenset) else names))
