"""How long messages take on a network that is described: by link, and in the alpha-beta model.

A message holds each link of its way for beta seconds a byte, and for the alpha seconds that its way takes in all.
Messages of one round follow one another on a link, and a round ends with the last. Links carry one way; a wire of
two ways is two of them.

>>> from jfed.collectives import count, ring_all_reduce
>>> network = hosts(2, 4, inside=(1e-6, 1 / 300e9), across=(1e-5, 1 / 12.5e9))
>>> round(seconds(count.all_reduce(ring_all_reduce, 8, np.zeros(10**6, np.float32)), network), 6)  # 14 (1e-5 + 4e-5)
0.0007

Letters: n devices, L links.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np

from jfed import _validate
from jfed.collectives.count import Counted


class Network(NamedTuple):
    """Links, and the way between any two devices."""

    devices: int  # n
    links: tuple[Hashable, ...]  # [L] names
    alpha: np.ndarray  # [L] seconds a message
    beta: np.ndarray  # [L] seconds a byte
    way: Callable[[int, int], tuple[int, ...]]  # (from, to) -> indices of links


def switch(n: int, *, alpha: float, beta: float) -> Network:
    """Every device has a link to a switch and one from it; the switch itself is never busy.

    Args:
      n: devices.
      alpha: seconds a message, in all.
      beta: seconds a byte, on either link.

    Raises:
      ValueError: if n is not a whole number of at least 1, or a time is negative.
    """
    _checked("switch", n=n)
    names = tuple([("up", i) for i in range(n)] + [("down", i) for i in range(n)])
    return _network("switch", n, names, [alpha] * n + [0.0] * n, [beta] * 2 * n, lambda a, b: (a, n + b))


def ring(n: int, *, alpha: float, beta: float) -> Network:
    """Devices in a circle, linked to both neighbours; messages take the shorter way."""
    return torus(1, n, alpha=alpha, beta=beta)


def torus(rows: int, columns: int, *, alpha: float, beta: float) -> Network:
    """Devices row by row on a 2-D torus, linked to four neighbours; messages go along the row, then the column.

    Args:
      rows: a.
      columns: b.
      alpha: seconds a message, on each link of its way.
      beta: seconds a byte, on each.

    Raises:
      ValueError: as `switch`.
    """
    _checked("torus", rows=rows, columns=columns)
    n = rows * columns
    names = tuple((direction, i) for direction in ("right", "left", "down", "up") for i in range(n))

    def way(a: int, b: int) -> tuple[int, ...]:
        links = []
        row, column = divmod(a, columns)
        for step, forward, size, place, goal in (
            (1, 0, columns, column, b % columns),
            (columns, 2, rows, row, b // columns),
        ):
            hops = (goal - place) % size
            back = hops > size - hops
            for _ in range(min(hops, size - hops)):
                here = row * columns + place if step == 1 else place * columns + b % columns
                links.append((forward + back) * n + here)
                place = (place - 1 if back else place + 1) % size
        return tuple(links)

    return _network("torus", n, names, [alpha] * 4 * n, [beta] * 4 * n, way)


def hosts(count: int, devices: int, *, inside: tuple[float, float], across: tuple[float, float]) -> Network:
    """Hosts of a few devices each: a switch within a host, and one network card a host to the others.

    Args:
      count: hosts.
      devices: of each host; those of a host follow one another.
      inside: alpha, seconds a message, and beta, seconds a byte, within a host.
      across: the same from host to host, of all devices of a host together.

    Raises:
      ValueError: as `switch`.
    """
    _checked("hosts", count=count, devices=devices)
    n = count * devices
    names = [(way, i) for way in ("up", "down") for i in range(n)] + [
        (way, i) for way in ("out", "in") for i in range(count)
    ]

    def way(a: int, b: int) -> tuple[int, ...]:
        if a // devices == b // devices:
            return a, n + b
        return 2 * n + a // devices, 2 * n + count + b // devices

    alpha = [inside[0]] * n + [0.0] * n + [across[0]] * count + [0.0] * count
    return _network("hosts", n, tuple(names), alpha, [inside[1]] * 2 * n + [across[1]] * 2 * count, way)


def per_link(counted: Counted, network: Network) -> dict[Hashable, int]:
    """Bytes on every link.

    Args:
      counted: from `count.all_reduce` or `count.traced`, with messages.
      network: of as many devices.

    Raises:
      ValueError: if messages are not known, or devices differ in number.

    >>> from jfed.collectives import count, ring_all_reduce
    >>> counted = count.all_reduce(ring_all_reduce, 4, np.zeros(100, np.float32))
    >>> per_link(counted, ring(4, alpha=0.0, beta=1.0))["right", 0]
    600
    """
    loads = np.zeros(len(network.links), np.int64)
    for ways, sizes, times in _routed("per_link", counted, network):
        for links, size in zip(ways, sizes, strict=True):
            loads[list(links)] += size * times
    return dict(zip(network.links, loads.tolist(), strict=True))


def seconds(counted: Counted, network: Network) -> float:
    """How long it takes, in the alpha-beta model; a round lasts as long as its busiest link.

    Args:
      counted: from `count.all_reduce` or `count.traced`, with messages.
      network: of as many devices.

    Raises:
      ValueError: as `per_link`.
    """
    total = 0.0
    for ways, sizes, times in _routed("seconds", counted, network):
        held = np.zeros(len(network.links))
        for links, size in zip(ways, sizes, strict=True):
            way = list(links)
            held[way] += network.alpha[way].sum() + network.beta[way] * size
        total += times * float(held.max())
    return total


def _routed(where: str, counted: Counted, network: Network):
    """`(ways, sizes, times)` of every step."""
    if counted.steps is None or counted.opaque:
        raise ValueError(
            f"{where}(counted): it does not say which messages travel; count a traced program of permutes, "
            "with count.traced or count.all_reduce."
        )
    if counted.sent.size != network.devices:
        raise ValueError(
            f"{where}(counted of {counted.sent.size} devices, network of {network.devices}): "
            "describe a network of as many."
        )
    way = functools.cache(network.way)
    for step in counted.steps:
        yield [way(int(a), int(b)) for a, b in step.pairs], step.bytes, step.times


def _checked(where: str, **counts: int) -> None:
    for name, value in counts.items():
        _validate.at_least_one(where, name, value, "4 would do")


def _network(where: str, n: int, names: tuple, alpha: list[float], beta: list[float], way: Callable) -> Network:
    for name, times in (("alpha", alpha), ("beta", beta)):
        _validate.at_least_zero(where, name, min(times), "give seconds, such as 1e-6 and 1e-10")
    return Network(n, names, np.asarray(alpha), np.asarray(beta), way)
