"""What holds for every algorithm under every client map. A new method joins by one row of METHODS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from problem import PARAMS, POPULATION, cohort_of

from jfed import local, mesh, run, sampling, tree
from jfed.algorithms import (
    Kind,
    afl,
    apfl,
    ditto,
    fedadagrad,
    fedadam,
    fedasync,
    fedavg,
    fedavgm,
    fedbuff,
    feddf,
    feddyn,
    federated,
    fedmd,
    fednova,
    fedper,
    fedprox,
    fedrep,
    fedsgd,
    fedyogi,
    ifca,
    local_only,
    mime,
    mimelite,
    perfedavg,
    perfedavg_fo,
    perfedavg_hf,
    pfedme,
    qfedavg,
    scaffold,
)
from jfed.clients import lanes, sharded, vectorised

WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
MOMENTUM = local.sgd(problem.loss, optax.sgd(0.1, momentum=0.9), batch_size=3, epochs=1)
FULL = local.full_batch(problem.loss, optax.adam(0.05), epochs=2, chunk_size=5)


def half_now_half_later():
    """An uplink with state: sends half, keeps the rest for next time."""

    def update_fn(updates, state, params=None):
        del params
        total = jax.tree.map(jnp.add, updates, state)
        half = jax.tree.map(lambda x: x / 2, total)
        return half, half

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update_fn)


def largest_weight():
    """An aggregator that needs the stack: the message of the client that weighs most."""

    def update_fn(stack, state, params=None, *, weights, **extra_args):
        del params, extra_args
        return tree.take(stack, jnp.argmax(weights)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def seconds(key, cohort):
    """Simulated seconds away: by the client's steps, and by chance."""
    draws = jax.vmap(lambda i: jax.random.exponential(jax.random.fold_in(key, i)))(cohort.ids)
    return draws * (1.0 + cohort.steps)


def two_models(work, **options):
    """IFCA started from one model and the same shrunk."""
    algorithm = ifca(work, clusters=2, num_clients=12, **options)
    both = functools.partial(jax.tree.map, lambda p: jnp.stack([p, 0.5 * p]))
    return algorithm._replace(init=lambda params: algorithm.init(both(params)))


def one_kind(make, work, **options):
    """A method for clients of several kinds of model, with a single kind."""
    public = jnp.asarray(np.random.default_rng(5).normal(size=(8, problem.FEATURES)), jnp.float32)
    teach = {
        f"{'digest' if make is fedmd else 'distill'}{name}": v for name, v in (("", optax.sgd(0.1)), ("_batch", 4))
    }
    kinds = {"kind_of": [0] * 12, "public": public, "public_size": 8}
    algorithm = make([Kind(problem.logits, work)], **kinds, **teach, **options)
    return algorithm._replace(init=lambda params: algorithm.init((params,)))


def bias(path):
    return path == "b"


METHODS = {
    "fedavg": (WORK, fedavg),
    "fedavg, client momentum": (MOMENTUM, fedavg),
    "fedavg, full batch": (FULL, fedavg),
    "fedsgd": (
        local.gradient(problem.loss, chunk_size=5),
        functools.partial(fedsgd, learning_rate=0.3),
    ),
    "fedavgm": (WORK, fedavgm),
    "fedadam": (WORK, functools.partial(fedadam, learning_rate=0.05)),
    "fedyogi": (WORK, functools.partial(fedyogi, learning_rate=0.05)),
    "fedadagrad": (WORK, functools.partial(fedadagrad, learning_rate=0.05)),
    "fedprox": (WORK, functools.partial(fedprox, mu=0.5)),
    "qfedavg": (WORK, functools.partial(qfedavg, q=1.0, learning_rate=0.2)),
    "afl": (WORK, functools.partial(afl, learning_rate=0.1, num_clients=12)),
    "perfedavg": (WORK, functools.partial(perfedavg, alpha=0.1)),
    "perfedavg_fo": (WORK, functools.partial(perfedavg_fo, alpha=0.1)),
    "perfedavg_hf": (WORK, functools.partial(perfedavg_hf, alpha=0.1, delta=0.1)),
    "scaffold": (WORK, functools.partial(scaffold, num_clients=12)),
    "fednova": (MOMENTUM, fednova),
    "feddyn": (WORK, functools.partial(feddyn, alpha=0.3, num_clients=12)),
    "mime": (MOMENTUM, mime),
    "mimelite": (FULL, mimelite),
    "fedper": (WORK, functools.partial(fedper, is_local=bias, num_clients=12)),
    "fedrep": (WORK, functools.partial(fedrep, is_local=bias, head_epochs=1, num_clients=12)),
    "ditto": (MOMENTUM, functools.partial(ditto, strength=0.5, num_clients=12)),
    "apfl": (WORK, functools.partial(apfl, alpha=0.5, alpha_learning_rate=0.1, num_clients=12)),
    "pfedme": (
        WORK,
        functools.partial(pfedme, strength=2.0, personal_learning_rate=0.1, inner_steps=3, num_clients=12),
    ),
    "ifca": (WORK, two_models),
    "fedbuff": (WORK, functools.partial(fedbuff, concurrency=4, buffer=3, duration=seconds)),
    "fedasync": (WORK, functools.partial(fedasync, concurrency=4, mixing=0.6, duration=seconds)),
    "fedmd": (WORK, functools.partial(one_kind, fedmd)),
    "feddf": (WORK, functools.partial(one_kind, feddf)),
    "local_only": (WORK, functools.partial(local_only, num_clients=12)),
    "uplink with state": (WORK, functools.partial(federated, uplink=half_now_half_later(), num_clients=12)),
    "aggregator of the stack": (WORK, functools.partial(federated, aggregator=largest_weight())),
}
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
IDS = [3, 0, 12, 5, 1, 12, 7, 11, 2]  # 12 is an empty slot
KEY = jax.random.key(7)

