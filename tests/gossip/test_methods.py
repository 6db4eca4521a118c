"""Each method held to what its paper promises, on quadratics whose optimum and fixed points have closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import quadratic

from jfed import compress, gossip, local, parallel, run, sampling
from jfed.algorithms import fedavg
from jfed.availability import per_step
from jfed.clients import lanes
from jfed.core import make_cohort
from jfed.gossip import conditions, mix, topology

N, D = quadratic.CLIENTS, quadratic.DIMENSIONS
GRADIENT = local.gradient(quadratic.loss, chunk_size=1)
QUADRATICS = quadratic.population(spread=2.0)
A, B = (np.asarray(QUADRATICS.examples[name], np.float64) for name in "ab")
OPTIMUM = quadratic.optimum(QUADRATICS)
RING = topology.ring(N)
W = topology.matrices(RING)[0]
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=(0, 2))
def after(algorithm, params, rounds, state=None):
    """All peers' models after so many rounds of everybody."""
    state = algorithm.init(params) if state is None else state
    sampler = sampling.full(steps=GRADIENT.steps)
    return run.scan_rounds(algorithm, sampler, QUADRATICS, state, KEY, rounds=rounds)[0]


def rest(eta, order):
    """Where D-PSGD comes to rest: of x = W x - eta A (x - b) and its like, coordinate by coordinate; [N, D]."""
    found = np.empty((N, D))
    for d in range(D):
        a, b = np.diag(A[:, d]), B[:, d]
        if order == "dpsgd":
            left, right = np.eye(N) - W + eta * a, eta * a @ b
        elif order == "adapt_then_combine":
            left, right = np.eye(N) - W @ (np.eye(N) - eta * a), eta * W @ a @ b
        else:
            left, right = np.eye(N) - (np.eye(N) - eta * a) @ W, eta * a @ b
        found[:, d] = np.linalg.solve(left, right)
    return found


# --- D-PSGD and what mends its bias ----------------------------------------------------------------------------------

# The root mean square distance of peers to the optimum, by the closed form.
BIAS = {
    "dpsgd": {0.2: 0.931, 0.1: 0.587, 0.05: 0.339},
    "adapt_then_combine": {0.2: 0.783, 0.1: 0.483, 0.05: 0.274},
    "combine_then_adapt": {0.2: 1.025, 0.1: 0.622, 0.05: 0.350},
}


@pytest.mark.parametrize("eta", [0.2, 0.1, 0.05])
@pytest.mark.parametrize("order", BIAS)
def test_dpsgd_comes_to_rest_where_its_equation_says_away_from_the_optimum(order, eta):
    algorithm = getattr(gossip, order)(GRADIENT, RING, optimizer=optax.sgd(eta))
    found = after(algorithm, jnp.zeros(D), 2000).params
    problem.close(found, rest(eta, order), 1e-4)
    assert distance(found) == pytest.approx(BIAS[order][eta], abs=6e-4)


def distance(x):
    """The root mean square distance of peers to the optimum."""
    return np.sqrt(np.mean(np.sum((np.asarray(x) - OPTIMUM) ** 2, 1)))


@pytest.mark.parametrize(
    "algorithm",
    [
        gossip.gradient_tracking(GRADIENT, RING, optimizer=optax.sgd(0.1)),
        gossip.d2(GRADIENT, topology.lazy(RING), optimizer=optax.sgd(0.1)),
        gossip.relay(GRADIENT, topology.chain(N), optimizer=optax.sgd(0.05)),
        gossip.relay(GRADIENT, topology.star(N), optimizer=optax.sgd(0.05)),
    ],
    ids=["gradient_tracking", "d2", "relay, chain", "relay, star"],
)
def test_where_dpsgd_is_biased_every_peer_comes_to_the_optimum_and_stays(algorithm):
    problem.close(after(algorithm, jnp.zeros(D), 2000).params, np.broadcast_to(OPTIMUM, (N, D)), 3e-5)


def test_d2_is_its_recursion_in_two_steps_of_memory():
    lazy = topology.lazy(RING)
    w, eta = topology.matrices(lazy)[0], 0.1
    g = [None, None]
    x = [np.zeros((N, D))]
    for t in range(6):
        g = [g[1], A * (x[-1] - B)]
        ahead = x[-1] - eta * g[1] if t == 0 else 2 * x[-1] - x[-2] - eta * (g[1] - g[0])
        x.append(w @ ahead)
    problem.close(after(gossip.d2(GRADIENT, lazy, optimizer=optax.sgd(eta)), jnp.zeros(D), 6).params, x[-1], 1e-5)


