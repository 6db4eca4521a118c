"""What is counted in a program is what theory says, and time is the model's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfed import collectives
from jfed.collectives import cost, count, network

pytestmark = pytest.mark.slow  # one version of JAX is enough for arithmetic
every = pytest.mark.parametrize("all_reduce", cost.THEORY, ids=lambda f: f.__name__.removesuffix("_all_reduce"))


DEDICATED = collectives.dedicated_servers_all_reduce


def shape(d, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((d,), dtype)


def variants(all_reduce, n):
    """The same with every option that fits n devices, or a few of them."""
    servers = [s for s in (1, 2, 3, n // 2, n) if 1 <= s <= n]
    if all_reduce is collectives.sharded_servers_all_reduce:
        return [functools.partial(all_reduce, servers=s) for s in dict.fromkeys(servers)]
    if all_reduce is collectives.dedicated_servers_all_reduce:
        return [functools.partial(all_reduce, servers=s) for s in dict.fromkeys(servers) if 2 * s <= n]
    name = {collectives.hierarchical_all_reduce: "group", collectives.torus_all_reduce: "rows"}.get(all_reduce)
    if name:
        return [all_reduce] + [functools.partial(all_reduce, **{name: g}) for g in (1, 2, 4, n) if n % g == 0]
    return [all_reduce]


def assert_as_by_theory(counted, theory, n):
    assert counted.sent.max() == theory.sent and counted.received.max() == theory.received
    assert count.total(counted) == counted.received.sum() == theory.total
    assert counted.rounds == theory.rounds and not counted.opaque
    switch = network.switch(n, alpha=3.0, beta=0.5)
    assert network.seconds(counted, switch) == cost.on_a_switch(theory, alpha=3.0, beta=0.5)


@every
@pytest.mark.parametrize("n", range(2, 9))
def test_volume_and_rounds_equal_theory(all_reduce, n):
    for f in variants(all_reduce, n):
        for d, dtype, itemsize in ((840 * n, jnp.float32, 4), (1001, jnp.bfloat16, 2), (n - 1, jnp.uint32, 4)):
            counted = count.all_reduce(f, n, shape(d, dtype))
            assert_as_by_theory(counted, cost.of(f, n, d, itemsize=itemsize), n)


@every
@pytest.mark.parametrize("n", [64, 256])
def test_volume_and_rounds_equal_theory_on_devices_that_do_not_exist(all_reduce, n):
    d = 3 * 2**14
    counted = count.all_reduce(all_reduce, n, shape(d))
    assert_as_by_theory(counted, cost.of(all_reduce, n, d), n)
    handed = count.lowered(*count.over(all_reduce, n, shape(d)))
    np.testing.assert_array_equal(handed.sent, counted.sent)
    np.testing.assert_array_equal(handed.received, counted.received)


def test_theory_is_the_notes_table():
    """Per worker and in all, in units of the vector: 8 workers, and 4 servers where servers are apart."""
    k, n, s = 840 * 8, 8, 4
    of = {f.__name__.removesuffix("_all_reduce"): cost.of(f, n, k, itemsize=1) for f in cost.THEORY}
    assert of["one_shot"].sent == k * (n - 1) and of["one_shot"].total == k * n * (n - 1)
    for ring in ("ring", "bidirectional_ring", "halving_doubling", "two_shot", "hierarchical", "torus"):
        assert (of[ring].sent, of[ring].total) == (2 * k * (n - 1) // n, 2 * k * (n - 1)), ring
    assert of["tree"].total == 2 * k * (n - 1) and of["doubling"].total == k * n * 3
    assert of["parameter_server"].received == k * (n - 1)
    apart = cost.of(functools.partial(collectives.dedicated_servers_all_reduce, servers=s), n + s, k, itemsize=1)
    assert (apart.sent, apart.received, apart.total) == (k * n // s, k * n // s, 2 * k * n)
    counted = count.all_reduce(
        functools.partial(collectives.dedicated_servers_all_reduce, servers=s), n + s, shape(k, jnp.uint8)
    )
    np.testing.assert_array_equal(counted.sent, [k] * n + [k * n // s] * s)


def test_a_ring_on_a_ring_uses_each_link_one_way_and_two_rings_both():
    d, links = 840, network.ring(8, alpha=1.0, beta=1.0)
    one, both = (
        count.all_reduce(f, 8, shape(d, jnp.uint8))
        for f in (collectives.ring_all_reduce, collectives.bidirectional_ring_all_reduce)
    )
    share = 2 * 7 * d // 8
    assert {way: size for (way, i), size in network.per_link(one, links).items() if size} == {"right": share}
    loads = network.per_link(both, links)
    assert sum(loads.values()) == 8 * share
    assert abs(loads["right", 0] - loads["left", 0]) <= 14
    assert network.seconds(one, links) == 14 + share and network.seconds(both, links) < 14 + share / 2 + 14


def test_messages_of_a_torus_go_along_row_and_column_the_shorter_way():
    net = network.torus(3, 5, alpha=1.0, beta=0.0)

    def hops(a, b):
        (ra, ca), (rb, cb) = divmod(a, 5), divmod(b, 5)
        return min((ra - rb) % 3, (rb - ra) % 3) + min((ca - cb) % 5, (cb - ca) % 5)

    for a in range(15):
        for b in range(15):
            way = [net.links[i] for i in net.way(a, b)]
            assert len(way) == hops(a, b)
            at = a
            for direction, here in way:
                assert here == at
                row, column = divmod(at, 5)
                step = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}[direction]
                at = (row + step[0]) % 3 * 5 + (column + step[1]) % 5
            assert at == b


def test_groups_spare_the_links_between_hosts():
    net, d = network.hosts(2, 4, inside=(0.0, 1.0), across=(0.0, 100.0)), 840
    grouped, ring = (
        count.all_reduce(f, 8, shape(d, jnp.uint8))
        for f in (functools.partial(collectives.hierarchical_all_reduce, group=4), collectives.doubling_all_reduce)
    )
    loads = network.per_link(grouped, net)
    assert loads["out", 0] == loads["in", 1] == d  # 2 k (n / g - 1) / n by each of four
    assert network.per_link(ring, net)["out", 0] == 4 * d
    assert network.seconds(grouped, net) < network.seconds(ring, net)


def test_a_tree_of_arrays_costs_as_one_vector_of_each_dtype():
    x = {"a": shape(600), "b": jax.ShapeDtypeStruct((20, 12), jnp.float32), "n": shape(0), "i": shape(80, jnp.int32)}
    counted = count.all_reduce(collectives.ring_all_reduce, 8, x)
    assert counted.sent.max() == cost.of(collectives.ring_all_reduce, 8, 840 + 80).sent
    assert counted.permutes == 2 * 14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.of(functools.partial(collectives.hierarchical_all_reduce, group=3), 8, 10), "one of .1, 2, 4, 8"),
        (lambda: cost.of(functools.partial(collectives.torus_all_reduce, rows=0), 8, 10), "rows=0"),
        (lambda: cost.of(functools.partial(collectives.sharded_servers_all_reduce, servers=9), 8, 10), "at most 8"),
        (lambda: cost.of(functools.partial(DEDICATED, servers=7), 8, 10), "at most 4"),
        (lambda: cost.on_a_switch(cost.of(collectives.ring_all_reduce, 4, 10), alpha=-1.0, beta=0.0), "alpha=-1.0"),
        (lambda: cost.of(jax.lax.psum, 4, 10), "there is no theory of it here; take one of one_shot_all_reduce"),
        (lambda: cost.of(collectives.ring_all_reduce, 0, 10), "devices=0"),
        (lambda: cost.of(collectives.ring_all_reduce, 4, 0), "numbers=0"),
        (lambda: network.switch(0, alpha=0.0, beta=0.0), r"switch\(n=0\)"),
        (lambda: network.switch(2, alpha=-1.0, beta=0.0), r"switch\(alpha=-1.0\)"),
        (lambda: network.torus(2, 0, alpha=0.0, beta=0.0), "columns=0"),
        (
            lambda: network.seconds(
                count.all_reduce(jax.lax.psum, 4, shape(8)), network.switch(4, alpha=0.0, beta=0.0)
            ),
            "which messages travel",
        ),
        (
            lambda: network.per_link(
                count.all_reduce(collectives.ring_all_reduce, 4, shape(8)), network.switch(5, alpha=0.0, beta=0.0)
            ),
            "counted of 4 devices, network of 5",
        ),
    ],
)
def test_bad_input_is_said_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
