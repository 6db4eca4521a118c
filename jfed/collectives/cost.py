"""What an all-reduce costs by theory: bytes, rounds, and seconds on a network that is described.

Bytes count where they go from one device to another. Lecture notes often put a total, k n (n - 1) of everyone to
everyone, beside the bytes of one worker, 2 k (n - 1) / n of the ring: here both are given of each. Vectors that n
does not divide are filled up, so a chunk has ceil(d / n) numbers.

Letters: n devices, s servers, d numbers, c numbers a chunk, m the largest power of two up to n.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jfed import _validate
from jfed.collectives.butterfly import doubling_all_reduce, halving_doubling_all_reduce
from jfed.collectives.direct import one_shot_all_reduce, two_shot_all_reduce
from jfed.collectives.grid import hierarchical_all_reduce, nearly_square, torus_all_reduce
from jfed.collectives.ring import bidirectional_ring_all_reduce, ring_all_reduce
from jfed.collectives.servers import (
    dedicated_servers_all_reduce,
    parameter_server_all_reduce,
    sharded_servers_all_reduce,
)
from jfed.collectives.tree import tree_all_reduce


class Cost(NamedTuple):
    """One all-reduce."""

    sent: int  # bytes, by the device that sends most
    received: int  # bytes, by the device that receives most
    total: int  # bytes, by all devices together
    rounds: int  # messages that wait for one another
    in_turn: int  # bytes through the busiest device of each round, in or out, added up over rounds


def of(all_reduce: Callable, devices: int, numbers: int, *, itemsize: int = 4) -> Cost:
    """The cost of one all-reduce of a vector.

    Args:
      all_reduce: one of `THEORY`, or a `functools.partial` that sets its options.
      devices: n, with servers that hold no data.
      numbers: d.
      itemsize: bytes a number.

    Raises:
      ValueError: if there is no theory of it, or a count is not a whole number of at least 1.

    >>> of(ring_all_reduce, 4, 1000).sent, of(one_shot_all_reduce, 4, 1000).total
    (6000, 48000)
    """
    for name, value in (("devices", devices), ("numbers", numbers), ("itemsize", itemsize)):
        _validate.at_least_one("of", name, value, "2 devices, 1000 numbers, 4 bytes would do")
    options: dict[str, Any] = {}
    if isinstance(all_reduce, functools.partial):
        all_reduce, options = all_reduce.func, all_reduce.keywords
    if all_reduce not in THEORY:
        known = ", ".join(f.__name__ for f in THEORY)
        raise ValueError(f"of(all_reduce={all_reduce!r}): there is no theory of it here; take one of {known}.")
    if devices == 1:
        return Cost(0, 0, 0, 0, 0)
    cost = THEORY[all_reduce](devices, numbers, **options)
    return cost._replace(**{name: itemsize * getattr(cost, name) for name in cost._fields if name != "rounds"})


def on_a_switch(cost: Cost, *, alpha: float, beta: float) -> float:
    """Seconds where every device has one link to a switch, of full bandwidth both ways.

    The alpha-beta model: a round takes alpha seconds, and beta for each byte of its busiest device.

    Args:
      cost: from `of`.
      alpha: seconds a message.
      beta: seconds a byte.
    """
    return alpha * cost.rounds + beta * cost.in_turn


def _even(n: int, each: int, rounds: int) -> Cost:
    """All devices send and receive the same number in every round."""
    return Cost(each, each, n * each, rounds, each)


def _ring(n: int, d: int) -> Cost:
    return _even(n, 2 * (n - 1) * _chunk(d, n), 2 * (n - 1))


def _one_shot(n: int, d: int) -> Cost:
    return _even(n, (n - 1) * d, 1)


def _servers(n: int, d: int, servers: int = 2) -> Cost:
    c = _chunk(d, servers)
    both = (n + servers - 2) * c  # from workers, and as a worker from the other servers
    return Cost(both, both, 2 * servers * (n - 1) * c, 2, 2 * (n - 1) * c)


def _dedicated(n: int, d: int, servers: int = 1) -> Cost:
    workers, c = n - servers, _chunk(d, servers)
    return Cost(workers * c, workers * c, 2 * workers * servers * c, 2, 2 * workers * c)


def _butterfly(n: int, d: int, each: Callable[[int], int], rounds: int) -> Cost:
    """`each(m)` numbers by each of m devices, in so many times log2 m rounds."""
    m = _power_below(n)
    outside = n - m
    fold = d if outside else 0
    return Cost(
        sent=each(m) + fold,
        received=each(m) + fold,
        total=m * each(m) + 2 * d * outside,
        rounds=rounds * _log2(m) + (2 if outside else 0),
        in_turn=each(m) + 2 * fold,
    )


def _tree(n: int, d: int) -> Cost:
    depth = _log2_up(n)
    return Cost(sent=depth * d, received=depth * d, total=2 * (n - 1) * d, rounds=2 * depth, in_turn=2 * depth * d)


def _grid(n: int, d: int, rows: int) -> Cost:
    return _even(n, 2 * (n - 1) * _chunk(d, n), 2 * (rows - 1) + 2 * (n // rows - 1))


def _hierarchical(n: int, d: int, group: int | None = None) -> Cost:
    return _grid(n, d, nearly_square(n)[1] if group is None else group)


def _torus(n: int, d: int, rows: int | None = None) -> Cost:
    return _grid(n, d, nearly_square(n)[0] if rows is None else rows)


def _chunk(d: int, n: int) -> int:
    return -(-d // n)


def _power_below(n: int) -> int:
    return 1 << _log2(n)


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _log2_up(n: int) -> int:
    return (n - 1).bit_length()


THEORY: dict[Callable, Callable[..., Cost]] = {
    one_shot_all_reduce: _one_shot,
    parameter_server_all_reduce: lambda n, d: _servers(n, d, 1),
    sharded_servers_all_reduce: _servers,
    dedicated_servers_all_reduce: _dedicated,
    two_shot_all_reduce: lambda n, d: _servers(n, d, n),
    ring_all_reduce: _ring,
    bidirectional_ring_all_reduce: _ring,
    halving_doubling_all_reduce: lambda n, d: _butterfly(n, d, lambda m: 2 * (m - 1) * _chunk(d, m), 2),
    doubling_all_reduce: lambda n, d: _butterfly(n, d, lambda m: _log2(m) * d, 1),
    tree_all_reduce: _tree,
    hierarchical_all_reduce: _hierarchical,
    torus_all_reduce: _torus,
}
"""The all-reduces of the kit, and `(n, d, **options) -> Cost` in numbers."""
