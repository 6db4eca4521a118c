"""What goes wrong in programs of many devices and raises no error: found in the traced program, before it runs.

    divergent collective   in a branch or loop that some devices may enter and others not, where they wait for ever
    not a permutation      a `ppermute` with a source or destination twice, or one that is no device of the axis
    summed twice           a sum over devices of what a sum over them already made the same on all, n times too much,
                           as when JAX has summed a gradient of replicated parameters (`check_vma=True`) already

Each variable is known by the axes along which it may differ from device to device. Values that are the same though
nothing says so, as a compressed all-reduce gives, count as differing; `lax.pmax` says so. A permutation that leaves
devices out is no finding: they receive zeros, on which trees and folds build.

A mean is no finding, where the sum is used for nothing else and divided by the number of devices at once, as `/ n` or
`* (1 / n)`: of what is the same on all it changes nothing, and of the gradient of a loss that is itself a sum or mean
over devices it is right where types are not checked (`check_vma=False`). There each device has n times its part of
that gradient, so that the sum is "summed twice"; it is found if what comes between the derivative and the sum is linear
and adds nothing but other such gradients. Where types are checked even the mean of a gradient that JAX has summed is
found, which is wrong if the loss is the device's own and needless if it is a mean over devices.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from jfed.collectives import _walk
from jfed.collectives._differs import Context, Value, devices_along, interpret, of_the_kit, within


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

    def visit(eqn, jaxpr, ins, disagreed, context):
        findings.extend(_divergent(eqn, disagreed, context))
        findings.extend(_not_a_permutation(eqn, context))
        findings.extend(_summed_twice(eqn, jaxpr, ins, context))

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


def _divergent(eqn: JaxprEqn, disagreed: frozenset[str], context: Context) -> Iterator[Finding]:
    """Collectives in bodies that some devices may run and others not."""
    what = "a while loop whose turns" if eqn.primitive.name == "while" else "a cond or switch whose predicate"
    for body in _walk.inner(eqn) if disagreed else ():
        for one, line in _collectives(body, context):
            if waiting := disagreed & {*_walk.axes(one)}:
                yield Finding(
                    "divergent collective",
                    f"{_walk.word(one)} over {_listed(_walk.axes(one))} in {what} may differ along {_listed(waiting)}, "
                    "so that some devices wait for others for ever; send outside and choose by jnp.where, or make "
                    "it the same on all, by lax.pmax over the axis.",
                    line,
                )


def _collectives(jaxpr: Jaxpr, context: Context) -> Iterator[tuple[JaxprEqn, str]]:
    """All that send in a program, and the user's lines."""
    for eqn in jaxpr.eqns:
        if _walk.is_collective(eqn):
            yield eqn, context.line(eqn)
        for body in _walk.inner(eqn):
            yield from _collectives(body, within(eqn, context))


def _not_a_permutation(eqn: JaxprEqn, context: Context) -> Iterator[Finding]:
    if _walk.name(eqn) not in _walk.SENDS:
        return
    axes, n = _walk.axes(eqn), devices_along(_walk.axes(eqn), context)
    pairs = np.asarray(eqn.params["perm"], np.int64).reshape(-1, 2)
    for devices, word in ((pairs[:, 0], "sends"), (pairs[:, 1], "receives")):
        numbers, times = np.unique(devices, return_counts=True)
        if twice := numbers[times > 1].tolist():
            yield Finding(
                "not a permutation",
                f"in a ppermute over {_listed(axes)} device {_listed(twice)} {word} more than once; "
                "take turns, one ppermute each.",
                context.line(eqn),
            )
    if strange := np.unique(pairs[(pairs < 0) | (pairs >= n)]).tolist():
        yield Finding(
            "not a permutation",
            f"a ppermute over {_listed(axes)} names device {_listed(strange)} of {n}, which are numbered from 0; "
            "take numbers modulo lax.axis_size.",
            context.line(eqn),
        )


def _summed_twice(eqn: JaxprEqn, jaxpr: Jaxpr, ins: list[Value], context: Context) -> Iterator[Finding]:
    axes = frozenset() if context.call else _sums_over(eqn)  # those within the kit's are no mistakes of the user
    again = axes & frozenset().union(*(value.summed for value in ins))
    derived = axes & frozenset().union(*(value.derived for value in ins))
    of_sum = axes & frozenset().union(*(value.of_sum for value in ins))
    if context.backward or not again | of_sum or (not derived and _is_mean(eqn, jaxpr, devices_along(axes, context))):
        return
    if derived:
        what = "a gradient that JAX has summed over it already, since its parameters are the same on all devices"
        cure = "differentiate by lax.pcast(parameters, axis, to='varying'), or leave it out"
    elif of_sum:
        what = "the gradient of a loss that is a sum or mean over it, of which each device has n times its part"
        cure = "take lax.pmean, or differentiate the device's own loss"
    else:
        what, cure = "what a sum or gather over it has made the same on all devices", "leave it out"
    called = eqn.params["name"].lstrip("_") if of_the_kit(eqn)[0] else _walk.word(eqn)
    yield Finding(
        "summed twice", f"{called} over {_listed(derived or of_sum or again)} of {what}; {cure}.", context.line(eqn)
    )


def _sums_over(eqn: JaxprEqn) -> frozenset[str]:
    """The axes over which an equation sums: one of XLA's own, or a call of one of the kit's."""
    if _walk.name(eqn) in _walk.SUMS | _walk.SCATTERS and not eqn.params.get("axis_index_groups"):
        return frozenset(_walk.axes(eqn))
    kind, axes = of_the_kit(eqn)
    return frozenset(axes if kind in ("all_reduce", "reduce_scatter") else ())


def _is_mean(eqn: JaxprEqn, jaxpr: Jaxpr, n: int) -> bool:
    """Whether a sum over n devices is divided by n and not used otherwise, as in `lax.pmean`."""
    for out in eqn.outvars:
        users = [user for user in jaxpr.eqns if any(atom is out for atom in user.invars)]
        if any(atom is out for atom in jaxpr.outvars) or not all(_walk.divides(user, out, n, jaxpr) for user in users):
            return False
    return True


def _listed(names: Sequence | frozenset) -> str:
    return ", ".join(repr(name) for name in (sorted(names) if isinstance(names, frozenset) else names))