def test_gradient_tracking_is_its_recursion_and_keeps_the_mean_of_gradients():
    eta, x, y, old = 0.1, np.zeros((N, D)), np.zeros((N, D)), np.zeros((N, D))
    for t in range(6):
        g = A * (x - B)
        y, old = (g if t == 0 else W @ y + g - old), g
        assert np.allclose(y.mean(0), g.mean(0))
        x = W @ (x - eta * y)
    found = after(gossip.gradient_tracking(GRADIENT, RING, optimizer=optax.sgd(eta)), jnp.zeros(D), 6)
    problem.close(found.params, x, 1e-5)


def test_matrices_that_a_method_cannot_do_with_are_refused_by_name():
    push = topology.from_graph(np.tri(4, k=0) + np.eye(4, k=1) > 0, weights=topology.push, name="leaning")
    for method in (gossip.dpsgd, gossip.adapt_then_combine, gossip.gradient_tracking):
        with pytest.raises(ValueError, match="leaning.*row [0-9]+ adds up to"):
            method(GRADIENT, push)
    rows = topology.from_graph(np.tri(4, k=0) + np.eye(4, k=1) > 0, weights=topology.uniform, name="leaning")
    for method in (gossip.gradient_tracking, gossip.push_sum):
        with pytest.raises(ValueError, match="leaning.*column [0-9]+ adds up to"):
            method(GRADIENT, rows)
    with pytest.raises(ValueError, match="smallest eigenvalue is -0.33.*lazy"):
        gossip.d2(GRADIENT, RING)
    with pytest.raises(ValueError, match="changes, with a period of 3"):
        gossip.d2(GRADIENT, topology.one_peer_exponential(8))
    with pytest.raises(ValueError, match="no tree"):
        gossip.relay(GRADIENT, RING)
    with pytest.raises(ValueError, match="peer 0 gives its own model no weight"):
        gossip.push_sum(None, topology.from_matrix(np.roll(np.eye(3), 1, 0)))
    with pytest.raises(ValueError, match="give one of jfed.gossip.topology"):
        gossip.dpsgd(GRADIENT, W)


@pytest.mark.parametrize("method", ["averaging", "choco_gossip", "push_sum", "biased_push", "epidemic"])
@pytest.mark.parametrize("given", [{"optimizer": optax.sgd(0.1)}, {"client_map": lanes(4)}])
def test_what_only_training_needs_is_refused_without_work(method, given):
    build = {
        "averaging": functools.partial(gossip.averaging, RING),
        "choco_gossip": functools.partial(gossip.choco_gossip, RING, compressor=compress.top_k(0.5), step_size=0.1),
        "push_sum": functools.partial(gossip.push_sum, None, RING),
        "biased_push": functools.partial(gossip.biased_push, None, RING),
        "epidemic": functools.partial(gossip.epidemic, None, 6, fanout=2),
    }[method]
    build()
    with pytest.raises(ValueError, match=rf"{method}\({next(iter(given))}=...\): without work"):
        build(**given)


# --- what they reduce to ---------------------------------------------------------------------------------------------

WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
CLIENTS = problem.CLIENTS


def test_on_the_complete_graph_it_is_fedavg_in_which_everybody_takes_part():
    peers = gossip.adapt_then_combine(WORK, topology.complete(CLIENTS))
    server = fedavg(WORK, client_map=lanes(4))
    everyone = problem.cohort_of(range(CLIENTS), WORK)
    a, b = peers.init(problem.PARAMS), server.init(problem.PARAMS)
    for t in range(3):
        key = jax.random.fold_in(KEY, t)
        a, of_a = jax.jit(peers.round)(a, everyone, key)
        b, of_b = jax.jit(server.round)(b, everyone._replace(weight=jnp.ones(CLIENTS)), key)
        problem.close(of_a["loss"], of_b["loss"])
    problem.close(peers.params(a), b.params)
    problem.close(a.params, jax.tree.map(lambda p: jnp.broadcast_to(p, (CLIENTS, *p.shape)), b.params))


