import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, cohort_of

from jfed import _streams, local, run, sampling
from jfed.algorithms import Kind, fedavg, feddf, fedmd, local_only

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

KEY = jax.random.key(3)
PUBLIC = jnp.asarray(np.random.default_rng(5).normal(size=(16, problem.FEATURES)), jnp.float32)


def deep_logits(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["w"]


def deep_loss(params, batch, key):
    z = deep_logits(params, batch["x"])
    return jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, batch["y"][:, None], 1)[:, 0]


DEEP = {
    "hidden": jnp.asarray(np.random.default_rng(2).normal(size=(4, 5)), jnp.float32),
    "w": jnp.asarray(np.random.default_rng(3).normal(size=(5, 3)) * 0.3, jnp.float32),
}
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
FLAT = Kind(problem.logits, WORK)
KINDS = [FLAT, Kind(deep_logits, local.sgd(deep_loss, optax.sgd(0.2), batch_size=4, epochs=2))]
KIND_OF = np.arange(12) % 2
MODELS = (PARAMS, DEEP)
TWO = {"kind_of": KIND_OF, "public": PUBLIC, "public_size": 8}
ONE = TWO | {"kind_of": np.zeros(12, int)}


def rounds(algorithm, models=MODELS, schedule=([3, 0, 5, 8], [3, 7, 2, 5])):
    state, advance = algorithm.init(models), jax.jit(algorithm.round)
    for t, ids in enumerate(schedule):
        state, metrics = advance(state, cohort_of(list(ids), WORK), jax.random.fold_in(KEY, t))
    return state, metrics


def test_feddf_that_distils_nothing_is_fedavg():
    algorithm = feddf([FLAT], distill=optax.sgd(0.1), distill_epochs=0, distill_batch=8, **ONE)
    plain = fedavg(WORK)
    state = plain.init(PARAMS)
    for t, ids in enumerate(([3, 0, 5, 8], [3, 7, 2, 5])):
        state, _ = jax.jit(plain.round)(state, cohort_of(ids, WORK), jax.random.fold_in(KEY, t))
    problem.close(algorithm.params(rounds(algorithm, (PARAMS,))[0]), state.params)


def test_feddf_averages_each_kind_and_trains_both_to_agree_with_the_ensemble():
    algorithm = feddf(KINDS, distill=optax.adam(0.01), distill_epochs=200, distill_batch=8, **TWO)
    before = feddf(KINDS, distill=optax.sgd(0.1), distill_epochs=0, distill_batch=8, **TWO)
    once = ([3, 0, 5, 8],)
    state, metrics = rounds(algorithm, schedule=once)
    plain, _ = rounds(before, schedule=once)
    # The ensemble: scores of the four trained models on the public examples of the round, by weight.
    rows = jax.random.choice(jax.random.fold_in(jax.random.fold_in(KEY, 0), _streams.PUBLIC), 16, (8,), replace=False)
    said, weight = 0.0, 0.0
    for i in once[0]:
        kind = KINDS[KIND_OF[i]]
        alone = fedavg(kind.work)
        own, _ = alone.round(alone.init(MODELS[KIND_OF[i]]), cohort_of([i], WORK), jax.random.fold_in(KEY, 0))
        said = said + problem.SIZES[i] * kind.apply(own.params, PUBLIC[rows])
        weight += problem.SIZES[i]
    target = jax.nn.softmax(said / weight)

    def divergence(k, params):
        return float(
            jnp.mean(jnp.sum(target * (jnp.log(target) - jax.nn.log_softmax(KINDS[k].apply(params, PUBLIC[rows]))), 1))
        )

    for k in range(2):
        assert divergence(k, state.kinds[k].params) < 0.1 * divergence(k, plain.kinds[k].params)
    assert int(metrics["reports"]) == 4 and int(jnp.sum(metrics["traffic"].up > 0)) == 4


def test_fedmd_without_a_digest_lets_every_client_train_alone():
    algorithm = fedmd([FLAT], digest=optax.sgd(0.0), digest_batch=8, **ONE)
    alone = local_only(WORK, num_clients=12)
    state, metrics = rounds(algorithm, (PARAMS,))
    expected, _ = rounds(alone, PARAMS)
    for i in (3, 0, 7, 11):
        problem.close(algorithm.personal(state, i), alone.personal(expected, i))
    assert int(jnp.max(metrics["traffic"].up)) == 4 * 8 * problem.CLASSES  # scores, not a model


def test_fedmd_brings_what_clients_of_different_models_say_together():
    idle = local.sgd(problem.loss, optax.sgd(0.0), batch_size=4), local.sgd(deep_loss, optax.sgd(0.0), batch_size=4)
    kinds = [kind._replace(work=work) for kind, work in zip(KINDS, idle, strict=True)]
    algorithm = fedmd(kinds, digest=optax.adam(0.02), digest_epochs=100, digest_batch=16, **TWO | {"public_size": 16})
    everyone = [list(range(12))]

    def disagreement(state):
        said = [KINDS[KIND_OF[i]].apply(algorithm.personal(state, i), PUBLIC) for i in (0, 1)]
        return float(jnp.mean(jnp.abs(said[0] - said[1])))

    assert disagreement(rounds(algorithm, schedule=everyone)[0]) < 0.3 * disagreement(algorithm.init(MODELS))


@pytest.mark.parametrize("make", [fedmd, feddf])
def test_both_learn_over_a_compiled_run(make):
    teach = {"digest": optax.adam(0.01)} if make is fedmd else {"distill": optax.adam(0.01)}
    size = {"digest_batch" if make is fedmd else "distill_batch": 8}
    algorithm = make(KINDS, **TWO, **teach, **size)
    sampler = sampling.uniform(6, steps=WORK.steps)
    state, metrics = run.scan_rounds(algorithm, sampler, POPULATION, algorithm.init(MODELS), KEY, rounds=6)
    assert metrics["loss"][-1] < metrics["loss"][0]
    for i in (0, 1):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(algorithm.personal(state, i)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind_of": [0, 2]}, r"feddf\(kind_of=\[0 2\]\): one number in \[0, 2\)"),
        ({"public_size": 17, "distill_batch": 17}, r"feddf\(public_size=17\): at most the 16"),
        ({"public_size": 8, "distill_batch": 3}, r"feddf\(public_size=8\).*multiple of the batch, 3"),
        ({"public_size": 0}, r"feddf\(public_size=0\)"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        feddf(KINDS, distill=optax.sgd(0.1), **TWO | options)
