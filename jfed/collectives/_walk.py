"""What programs that JAX has traced say about devices: which equations send, along which axes, called from where."""

import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

SUMS = {"psum", "psum2", "psum_invariant"}
REDUCES = SUMS | {"pmax", "pmin"}
GATHERS = {"all_gather", "all_gather_invariant"}
SCATTERS = {"reduce_scatter"}
EXCHANGES = {"all_to_all"}
SENDS = {"ppermute"}
NO_MESSAGES = {"axis_index", "pvary", "pcast", "preduced", "vary_unreduced_cast"}
"""Primitives that name axes of devices, and send nothing."""

_NOT_THE_USERS = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(jax.__file__).parent)]
_NOT_THE_USERS += [path for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib", "platlib")]


def trace(where: str, f: Callable, args: Sequence[Any]) -> Jaxpr:
    """The program of `f(*args)`; args may be `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: if there is no `shard_map` in it.
    """
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    if not any(eqn.primitive.name == "shard_map" for eqn in equations(jaxpr)):
        raise ValueError(f"{where}(f): nothing in it runs under jax.shard_map, where messages are; put it in one.")
    return jaxpr


def name(eqn: JaxprEqn) -> str:
    """Of the primitive; the start of what has a start and an end counts as the whole."""
    return eqn.primitive.name.removesuffix("_start")


def word(eqn: JaxprEqn) -> str:
    """What `jax.lax` calls it."""
    return "psum_scatter" if name(eqn) in SCATTERS else "psum" if name(eqn) in SUMS else name(eqn)


def axes(eqn: JaxprEqn) -> tuple[str, ...]:
    """The axes of devices that an equation names, the last running fastest."""
    if eqn.primitive.name.endswith("_done"):
        return ()
    found = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    found = found if isinstance(found, tuple | list) else (found,)
    return tuple(axis for axis in found if isinstance(axis, str))


def is_collective(eqn: JaxprEqn) -> bool:
    """Whether devices send something in this very equation."""
    return bool(axes(eqn)) and name(eqn) not in NO_MESSAGES


def inner(eqn: JaxprEqn) -> list[Jaxpr]:
    """The programs within an equation: bodies, branches, what it calls."""
    found = []
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, Jaxpr):
                found.append(one)
    return found


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All of a program, those within others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in inner(eqn):
            yield from equations(body)


def called(eqn: JaxprEqn) -> Jaxpr | None:
    """What an equation runs once on what it is given: of jit, remat, custom derivatives, shard_map and the like."""
    bodies = inner(eqn)
    if len(bodies) == 1 and len(bodies[0].invars) == len(eqn.invars) and len(bodies[0].outvars) == len(eqn.outvars):
        return bodies[0]
    return None


def divides(eqn: JaxprEqn, atom: Any, n: int, jaxpr: Jaxpr) -> bool:
    """Whether an equation of a program divides a variable by n, as `x / n` or as `x * (1 / n)`."""
    if eqn.primitive.name == "div":
        return eqn.invars[0] is atom and _number(eqn.invars[1], jaxpr) == n
    if eqn.primitive.name == "mul":
        rounded = np.asarray(1 / n).astype(eqn.outvars[0].aval.dtype).item()
        return any(other is not atom and _number(other, jaxpr) == rounded for other in eqn.invars)
    return False


def _number(atom: Any, jaxpr: Jaxpr) -> float | None:
    """The value of a constant scalar; None of anything else."""
    if isinstance(atom, Literal):
        return np.asarray(atom.val).item() if np.ndim(atom.val) == 0 else None
    made_by = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
    casts = made_by is not None and made_by.primitive.name in ("pvary", "pcast", "convert_element_type")
    return _number(made_by.invars[0], jaxpr) if casts else None


def scanned(eqn: JaxprEqn) -> tuple[int, int]:
    """How many inputs of a scan stay the same, and how many after those are carried."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    parts = eqn.params["ft_in"].update(list(range(len(eqn.invars)))).unpack()  # from jax 0.12
    consts, carry, _ = (len(list(part)) for part in parts)
    return consts, carry


def source(eqn: JaxprEqn) -> str:
    """`file:line` of the innermost line that is the user's; empty where none is."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not any(frame.file_name.startswith(path) for path in _NOT_THE_USERS):
            return f"{frame.file_name}:{frame.line_num}"
    return ""
