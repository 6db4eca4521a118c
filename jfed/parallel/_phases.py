"""A function's work, and that of its two gradients, as three phases that may run at different times.

    forward           y, and what the later two need of it
    input_gradient    dh, and what the last needs of it
    weight_gradient   dparams

Value and gradients are traced as one program, whose operations are dealt to the first phase that needs their results:
those that lead to y, those that lead to dh, the rest. What crosses from a phase to a later one is kept, and nothing
else. What follows from the parameters alone is computed again where it is needed, so parameters that are gathered in
the forward pass are gathered again, not kept; and so is what is but a view of something kept, or a wider copy. Products
for weights can thus wait, layer by layer, without a second backward pass (Qi et al. 2023, arXiv:2401.10241).
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Literal

from jfed.core import Tree

_CALLS = {"pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_VIEWS = {"reshape", "transpose", "convert_element_type", "broadcast_in_dim", "squeeze", "expand_dims", "copy", "neg"}


class Phases(NamedTuple):
    """The phases of `f(params, h) -> y`; `kept` and `waiting` are lists of arrays."""

    forward: Callable  # (params, h) -> (y, kept)
    backward: Callable  # (params, kept, dy) -> (dparams, dh)
    input_gradient: Callable  # (params, kept, dy) -> (dh, waiting)
    weight_gradient: Callable  # (params, kept, waiting) -> dparams
    kept: list  # jax.ShapeDtypeStructs, of one call
    waiting: list


def phases(f: Callable, params: Tree, h: Tree, *, recompute: bool) -> Phases:
    """Traces `f` and its gradients, and deals their operations to phases.

    Args:
      f: `(params, h) -> y`.
      params: of the right shapes.
      h: of the right shapes, floating.
      recompute: keep nothing of the forward phase but `h`; the backward phases compute it again.
    """
    h_leaves, h_tree = jax.tree.flatten(h)
    params_leaves, params_tree = jax.tree.flatten(params)

    def joint(params, h, dy):
        y, pull = jax.vjp(f, params, h)
        return y, *pull(dy)

    y = jax.eval_shape(f, params, h)
    traced = jax.make_jaxpr(joint)(params, h, y)
    flat = jax.make_jaxpr(functools.partial(_inlined, traced))(*params_leaves, *h_leaves, *jax.tree.leaves(y))
    program = _Program(flat)
    of_params, of_h, of_dy = _cut(flat.jaxpr.invars, [len(params_leaves), len(h_leaves)])
    y_vars, dparams_vars, dh_vars = _cut(flat.jaxpr.outvars, [len(of_dy), len(of_params)])

    always = program.reached_from(of_params)  # what parameters alone give
    forward = program.before(y_vars)
    first = set() if recompute else {v for i in forward for v in flat.jaxpr.eqns[i].outvars} - always
    kept = program.crossing(dparams_vars + dh_vars, first | set(of_h), stop=set(of_dy))
    backward = program.before(dh_vars, stop=set(kept))
    second = {v for i in backward for v in flat.jaxpr.eqns[i].outvars} - always - set(kept)
    waiting = program.crossing(dparams_vars, second | set(of_dy), stop=set(kept))

    def evaluate(wanted, given, values):
        return program.evaluate(wanted, dict(zip(given, values, strict=True)))

    def forward_fn(params: Tree, h: Tree) -> tuple[Tree, list]:
        values = jax.tree.leaves(params) + jax.tree.leaves(h)
        found = evaluate(y_vars + kept, of_params + of_h, values)
        return jax.tree.unflatten(jax.tree.structure(y), found[: len(y_vars)]), found[len(y_vars) :]

    def backward_fn(params: Tree, kept_values: list, dy: Tree) -> tuple[Tree, Tree]:
        values = [*jax.tree.leaves(params), *kept_values, *jax.tree.leaves(dy)]
        found = evaluate(dparams_vars + dh_vars, of_params + kept + of_dy, values)
        n = len(dparams_vars)
        return jax.tree.unflatten(params_tree, found[:n]), jax.tree.unflatten(h_tree, found[n:])

    def input_fn(params: Tree, kept_values: list, dy: Tree) -> tuple[Tree, list]:
        values = [*jax.tree.leaves(params), *kept_values, *jax.tree.leaves(dy)]
        found = evaluate(dh_vars + waiting, of_params + kept + of_dy, values)
        return jax.tree.unflatten(h_tree, found[: len(dh_vars)]), found[len(dh_vars) :]

    def weight_fn(params: Tree, kept_values: list, waiting_values: list) -> Tree:
        values = [*jax.tree.leaves(params), *kept_values, *waiting_values]
        return jax.tree.unflatten(params_tree, evaluate(dparams_vars, of_params + kept + waiting, values))

    def shapes(variables):
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]

    return Phases(forward_fn, backward_fn, input_fn, weight_fn, shapes(kept), shapes(waiting))


def lean(f: Callable) -> Callable:
    """`f(params, h)`, which keeps nothing for its gradient that follows from the parameters alone.

    In a loop over layers whose parameters are gathered, the gathered ones are then no residuals.
    """

    @jax.custom_vjp
    def lean_fn(params, h):
        return f(params, h)

    def forward(params, h):
        y, kept = phases(f, params, h, recompute=False).forward(params, h)
        return y, (params, kept, h)

    def backward(residuals, dy):
        params, kept, h = residuals
        return phases(f, params, h, recompute=False).backward(params, kept, dy)

    lean_fn.defvjp(forward, backward)
    return lean_fn


class _Program:
    """A jaxpr without calls, its operations found by what they make."""

    def __init__(self, closed: ClosedJaxpr):
        self.eqns = closed.jaxpr.eqns
        self.constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.maker = {v: i for i, eqn in enumerate(self.eqns) for v in eqn.outvars}

    def reached_from(self, given: Iterable) -> set:
        """What is computed of `given` and constants alone."""
        reached = set(given) | set(self.constants)
        for eqn in self.eqns:
            if all(isinstance(v, Literal) or v in reached for v in eqn.invars):
                reached |= set(eqn.outvars)
        return reached

    def before(self, wanted: Iterable, stop: set = frozenset()) -> set:
        """Places of the operations that `wanted` follows from, given `stop`."""
        found, open_ = set(), list(wanted)
        while open_:
            v = open_.pop()
            if isinstance(v, Literal) or v in stop or (i := self.maker.get(v)) is None or i in found:
                continue
            found.add(i)
            open_ += self.eqns[i].invars
        return found

    def crossing(self, wanted: Iterable, earlier: set, *, stop: set) -> list:
        """Which of `earlier` must be kept for `wanted`: views of what is kept anyway are made again."""
        kept, seen, open_ = {}, set(), list(wanted)
        while open_:
            v = open_.pop()
            if isinstance(v, Literal) or v in stop or v in seen:
                continue
            seen.add(v)
            i = self.maker.get(v)
            if v in earlier and (i is None or not self._is_view(i)):
                kept[v] = None
            elif i is not None:
                open_ += self.eqns[i].invars
        return list(kept)

    def _is_view(self, i: int) -> bool:
        eqn = self.eqns[i]
        inputs = [v for v in eqn.invars if not isinstance(v, Literal)]
        smaller = len(inputs) == 1 and _nbytes(inputs[0]) <= _nbytes(eqn.outvars[0])
        return eqn.primitive.name in _VIEWS and smaller

    def evaluate(self, wanted: list, env: dict) -> list:
        """Values of `wanted` from those in `env`."""
        env = env | self.constants

        def read(v):
            return v.val if isinstance(v, Literal) else env[v]

        for i in sorted(self.before(wanted, stop=set(env))):
            eqn = self.eqns[i]
            for v, value in zip(eqn.outvars, _bound(eqn, [read(v) for v in eqn.invars]), strict=True):
                env.setdefault(v, value)
        return [read(v) for v in wanted]


def _bound(eqn: Any, values: list) -> list:
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, parameters = given if isinstance(given, tuple) else ((), given)  # a pair before jax 0.10
    result = eqn.primitive.bind(*functions, *values, **parameters)
    return result if eqn.primitive.multiple_results else [result]


def _inlined(closed: ClosedJaxpr, *values: jax.Array) -> list:
    """The value of a jaxpr, calls in it done operation by operation."""
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(closed.jaxpr.invars, values, strict=True))

    def read(v):
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in closed.jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        inner = next((p for p in eqn.params.values() if isinstance(p, ClosedJaxpr)), None)
        known = eqn.primitive.name in _CALLS and inner is not None
        env |= dict(zip(eqn.outvars, _inlined(inner, *given) if known else _bound(eqn, given), strict=True))
    return [read(v) for v in closed.jaxpr.outvars]


def _cut(values: list, lengths: list[int]) -> list[list]:
    """`values` in runs of such lengths, and the rest."""
    parts, begin = [], 0
    for length in lengths:
        parts.append(list(values[begin : begin + length]))
        begin += length
    return [*parts, list(values[begin:])]


def _nbytes(v: Any) -> int:
    return v.aval.size * v.aval.dtype.itemsize
