"""What holds for every method without a server. A new one joins by one row of `peer_methods.METHODS`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peer_methods
import problem
import pytest
import together
from peer_methods import KEY, METHODS, MIXES, TRAINS, WORK, N

from jfed import checkpoint, mesh, run, sampling, tree
from jfed.clients import vectorised
from jfed.core import make_cohort
from jfed.gossip import mix

HOW = {
    "as it comes": lambda: {},
    "dense": lambda: {"mixing": mix.dense(), "client_map": vectorised()},
    "a device for two": lambda: peer_methods.on(mesh.make((8,), ("peers",))),
    "a device for four": lambda: peer_methods.on(mesh.make((4,), ("peers",))),
}
# On every version of JAX; of the others, one version is enough.
EVERYWHERE = {"dpsgd", "push_sum", "choco", "relay"}


def over(names):
    """A case for each; one worker runs all tests of a method, so that it compiles each program once."""
    return pytest.mark.parametrize(
        "method",
        [
            pytest.param(
                m, marks=[pytest.mark.xdist_group(f"peers {m}"), *([] if m in EVERYWHERE else [pytest.mark.slow])]
            )
            for m in METHODS
            if m in names
        ],
    )


@functools.lru_cache(maxsize=4)
def compiled(method, how):
    """The algorithm, its compiled round, and the list of its traces."""
    algorithm, traces = peer_methods.make(method, **HOW[how]()), []

    def one_round(state, cohort, key):
        traces.append(method)
        return algorithm.round(state, cohort, key)

    return algorithm, jax.jit(one_round), traces


@functools.lru_cache(maxsize=1)
def reference(method):
    algorithm, one_round, _ = compiled(method, "as it comes")
    return jax.device_get(peer_methods.rounds(algorithm, one_round))


@pytest.mark.parametrize("how", list(HOW)[1:])
@over(MIXES)
def test_every_way_to_mix_gives_the_same_state_and_metrics_from_one_program(method, how):
    algorithm, one_round, traces = compiled(method, how)
    problem.close(jax.device_get(peer_methods.rounds(algorithm, one_round)), reference(method))
    assert len(traces) == one_round._cache_size() == 1


@over(METHODS)
def test_the_order_of_clients_and_empty_slots_do_not_matter(method):
    algorithm, one_round, _ = compiled(method, "as it comes")
    state, cohort = peer_methods.begun(algorithm), peer_methods.sampler(0)
    order = np.r_[np.random.default_rng(0).permutation(N), 0, 0]
    shuffled = tree.take(cohort._replace(examples=()), order)
    shuffled = shuffled._replace(ids=shuffled.ids.at[N:].set(N), weight=shuffled.weight.at[N:].set(9.0))
    a, b = (one_round(state, c, KEY) for c in (cohort, shuffled._replace(examples=cohort.examples)))
    problem.close(jax.device_get(a), jax.device_get(b))


@over(METHODS)
def test_who_is_away_keeps_all_that_it_has(method):
    algorithm, one_round, _ = compiled(method, "as it comes")
    state = peer_methods.begun(algorithm)
    state, _ = one_round(state, peer_methods.sampler(5), KEY)
    after, metrics = one_round(state, peer_methods.sampler(0), KEY)  # peer 3 is away
    for name in set(state._fields) - {"round", "due"}:
        before, now = (tree.take(getattr(s, name), 3) for s in (state, after))
        jax.tree.map(np.testing.assert_array_equal, before, now)
    assert int(metrics["reports"]) == N - 1
    assert not metrics["traffic"].up[3] and not metrics["traffic"].down[3]


@over(TRAINS)
def test_a_peer_whose_gradient_is_not_finite_goes_on_with_the_others(method):
    algorithm, one_round, _ = compiled(method, "as it comes")
    cohort = make_cohort(peer_methods.population(), jnp.arange(N), steps=WORK.steps)
    x = cohort.examples["x"].at[cohort.start[2] : cohort.start[2] + cohort.size[2]].set(jnp.nan)
    bad = cohort._replace(examples=cohort.examples | {"x": x})
    state, metrics = one_round(peer_methods.begun(algorithm), bad, KEY)
    assert int(metrics["dropped"]) >= 1
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))


@over(TRAINS)
def test_a_method_does_train(method):
    algorithm, one_round, _ = compiled(method, "as it comes")
    cohort = make_cohort(peer_methods.population(), jnp.arange(N), steps=WORK.steps)
    state, losses = algorithm.init(problem.PARAMS), []
    for t in range(8):
        state, metrics = one_round(state, cohort, jax.random.fold_in(KEY, t))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02
    own = algorithm.personal(state, jnp.int32(4))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, problem.PARAMS)


@over(METHODS)
def test_a_run_saved_and_restored_goes_on_in_the_same_bits(method, tmp_path):
    algorithm, one_round, _ = compiled(method, "as it comes")
    state, _ = one_round(peer_methods.begun(algorithm), peer_methods.sampler(0), KEY)
    checkpoint.save(tmp_path, 1, state)
    _, restored = checkpoint.restore(tmp_path, algorithm.init(problem.PARAMS))
    for a, b in zip(
        *(jax.tree.leaves(one_round(s, peer_methods.sampler(1), KEY)) for s in (state, restored)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@over(METHODS)
def test_a_state_may_be_given_away(method):
    algorithm, _, _ = compiled(method, "as it comes")
    leaves = jax.tree.leaves(algorithm.init(problem.PARAMS))
    assert len({x.unsafe_buffer_pointer() for x in leaves if x.size}) == len([x for x in leaves if x.size])


@pytest.mark.slow
@over(["dpsgd", "relay", "epidemic", "ad_psgd"])
def test_seeds_run_side_by_side_as_they_run_alone(method):
    algorithm = METHODS[method]()
    sampler = sampling.full(steps=WORK.steps)

    def whole_run(key):
        state = algorithm.init(problem.PARAMS)
        return run.scan_rounds(algorithm, sampler, peer_methods.population(), state, key, rounds=2)

    keys = jax.random.split(KEY, 2)
    together = jax.vmap(whole_run)(keys)
    problem.close(tree.take(together, 1), whole_run(keys[1]))


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory):
    """What two processes of four devices end with, all methods after one another."""
    folder = tmp_path_factory.mktemp("peers")
    together.two_processes(peer_methods.__file__, folder, devices_per_process=4, timeout=900)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("peers of processes")
@pytest.mark.parametrize("method", MIXES)
def test_two_processes_of_four_devices_end_as_one_device_does(method, of_processes):
    state, metrics = reference(method)
    for process in range(2):
        found = np.load(of_processes / f"{method}.{process}.npz")
        assert found["programs"] == 1
        problem.close(found["loss"], metrics["loss"])
        problem.close(found["consensus"], metrics["consensus"])
        rows = 0
        for i, leaf in enumerate(jax.tree.leaves(state.params)):
            for name in found.files:
                if name.startswith(f"{i}."):
                    part, first = found[name], int(name.split(".")[1])
                    problem.close(part, leaf[first : first + len(part)])
                    rows += len(part)
        assert rows == 8 * len(jax.tree.leaves(state.params))
