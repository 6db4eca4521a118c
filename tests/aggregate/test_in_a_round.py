"""Aggregators where they are used: in a federated method's round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, cohort_of

from jfed import local, mesh, run, sampling, tree
from jfed.aggregate import attacked, bucketing, centred_clipping, geometric_median, krum, mean, median, sign_flip
from jfed.algorithms import fedavg, federated
from jfed.clients import sharded, vectorised

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
IDS = [3, 0, 12, 5, 1, 12, 7, 11, 2]  # 12 is an empty slot
KEY = jax.random.key(7)


def one_round(algorithm, ids=IDS):
    return jax.jit(algorithm.round)(algorithm.init(PARAMS), cohort_of(ids, WORK), KEY)


def alone(ids):
    """Each client's message, [C, ...]: what it moves the model by when alone."""
    algorithm = fedavg(WORK, client_map=vectorised())
    one = jax.jit(lambda cohort: algorithm.round(algorithm.init(PARAMS), cohort, KEY)[0].params)
    moves = [jax.tree.map(jnp.subtract, PARAMS, one(cohort_of([i], WORK))) for i in ids]
    return jax.tree.map(lambda *x: jnp.stack(x), *moves)


def test_a_round_with_the_mean_is_fedavg():
    with_stack, without = one_round(federated(WORK, aggregator=mean())), one_round(fedavg(WORK))
    problem.close(with_stack[0].params, without[0].params)
    problem.close(with_stack[1], without[1])


def test_a_round_with_the_median_moves_by_the_median_of_what_clients_would():
    state, _ = one_round(federated(WORK, aggregator=median()))
    here = [i for i in IDS if i != 12]
    middle = jax.tree.map(lambda x: jnp.asarray(np.median(x, axis=0)), alone(here))
    problem.close(state.params, jax.tree.map(jnp.subtract, PARAMS, middle))


def test_an_attacked_round_is_the_round_with_the_attackers_signs_flipped():
    state, _ = one_round(federated(WORK, aggregator=attacked(mean(), sign_flip(), lambda ids: ids < 2)))
    here = [i for i in IDS if i != 12]
    weights = np.asarray(POPULATION.size)[here].astype(np.float32)
    signed = jnp.asarray(np.where(np.asarray(here) < 2, -weights, weights) / weights.sum())
    flipped = jax.tree.map(lambda x: jnp.tensordot(signed, x, 1), alone(here))
    problem.close(state.params, jax.tree.map(jnp.subtract, PARAMS, flipped))


@pytest.mark.parametrize("aggregator", [median(), krum(2), geometric_median()], ids=["median", "krum", "geometric"])
def test_messages_from_several_devices_are_aggregated_alike(aggregator):
    spread = federated(WORK, aggregator=aggregator, client_map=sharded(mesh.make((2,)), vectorised()))
    state, _ = jax.jit(spread.round)(spread.init(PARAMS), cohort_of(IDS, WORK), KEY)
    problem.close(state.params, one_round(federated(WORK, aggregator=aggregator))[0].params)


@pytest.mark.slow
def test_seeds_run_side_by_side_as_they_run_alone():
    aggregator = attacked(bucketing(centred_clipping(0.5), size=2), sign_flip(3.0), lambda ids: ids < 2)
    algorithm = federated(WORK, aggregator=aggregator, client_map=vectorised())
    sampler = sampling.uniform(8, steps=WORK.steps)

    def whole_run(key):
        return run.scan_rounds(algorithm, sampler, POPULATION, algorithm.init(PARAMS), key, rounds=3)

    keys = jax.random.split(KEY, 2)
    together = jax.vmap(whole_run)(keys)
    for i in range(2):
        one = whole_run(keys[i])
        problem.close(tree.take(together, i), one)
        assert tree.all_finite(one[0].params)
