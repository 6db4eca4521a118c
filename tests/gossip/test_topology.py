"""Topologies: closed forms, exact means, oracles by scipy and by plain powering, and what is refused."""

import math

import numpy as np
import pytest
from scipy.sparse.csgraph import shortest_path

from jfed.gossip import topology
from jfed.gossip.topology import graph

STATIC = {
    "ring": topology.ring,
    "chain": topology.chain,
    "torus": lambda n: topology.torus(n // 4, 4),
    "grid": lambda n: topology.grid(n // 4, 4),
    "hypercube": topology.hypercube,
    "complete": topology.complete,
    "star": topology.star,
    "binary_tree": topology.binary_tree,
    "erdos_renyi": lambda n: topology.erdos_renyi(n, 0.4, seed=1),
    "random_regular": lambda n: topology.random_regular(n, 3, seed=1),
    "small_world": lambda n: topology.small_world(n, 4, 0.2, seed=1),
    "geometric": lambda n: topology.geometric(n, 0.5, seed=1),
}
DIRECTED = {"directed_ring": topology.directed_ring, "exponential": topology.exponential}
CHANGING = {
    "one_peer_exponential": topology.one_peer_exponential,
    "base_graph": lambda n: topology.base_graph(n, 2),
    "random_matchings": lambda n: topology.random_matchings(n, 9, seed=1),
    "sequence": lambda n: topology.sequence(
        topology.star(n), topology.ring(n), topology.random_matchings(n, 2, seed=3)
    ),
}
EVERY = STATIC | DIRECTED | CHANGING
SMALL = {name: make for name, make in EVERY.items() if name not in {"torus", "grid", *list(STATIC)[-4:]}}


def of_each(table):
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


def weights_of(one):
    return topology.matrices(one)[0]


def distance_left(one, rounds):
    """The worst ratio of consensus distances, by the plain product of the first rounds."""
    w, pi = topology.matrices(one), np.eye(topology.peers(one))
    for t in range(rounds):
        pi = w[t % len(w)] @ pi
    return np.linalg.norm(pi - pi.mean(0), 2)


def stochastic(rng, n, density):
    """A random matrix whose rows add up to 1, some weights 0."""
    w = rng.random((n, n)) * (rng.random((n, n)) < density) + np.eye(n)
    return w / w.sum(1, keepdims=True)


# The type.


@of_each(EVERY)
def test_every_slot_is_a_partial_permutation_and_weighs_only_what_is_heard(make):
    one = make(16)
    here = np.arange(16)
    for source, weight in zip(one.source.reshape(-1, 16), one.weight.reshape(-1, 16), strict=True):
        senders = source[source != here]
        assert len(set(senders)) == len(senders)
        assert ((weight > 0) == (source != here)).all()


@of_each(EVERY)
def test_slots_are_as_many_as_the_busiest_peer_has_neighbours(make):
    one = make(16)
    linked = (topology.matrices(one) != 0) & ~np.eye(16, dtype=bool)
    assert one.source.shape[1] == max(linked.sum(1).max(), linked.sum(2).max())


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7, 1.0])
def test_a_matrix_comes_back_from_its_slots(density):
    w = stochastic(np.random.default_rng(int(10 * density)), 23, density)
    one = topology.from_matrix(w)
    np.testing.assert_array_equal(weights_of(one), w)
    linked = (w != 0) & ~np.eye(23, dtype=bool)
    assert one.source.shape[1] == max(linked.sum(0).max(), linked.sum(1).max())


def test_edges_and_pairs_tell_of_every_weight_once():
    one = CHANGING["sequence"](6)
    w = topology.matrices(one)
    told = np.zeros_like(w)
    for t, sender, receiver, weight in topology.edges(one):
        told[t, receiver, sender] += weight
    np.testing.assert_array_equal(told, w * ~np.eye(6, dtype=bool))
    for t in range(topology.period(one)):
        linked = {(i, j) for slot in topology.pairs(one, t) for i, j in slot}
        assert linked == {(int(j), int(i)) for i, j in np.argwhere(told[t])}


