"""Every method, ready for the tests that hold for all of them. A new method joins by one row of METHODS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
from problem import cohort_of

from jfed import compress, ledger, local, tree
from jfed.algorithms import (
    Kind,
    afl,
    apfl,
    compressed_downlink,
    ditto,
    fedadagrad,
    fedadam,
    fedasync,
    fedavg,
    fedavgm,
    fedbn,
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
    fetchsgd,
    ifca,
    lg_fedavg,
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
from jfed.core import Traffic

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
    public = np.asarray(np.random.default_rng(5).normal(size=(8, problem.FEATURES)), np.float32)
    teach = {
        f"{'digest' if make is fedmd else 'distill'}{name}": v for name, v in (("", optax.sgd(0.1)), ("_batch", 4))
    }
    kinds = {"kind_of": [0] * 12, "public": public, "public_size": 8}
    algorithm = make([Kind(problem.logits, work)], **kinds, **teach, **options)
    return algorithm._replace(init=lambda params: algorithm.init((params,)))


def both_ways(work, **options):
    """Compressed up, with error feedback, and down."""
    up = compress.error_feedback(optax.chain(compress.top_k(0.5), compress.quantize(4, rounding="nearest")))
    algorithm = federated(work, uplink=up, num_clients=12, **options)
    return compressed_downlink(algorithm, compress.scaled_sign(), num_clients=12)


def bias(path):
    return path == "b"


def kernel(path):
    return path != "b"


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
    "lg_fedavg": (WORK, functools.partial(lg_fedavg, is_local=kernel, num_clients=12)),
    "fedbn": (WORK, functools.partial(fedbn, is_local=bias, num_clients=12)),
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
    "fetchsgd": (WORK, functools.partial(fetchsgd, rows=3, columns=4, fraction=0.5, learning_rate=0.1)),
    "compressed both ways": (WORK, both_ways),
    "local_only": (WORK, functools.partial(local_only, num_clients=12)),
    "uplink with state": (WORK, functools.partial(federated, uplink=half_now_half_later(), num_clients=12)),
    "aggregator of the stack": (WORK, functools.partial(federated, aggregator=largest_weight())),
}
IDS = [3, 0, 12, 5, 1, 12, 7, 11, 2]  # 12 is an empty slot
KEY = jax.random.key(7)


def make(method, client_map):
    """The method of a row."""
    work, maker = METHODS[method]
    return maker(work, client_map=client_map)


def two_rounds(one_round, method, state, ids=IDS, place=lambda tree: tree):
    """State and metrics after two rounds; in the second, clients stop early, do nothing or stay away.

    The traffic of the second is that of each client of the population.
    """
    first = cohort_of(ids, METHODS[method][0])
    slot = {client: row for row, client in enumerate(ids)}
    steps = first.steps.at[slot[3]].min(2).at[slot[5]].set(0)
    second = first._replace(steps=steps, weight=first.weight.at[slot[0]].set(0.0))
    state, _ = one_round(place(state), place(first), place(jax.random.fold_in(KEY, 0)))
    state, metrics = one_round(state, place(second), place(jax.random.fold_in(KEY, 1)))
    here = Traffic(*(x.addressable_data(0) if isinstance(x, jax.Array) else x for x in metrics["traffic"]))
    return state, metrics | {"traffic": ledger.add(ledger.empty(problem.CLIENTS), here)}
