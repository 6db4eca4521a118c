"""What holds for every algorithm under every client map. A new method joins by one row of METHODS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
import together
import two_process_methods
from methods import IDS, KEY, METHODS, make, two_rounds
from problem import PARAMS, POPULATION, cohort_of

from jfed import checkpoint, mesh, run, sampling, tree
from jfed.clients import lanes, sharded, vectorised

MAPS = {
    "vectorised": vectorised,
    "vectorised, bounded": lambda: vectorised(max_steps=8),
    "lanes(1)": lambda: lanes(1),
    "lanes(3)": lambda: lanes(3),
    "lanes(64)": lambda: lanes(64),
    "sharded lanes(2)": lambda: sharded(MESHES["sharded lanes(2)"], lanes(2)),
    "sharded vectorised": lambda: sharded(MESHES["sharded vectorised"], vectorised()),
}
MESHES = {"sharded lanes(2)": mesh.make(), "sharded vectorised": mesh.make((2,))}
# On every version of JAX; of the other methods, all of which are made of the same parts, one version is enough.
EVERYWHERE = {"fedavg", "scaffold", "mime", "ifca", "compressed both ways", "aggregator of the stack"}

# Between them, all that a client map may be asked: several epochs, nested steps, memory, a stack. Other methods meet
# one map of each kind.
THROUGH_ALL_MAPS = {"fedavg", "fedavg, full batch", "mime", "scaffold", "uplink with state", "aggregator of the stack"}
ONE_OF_EACH = ["lanes(3)", "sharded lanes(2)"]
# What takes a program of its own for each method, where one method of each make is enough.
OF_EACH_MAKE = EVERYWHERE | {"perfedavg", "fedbuff", "fedmd", "fetchsgd", "uplink with state"}


def marks(method):
    """One worker runs all tests of a method, so that it compiles each program once."""
    return [pytest.mark.xdist_group(method), *([] if method in EVERYWHERE else [pytest.mark.slow])]


def over(names):
    """A case for each of those methods."""
    return pytest.mark.parametrize("method", [pytest.param(m, marks=marks(m)) for m in METHODS if m in names])


methods = over(METHODS)


@functools.lru_cache(maxsize=8)  # those of one method
def compiled(method, client_map):
    """The algorithm, its compiled round, and the list of its traces."""
    algorithm = make(method, MAPS[client_map]())
    traces = []

    def one_round(state, cohort, key):
        traces.append(method)
        return algorithm.round(state, cohort, key)

    return algorithm, jax.jit(one_round), traces


def after_two_rounds(method, client_map, ids=IDS):
    """State and metrics."""
    algorithm, one_round, _ = compiled(method, client_map)
    state = algorithm.init(PARAMS)
    if client_map in MESHES:  # else the state would move there after the first round, for a second compilation
        state = mesh.replicate(state, MESHES[client_map])
    return two_rounds(one_round, method, state, ids)


@functools.lru_cache(maxsize=1)
def reference(method):
    return after_two_rounds(method, "vectorised")


@pytest.mark.parametrize(
    ("method", "client_map"),
    [
        pytest.param(method, client_map, marks=marks(method))
        for method in METHODS
        for client_map in (list(MAPS)[1:] if method in THROUGH_ALL_MAPS else ONE_OF_EACH)
    ],
)
def test_every_client_map_gives_the_same_state_and_metrics(method, client_map):
    problem.close(after_two_rounds(method, client_map), reference(method))


@pytest.mark.slow
@methods
def test_the_order_of_clients_does_not_matter(method):
    problem.close(after_two_rounds(method, "lanes(3)", ids=IDS[::-1]), reference(method))


@pytest.mark.slow
@over(OF_EACH_MAKE)
def test_empty_slots_do_not_matter(method):
    filled = [i for i in IDS if i != 12]
    problem.close(after_two_rounds(method, "lanes(3)", ids=filled), reference(method))


@pytest.mark.slow
@over(THROUGH_ALL_MAPS)
def test_a_compiled_round_equals_an_eager_one(method):
    algorithm, one_round, _ = compiled(method, "lanes(3)")
    state, cohort = algorithm.init(PARAMS), cohort_of(IDS, METHODS[method][0])
    problem.close(one_round(state, cohort, KEY), algorithm.round(state, cohort, KEY))


@methods
def test_a_round_is_traced_once_whatever_the_clients(method):
    algorithm, one_round, traces = compiled(method, "lanes(3)")
    state, before = algorithm.init(PARAMS), len(traces)  # another test may have compiled it
    for t, ids in enumerate((range(9), [3] * 9, [12] * 8 + [1], range(11, 2, -1))):
        state, _ = one_round(state, cohort_of(list(ids), METHODS[method][0]), jax.random.fold_in(KEY, t))
    assert traces and len(traces) <= before + 1


@pytest.mark.slow
@over(OF_EACH_MAKE)
def test_seeds_run_side_by_side_as_they_run_alone(method):
    algorithm = make(method, lanes(3))
    sampler = sampling.uniform(5, steps=METHODS[method][0].steps)

    def whole_run(key):
        state = algorithm.init(PARAMS)
        return run.scan_rounds(algorithm, sampler, POPULATION, state, key, rounds=3)

    keys = jax.random.split(KEY, 3)
    together = jax.vmap(whole_run)(keys)
    for i in range(3):
        problem.close(tree.take(together, i), whole_run(keys[i]))


@methods
def test_a_round_does_train(method):
    state, metrics = reference(method)
    moved, before = jax.tree.leaves(compiled(method, "vectorised")[0].params(state)), jax.tree.leaves(PARAMS)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(moved, before, strict=True)) > 1e-3
    assert np.isfinite(metrics["loss"])


@methods
def test_a_run_saved_and_restored_goes_on_in_the_same_bits(method, tmp_path):
    algorithm, one_round, _ = compiled(method, "lanes(3)")
    cohort = cohort_of(IDS, METHODS[method][0])
    state, _ = one_round(algorithm.init(PARAMS), cohort, KEY)
    checkpoint.save(tmp_path, 1, state)
    _, restored = checkpoint.restore(tmp_path, algorithm.init(PARAMS))
    for a, b in zip(
        jax.tree.leaves(one_round(state, cohort, jax.random.fold_in(KEY, 1))),
        jax.tree.leaves(one_round(restored, cohort, jax.random.fold_in(KEY, 1))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_processes_end_in_the_state_that_one_does(tmp_path):
    asked = sorted(OF_EACH_MAKE)
    together.two_processes(two_process_methods.__file__, tmp_path, *asked, devices_per_process=2)
    for method in asked:
        ended = np.load(tmp_path / f"{method}.npz")
        alone = jax.tree.leaves(reference(method))
        problem.close([ended[str(i)] for i in range(len(alone))], alone)