def test_rows_of_the_share_of_examples_are_fedavg_with_its_weights():
    shares = problem.SIZES / problem.SIZES.sum()
    peers = gossip.adapt_then_combine(WORK, topology.from_matrix(np.tile(shares, (CLIENTS, 1))))
    server, everyone = fedavg(WORK, client_map=lanes(4)), problem.cohort_of(range(CLIENTS), WORK)
    a, _ = jax.jit(peers.round)(peers.init(problem.PARAMS), everyone, KEY)
    b, _ = jax.jit(server.round)(server.init(problem.PARAMS), everyone, KEY)
    problem.close(peers.params(a), b.params)


@pytest.mark.parametrize("order", ["combine_then_adapt", "adapt_then_combine"])
def test_on_the_complete_graph_with_one_gradient_it_is_data_parallel_training(order):
    rows, optimizer = 4, optax.sgd(0.3)
    x = problem.POPULATION.examples["x"][:32]
    examples = {"x": x, "y": problem.POPULATION.examples["y"][:32]}
    start = jnp.arange(8, dtype=jnp.int32) * rows
    population = problem.POPULATION._replace(examples=examples, start=start, size=jnp.full(8, rows, jnp.int32))
    work = local.gradient(problem.loss)
    peers = getattr(gossip, order)(work, topology.complete(8), optimizer=optimizer)
    workers = parallel.data_parallel(problem.loss, optimizer, workers=8)
    cohort = make_cohort(population, jnp.arange(8), steps=work.steps)
    a, b = peers.init(problem.PARAMS), workers.init(problem.PARAMS)
    for t in range(4):
        a, of_a = jax.jit(peers.round)(a, cohort, KEY)
        b, of_b = jax.jit(workers.round)(b, examples, KEY)
    problem.close(peers.params(a), workers.params(b))


def test_quasi_global_momentum_without_momentum_is_adapt_then_combine():
    a = gossip.quasi_global(GRADIENT, RING, learning_rate=0.1, momentum=0.0)
    b = gossip.adapt_then_combine(GRADIENT, RING, optimizer=optax.sgd(0.1))
    problem.close(after(a, jnp.zeros(D), 5).params, after(b, jnp.zeros(D), 5).params)


@pytest.mark.parametrize("nesterov", [False, True])
def test_quasi_global_momentum_is_its_recursion(nesterov):
    eta, beta, mu, x, m = 0.1, 0.9, 0.8, np.zeros((N, D)), np.zeros((N, D))
    for _ in range(5):
        g = A * (x - B)
        direction = beta * m + g
        direction = beta * direction + g if nesterov else direction
        new = W @ (x - eta * direction)
        m, x = mu * m + (1 - mu) * (x - new) / eta, new
    algorithm = gossip.quasi_global(
        GRADIENT, RING, learning_rate=eta, momentum=beta, buffer_momentum=mu, nesterov=nesterov
    )
    problem.close(after(algorithm, jnp.zeros(D), 5).params, x, 1e-5)


def test_personalised_mixes_what_is_shared_and_leaves_heads_alone():
    algorithm = gossip.personalised(WORK, topology.ring(CLIENTS), is_local=lambda path: path == "b")
    whole = gossip.adapt_then_combine(WORK, topology.ring(CLIENTS))
    alone = gossip.adapt_then_combine(WORK, topology.from_matrix(np.eye(CLIENTS)))
    everyone = problem.cohort_of(range(CLIENTS), WORK)
    found, mixed, own = (
        jax.jit(a.round)(a.init(problem.PARAMS), everyone, KEY)[0].params for a in (algorithm, whole, alone)
    )
    problem.close(found["w"], mixed["w"])
    problem.close(found["b"], own["b"])
    with pytest.raises(ValueError, match="some must be local"):
        gossip.personalised(WORK, topology.ring(3), is_local=lambda path: True).init(problem.PARAMS)


# --- averaging -------------------------------------------------------------------------------------------------------

GRAPHS = [
    topology.ring(16),
    topology.chain(16),
    topology.torus(4, 4),
    topology.grid(4, 4),
    topology.hypercube(16),
    topology.complete(16),
    topology.star(16),
    topology.binary_tree(16),
    topology.exponential(16),
    topology.one_peer_exponential(16),
    topology.base_graph(15, 2),
    topology.erdos_renyi(16, 0.4, seed=0),
    topology.random_regular(16, 4, seed=0),
    topology.small_world(16, 4, 0.2, seed=0),
    topology.geometric(16, 0.5, seed=0),
]


