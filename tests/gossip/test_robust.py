"""Rules against liars, attacks, and the mixing made of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

from jfed import aggregate, compress, local, mesh
from jfed.gossip import adapt_then_combine, averaging, choco_gossip, mix, relay, robust, topology

N = 12
TORUS = topology.torus(3, 4)
KEY = jax.random.key(7)
NUMBERS = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
MODELS = {"a": jnp.asarray(NUMBERS[:, :2]), "b": jnp.asarray(NUMBERS[:, 2:].reshape(N, 2, 2))}
WORK = local.sgd(problem.loss, optax.sgd(0.1), batch_size=4)
HALF = compress.top_k(0.5)
LOST = np.random.default_rng(1).random((N, N)) < 0.3


def rows(models):
    return np.concatenate([np.asarray(x, np.float64).reshape(N, -1) for x in (models["a"], models["b"])], 1)


def mixed(mixing, models, *, present=True, arrives=None, t=0, key=KEY, net=TORUS):
    n = net.own.shape[1]
    present = jnp.broadcast_to(jnp.asarray(present), (n,))
    weights = mix.weights_of(net, jnp.int32(t), present=present, arrives=arrives, lost=mix.own_instead)
    return mixing(net).combine(models, models, weights, key)


def neighbours(i):
    return np.flatnonzero(topology.matrices(TORUS)[0][i] * (np.arange(N) != i))


@functools.cache
def clipped_program():
    """Of a radius, and of what messages arrive."""

    def f(radius, models, arrives):
        return mixed(robust.robust(mix.sparse(), robust.clipped(radius)), models, arrives=arrives)

    return jax.jit(f)


@functools.cache
def plain_program():
    return jax.jit(lambda models, arrives: mixed(mix.sparse(), models, arrives=arrives))


def test_with_an_infinite_radius_it_is_plain_gossip():
    got = clipped_program()(jnp.inf, MODELS, ~LOST)
    problem.close(got, plain_program()(MODELS, ~LOST), 1e-6)


def test_with_a_radius_of_zero_nobody_moves():
    problem.close(clipped_program()(0.0, MODELS, ~LOST), MODELS, 0)


def clip_in_numpy(x, w, radius):
    """Differences clipped one by one; `radius` of each peer."""
    new = x.copy()
    for i in range(N):
        for j in np.flatnonzero(w[i]):
            difference = x[j] - x[i]
            distance = np.linalg.norm(difference)
            if j != i and np.isfinite(distance):
                new[i] += w[i, j] * difference * min(1.0, radius[i] / distance)
    return new


def test_differences_are_clipped_by_the_norm_of_the_whole_model():
    x, w = rows(MODELS), np.where(LOST, 0.0, topology.matrices(TORUS)[0])
    want = clip_in_numpy(x, w, [2.0] * N)
    np.testing.assert_allclose(rows(clipped_program()(2.0, MODELS, ~LOST)), want, atol=1e-5)
    assert np.abs(want - clip_in_numpy(x, w, [np.inf] * N)).max() > 0.1


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_a_message_that_is_not_finite_counts_as_no_difference(poison):
    models = MODELS | {"a": MODELS["a"].at[5, 1].set(poison)}
    got, want = (
        rows(clipped_program()(2.0, m, a)) for m, a in ((models, ~LOST), (MODELS, ~LOST & (np.arange(N) != 5)))
    )
    others = np.arange(N) != 5
    np.testing.assert_allclose(got[others], want[others], atol=1e-5)


def test_with_one_radius_for_all_the_mean_stays():
    got = rows(clipped_program()(1.0, MODELS, np.ones((N, N), bool)))
    np.testing.assert_allclose(got.mean(0), rows(MODELS).mean(0), atol=1e-6)
    assert np.abs(got - rows(MODELS)).max() > 0.1


def test_nobody_moves_farther_than_the_radius_times_what_it_hears_weighs():
    models = jax.tree.map(lambda x: x.at[0].mul(1e6), MODELS)
    moved = np.linalg.norm(rows(clipped_program()(0.5, models, ~LOST))[1:] - rows(models)[1:], axis=1)
    heard = (topology.matrices(TORUS)[0] * ~LOST * ~np.eye(N, dtype=bool)).sum(1)[1:]
    assert np.all(moved <= 0.5 * heard + 1e-6)
    assert moved[neighbours(0)[0] - 1] > 0


def test_the_adaptive_radius_is_of_the_nearest_messages():
    present = np.arange(N) != 3
    models = jax.tree.map(lambda x: x.at[0].mul(1e18), MODELS)
    models["a"] = models["a"].at[7, 0].set(jnp.nan)
    delta = 0.4
    program = jax.jit(lambda m, p: mixed(robust.robust(mix.sparse(), robust.clipped_adaptive(delta)), m, present=p))
    got, x, w = rows(program(models, present)), rows(models), topology.matrices(TORUS)[0]
    w = np.where(present[:, None] & present & np.isfinite(x).all(1), w, 0.0)
    radius = []
    for i in range(N):
        own = 1 - sum(w[i, j] for j in np.flatnonzero(w[i]) if j != i)
        own = own if i != 7 and 7 not in neighbours(i) else own - 0.2  # what is not finite keeps its weight
        near = sorted((np.linalg.norm(x[j] - x[i]), w[i, j]) for j in np.flatnonzero(w[i]) if j != i)
        total = 0.0
        for distance, weight in near:
            own += weight
            total += weight * distance**2 if own <= 1 - delta + 1e-6 else 0.0
        radius.append(np.sqrt(total / delta))
    want = clip_in_numpy(x, w, radius)
    some = np.setdiff1d(np.arange(N), [0, 7])
    np.testing.assert_allclose(got[some], want[some], atol=1e-5)
    assert 0 < np.median(np.array(radius)[some]) < 3


@functools.cache
def rules_program():
    rules = {
        "median": robust.by(aggregate.median()),
        "mean": robust.by(aggregate.mean()),
        "buckets": robust.by(aggregate.bucketing(aggregate.mean(), 2)),
    }
    return jax.jit(
        lambda models, arrives: {
            name: mixed(robust.robust(mix.sparse(), rule), models, arrives=arrives) for name, rule in rules.items()
        }
    )


def test_any_aggregator_is_a_rule_over_own_and_heard():
    models = MODELS | {"a": MODELS["a"].at[5, 1].set(jnp.nan)}
    got, x = rows(rules_program()(models, ~LOST)["median"]), rows(models)
    for i in np.setdiff1d(np.arange(N), 5):
        there = [i, *(j for j in neighbours(i) if not LOST[i, j] and j != 5)]
        np.testing.assert_allclose(got[i], np.median(x[there], 0), atol=1e-6)


def test_the_mean_as_a_rule_is_plain_gossip():
    problem.close(rules_program()(MODELS, ~LOST)["mean"], plain_program()(MODELS, ~LOST), 1e-5)


def test_a_rule_that_draws_is_given_a_key_of_each_peer():
    got = rows(rules_program()(MODELS, np.ones((N, N), bool))["buckets"])
    x = rows(MODELS)
    weights = [np.linalg.lstsq(x[[i, *neighbours(i)]].T, got[i], rcond=None)[0] for i in range(N)]
    own = np.array([w[0] for w in weights])  # a peer by itself in the third bucket weighs 1/3, else 1/6
    np.testing.assert_allclose(np.minimum(np.abs(own - 1 / 3), np.abs(own - 1 / 6)), 0, atol=1e-4)
    assert 0 < np.sum(own > 0.25) < N


LIARS = [1, 5]  # neighbours
EVIL = np.isin(np.arange(N), LIARS)


@functools.cache
def attacks_program():
    attacks = {
        "stall": robust.dissensus(1.0),
        "flip": robust.sending(aggregate.sign_flip(2.0)),
        "alie": robust.sending(aggregate.alie(1.5)),
        "noise": robust.gaussian(3.0),
    }

    def f(models, arrives):
        def one(attack):
            mixing = robust.robust(mix.sparse(), robust.clipped(jnp.inf), byzantine=LIARS, attack=attack)
            return mixed(mixing, models, arrives=arrives)

        return {name: one(attack) for name, attack in attacks.items()}

    return jax.jit(f)


def heard_from_liars(name):
    """Of each honest peer that hears one liar alone: `{i: what it heard from it}`, told from how it moved."""
    got, x, w = rows(attacks_program()(MODELS, ~LOST)[name]), rows(MODELS), topology.matrices(TORUS)[0]
    found = {}
    for i in np.flatnonzero(~EVIL):
        there = [j for j in neighbours(i) if not LOST[i, j]]
        if sum(EVIL[there]) == 1:
            rest = sum(w[i, j] * (x[j] - x[i]) for j in there if not EVIL[j])
            found[i] = (got[i] - x[i] - rest) / 0.2 + x[i], there
    assert len(found) > 1
    return found


def test_dissensus_of_one_stalls_whoever_hears_a_liar():
    got = rows(attacks_program()(MODELS, ~LOST)["stall"])
    hears = [i for i in np.flatnonzero(~EVIL) if any(EVIL[j] and not LOST[i, j] for j in neighbours(i))]
    np.testing.assert_allclose(got[hears], rows(MODELS)[hears], atol=1e-5)


def test_peers_that_hear_no_liar_and_liars_themselves_hear_what_was_sent():
    got, plain = rows(attacks_program()(MODELS, ~LOST)["flip"]), rows(plain_program()(MODELS, ~LOST))
    same = [i for i in range(N) if EVIL[i] or not any(EVIL[j] and not LOST[i, j] for j in neighbours(i))]
    np.testing.assert_allclose(got[same], plain[same], atol=1e-6)
    assert len(LIARS) < len(same) < N


def test_attacks_of_clients_are_upon_each_peer_by_itself():
    x = rows(MODELS)
    for i, (message, there) in heard_from_liars("flip").items():
        np.testing.assert_allclose(message, -2 * x[[j for j in there if EVIL[j]][0]], atol=1e-4)
    for i, (message, there) in heard_from_liars("alie").items():
        honest = x[[i, *(j for j in there if not EVIL[j])]]
        np.testing.assert_allclose(message, honest.mean(0) - 1.5 * honest.std(0), atol=1e-4)


def test_noise_has_its_scale_and_is_drawn_for_each_message():
    def one(key):
        received = robust.Received(
            jnp.zeros(3), jnp.float32(0.2), jnp.ones((4, 3)), jnp.full(4, 0.2), jnp.ones(4, bool)
        )
        return robust.gaussian(3.0)(received, jnp.arange(4) < 3, key)

    heard = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000)))
    assert np.all(heard[:, 3] == 1)
    noise = heard[:, :3].reshape(2000, 9) - 1
    assert abs(noise.mean()) < 4 * 3 / np.sqrt(noise.size)
    assert abs(noise.std() / 3 - 1) < 4 / np.sqrt(2 * noise.size)
    assert np.abs(np.corrcoef(noise.T) - np.eye(9)).max() < 0.12


@pytest.mark.slow
def test_dissensus_drives_plain_gossip_apart_and_clipped_gossip_agrees():
    """A fixed radius leaves some distance, in proportion to it."""
    honest = np.setdiff1d(np.arange(N), [0])

    def spread(x):
        return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(x[honest] - x[honest].mean(0, keepdims=True)), 1)))

    def run(rule):
        mixing = robust.robust(mix.sparse(), rule, byzantine=[0], attack=robust.dissensus(1.5))
        x = jax.lax.fori_loop(0, 60, lambda t, x: mixed(mixing, x, t=t), jnp.asarray(NUMBERS))
        return spread(x), jnp.linalg.norm(x[honest].mean(0) - NUMBERS[honest].mean(0))

    fixed, adaptive = jax.jit(
        lambda radius: (jax.vmap(lambda r: run(robust.clipped(r)))(radius), run(robust.clipped_adaptive(0.2)))
    )(jnp.array([jnp.inf, 1.0, 0.1]))
    (plain, one, tenth), moved = (np.asarray(x) for x in fixed)
    begin = spread(NUMBERS)
    assert plain > 1e6 * begin
    assert one < 0.2 * begin
    assert tenth < 0.2 * begin
    assert adaptive[0] < 0.02 * begin
    assert max(*moved[1:], adaptive[1]) < 0.3 * begin


def test_on_a_mesh_it_is_the_same_and_only_messages_travel():
    devices = mesh.make((8,), ("peers",))
    net = topology.ring(16)
    x = {"a": jnp.arange(48.0).reshape(16, 3) % 7, "b": jnp.arange(16.0) % 5}
    rule, attack = robust.clipped_adaptive(1 / 3), robust.gaussian(2.0)

    def program(mixing):
        mixing = robust.robust(mixing, rule, byzantine=[2], attack=attack)
        return jax.jit(lambda x: mixed(mixing, x, net=net))

    placed = mix.on_mesh(devices)(net).place(x)
    compiled = program(mix.on_mesh(devices)).lower(placed).compile()
    problem.close(compiled(placed), program(mix.sparse())(x), 1e-6)
    text = compiled.as_text()
    assert text.count(" collective-permute(") == 2
    assert not any(f" {other}(" in text for other in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter"))


def test_a_method_trains_with_it_in_one_program():
    mixings = mix.sparse(), robust.robust(mix.sparse(), robust.clipped(1e6))
    states = []
    for mixing in mixings:
        method = adapt_then_combine(WORK, TORUS, mixing=mixing)
        round_fn, state = jax.jit(method.round), method.init(problem.PARAMS)
        for t in range(3):
            cohort = problem.cohort_of(np.random.default_rng(t).permutation(N), WORK)
            state, _ = round_fn(state, cohort, jax.random.fold_in(KEY, t))
        assert round_fn._cache_size() == 1
        states.append(state.params)
    problem.close(*states)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: robust.clipped(-1.0), r"clipped\(radius=-1.0\): radius must lie in \[0, inf\]"),
        (lambda: robust.clipped(np.nan), "clipped"),
        (lambda: robust.clipped_adaptive(0.0), r"clipped_adaptive\(byzantine_weight=0.0\)"),
        (lambda: robust.by(aggregate.centred_clipping(1.0)), r"by\(aggregator\): it remembers"),
        (lambda: robust.dissensus(0.0), r"dissensus\(epsilon=0.0\)"),
        (lambda: robust.gaussian(-1.0), r"gaussian\(scale=-1.0\)"),
        (lambda: put(byzantine=[0.5], attack=robust.gaussian(1.0)), r"robust\(byzantine=\[0.5\]\): ids"),
        (lambda: put(byzantine=[-1], attack=robust.gaussian(1.0)), "ids are whole numbers"),
        (lambda: put(byzantine=[1, 1], attack=robust.gaussian(1.0)), "named twice"),
        (lambda: put(byzantine=[1]), "give both"),
        (lambda: put(attack=robust.gaussian(1.0)), "give both"),
        (lambda: put(byzantine=[12], attack=robust.gaussian(1.0))(TORUS), "peers 0 to 11"),
        (lambda: put()(topology.from_matrix([[0.5, 1.0], [0.5, 0.0]])), "row 0 adds up to 1.5"),
        (lambda: trace(choco_gossip(TORUS, compressor=HALF, step_size=0.1, mixing=put())), "mixes changes"),
        (lambda: trace(relay(WORK, topology.chain(N), mixing=put())), "one by one"),
    ],
)
def test_what_it_cannot_do_it_refuses(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def put(**options):
    return robust.robust(mix.sparse(), robust.clipped(1.0), **options)


def trace(method):
    cohort = problem.cohort_of(np.arange(N), WORK)
    return jax.eval_shape(lambda: method.round(method.init(problem.PARAMS), cohort, KEY))


def test_a_peer_that_hears_nobody_keeps_its_model():
    pair = topology.from_matrix([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    rule = robust.robust(mix.sparse(), robust.by(aggregate.median()))
    got = jax.jit(lambda x: mixed(rule, x, net=pair))(jnp.array([1.0, 3.0, 7.0]))
    np.testing.assert_allclose(got, [2, 2, 7])


def test_averaging_goes_on_without_the_liar():
    method = averaging(TORUS, mixing=put(byzantine=[0], attack=robust.sending(aggregate.sign_flip(100.0))))
    state = method.init(jnp.zeros(6))._replace(params=jnp.asarray(NUMBERS))
    round_fn = jax.jit(method.round)
    for t in range(30):
        state, _ = round_fn(state, problem.cohort_of(np.arange(N), WORK), jax.random.fold_in(KEY, t))
    honest = np.asarray(state.params)[1:]
    assert np.linalg.norm(honest - honest.mean(0), axis=1).max() < 0.5