# On every version of JAX; of the other methods, all of which are made of the same parts, one version is enough.
EVERYWHERE = {"fedavg", "fedavg, full batch", "fedsgd", "fedadam", "scaffold", "fednova", "mime", "perfedavg", "apfl"}
EVERYWHERE |= {"ifca", "fedbuff", "uplink with state", "aggregator of the stack"}

# Between them, all that a client map may be asked: several epochs, nested steps, memory, a stack. Other methods meet
# one map of each kind.
THROUGH_ALL_MAPS = {"fedavg", "fedavg, full batch", "mime", "scaffold", "uplink with state", "aggregator of the stack"}
ONE_OF_EACH = ["lanes(3)", "sharded lanes(2)"]


def marks(method):
    """One worker runs all tests of a method, so that it compiles each program once."""
    return [pytest.mark.xdist_group(method), *([] if method in EVERYWHERE else [pytest.mark.slow])]


methods = pytest.mark.parametrize("method", [pytest.param(m, marks=marks(m)) for m in METHODS])


@functools.cache
def compiled(method, client_map):
    """The algorithm, its compiled round, and the list of its traces."""
    algorithm = METHODS[method][1](METHODS[method][0], client_map=MAPS[client_map]())
    traces = []

    def one_round(state, cohort, key):
        traces.append(method)
        return algorithm.round(state, cohort, key)

    return algorithm, jax.jit(one_round), traces


def two_rounds(method, client_map, ids=IDS):
    """State and metrics after two rounds; in the second, clients stop early, do nothing or stay away."""
    algorithm, one_round, _ = compiled(method, client_map)
    first = cohort_of(ids, METHODS[method][0])
    slot = {client: place for place, client in enumerate(ids)}
    steps = first.steps.at[slot[3]].min(2).at[slot[5]].set(0)
    second = first._replace(steps=steps, weight=first.weight.at[slot[0]].set(0.0))
    state = algorithm.init(PARAMS)
    if client_map in MESHES:  # else the state would move there after the first round, for a second compilation
        state = mesh.replicate(state, MESHES[client_map])
    state, _ = one_round(state, first, jax.random.fold_in(KEY, 0))
    return one_round(state, second, jax.random.fold_in(KEY, 1))


@functools.cache
def reference(method):
    return two_rounds(method, "vectorised")


@pytest.mark.parametrize(
    ("method", "client_map"),
    [
        pytest.param(method, client_map, marks=marks(method))
        for method in METHODS
        for client_map in (list(MAPS)[1:] if method in THROUGH_ALL_MAPS else ONE_OF_EACH)
    ],
)
def test_every_client_map_gives_the_same_state_and_metrics(method, client_map):
    problem.close(two_rounds(method, client_map), reference(method))


@pytest.mark.slow
@methods
def test_the_order_of_clients_does_not_matter(method):
    problem.close(two_rounds(method, "lanes(3)", ids=IDS[::-1]), reference(method))


@pytest.mark.slow
@methods
def test_empty_slots_do_not_matter(method):
    filled = [i for i in IDS if i != 12]
    problem.close(two_rounds(method, "lanes(3)", ids=filled), reference(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param(m, marks=marks(m)) for m in sorted(THROUGH_ALL_MAPS)])
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
@methods
def test_seeds_run_side_by_side_as_they_run_alone(method):
    work, make = METHODS[method]
    algorithm = make(work, client_map=lanes(3))
    sampler = sampling.uniform(5, steps=work.steps)

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