def averaged(graph, x, rounds, **options):
    """Models after every round, [rounds + 1, n, ...]."""
    algorithm = gossip.averaging(graph, **options)
    n = topology.peers(graph)
    everyone = sampling.full(steps=lambda size: size)
    population = problem.POPULATION._replace(examples=(), start=jnp.arange(n), size=jnp.ones(n, jnp.int32))
    state, found = algorithm.init(jnp.zeros(x.shape[1:]))._replace(params=jnp.asarray(x, jnp.float32)), [x]
    for moment in run.iterate(algorithm, everyone, population, state, KEY, rounds=rounds):
        found.append(np.asarray(moment.state.params))
    return np.array(found)


def apart(x):
    return np.sqrt(np.sum((x - x.mean(0)) ** 2))


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_consensus_contracts_at_the_predicted_rate(graph):
    n, period = topology.peers(graph), topology.period(graph)
    mean = np.full((n, n), 1 / n)
    product = np.eye(n)
    for w in topology.matrices(graph):
        product = w @ product
    worst = np.linalg.svd(product - mean)[2][0]  # the start that contracts least
    found = averaged(graph, worst[:, None], period)
    predicted = topology.contraction(graph) ** period
    assert apart(found[-1]) == pytest.approx(predicted, abs=2e-6, rel=1e-4)
    np.testing.assert_allclose(found[-1].mean(0), found[0].mean(0), atol=1e-6)
    random = np.random.default_rng(0).normal(size=(n, 4))
    rounds = 3 * period
    found = averaged(graph, random, rounds)
    assert apart(found[-1]) <= predicted**3 * apart(random) + 1e-5


@pytest.mark.parametrize("n", [2, 8, 32])
def test_one_peer_exponential_averages_exactly_in_log2_n_rounds(n):
    x = np.random.default_rng(0).integers(-8, 8, (n, 3)).astype(np.float32)
    found = averaged(topology.one_peer_exponential(n), x, int(np.log2(n)))
    np.testing.assert_array_equal(found[-1], np.broadcast_to(x.mean(0), x.shape))
    assert apart(found[-2]) > 0.1


def test_peers_who_agree_stay_where_they_are_to_the_last_bit():
    x = np.broadcast_to(np.random.default_rng(0).normal(size=3).astype(np.float32), (16, 3))
    for graph in (topology.ring(16), topology.complete(16), topology.star(16)):
        for how in (mix.sparse(), mix.dense()):
            np.testing.assert_array_equal(averaged(graph, x, 50, mixing=how)[-1], x)


# --- directed graphs -------------------------------------------------------------------------------------------------


def lopsided(n):
    """A directed graph in which some send to many and some to few."""
    heard = np.random.default_rng(1).random((n, n)) < 0.25
    return heard | np.roll(np.eye(n, dtype=bool), 1, 0)


def pushed(method, x, rounds, sampler=None, **options):
    graph = topology.from_graph(lopsided(len(x)), weights=topology.push, name="lopsided")
    algorithm = method(None, graph, **options)
    population = problem.POPULATION._replace(examples=(), start=jnp.arange(len(x)), size=jnp.ones(len(x), jnp.int32))
    state = algorithm.init(jnp.zeros(x.shape[1:]))._replace(params=jnp.asarray(x, jnp.float32))
    sampler = sampling.full(steps=lambda size: size) if sampler is None else sampler
    for moment in run.iterate(algorithm, sampler, population, state, KEY, rounds=rounds):
        state = moment.state
    return np.stack([algorithm.personal(state, i) for i in range(len(x))]), state


def test_push_sum_agrees_on_the_mean_on_a_directed_graph_and_without_its_weights_does_not():
    x = np.random.default_rng(2).normal(size=(12, 3))
    exact, state = pushed(gossip.push_sum, x, 100)
    problem.close(exact, np.broadcast_to(x.mean(0), x.shape), 1e-5)
    assert float(state.memory.sum()) == pytest.approx(12, abs=1e-4) and float(state.memory.max()) > 1.3
    biased, _ = pushed(gossip.biased_push, x, 100)
    assert np.abs(biased - x.mean(0)).max() > 0.1


