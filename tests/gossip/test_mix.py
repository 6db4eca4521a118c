"""Mixing held to products of matrices, and what it sends between devices to what a graph's edges say."""

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jfed import compress, mesh, tree
from jfed.collectives import count
from jfed.gossip import mix, topology
from jfed.gossip.mix._blocks import blocks_of

N = 16
EVERYBODY = jnp.ones(N, bool)
GRAPHS = {
    "ring": topology.ring(N),
    "star": topology.star(N),
    "complete": topology.complete(N),
    "exponential": topology.exponential(N),
    "one peer": topology.one_peer_exponential(N),
    "base": topology.base_graph(N, 2),
    "random, directed": topology.from_graph(
        np.random.default_rng(0).random((N, N)) < 0.3, weights=topology.uniform, name="random"
    ),
}
graphs = pytest.mark.parametrize("name", GRAPHS)
X = {
    "a": jnp.asarray(np.random.default_rng(1).normal(size=(N, 3, 2)), jnp.float32),
    "b": jnp.asarray(np.random.default_rng(2).normal(size=N), jnp.float32),
}


def mixers(name):
    devices = [mesh.make((m,), ("peers",)) for m in (8, 4)]
    return [how(GRAPHS[name]) for how in (mix.dense(), mix.sparse(), *map(mix.on_mesh, devices))]


def weights(graph, t=0, *, present=EVERYBODY, lost=mix.own_instead, **options):
    return mix.weights_of(graph, jnp.int32(t), present=present, lost=lost, **options)


def by_matrix(matrix):
    return jax.tree.map(lambda x: np.tensordot(matrix, np.asarray(x, np.float64), 1), X)


@graphs
def test_every_mixer_is_a_product_with_the_matrix_of_the_round(name):
    graph = GRAPHS[name]
    w = topology.matrices(graph)
    for mixer in mixers(name):
        combine = jax.jit(lambda x, w, mixer=mixer: mixer.combine(x, x, w, None))
        for t in (0, 1, 6):
            problem.close(combine(X, weights(graph, t)), by_matrix(w[t % len(w)]))


@graphs
def test_what_is_sent_may_be_another_tree_than_what_a_peer_keeps(name):
    graph = GRAPHS[name]
    w = topology.matrices(graph)[0]
    sent = jax.tree.map(lambda x: 2 * x, X)
    for mixer in mixers(name):
        mixed = jax.jit(lambda x, sent, w, mixer=mixer: mixer.combine(x, sent, w, None))(X, sent, weights(graph))
        problem.close(mixed, by_matrix(2 * w - np.diag(np.diag(w))))


@graphs
def test_a_slot_brings_each_peer_its_source(name):
    graph = GRAPHS[name]
    for mixer in mixers(name):
        hear = jax.jit(mixer.hear, static_argnums=1)
        for slot in {0, graph.source.shape[1] - 1}:
            heard = hear(X, slot, jnp.int32(5))
            np.testing.assert_array_equal(heard["a"], X["a"][graph.source[5 % len(graph.source), slot]])


def test_messages_are_decoded_where_they_are_heard():
    graph, link = GRAPHS["ring"], compress.quantize(8, rounding="nearest")
    message = jax.vmap(lambda x: link.update(x, link.init(x))[0])(X)
    decoded = jax.vmap(compress.decode)(message)
    w = topology.matrices(graph)[0]
    for mixer in mixers("ring"):
        mixed = mixer.combine(X, message, weights(graph), None)
        expected = jax.tree.map(
            lambda x, d: np.diag(w).reshape(-1, *[1] * (x.ndim - 1)) * x + np.tensordot(w - np.diag(np.diag(w)), d, 1),
            X,
            decoded,
        )
        problem.close(mixed, expected)


# --- what does not come ----------------------------------------------------------------------------------------------

AWAY = EVERYBODY.at[jnp.array([2, 9])].set(False)
ARRIVES = jnp.asarray(np.random.default_rng(3).random((N, N)) < 0.7)


def what_came(graph, lost):
    """The mixing matrix of a rough round, made entry by entry."""
    w = topology.matrices(graph)[0]
    out = np.diag(np.diag(w)).copy()
    for i in range(N):
        for j in range(N):
            if i == j or not w[i, j]:
                continue
            there, came = bool(AWAY[i] & AWAY[j]), bool(AWAY[i] & AWAY[j] & ARRIVES[i, j])
            if came:
                out[i, j] = w[i, j]
            elif lost == "own" or (lost == "nothing" and not there):
                out[i, i] += w[i, j]
            elif lost == "mass" and not there:
                out[j, j] += w[i, j]
    if lost == "renormalised":
        out *= (w.sum(1) / out.sum(1))[:, None]
    out[~np.asarray(AWAY)] = np.eye(N)[~np.asarray(AWAY)]
    return out


@pytest.mark.parametrize(
    ("lost", "rule"),
    [
        ("own", mix.own_instead),
        ("nothing", mix.nothing_instead),
        ("renormalised", mix.renormalised),
        ("mass", mix.mass_returned),
        ("changes", mix.nothing),
    ],
)
@pytest.mark.parametrize("name", ["ring", "random, directed", "complete"])
def test_what_takes_the_place_of_a_lost_message(name, lost, rule):
    graph = GRAPHS[name]
    rough = weights(graph, present=AWAY, arrives=ARRIVES, lost=rule)
    problem.close(mix.sparse()(graph).combine(X, X, rough, None), by_matrix(what_came(graph, lost)))


