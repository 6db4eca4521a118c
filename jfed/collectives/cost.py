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
from jfed.collectives._call import divisor
from jfed.collectives.butterfly import doubling_all_reduce, halving_doubling_all_reduce
from jfed.collectives.direct import one_shot_all_reduce, two_shot_all_reduce
from jfed.collectives.grid import hierarchical_all_reduce, nearly_square, torus_all_reduce
from jfed.collectives.ring import bidirectional_ring_all_reduce, ring_all_reduce
from jfed.collectives.servers import (
    at_most,
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
    messages: int  # that those are


def of(all_reduce: Callable, devices: int, numbers: int, *, itemsize: int = 4) -> Cost:
    """The cost of one all-reduce of a vector.

    Args:
      all_reduce: one of `THEORY`, or a `functools.partial` that sets its options.
      devices: n, with servers that hold no data.
      numbers: d.
      itemsize: bytes a number.

    Raises:
      ValueError: if there is no theory of it, a count is not a whole number of at least 1, or an option does not fit
        the number of devices.

    >>> of(ring_all_reduce, 4, 1000).sent, of(one_shot_all_reduce, 4, 1000).total
    (6000, 48000)
    """
    for name, value in (("devices", devices), ("numbers", numbers), ("itemsize", itemsize)):
        _validate.at_least_one("of", name, value, "2 devices, 1000 numbers, 4 bytes would do")
    options: dict[str, Any] = {}
    if isinstance(all_reduce, functools.partial):
        all_reduce, options = all_reduce.func, all_reduce.keywords
    for name, value in options.items():
        _validate.at_least_one("of", name, value, "it counts devices")
    if not callable(all_reduce) or all_reduce not in THEORY:
        known = ", ".join(f.__name__ for f in THEORY)
        raise ValueError(f"of(all_reduce={all_reduce!r}): there is no theory of it here; take one of {known}.")
    if devices == 1:
        return Cost(0, 0, 0, 0, 0, 0)
    cost = THEORY[all_reduce](devices, numbers, **options)
    return cost._replace(**{name: itemsize * getattr(cost, name) for name in ("sent", "received", "total", "in_turn")})


def on_a_switch(cost: Cost, *, alpha: float, beta: float) -> float:
    """Seconds where every device has one link to a switch, of full bandwidth both ways.

    The alpha-beta model: a device sends one message after another, and receives so, each in alpha seconds and beta
    for each byte.

    Args:
      cost: from `of`.
      alpha: seconds a message.
      beta: seconds a byte.

    Raises:
      ValueError: if a time is negative.

    >>> print(on_a_switch(of(ring_all_reduce, 4, 1000), alpha=1.0, beta=0.001))
    12.0
    """
    _validate.at_least_zero("on_a_switch", "alpha", alpha, "1e-6 seconds, say")
    _validate.at_least_zero("on_a_switch", "beta", beta, "1e-10 seconds a byte, say")
    return alpha * cost.messages + beta * cost.in_turn


def _even(n: int, each: int, rounds: int, parts: int = 1) -> Cost:
    """All devices send and receive the same number in every round, in so many messages."""
    return Cost(each, each, n * each, rounds, each, parts * rounds)


def _ring(n: int, d: int) -> Cost:
    return _even(n, 2 * (n - 1) * _chunk(d, n), 2 * (n - 1))


def _both_ways(n: int, d: int) -> Cost:
    return _even(n, 2 * (n - 1) * _chunk(d, n), 2 * (n - 1), _halves(n, d))


def _one_shot(n: int, d: int) -> Cost:
    return _even(n, (n - 1) * d, 1)._replace(messages=n - 1)


def _servers(n: int, d: int, servers: int | None = None) -> Cost:
    servers = min(2, n) if servers is None else servers
    at_most("of", servers, n, f"there are {n} devices")
    c = _chunk(d, servers)
    both = (n + servers - 2) * c  # from workers, and as a worker from the other servers
    return Cost(both, both, 2 * servers * (n - 1) * c, 2, 2 * (n - 1) * c, 2 * (n - 1))


def _dedicated(n: int, d: int, servers: int = 1) -> Cost:
    at_most("of", servers, n // 2, f"of {n} devices as many must be workers")
    workers, c = n - servers, _chunk(d, servers)
    return Cost(workers * c, workers * c, 2 * workers * servers * c, 2, 2 * workers * c, 2 * workers)


def _butterfly(n: int, d: int, each: Callable[[int], int], times: int) -> Cost:
    """`each(m)` numbers by each of m devices, in so many times log2 m rounds."""
    m = _power_below(n)
    outside = n - m
    fold = d if outside else 0
    rounds = times * _log2(m) + (2 if outside else 0)
    total = m * each(m) + 2 * d * outside
    return Cost(each(m) + fold, each(m) + fold, total, rounds, each(m) + 2 * fold, rounds)


def _tree(n: int, d: int) -> Cost:
    depth = (n - 1).bit_length()
    return Cost(depth * d, depth * d, 2 * (n - 1) * d, 2 * depth, 2 * depth * d, 2 * depth)


def _hierarchical(n: int, d: int, group: int | None = None) -> Cost:
    group = nearly_square(n)[1] if group is None else divisor("of", "group", group, n)
    return _even(n, 2 * (n - 1) * _chunk(d, n), 2 * (n // group - 1) + 2 * (group - 1))


def _torus(n: int, d: int, rows: int | None = None) -> Cost:
    rows = nearly_square(n)[0] if rows is None else divisor("of", "rows", rows, n)
    return _even(n, 2 * (n - 1) * _chunk(d, n), 2 * (rows - 1) + 2 * (n // rows - 1), _halves(n, d))


def _halves(n: int, d: int) -> int:
    """Into how many parts a chunk is split: a single number is none to split."""
    return min(2, _chunk(d, n))


def _chunk(d: int, n: int) -> int:
    return -(-d // n)


def _power_below(n: int) -> int:
    return 1 << _log2(n)


def _log2(n: int) -> int:
    return n.bit_length() - 1


THEORY: dict[Callable, Callable[..., Cost]] = {
    one_shot_all_reduce: _one_shot,
    parameter_server_all_reduce: lambda n, d: _servers(n, d, 1),
    sharded_servers_all_reduce: _servers,
    dedicated_servers_all_reduce: _dedicated,
    two_shot_all_reduce: lambda n, d: _servers(n, d, n),
    ring_all_reduce: _ring,
    bidirectional_ring_all_reduce: _both_ways,
    halving_doubling_all_reduce: lambda n, d: _butterfly(n, d, lambda m: 2 * (m - 1) * _chunk(d, m), 2),
    doubling_all_reduce: lambda n, d: _butterfly(n, d, lambda m: _log2(m) * d, 1),
    tree_all_reduce: _tree,
    hierarchical_all_reduce: _hierarchical,
    torus_all_reduce: _torus,
}
"""The all-reduces of the kit, and `(n, d, **options) -> Cost` in numbers."""