def test_push_sum_whose_messages_are_lost_still_holds_means_of_models():
    x = 5 + np.random.default_rng(2).normal(size=(12, 3))
    lossy = conditions.lost_messages(sampling.full(steps=lambda size: size), 0.3)
    for lost, weights in ((mix.mass_returned, (0, 0.1)), (mix.own_instead, (12, 2000))):
        found, state = pushed(gossip.push_sum, x, 100, lossy, lost=lost)
        assert weights[0] < float(state.memory.sum()) < weights[1]  # lost with what it weighed, or not
        assert np.ptp(found, axis=0).max() < 1e-3
        assert ((x.min(0) - 1e-3 <= found) & (found <= x.max(0) + 1e-3)).all()


def test_push_sums_weights_stay_one_where_rows_add_up_to_one_whatever_is_lost():
    lossy = conditions.lost_messages(sampling.full(steps=GRADIENT.steps), 0.3)
    algorithm = gossip.push_sum(GRADIENT, topology.one_peer_exponential(N), optimizer=optax.sgd(0.1))
    state = run.scan_rounds(algorithm, lossy, QUADRATICS, algorithm.init(jnp.zeros(D)), KEY, rounds=50)[0]
    np.testing.assert_allclose(state.memory, 1, atol=1e-5)
    assert distance(state.params) < 1.2


# --- CHOCO -----------------------------------------------------------------------------------------------------------


def choco_errors(step_size, rounds, every):
    """Squared consensus distance over the first, on a ring of 25, d = 2000, of which 1 % are sent."""
    algorithm = gossip.choco_gossip(topology.ring(25), compressor=compress.top_k(0.01), step_size=step_size)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(25, 2000)), jnp.float32)
    state = algorithm.init(jnp.zeros(2000))._replace(params=x)
    population = problem.POPULATION._replace(examples=(), start=jnp.arange(25), size=jnp.ones(25, jnp.int32))
    everyone, found = sampling.full(steps=lambda size: size), []
    for moment in run.iterate(algorithm, everyone, population, state, KEY, rounds=rounds, every=every):
        found.append(float(moment.metrics["consensus"][-1]) ** 2 / apart(np.asarray(x)) ** 2 * 25)
    return found


@pytest.mark.slow
def test_choco_gossip_converges_at_the_stated_step_size_and_diverges_at_the_larger():
    at_1000, *_, at_3000 = choco_errors(0.046, 3000, 1000)
    assert at_1000 < 0.03 and at_3000 < 1e-3
    assert choco_errors(0.1, 3000, 3000)[0] > 100


def test_choco_that_leaves_nothing_out_with_a_whole_step_is_gossip():
    exact = gossip.adapt_then_combine(GRADIENT, RING, optimizer=optax.sgd(0.1))
    choco = gossip.choco(GRADIENT, RING, compressor=compress.top_k(1.0), step_size=1.0, optimizer=optax.sgd(0.1))
    problem.close(after(choco, jnp.ones(D), 20).params, after(exact, jnp.ones(D), 20).params, 1e-5)


def test_choco_keeps_the_mean_whatever_is_left_out():
    state = after(
        gossip.choco(GRADIENT, RING, compressor=compress.top_k(0.34), step_size=0.3, optimizer=optax.sgd(0.0)),
        jnp.ones(D),
        30,
    )
    problem.close(state.params, jnp.ones((N, D)))
    algorithm = gossip.choco_gossip(RING, compressor=compress.top_k(0.34), step_size=0.3)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(N, D)), jnp.float32)
    state = after(algorithm, jnp.zeros(D), 200, algorithm.init(jnp.zeros(D))._replace(params=x))
    problem.close(state.params, jnp.broadcast_to(x.mean(0), x.shape), 1e-4)


def test_the_safe_step_size_is_the_theorems():
    assert gossip.choco_step_size(topology.ring(25), quality=0.01) == pytest.approx(5.9e-7, rel=0.01)
    assert gossip.choco_step_size(topology.ring(25), quality=1.0) == pytest.approx(6.0e-5, rel=0.01)
    with pytest.raises(ValueError, match="step_size must lie"):
        gossip.choco(GRADIENT, RING, compressor=compress.top_k(0.5), step_size=1.5)


# --- RelaySGD --------------------------------------------------------------------------------------------------------