def test_rows_add_up_to_one_whatever_is_lost_and_columns_too_where_links_fail_both_ways():
    both = ARRIVES & ARRIVES.T
    for rule in (mix.own_instead, mix.renormalised):
        rough = weights(GRAPHS["ring"], present=AWAY, arrives=ARRIVES, lost=rule)
        np.testing.assert_allclose(rough.own + rough.heard.sum(0), 1, atol=1e-6)
    rough = weights(GRAPHS["ring"], present=AWAY, arrives=both)
    matrix = np.diag(np.asarray(rough.own))
    np.add.at(matrix, (np.arange(N), GRAPHS["ring"].source[0]), np.asarray(rough.heard))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)


def test_links_that_are_not_used_send_nothing_and_lost_messages_were_sent():
    used = weights(GRAPHS["ring"], present=AWAY, links=ARRIVES)
    assert int(used.sent.sum()) == int(used.came.sum()) > 0
    lossy = weights(GRAPHS["ring"], present=AWAY, arrives=ARRIVES)
    assert int(lossy.sent.sum()) == 2 * N - 8 > int(lossy.came.sum())


# --- between devices -------------------------------------------------------------------------------------------------


def lowered(name, devices, x=X):
    devices = mesh.make((devices,), ("peers",))
    graph = GRAPHS[name] if isinstance(name, str) else name
    mixer = mix.on_mesh(devices)(graph)
    x = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(devices, PartitionSpec("peers"))), x)
    return lambda x, w: mixer.combine(x, x, w, None), x, weights(graph, present=jnp.ones(topology.peers(graph), bool))


@pytest.mark.parametrize("devices", [4, 8])
def test_a_ring_on_a_mesh_is_two_collective_permutes_and_nothing_else(devices):
    f, x, w = lowered("ring", devices)
    text = jax.jit(f).lower(x, w).compile().as_text()
    others = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-broadcast")
    assert not [name for name in others if f"{name}(" in text or f"{name}-start(" in text]
    counted = count.compiled(text)
    assert counted.permutes == 2 and counted.opaque == 0


@pytest.mark.parametrize("name", ["ring", "exponential", "complete", "random, directed"])
def test_a_peer_a_device_sends_its_model_to_each_that_hears_it(name):
    graph = topology.ring(8) if name == "ring" else topology.exponential(8) if name == "exponential" else None
    graph = topology.complete(8) if name == "complete" else graph
    if graph is None:
        graph = topology.from_graph(np.random.default_rng(5).random((8, 8)) < 0.4, weights=topology.uniform, name=name)
    f, x, w = lowered(graph, 8, tree.take(X, jnp.arange(8)))
    hearers = [sum(1 for _, j, i, _ in topology.edges(graph) if j == peer) for peer in range(8)]
    np.testing.assert_array_equal(count.traced(f, x, w).sent, 7 * 4 * np.array(hearers))


def test_a_block_of_peers_sends_each_row_once():
    f, x, w = lowered("ring", 4)
    np.testing.assert_array_equal(count.traced(f, x, w).sent, [2 * 7 * 4] * 4)  # its first and its last row
    graph = topology.ring(N)
    assert [len(t.rows[0]) for t in blocks_of(graph.source[0], 4).transfers] == [1, 1]


def test_packed_messages_travel_packed():
    graph, link = GRAPHS["ring"], compress.quantize(4, rounding="nearest")
    x = jnp.asarray(np.random.default_rng(4).normal(size=(8, 1000)), jnp.float32)
    message = jax.vmap(lambda x: link.update(x, link.init(x))[0])(x)
    devices = mesh.make((8,), ("peers",))
    graph = topology.ring(8)
    mixer = mix.on_mesh(devices)(graph)
    w = weights(graph, present=jnp.ones(8, bool))
    sent = count.traced(lambda x, m, w: mixer.combine(x, m, w, None), x, message, w).sent
    np.testing.assert_array_equal(sent, [2 * tree.nbytes(tree.take(message, 0))] * 8)
    assert sent[0] < 1100


def test_blocks_find_every_row_that_is_heard():
    for seed in range(3):
        source = topology.from_graph(
            np.random.default_rng(seed).random((24, 24)) < 0.2, weights=topology.uniform
        ).source[0]
        for devices in (2, 3, 8, 24):
            b, blocks = 24 // devices, blocks_of(source, devices)
            for d in range(devices):
                table = [d * b + i for i in range(b)]
                for transfer in blocks.transfers:
                    sender = {to: a for a, to in transfer.pairs}.get(d)
                    table += [
                        -1 if sender is None else sender * b + row
                        for row in transfer.rows[d if sender is None else sender]
                    ]
                np.testing.assert_array_equal(np.array(table)[blocks.place[d]], source[:, d * b : (d + 1) * b])


def test_peers_that_devices_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="take 20"):
        mix.on_mesh(mesh.make((4,), ("peers",)))(topology.ring(17))
    with pytest.raises(ValueError, match="axis"):
        mix.on_mesh(mesh.make((4,), ("clients",)))


def test_peers_of_few_neighbours_are_gathered_and_those_of_many_multiplied():
    def dots(graph):
        mixer = mix.automatic()(graph)
        return "dot_general" in str(jax.make_jaxpr(lambda x, w: mixer.combine(x, x, w, None))(X, weights(graph)))

    assert dots(GRAPHS["complete"]) and not dots(GRAPHS["one peer"])
