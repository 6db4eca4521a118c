"""What a round sends, edge by edge: as metrics say, as a mesh does, and beside a server and a ring of the same job."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

from jfed import collectives, compress, gossip, ledger, local, mesh, run, sampling, tree
from jfed.clients import lanes, stationary
from jfed.collectives import count
from jfed.gossip import conditions, mix, topology

N = 8
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
PEOPLE = problem.POPULATION._replace(start=problem.POPULATION.start[:N], size=problem.POPULATION.size[:N])
MODEL = tree.nbytes(problem.PARAMS)
EVERYONE = sampling.full(steps=WORK.steps)
QUANTIZED = compress.quantize(4, rounding="nearest")
TREE = topology.binary_tree(N)
METHODS = {
    "dpsgd": (lambda **how: gossip.dpsgd(WORK, topology.ring(N), **how), 2 * MODEL),
    "exponential": (lambda **how: gossip.dpsgd(WORK, topology.exponential(N), **how), 3 * MODEL),
    "gradient_tracking": (lambda **how: gossip.gradient_tracking(WORK, topology.ring(N), **how), 4 * MODEL),
    "push_sum": (
        lambda **how: gossip.push_sum(WORK, topology.directed_ring(N, weights=topology.push), **how),
        MODEL + 4,
    ),
    "choco": (
        lambda **how: gossip.choco(WORK, topology.ring(N), compressor=QUANTIZED, step_size=0.5, **how),
        2 * compress.nbytes(QUANTIZED.update(problem.PARAMS, QUANTIZED.init(problem.PARAMS))[0]),
    ),
    "personalised": (
        lambda **how: gossip.personalised(WORK, topology.ring(N), is_local=lambda path: path == "b", **how),
        2 * tree.nbytes(problem.PARAMS["w"]),
    ),
    "relay": (lambda **how: gossip.relay(WORK, TREE, **how), None),
}


def on_mesh():
    devices = mesh.make((N,), ("peers",))
    return {"mixing": mix.on_mesh(devices), "client_map": stationary(devices, lanes(1), axis="peers")}


def traffic(algorithm, rounds=1, sampler=EVERYONE):
    state = algorithm.init(problem.PARAMS)
    return run.scan_rounds(algorithm, sampler, PEOPLE, state, jax.random.key(0), rounds=rounds)[1]["traffic"]


@pytest.mark.parametrize("name", METHODS)
def test_metrics_say_what_a_mesh_sends_to_the_byte(name):
    make, expected = METHODS[name]
    algorithm = make(**on_mesh())
    state, cohort = algorithm.init(problem.PARAMS), EVERYONE(PEOPLE, jax.random.key(0), 0)
    if expected is None:
        neighbours = np.bincount([i for _, _, i, _ in topology.edges(TREE)], minlength=N)
        expected = neighbours * (MODEL + 4)
    found = traffic(make())
    np.testing.assert_array_equal(found.up[0], np.broadcast_to(expected, N))
    np.testing.assert_array_equal(found.down[0], np.broadcast_to(expected, N))
    # Of the round on the mesh, compiled without its metrics, which are sums over devices.
    program = jax.jit(lambda s, c, k: algorithm.round(s, c, k)[0]).lower(state, cohort, jax.random.key(0)).compile()
    np.testing.assert_array_equal(count.compiled(program.as_text()).sent, found.up[0])


def test_a_whole_round_on_a_ring_of_devices_is_permutes_only():
    algorithm = METHODS["dpsgd"][0](**on_mesh())
    state, cohort = algorithm.init(problem.PARAMS), EVERYONE(PEOPLE, jax.random.key(0), 0)
    program = jax.jit(lambda s, c, k: algorithm.round(s, c, k)[0]).lower(state, cohort, jax.random.key(0)).compile()
    text = program.as_text()
    for other in ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-broadcast"):
        assert f" {other}(" not in text and f" {other}-start(" not in text, other
    assert count.compiled(text).permutes == 2


def test_no_peer_of_a_ring_is_a_bottleneck_where_a_server_is():
    """Bytes a step of the busiest: gossip 2 k, ring all-reduce 2 k (n - 1) / n, a server (n - 1) k."""
    k = jax.ShapeDtypeStruct((1000,), jnp.float32)
    server = count.all_reduce(collectives.parameter_server_all_reduce, N, k).sent.max()
    ring = count.all_reduce(collectives.ring_all_reduce, N, k).sent.max()
    algorithm = gossip.averaging(topology.ring(N))
    state = algorithm.init(jnp.zeros(1000))
    _, metrics = algorithm.round(state, EVERYONE(PEOPLE, jax.random.key(0), 0), jax.random.key(0))
    assert int(metrics["traffic"].up.max()) == int(metrics["traffic"].up.min()) == 2 * 4000
    assert ring == 2 * 4000 * 7 // 8 and server == 7 * 4000


def test_a_ledger_tells_links_apart():
    graph = topology.one_peer_exponential(N)
    found = traffic(gossip.adapt_then_combine(WORK, graph, by_edge=True), rounds=4)
    by_edge = ledger.by_edge(graph, found)
    expected = {}
    for t in range(4):
        for when, j, i, _ in topology.edges(graph):
            if when == t % 3:
                expected[j, i] = expected.get((j, i), 0) + MODEL
    assert by_edge == expected
    later = jax.tree.map(lambda x: x[3:], found)
    assert ledger.by_edge(graph, later, start=3) == {(j, i): MODEL for t, j, i, _ in topology.edges(graph) if t == 0}
    with pytest.raises(ValueError, match="does not tell links apart"):
        ledger.by_edge(graph, found._replace(edges=()))


def test_what_is_lost_was_sent_and_not_heard():
    lossy = conditions.lost_messages(EVERYONE, 0.5)
    found = traffic(gossip.adapt_then_combine(WORK, topology.complete(N)), 20, lossy)
    up, down = (int(np.asarray(x, np.int64).sum()) for x in (found.up, found.down))
    assert up == 20 * N * (N - 1) * MODEL
    assert abs(down / up - 0.5) < 0.06
