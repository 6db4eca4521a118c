"""Every method without a server, ready for the tests that hold for all of them. A new one joins by one row of METHODS.

As a script, one of two processes of four devices that run them all, started by `together`.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem

from jfed import compress, gossip, local, mesh, sampling
from jfed.clients import lanes, stationary
from jfed.gossip import conditions, mix, topology

N, KEY = 16, jax.random.key(1)
WORK = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
GRADIENT = local.stochastic_gradient(problem.loss, batch_size=4)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
RING, LAZY = topology.ring(N), topology.lazy(topology.ring(N))
PUSH = topology.directed_ring(N, weights=topology.push)
TOP = compress.top_k(0.5)


def population():
    """Peers of unlike size: the clients of the problem, of which four come twice."""
    ids = np.arange(N) % problem.CLIENTS
    return problem.POPULATION._replace(start=problem.POPULATION.start[ids], size=problem.POPULATION.size[ids])


def of_bias(path):
    return path == "b"


METHODS = {
    "dpsgd": functools.partial(gossip.dpsgd, WORK, RING),
    "dpsgd, momentum": functools.partial(gossip.dpsgd, GRADIENT, RING, optimizer=MOMENTUM),
    "dpsgd, everybody": functools.partial(gossip.dpsgd, WORK, topology.complete(N)),
    "adapt_then_combine": functools.partial(gossip.adapt_then_combine, WORK, topology.torus(4, 4)),
    "adapt_then_combine, one peer": functools.partial(
        gossip.adapt_then_combine, WORK, topology.one_peer_exponential(N)
    ),
    "adapt_then_combine, base": functools.partial(gossip.adapt_then_combine, WORK, topology.base_graph(N, 2)),
    "combine_then_adapt": functools.partial(gossip.combine_then_adapt, WORK, topology.star(N)),
    "d2": functools.partial(gossip.d2, GRADIENT, LAZY, optimizer=optax.sgd(0.1)),
    "gradient_tracking": functools.partial(gossip.gradient_tracking, GRADIENT, RING, optimizer=optax.sgd(0.1)),
    "push_sum": functools.partial(gossip.push_sum, WORK, PUSH),
    "biased_push": functools.partial(gossip.biased_push, WORK, PUSH),
    "quasi_global": functools.partial(gossip.quasi_global, GRADIENT, RING, learning_rate=0.1, nesterov=True),
    "choco": functools.partial(gossip.choco, WORK, RING, compressor=TOP, step_size=0.3),
    "choco, quantized": functools.partial(
        gossip.choco, WORK, RING, compressor=compress.quantize(4, rounding="stochastic"), step_size=0.3
    ),
    "relay": functools.partial(gossip.relay, WORK, topology.binary_tree(N)),
    "epidemic": functools.partial(gossip.epidemic, WORK, N, fanout=3),
    "epidemic_oracle": functools.partial(gossip.epidemic_oracle, WORK, N, fanout=3),
    "personalised": functools.partial(gossip.personalised, WORK, RING, is_local=of_bias),
    "averaging": functools.partial(gossip.averaging, RING),
    "choco_gossip": functools.partial(gossip.choco_gossip, RING, compressor=TOP, step_size=0.3),
    "ad_psgd": functools.partial(gossip.ad_psgd, GRADIENT, RING, optimizer=MOMENTUM),
}
TRAINS = [name for name in METHODS if name not in ("averaging", "choco_gossip")]
MIXES = [name for name in METHODS if name != "ad_psgd"]  # which runs on one device


def sampler(t):
    """Stragglers, peers that are away, links that fail and messages that are lost; a cohort of round t."""
    everyone = sampling.full(steps=WORK.steps)
    rough = conditions.failed_links(conditions.lost_messages(everyone, 0.2), 0.1)
    cohort = rough(population(), jax.random.fold_in(jax.random.key(7), t), t)
    away = jnp.arange(N) == 3 + t
    return cohort._replace(
        steps=jnp.where(away, 0, jnp.where(jnp.arange(N) % 5 == 1, 1, cohort.steps)),
        weight=jnp.where(away, 0.0, cohort.weight),
    )


def begun(algorithm):
    """The state before the first round, of peers that do not agree."""

    def apart(x):
        factors = 1 + 0.1 * np.arange(N, dtype=np.float32).reshape(-1, *[1] * (x.ndim - 1))
        rows = factors * np.asarray(x.addressable_data(0))[:1]
        if len(x.sharding.device_set) == 1:
            return jnp.asarray(rows)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: rows[index])

    state = algorithm.init(problem.PARAMS)
    return state._replace(params=jax.tree.map(apart, state.params))


def rounds(algorithm, one_round, count=3):
    """State and metrics after a few rough rounds."""
    state = begun(algorithm)
    for t in range(count):
        state, metrics = one_round(state, sampler(t), jax.random.fold_in(KEY, t))
    return state, metrics


def on(devices):
    """How peers run on devices: the mixing and the client map."""
    return {"mixing": mix.on_mesh(devices), "client_map": stationary(devices, lanes(2), axis="peers")}


def make(name, **how):
    """The method, run so; what does not train has no client map, and what runs on one device no mixing."""
    without = {"client_map"} if name not in TRAINS else {"mixing"} if name not in MIXES else set()
    return METHODS[name](**{option: value for option, value in how.items() if option not in without})


def main(folder):
    """Writes what this process has of each method's state, and the metrics."""
    devices = mesh.make((8,), ("peers",))
    for name in MIXES:
        algorithm = make(name, **on(devices))
        one_round = jax.jit(algorithm.round)
        state, metrics = rounds(algorithm, one_round)
        parts = {}
        for i, x in enumerate(jax.tree.leaves(state.params)):
            for shard in x.addressable_shards:
                parts[f"{i}.{shard.index[0].start or 0}"] = np.asarray(shard.data)
        parts["loss"] = np.asarray(metrics["loss"].addressable_data(0))
        parts["consensus"] = np.asarray(metrics["consensus"].addressable_data(0))
        parts["programs"] = np.asarray(one_round._cache_size())
        np.savez(folder / f"{name}.{jax.process_index()}.npz", **parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
