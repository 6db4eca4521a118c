import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, cohort_of

from jfed import compress, local, run, sampling, tree
from jfed.algorithms import compressed_downlink, fedavg, fedbuff, federated, fedper, ifca

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
KEY = jax.random.key(3)
DENSE = tree.nbytes(PARAMS)


def rounds_of(algorithm, rounds=6, state=None):
    sampler = sampling.uniform(5, steps=WORK.steps)
    state = algorithm.init(PARAMS) if state is None else state
    return run.scan_rounds(algorithm, sampler, POPULATION, state, KEY, rounds=rounds)


def test_a_downlink_that_leaves_nothing_out_is_the_method():
    plain, _ = rounds_of(fedavg(WORK))
    algorithm = compressed_downlink(fedavg(WORK), compress.top_k(1.0), num_clients=12)
    state, _ = rounds_of(algorithm)
    problem.close(state.model.params, plain.params, 1e-5)
    before, _ = rounds_of(algorithm, rounds=5)
    problem.close(state.sender.known, before.model.params, 1e-6)  # the last round's change is sent in the next


def test_what_is_left_out_is_sent_later():
    """Nobody trains, so the model stands still, and what clients know comes to it."""
    algorithm = compressed_downlink(fedavg(WORK), compress.top_k(0.25), num_clients=12)
    state = algorithm.init(PARAMS)
    moved = jax.tree.map(lambda x: x + 1.0, PARAMS)
    state = state._replace(model=state.model._replace(params=moved))
    nobody = cohort_of([12, 12], WORK)
    far = [jnp.inf]
    for t in range(4):
        state, _ = algorithm.round(state, nobody, jax.random.fold_in(KEY, t))
        far.append(optax.tree.norm(jax.tree.map(jnp.subtract, state.sender.known, moved)))
        assert far[-1] < far[-2]
    assert far[-1] == 0.0
    problem.close(state.model.params, moved, tolerance=0)


def test_a_client_that_stayed_away_is_sent_what_it_missed_or_the_model():
    algorithm = compressed_downlink(fedavg(WORK), compress.scaled_sign(), num_clients=12)
    one_round = jax.jit(algorithm.round)
    change = 2 + 4 + 1 + 4  # a bit for 12 numbers and for 3, and two scales
    state, down = algorithm.init(PARAMS), []
    for t, ids in enumerate([[0, 1], [0, 2], [2, 12], [1, 0]]):
        state, metrics = one_round(state, cohort_of(ids, WORK), jax.random.fold_in(KEY, t))
        down.append(metrics["traffic"].down.tolist())
    assert down == [[DENSE, DENSE], [change, DENSE], [change, 0], [3 * change, 2 * change]]
    long = state._replace(
        held=jnp.full(12, -1, jnp.int32).at[0].set(4), model=state.model._replace(round=jnp.int32(50))
    )
    _, metrics = one_round(long, cohort_of([0, 5], WORK), KEY)
    assert metrics["traffic"].down.tolist() == [DENSE, DENSE]


def test_clients_train_from_what_they_know_and_the_server_keeps_its_own_model():
    algorithm = compressed_downlink(fedavg(WORK), compress.quantize(3, rounding="nearest"), num_clients=12)
    state, _ = rounds_of(algorithm, rounds=3)
    cohort = cohort_of([3, 7], WORK)
    after, _ = algorithm.round(state, cohort, KEY)
    known = after.sender.known
    alone = fedavg(WORK)
    expected, _ = alone.round(alone.init(known)._replace(round=state.model.round), cohort, KEY)
    moved = jax.tree.map(jnp.subtract, expected.params, known)
    problem.close(after.model.params, jax.tree.map(jnp.add, state.model.params, moved), 1e-6)


def test_what_the_server_sets_to_zero_is_zero():
    server = optax.chain(optax.sgd(1.0), compress.prune(0.5))
    nearest = compress.quantize(4, rounding="nearest")
    state, _ = rounds_of(compressed_downlink(federated(WORK, server=server), nearest, num_clients=12))
    assert int(jnp.sum(state.model.params["w"] == 0)) == 6


def test_clients_beyond_those_it_knows_of_are_dropped():
    algorithm = compressed_downlink(fedavg(WORK), compress.scaled_sign(), num_clients=5)
    state, _ = algorithm.round(algorithm.init(PARAMS), cohort_of([4, 0], WORK), KEY)
    _, metrics = algorithm.round(state, cohort_of([7, 0, 12], WORK), KEY)
    assert (int(metrics["reports"]), int(metrics["dropped"])) == (1, 1)
    assert metrics["traffic"].down.tolist() == [DENSE, 2 + 4 + 1 + 4, 0]


def test_a_downlink_that_may_diverge_is_refused():
    algorithm = compressed_downlink(fedavg(WORK), compress.sign(), num_clients=12)
    with pytest.raises(ValueError, match="no contraction"):
        algorithm.round(algorithm.init(PARAMS), cohort_of([1], WORK), KEY)


def test_a_method_without_one_model_is_refused():
    asynchronous = fedbuff(WORK, concurrency=4, buffer=2, duration=lambda key, cohort: cohort.steps * 1.0)
    with pytest.raises(ValueError, match="AsynchronousState"):
        compressed_downlink(asynchronous, compress.scaled_sign(), num_clients=12).init(PARAMS)


def test_personal_models_are_still_there():
    both = jax.tree.map(lambda p: jnp.stack([p, -p]), PARAMS)
    method = ifca(WORK, clusters=2, num_clients=12)
    algorithm = compressed_downlink(method, compress.top_k(1.0), num_clients=12)
    state = algorithm.init(both)
    problem.close(algorithm.personal(state, 0), method.personal(state.model, 0))


def test_a_personal_model_is_made_of_what_clients_know():
    method = fedper(WORK, is_local=lambda path: path == "b", num_clients=12)
    algorithm = compressed_downlink(method, compress.scaled_sign(), num_clients=12)
    state, _ = rounds_of(algorithm, rounds=3)
    found = algorithm.personal(state, 0)
    problem.close(found["w"], state.sender.known["w"], 0)
    assert jnp.abs(found["w"] - state.model.params["w"]).max() > 0.01


def test_both_ways_compressed_still_learn():
    """Algorithm 2 of Sattler et al. 2019: ternary up and down, with error feedback on both sides."""
    up = compress.error_feedback(compress.ternary(0.25))
    algorithm = compressed_downlink(fedavg(WORK, uplink=up, num_clients=12), compress.ternary(0.25), num_clients=12)
    state, metrics = rounds_of(algorithm, rounds=60)
    exact, _ = rounds_of(fedavg(WORK), rounds=60)
    everyone = {"x": POPULATION.examples["x"], "y": POPULATION.examples["y"]}

    def loss(params):
        return float(jnp.mean(problem.loss(params, everyone, None)))

    assert loss(state.model.params) < loss(exact.params) + 0.05 < loss(PARAMS)
    assert np.asarray(metrics["traffic"].up).max() == (1 + 2 + 4) + (1 + 1 + 4)  # signs, bitmap or index, mean