def test_relayed_sums_are_delayed_by_their_distance_less_one():
    """Without gradients, x_i = sum_j x_j / n once all has come; with them, sums of half-models of earlier rounds."""
    eta, x = 0.1, np.zeros((N, D))
    halves = []
    for t in range(12):
        halves.append(x - eta * A * (x - B))
        new = np.empty_like(x)
        for i in range(N):
            total = halves[t][i].copy()
            for j in range(N):
                late = abs(i - j) - 1
                if j != i:
                    total += halves[t - late][j] if t >= late else x[i]
            new[i] = total / N
        x = new
    algorithm = gossip.relay(GRADIENT, topology.chain(N), optimizer=optax.sgd(eta))
    problem.close(after(algorithm, jnp.zeros(D), 12).params, x, 1e-5)


# --- random peers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["epidemic", "epidemic_oracle"])
def test_a_round_of_epidemic_learning_brings_peers_as_near_to_their_mean_as_theory_says(method):
    n, s, draws = 30, 4, 400
    algorithm = getattr(gossip, method)(None, n, fanout=s)
    x = np.random.default_rng(0).normal(size=(n, 8))
    x = jnp.asarray(x - x.mean(0), jnp.float32)
    population = problem.POPULATION._replace(examples=(), start=jnp.arange(n), size=jnp.ones(n, jnp.int32))
    cohort = make_cohort(population, jnp.arange(n), steps=lambda size: size)
    state = algorithm.init(jnp.zeros(8))._replace(params=x)

    @jax.jit
    @jax.vmap
    def once(key):
        after, metrics = algorithm.round(state, cohort, key)
        return jnp.sum(after.params**2) / jnp.sum(x**2), metrics["traffic"].up

    shares, up = once(jax.random.split(KEY, draws))
    q = s / (n - 1)
    theory = {
        "epidemic": (1 - (1 - q) ** n) / s - 1 / (n - 1),
        "epidemic_oracle": (1 - q) / (s + 1),
    }[method]
    assert float(shares.mean()) == pytest.approx(theory, rel=0.02)
    np.testing.assert_array_equal(up, np.full((draws, n), 4 * 8 * s))


# --- asynchronous pairs ----------------------------------------------------------------------------------------------


def test_two_peers_that_never_wait_follow_the_paper_line_by_line():
    eta, seconds = 0.1, np.array([1.0, 1.45])
    population = quadratic.population(spread=2.0)
    population = population._replace(start=population.start[:2], size=population.size[:2])
    algorithm = gossip.ad_psgd(
        GRADIENT, topology.complete(2), gradients=7, duration=per_step(seconds), optimizer=optax.sgd(eta)
    )
    cohort = make_cohort(population, jnp.arange(2), steps=GRADIENT.steps)
    state, metrics = jax.jit(algorithm.round)(algorithm.init(jnp.zeros(D)), cohort, KEY)
    x, read, due, stale, changed = np.zeros((2, D)), np.zeros((2, D)), seconds.copy(), [], [0, 0]
    for _ in range(7):
        i = int(np.argmin(due))
        now = due[i]
        g = A[i] * (read[i] - B[i])
        x[:] = x.mean(0)
        x[i] -= eta * g
        stale.append(changed[i])
        changed[1 - i] += 1
        changed[i], read[i] = 0, x[i]
        due[i] += seconds[i]
    problem.close(state.params, x)
    assert float(metrics["seconds"]) == pytest.approx(now) and float(metrics["staleness"]) == pytest.approx(
        np.mean(stale)
    )
    np.testing.assert_array_equal(metrics["traffic"].up, [7 * 4 * D] * 2)


def test_pairs_on_a_ring_train_all_peers_and_time_passes_as_it_should():
    algorithm = gossip.ad_psgd(GRADIENT, RING, gradients=40, optimizer=optax.sgd(0.05))
    cohort = make_cohort(QUADRATICS, jnp.arange(N), steps=GRADIENT.steps)
    state, seconds = algorithm.init(jnp.zeros(D)), []
    one_round = jax.jit(algorithm.round)
    for t in range(60):
        state, metrics = one_round(state, cohort, jax.random.fold_in(KEY, t))
        seconds.append(float(metrics["seconds"]))
    assert np.mean(seconds) == pytest.approx(40 / N, rel=0.1)
    assert distance(np.asarray(algorithm.params(state))[None]) < 0.35
    assert distance(state.params) < distance(np.zeros((N, D))) / 3
