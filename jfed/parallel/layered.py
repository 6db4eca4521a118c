"""A model of alike blocks between an entrance and an exit, written for one device of any mesh.

Whoever trains it decides which devices hold which blocks, and what is gathered when; the model decides how each array
is split over the axes that layers themselves are split over. So one text serves one device, layers split over devices,
layers dealt to devices, and all of these at once.

Letters: L blocks, B examples in a batch, b of them on a device, n devices along an axis.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jfed.core import Tree

AXES = ("data", "pipe", "tensor", "sequence", "expert")
"""What the axes of a mesh are called here; a mesh has some of them.

    data       examples are dealt to devices
    pipe       blocks are
    tensor     every layer's numbers are
    sequence   every example's tokens are
    expert     the experts of a mixture are, and examples
"""


class Axes(NamedTuple):
    """The axes a model's text communicates over, each by its name where the mesh has it, else None."""

    tensor: str | None = None
    sequence: str | None = None
    expert: str | None = None


class Parts(NamedTuple):
    """A model's parameters, or anything else of that shape."""

    enter: Tree
    blocks: Tree  # leaves [L, ...]
    leave: Tree


class Functions(NamedTuple):
    """The model, as a device runs it on its part of everything; `h` is any tree of floating leaves [b, ...]."""

    enter: Callable  # (params of enter, batch) -> h
    block: Callable  # (params of one block, h) -> h
    leave: Callable  # (params of leave, h, batch) -> losses [b], the same on all devices of the model's own axes


class Layered(NamedTuple):
    """A model that can be trained over any mesh."""

    init: Callable  # (key) -> params, as users know them
    split: Callable  # params -> Parts
    join: Callable  # Parts -> params
    specs: Parts  # of PartitionSpecs by "tensor" and "expert", a leaf of `blocks` without its axis of L
    functions: Callable  # (Axes) -> Functions
    check: Callable  # (sizes) -> None; raises ValueError where an axis of the mesh does not divide a dimension
    layers: int  # L
    axes: tuple[str, ...] = ()  # of "tensor", "sequence" and "expert", those that its functions can use


def divides(where: str, sizes: Mapping[str, int], axis: str, **dimension: int) -> None:
    """Refuses a dimension that an axis of the mesh does not divide.

    Args:
      where: who asks.
      sizes: devices along each axis of the mesh; an axis that is missing has 1.
      axis: the axis.
      **dimension: the name of the dimension, and its length.

    Raises:
      ValueError: if it does not, saying which axis, its size, the dimension, and the next length that would do.

    >>> divides("transformer", {"tensor": 4}, "tensor", heads=8)
    """
    ((name, length),) = dimension.items()
    n = sizes.get(axis, 1)
    if length % n or not length:
        raise ValueError(
            f"{where}({name}={length}): the mesh's axis {axis!r} has {n} devices, which must divide it; "
            f"take {name}={-(-max(length, 1) // n) * n}, or another mesh."
        )
