import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, cohort_of

from jfed import local
from jfed.algorithms import fedavg, fedbn, fedper, fedrep, lg_fedavg, local_only, partially_local

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)


def is_bias(path):
    return path == "b"


def rounds(algorithm, work=WORK, schedule=([3, 0, 5], [3, 7, 5])):
    state, advance = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for t, ids in enumerate(schedule):
        state, metrics = advance(state, cohort_of(list(ids), work), jax.random.fold_in(KEY, t))
    return state, metrics


def test_local_leaves_stay_with_their_client_and_the_others_are_averaged():
    eta, ids = 0.1, [3, 0, 5]
    work = local.full_batch(problem.loss, optax.sgd(eta), chunk_size=12)
    algorithm = partially_local(work, is_local=is_bias, num_clients=12)
    state, _ = rounds(algorithm, work, schedule=(ids, ids))
    w = np.asarray(PARAMS["w"], np.float64)
    b = {i: np.asarray(PARAMS["b"], np.float64) for i in ids}
    weights = problem.SIZES[ids] / problem.SIZES[ids].sum()
    for _ in range(2):
        new = []
        for i in ids:
            g = problem.numpy_gradient({"w": w, "b": b[i]}, *problem.examples_of(i).values())
            new.append(w - eta * g["w"])
            b[i] = b[i] - eta * g["b"]
        w = np.tensordot(weights, np.array(new), 1)
    for i in ids:
        problem.close(algorithm.personal(state, i), {"w": w, "b": b[i]})
    problem.close(algorithm.personal(state, 11)["b"], PARAMS["b"])
    problem.close(algorithm.params(state)["b"], (sum(b.values()) + 9 * np.asarray(PARAMS["b"], np.float64)) / 12)


def test_local_leaves_cost_no_bytes():
    _, metrics = rounds(fedper(WORK, is_local=is_bias, num_clients=12))
    assert int(metrics["traffic"].up[0]) == int(metrics["traffic"].down[0]) == 4 * 12


def test_a_client_absent_from_a_round_keeps_its_leaves():
    algorithm = fedper(WORK, is_local=is_bias, num_clients=12)
    once, _ = rounds(algorithm, schedule=([3, 0, 5],))
    twice, _ = rounds(algorithm)
    problem.close(algorithm.personal(twice, 0)["b"], algorithm.personal(once, 0)["b"], tolerance=0)


def test_fedper_and_lg_fedavg_split_the_model_at_opposite_ends():
    per, _ = rounds(fedper(WORK, is_local=is_bias, num_clients=12))
    lg, _ = rounds(lg_fedavg(WORK, is_local=lambda path: not is_bias(path), num_clients=12))
    assert (jax.tree.leaves(per.memory)[0].shape, jax.tree.leaves(lg.memory)[0].shape) == ((12, 3), (12, 4, 3))


def test_fedbn_keeps_normalisation_local():
    params = {"norm1": {"scale": jnp.ones(4)}, **PARAMS}

    def loss(params, batch, key):
        return problem.loss(params, batch | {"x": batch["x"] * params["norm1"]["scale"][None]}, key)

    work = local.sgd(loss, optax.sgd(0.2), batch_size=4)
    algorithm = fedbn(work, num_clients=12)
    state, _ = algorithm.round(algorithm.init(params), cohort_of([3, 0], work), KEY)
    scales = [algorithm.personal(state, i)["norm1"]["scale"] for i in (3, 0, 1)]
    assert not np.allclose(scales[0], scales[1]) and np.array_equal(scales[2], np.ones(4))
    problem.close(algorithm.personal(state, 3)["w"], algorithm.personal(state, 0)["w"], tolerance=0)


def test_fedrep_trains_the_local_part_first_and_then_the_other():
    eta, i = 0.1, 3
    work = local.sgd(problem.loss, optax.sgd(eta), batch_size=12, epochs=3)
    algorithm = fedrep(work, is_local=is_bias, head_epochs=2, num_clients=12)
    state, _ = rounds(algorithm, work, schedule=([i],))
    p, data = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}, problem.examples_of(i)
    for part in ("b", "b", "w"):
        g = problem.numpy_gradient(p, data["x"], data["y"])
        p[part] = p[part] - eta * g[part]
    problem.close(algorithm.personal(state, i), p)


def test_momentum_does_not_move_the_part_that_rests():
    work = local.sgd(problem.loss, optax.sgd(0.1, momentum=0.9), batch_size=12, epochs=2)
    algorithm = fedrep(work, is_local=is_bias, head_epochs=1, num_clients=12)
    both, _ = rounds(algorithm, work, schedule=([3],))
    heads = cohort_of([3], work)._replace(steps=jnp.ones(1, jnp.int32))
    first, _ = algorithm.round(algorithm.init(PARAMS), heads, KEY)
    problem.close(algorithm.personal(both, 3)["b"], algorithm.personal(first, 3)["b"], tolerance=1e-7)


@pytest.mark.parametrize(("mask", "found"), [(lambda path: True, "all"), (lambda path: False, "none")])
def test_a_mask_that_splits_nothing_is_refused(mask, found):
    with pytest.raises(ValueError, match=rf"fedper\(is_local\): it holds for {found} of \['b', 'w'\]"):
        fedper(WORK, is_local=mask, num_clients=12).init(PARAMS)


def test_its_two_ends_are_fedavg_and_training_alone():
    # With a leaf that does nothing made local it is FedAvg; with one made shared, every client trains alone.
    params = PARAMS | {"idle": jnp.zeros(2)}

    def rounds_of(algorithm):
        state, advance = algorithm.init(params), jax.jit(algorithm.round)
        for t in range(2):
            state, _ = advance(state, cohort_of([3, 0, 5], WORK), jax.random.fold_in(KEY, t))
        return state

    almost, plain = fedper(WORK, is_local=lambda p: p == "idle", num_clients=12), fedavg(WORK)
    problem.close(almost.params(rounds_of(almost)), plain.params(rounds_of(plain)))
    mostly, alone = (
        fedper(WORK, is_local=lambda p: p != "idle", num_clients=12),
        local_only(WORK, num_clients=12),
    )
    problem.close(mostly.personal(rounds_of(mostly), 3), alone.personal(rounds_of(alone), 3))
