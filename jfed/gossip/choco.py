"""CHOCO: gossip with any compressor, without giving up the mean (Koloskova et al. 2019, arXiv:1902.00340).

Every peer keeps a public copy x^ of its model, which its neighbours know, too. It sends the compressed difference of
the two, all who hear it add it to what they know, and models move towards the neighbours' public copies:

    q_i  = Q(x_i - x^_i);   x^_i <- x^_i + q_i;   x_i <- x_i + gamma sum_j w_ij (x^_j - x^_i)

As models settle so do differences, whatever Q leaves out. A peer need not keep each neighbour's copy: of
`d_i = sum_j w_ij (x^_j - x^_i)` it is sent the changes.

Letters of the paper: Q compressor of quality omega, x^ public copy, gamma step size, delta spectral gap,
beta = |I - W|.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _streams, _validate, compress, tree
from jfed.core import Algorithm, ClientWork
from jfed.gossip import mix
from jfed.gossip.decentralised import allowed, decentralised, minus, plus
from jfed.gossip.topology import graph, measures


def choco(
    work: ClientWork,
    topology: graph.Topology,
    *,
    compressor: optax.GradientTransformation,
    step_size: float,
    **options,
) -> Algorithm:
    """CHOCO-SGD (Algorithm 2): peers descend their gradients, then gossip by compressed differences.

    All begin with the same model, which is the first public copy, too. Public copies must be the same wherever they are
    kept, else models drift for ever; so a message that not everybody hears, because it was lost or somebody is away,
    counts for nobody, and its sender's public copy stays as it was. (Peers confirm what they heard before they use it.)

    Args:
      work: as in `dpsgd`.
      topology: static, undirected.
      compressor: any of `jfed.compress`, without error feedback, which this is; it is given `key`, the peer's own, and
        `round`, and may have state.
      step_size: gamma, in (0, 1], the smaller the more is left out: `choco_step_size` gives one that is safe, and
        many thousand times smaller than one tuned.
      **options: those of `decentralised`.

    Raises:
      ValueError: if the topology is none of these, or a number out of range.
    """
    return _choco("choco", work, topology, compressor, step_size, options)


def choco_gossip(
    topology: graph.Topology, *, compressor: optax.GradientTransformation, step_size: float, **options
) -> Algorithm:
    """CHOCO-Gossip (Algorithm 1): averaging alone, as `averaging`, by compressed differences.

    Args:
      topology: as in `choco`.
      compressor: as in `choco`.
      step_size: as in `choco`.
      **options: those of `decentralised` but what only training needs.

    Raises:
      ValueError: as `choco`.
    """
    return _choco("choco_gossip", None, topology, compressor, step_size, options)


def choco_step_size(topology: graph.Topology, *, quality: float) -> float:
    """The step size for which convergence is proven (Theorem 2): linear, at a rate of `delta^2 omega / 82`.

    Args:
      topology: static, undirected.
      quality: omega, in (0, 1]: the compressor leaves out at most a share 1 - omega of the squared norm; k / d for
        `top_k` and `random_k`.

    Raises:
      ValueError: if the topology is none of these, or the quality out of range.

    >>> from jfed.gossip.topology import complete
    >>> round(choco_step_size(complete(4), quality=1.0), 4)
    0.0667
    """
    _validate.within("choco_step_size", "quality", quality, np.finfo(np.float32).tiny, 1, "k / d for top_k")
    graph.check_static("choco_step_size", topology)
    graph.check_symmetric("choco_step_size", topology)
    delta, omega = measures.spectral_gap(topology), quality
    beta = float(np.linalg.norm(np.eye(graph.peers(topology)) - graph.matrices(topology)[0], 2))
    return delta**2 * omega / (16 * delta + delta**2 + 4 * beta**2 + 2 * delta * beta**2 - 8 * delta * omega)


def _choco(where, work, topology, compressor, step_size, options) -> Algorithm:
    graph.check_static(where, topology)
    graph.check_rows(where, topology)
    graph.check_symmetric(where, topology)
    _validate.positive(where, "step_size", step_size, "choco_step_size gives a safe one")
    _validate.within(where, "step_size", step_size, 0, 1, "choco_step_size gives a safe one")
    compressor = optax.with_extra_args_support(compressor)

    def memory(params):
        # A copy, so that a state may be given away.
        wide = jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), params)
        state = jax.vmap(compressor.init)(wide)
        state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
        return {"public": wide, "pull": tree.zeros(wide), "compressor": state}

    def step(net, x, g, optimizer, memory):
        updates, optimizer = net.descend(g)
        x = plus(x, updates)

        def encode(change, state, i):
            own = jax.random.fold_in(jax.random.fold_in(net.key, _streams.UPLINK), i)
            return compressor.update(change, state, key=own, round=net.round)

        everybody = jnp.arange(graph.peers(topology))
        message, state = jax.vmap(encode)(minus(x, memory["public"]), memory["compressor"], everybody)
        speaks = mix.heard_by_all(topology, net.weights)
        q = jax.vmap(compress.decode)(message)
        q = tree.select(speaks, q, tree.zeros(q))
        state = tree.select(speaks, state, memory["compressor"])
        public = plus(memory["public"], q)
        # Sums of differences, so that what all have in common leaves no rounding error behind.
        pull = plus(memory["pull"], minus(net.mix(q, message, speaks), q))
        x = jax.tree.map(lambda x, d: (x + step_size * d).astype(x.dtype), x, pull)
        return x, optimizer, {"public": public, "pull": pull, "compressor": state}

    return decentralised(
        where, work, topology, step=step, memory=memory, lost=mix.nothing, **allowed(where, options, without=("lost",))
    )