# Weights.


@of_each(EVERY)
def test_rows_and_columns_add_up_to_1(make):
    w = topology.matrices(make(16))
    np.testing.assert_allclose(w.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(w.sum(2), 1, atol=1e-12)
    assert (w >= 0).all()


@of_each(STATIC)
def test_undirected_graphs_have_the_weights_of_metropolis_by_hand(make):
    w = weights_of(make(16))
    linked = (w != 0) & ~np.eye(16, dtype=bool)
    degree = linked.sum(1)
    for i, j in np.argwhere(linked):
        assert w[i, j] == pytest.approx(1 / (1 + max(degree[i], degree[j])), abs=1e-15)
    np.testing.assert_array_equal(linked, linked.T)


def test_pushing_is_hearing_alike_with_senders_and_receivers_exchanged():
    heard = np.random.default_rng(0).random((9, 9)) < 0.3
    w = topology.uniform(heard)
    np.testing.assert_array_equal(topology.push(heard), topology.uniform(heard.T).T)
    np.testing.assert_allclose(w.sum(1), 1)
    assert set(w[4][w[4] > 0]) == {1 / (1 + (heard[4] & (np.arange(9) != 4)).sum())}


@of_each({"ring": topology.ring, "hypercube": topology.hypercube, "exponential": topology.exponential})
def test_where_all_have_equally_many_neighbours_all_weights_agree(make):
    np.testing.assert_allclose(weights_of(make(16, weights=topology.uniform)), weights_of(make(16)), atol=1e-15)
    np.testing.assert_allclose(weights_of(make(16, weights=topology.push)), weights_of(make(16)), atol=1e-15)


@of_each(EVERY)
def test_lazy_goes_part_of_the_way(make):
    one = make(8)
    expected = 0.7 * np.eye(8) + 0.3 * topology.matrices(one)
    np.testing.assert_allclose(topology.matrices(topology.lazy(one, 0.3)), expected, atol=1e-15)


@of_each(STATIC)
def test_lazy_halfway_leaves_no_eigenvalue_below_0(make):
    one = make(16)
    least = topology.smallest_eigenvalue(one)
    assert topology.smallest_eigenvalue(topology.lazy(one)) == pytest.approx((1 + least) / 2)
    assert topology.smallest_eigenvalue(topology.lazy(one)) > -1e-12
    assert least == pytest.approx(np.linalg.eigvals(weights_of(one)).real.min(), abs=1e-9)


# Kinds.


@pytest.mark.parametrize("n", [3, 4, 5, 8, 16, 33, 64])
def test_spectral_gaps_are_the_closed_forms(n):
    cos = math.cos(2 * math.pi / n)
    gap = topology.spectral_gap
    assert gap(topology.ring(n)) == pytest.approx(1 - (1 + 2 * cos) / 3)
    assert gap(topology.chain(n)) == pytest.approx((2 - 2 * math.cos(math.pi / n)) / 3)
    assert gap(topology.star(n)) == pytest.approx(1 / n)
    assert gap(topology.complete(n)) == 1
    assert gap(topology.torus(n, 3)) == pytest.approx((2 - 2 * cos) / 5)
    assert gap(topology.directed_ring(n)) == pytest.approx(1 - math.cos(math.pi / n))
    exponential = 2 / (1 + math.ceil(math.log2(n)))
    assert gap(topology.exponential(n)) >= exponential - 1e-12
    if n % 2 == 0:
        assert gap(topology.exponential(n)) == pytest.approx(exponential)
    if n & (n - 1) == 0:
        assert gap(topology.hypercube(n)) == pytest.approx(exponential)


def test_spectral_gaps_of_64_peers_in_figures():
    """The closed forms again, to the digits that tables of topologies give."""
    gap = topology.spectral_gap
    assert gap(topology.chain(64)) == pytest.approx(0.0008, abs=5e-5)
    assert gap(topology.ring(64)) == pytest.approx(0.0032, abs=5e-5)
    assert gap(topology.star(64)) == pytest.approx(0.0156, abs=5e-5)
    assert gap(topology.torus(8, 8)) == pytest.approx(0.117, abs=5e-4)
    assert gap(topology.exponential(64)) == pytest.approx(0.286, abs=5e-4)


@pytest.mark.parametrize("n", [3, 4, 5, 8, 16, 17])
def test_diameters_are_the_closed_forms(n):
    diameter = topology.diameter
    assert diameter(topology.ring(n)) == n // 2
    assert diameter(topology.directed_ring(n)) == diameter(topology.chain(n)) == n - 1
    assert diameter(topology.star(n)) == 2
    assert diameter(topology.complete(n)) == 1
    assert diameter(topology.torus(n, 6)) == n // 2 + 3
    assert diameter(topology.grid(n, 6)) == n + 4
    if n & (n - 1) == 0:
        assert diameter(topology.hypercube(n)) == diameter(topology.exponential(n)) == math.log2(n)


@pytest.mark.parametrize("n", range(1, 20))
def test_a_torus_of_two_rows_joins_them_once_and_of_one_is_a_ring(n):
    np.testing.assert_array_equal(weights_of(topology.torus(1, n)), weights_of(topology.ring(n)))
    np.testing.assert_array_equal(weights_of(topology.torus(n, 1)), weights_of(topology.ring(n)))
    ladder = topology.torus(2, n)
    assert ladder.source.shape[1] == 1 + min(n - 1, 2)
    np.testing.assert_allclose(weights_of(ladder)[0, n], 1 / (2 + min(n - 1, 2)))


@pytest.mark.parametrize("n", range(1, 20))
def test_a_grid_of_one_row_is_a_chain_and_a_chain_closed_is_a_ring(n):
    np.testing.assert_array_equal(weights_of(topology.grid(1, n)), weights_of(topology.chain(n)))
    heard = weights_of(topology.chain(n)) > 0
    heard[0, -1] = heard[-1, 0] = True
    np.testing.assert_allclose(weights_of(topology.from_graph(heard)), weights_of(topology.ring(n)), atol=1e-15)


@of_each(SMALL)
def test_one_peer_keeps_its_model(make):
    one = make(1)
    np.testing.assert_array_equal(topology.matrices(one), np.ones((topology.period(one), 1, 1)))
    assert (topology.spectral_gap(one), topology.contraction(one)) == (1, 0)
    assert topology.mixing_time(one) == topology.diameter(one) == 0


@of_each(SMALL)
def test_two_peers_average_over_one_edge(make):
    w = topology.matrices(make(2))
    assert (w == 0.5).all() and make(2).source.shape[1] == 1


def test_a_tree_has_one_edge_fewer_than_peers_and_parents_by_number():
    w = weights_of(topology.binary_tree(13))
    assert {(int(i), int(j)) for i, j in np.argwhere(np.triu(w, 1))} == {((j - 1) // 2, j) for j in range(1, 13)}


# Random graphs.


def test_the_same_seed_gives_the_same_graph_and_another_another():
    for draw in (
        lambda seed: topology.erdos_renyi(20, 0.3, seed=seed),
        lambda seed: topology.random_regular(20, 3, seed=seed),
        lambda seed: topology.small_world(20, 4, 0.3, seed=seed),
        lambda seed: topology.geometric(20, 0.4, seed=seed),
        lambda seed: topology.random_matchings(20, 5, seed=seed),
    ):
        np.testing.assert_array_equal(topology.matrices(draw(7)), topology.matrices(draw(7)))
        assert (topology.matrices(draw(7)) != topology.matrices(draw(8))).any()


def test_erdos_renyi_joins_as_many_pairs_as_its_probability_says():
    """The mean of 200 graphs, each of whose 435 pairs is joined with 0.3, within four standard errors."""
    linked = [np.triu(weights_of(topology.erdos_renyi(30, 0.3, seed=s)), 1) > 0 for s in range(200)]
    error = math.sqrt(0.3 * 0.7 / (200 * 435))
    assert abs(np.mean(linked) * 900 / 435 - 0.3) < 4 * error < 0.01


@pytest.mark.parametrize(("n", "degree"), [(2, 1), (5, 2), (7, 4), (8, 7), (10, 6), (24, 3), (64, 9), (31, 26)])
def test_everyone_has_the_degree_asked_for(n, degree):
    w = weights_of(topology.random_regular(n, degree, seed=0))
    assert ((w > 0).sum(1) == degree + 1).all()
    np.testing.assert_allclose(w[w > 0], 1 / (degree + 1))


@pytest.mark.parametrize("degree", [3, 4])
def test_random_regular_graphs_favour_no_pair(degree):
    """Of 8 peers, a pair is joined in degree / 7 of the graphs; the chi-square of 28 pairs has mean about 28."""
    seeds = 600
    share = degree / 7
    counts = sum(weights_of(topology.random_regular(8, degree, seed=s)) > 0 for s in range(seeds))[
        np.triu_indices(8, 1)
    ]
    chi_square = ((counts - seeds * share) ** 2 / (seeds * share * (1 - share))).sum()
    assert chi_square < 28 + 4 * math.sqrt(2 * 28)
    assert counts.sum() == seeds * 4 * degree


def test_a_small_world_keeps_its_edges_and_rewires_as_many_as_told():
    lattice = weights_of(topology.small_world(40, 6, 0.0, seed=0)) > 0
    apart = np.abs(np.arange(40)[:, None] - np.arange(40))
    np.testing.assert_array_equal(lattice, np.minimum(apart, 40 - apart) <= 3)
    graphs = [weights_of(topology.small_world(40, 6, 0.25, seed=s)) > 0 for s in range(50)]
    assert {int(np.triu(one, 1).sum()) for one in graphs} == {120}
    moved = np.mean([(lattice & ~one).sum() / 240 for one in graphs])
    # A few edges are led back to where another was taken away.
    assert abs(moved - 0.25) < 0.02


def test_geometric_peers_hear_all_within_the_radius():
    positions = topology.geometric_positions(30, 0.3, seed=5)
    linked = weights_of(topology.geometric(30, 0.3, seed=5)) > 0
    distance = np.sqrt(((positions[:, None] - positions) ** 2).sum(2))
    np.testing.assert_array_equal(linked, distance <= 0.3)
    assert positions.min() >= 0 and positions.max() <= 1 and not linked.all()


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_are_connected(seed):
    for one in (
        topology.erdos_renyi(12, 0.2, seed=seed),
        topology.random_regular(12, 2, seed=seed),
        topology.small_world(12, 2, 0.3, seed=seed),
        topology.geometric(12, 0.35, seed=seed),
    ):
        assert np.isfinite(shortest_path(weights_of(one) > 0)).all()
        assert topology.is_connected(one)


# Sequences.


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64])
def test_one_neighbour_at_a_time_is_the_exact_mean_after_log2_n_rounds(n):
    one = topology.one_peer_exponential(n)
    assert topology.period(one) == topology.mixing_time(one, 1e-12) == math.log2(n)
    assert distance_left(one, topology.period(one)) < 1e-14
    assert (topology.spectral_gap(one), topology.contraction(one)) == (1, 0)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_it_is_not_exact_for_other_numbers_of_peers(n):
    assert topology.contraction(topology.one_peer_exponential(n)) > 0.1


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_base_graphs_average_exactly_with_few_neighbours_for_any_number_of_peers(k):
    for n in range(2, 41):
        one = topology.base_graph(n, k)
        w, rounds = topology.matrices(one), topology.period(one)
        assert distance_left(one, rounds) < 1e-13, n
        assert topology.contraction(one) == 0, n
        assert ((w != 0) & ~np.eye(n, dtype=bool)).sum(2).max() <= k, n
        np.testing.assert_array_equal(w, w.swapaxes(1, 2))
        np.testing.assert_allclose(w.sum(2), 1, atol=1e-12)
        assert rounds <= 2 * math.log(n, k + 1) + 2 + 1e-9, n
        if rounds > 1:
            assert distance_left(one, rounds - 1) > 1e-3, n


def test_base_graphs_take_the_rounds_of_the_algorithms():
    """A box one a side; 5 = 4 + 1 two for a mean of 4, one to pass it on, two to level out; 6 = 2 x 3 three and one."""
    rounds = {(n, k): topology.period(topology.base_graph(n, k)) for n, k in [(5, 1), (6, 1), (16, 1), (27, 2), (6, 2)]}
    assert rounds == {(5, 1): 5, (6, 1): 4, (16, 1): 4, (27, 2): 3, (6, 2): 2}


def test_a_box_has_as_few_sides_as_can_be():
    """216 peers with up to 7 neighbours: 6 x 6 x 6, though 8 x 3 x 3 x 3 would begin with more."""
    assert topology.period(topology.base_graph(216, 7)) == 3


def test_random_matchings_pair_all_and_favour_no_pair():
    """Of 6 peers each pair meets in a fifth of 4000 rounds, within four standard errors."""
    one = topology.random_matchings(6, 4000, seed=0)
    w = topology.matrices(one)
    assert set(np.unique(w)) == {0, 0.5} and (w == w.swapaxes(1, 2)).all()
    met = (w > 0).mean(0)[np.triu_indices(6, 1)]
    error = math.sqrt(0.2 * 0.8 / 4000)
    assert np.abs(met - 0.2).max() < 4 * error < 0.03


def test_of_an_odd_number_one_sits_out_each_in_turn():
    one = topology.random_matchings(7, 1000, seed=0)
    out = one.own == 1
    assert (out.sum(1) == 1).all()
    assert np.abs(out.mean(0) - 1 / 7).max() < 4 * math.sqrt(6 / 49 / 1000)


def test_a_sequence_has_the_rounds_of_one_after_those_of_another():
    parts = topology.star(6), topology.one_peer_exponential(6), topology.ring(6)
    joined = topology.sequence(*parts, name="three")
    assert (joined.name, topology.period(joined)) == ("three", 5)
    np.testing.assert_array_equal(topology.matrices(joined), np.concatenate([topology.matrices(one) for one in parts]))


# Measures.


@of_each(STATIC)
def test_contraction_is_the_decay_of_the_slowest_models(make):
    """By power iteration from random models; the norm of W - J and 1 - gap are the same number."""
    one = make(16)
    w, x = weights_of(one), np.random.default_rng(0).standard_normal(16)
    x -= x.mean()
    first = np.linalg.norm(w @ x) / np.linalg.norm(x)
    for _ in range(2000):
        x = w @ x
        x = (x - x.mean()) / max(np.linalg.norm(x - x.mean()), 1e-300)
    decay = np.linalg.norm(w @ x - x.mean())
    assert topology.contraction(one) == pytest.approx(decay, abs=1e-9)
    assert topology.spectral_gap(one) == pytest.approx(1 - decay, abs=1e-9)
    assert first <= topology.contraction(one) + 1e-12


@of_each(CHANGING)
def test_contraction_of_a_sequence_is_that_of_its_period(make):
    one = make(12)
    expected = distance_left(one, topology.period(one)) ** (1 / topology.period(one))
    assert topology.contraction(one) == pytest.approx(expected if expected > 0.1 else 0, abs=1e-9)
    assert topology.spectral_gap(one) == 1 - topology.contraction(one)


def test_contraction_of_a_thousand_rounds_is_not_lost_in_rounding():
    """A W repeated a thousand times shrinks by what W does, though 0.8 to the thousandth is 1e-97."""
    one = topology.lazy(topology.complete(4), 0.2)
    assert topology.contraction(topology.sequence(*[one] * 1000)) == pytest.approx(0.8, rel=1e-9)


def test_contraction_holds_of_rows_alone():
    w = stochastic(np.random.default_rng(2), 8, 0.5)
    one, x = topology.from_matrix(w), np.random.default_rng(3).standard_normal((8, 1000))
    ratio = np.linalg.norm(w @ x - (w @ x).mean(0), axis=0) / np.linalg.norm(x - x.mean(0), axis=0)
    assert 0.5 * topology.contraction(one) < ratio.max() <= topology.contraction(one)


def test_the_spectral_gap_of_columns_is_that_of_rows():
    w = stochastic(np.random.default_rng(2), 8, 0.3)
    moduli = np.sort(np.abs(np.linalg.eigvals(w)))
    for one in (topology.from_matrix(w), topology.from_matrix(w.T)):
        assert topology.spectral_gap(one) == pytest.approx(1 - moduli[-2])


@pytest.mark.parametrize("epsilon", [0.5, 1e-3, 1e-7])
@of_each(EVERY)
def test_mixing_time_is_the_first_round_that_is_good_enough(make, epsilon):
    one = make(12 if make is not STATIC["hypercube"] else 8)
    rounds = topology.mixing_time(one, epsilon)
    assert distance_left(one, rounds) <= epsilon + 1e-14 < distance_left(one, rounds - 1)


def test_peers_that_never_agree_never_mix():
    apart = topology.from_matrix(np.kron(np.eye(2), np.full((3, 3), 1 / 3)))
    swapping = topology.from_matrix([[0.0, 1.0], [1.0, 0.0]])
    turning = topology.from_matrix(np.roll(np.eye(5), 1, axis=0))
    for one in (apart, swapping, turning, topology.sequence(apart, apart)):
        assert topology.mixing_time(one) == math.inf
        assert topology.contraction(one) == pytest.approx(1)
        assert topology.spectral_gap(one) == pytest.approx(0, abs=1e-9)
    assert (topology.is_connected(apart), topology.is_connected(turning)) == (False, True)
    assert topology.mixing_time(topology.ring(5), 1) == 0


def test_the_diameter_is_the_longest_of_the_shortest_paths_of_scipy():
    rng = np.random.default_rng(4)
    seen = set()
    for density in np.linspace(0.05, 0.6, 40):
        one = topology.from_matrix(stochastic(rng, 11, density))
        expected = shortest_path(weights_of(one) > 0, unweighted=True).max()
        assert topology.diameter(one) == expected
        assert topology.is_connected(one) == np.isfinite(expected)
        seen.add(expected)
    assert math.inf in seen and len(seen) > 4


def test_the_diameter_of_a_sequence_is_that_of_all_its_edges():
    one = topology.one_peer_exponential(16)
    union = topology.matrices(one).sum(0) > 0
    assert topology.diameter(one) == shortest_path(union, unweighted=True).max() == 4


def test_a_thousand_peers_are_no_matter():
    one = topology.complete(1024)
    assert one.source.shape == (1, 1023, 1024)
    ring = topology.ring(1024)
    assert topology.mixing_time(ring) == pytest.approx(math.log(1e-3) / math.log1p(-topology.spectral_gap(ring)), abs=1)
    assert topology.diameter(ring) == 512


# Refusals.


def half():
    return np.full((3, 3), 1 / 3) - np.diag([0, 0.2, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topology.from_matrix(half()), r"row 1 adds up to 0.8, not 1 \(nor do the columns\); divide each row"),
        (lambda: topology.from_matrix([np.eye(3), half()]), "row 1 of round 1 adds up to 0.8"),
        (lambda: topology.from_matrix([[1.5, -0.5], [0, 1]]), "row 0 gives peer 1 the weight -0.5"),
        (lambda: topology.from_matrix([[np.nan, 1], [0, 1]]), "row 0 gives peer 0 the weight nan"),
        (lambda: topology.from_matrix(np.ones((2, 3))), "of shape"),
        (
            lambda: graph.check_rows("f", topology.from_matrix(topology.push(np.tri(3)))),
            "f.*: row 0 adds up to 0.333333",
        ),
        (
            lambda: graph.check_columns("f", topology.from_matrix(topology.uniform(np.tri(3)))),
            "column 0 adds up to 1.83333",
        ),
        (
            lambda: graph.check_symmetric("f", topology.directed_ring(3)),
            "row 0 gives peer 1 0.5, and row 1 gives peer 0 0;",
        ),
        (lambda: graph.check_static("f", topology.one_peer_exponential(8)), "period of 3 rounds"),
        (lambda: topology.metropolis([[0, 1], [0, 0]]), "peer 0 hears peer 1, which does not hear it"),
        (lambda: topology.uniform([[0, 2], [0, 0]]), "0 and 1"),
        (lambda: topology.push([0, 1]), "of shape"),
        (lambda: topology.exponential(5, weights=topology.metropolis), "peer 0 hears peer 2, which does not hear it"),
        (lambda: topology.ring(4, weights=lambda heard: heard / 4), "row 0 adds up to 0.5"),
        (lambda: topology.star(4, weights=lambda heard: heard / 4), "row 0 adds up to 0.75"),
        (lambda: topology.lazy(topology.ring(4), 0), "share must be a finite number above 0"),
        (lambda: topology.lazy(topology.ring(4), 1.5), "share must lie in"),
        (lambda: topology.hypercube(12), r"power of 2; take 8, or exponential\(12\)"),
        (lambda: topology.ring(0), "n must be a whole number of at least 1"),
        (lambda: topology.torus(2, 2.0), "columns must be"),
        (
            lambda: topology.erdos_renyi(50, 0.0, seed=0),
            r"none of 100 graphs drawn is connected; take a probability above",
        ),
        (lambda: topology.erdos_renyi(9, 1.2, seed=0), "probability must lie in"),
        (lambda: topology.erdos_renyi(9, 0.9, seed=-1), "probability=0.9, seed=-1.: seed must be a whole number"),
        (lambda: topology.random_regular(5, 3, seed=0), "n degree even"),
        (lambda: topology.random_regular(4, 4, seed=0), "degree must be below n"),
        (lambda: topology.random_regular(6, 1, seed=0), "none of 100 graphs drawn is connected; take a degree"),
        (lambda: topology.small_world(8, 3, 0.1, seed=0), "even and below n"),
        (lambda: topology.geometric(50, 0.01, seed=0), "none of 100 graphs drawn is connected; try 0.22"),
        (lambda: topology.geometric(50, 0, seed=0), "radius must be a finite number above 0"),
        (lambda: topology.base_graph(5, 0), "degree must be a whole number of at least 1"),
        (lambda: topology.random_matchings(4, 2, seed=0.5), "seed must be a whole number"),
        (lambda: topology.sequence(topology.ring(3), topology.star(4)), "ring of 3, star of 4"),
        (lambda: topology.sequence(), "one or more"),
        (lambda: topology.mixing_time(topology.ring(4), 0), "epsilon must lie in"),
        (lambda: topology.mixing_time(topology.from_matrix(topology.uniform(np.tri(3)))), "column 0"),
        (lambda: topology.contraction(topology.from_matrix(topology.push(np.tri(3)))), "row 0"),
        (
            lambda: topology.spectral_gap(topology.sequence(*[topology.from_matrix(topology.push(np.tri(3)))] * 2)),
            "row 0",
        ),
        (
            lambda: topology.smallest_eigenvalue(topology.exponential(5)),
            "row 0 gives peer 2 0.25, and row 2 gives peer 0 0;",
        ),
        (lambda: topology.smallest_eigenvalue(topology.random_matchings(4, 2, seed=0)), "it changes"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
