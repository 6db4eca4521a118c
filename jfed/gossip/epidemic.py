"""Epidemic learning: in every round each peer tells a few others, drawn anew (de Vos et al. 2023, arXiv:2310.01972).

Who hears whom is drawn inside the compiled program. Each peer averages, all alike, its model with those it heard.

Letters: n peers, s whom each tells.
"""

import jax
import jax.numpy as jnp

from jfed import _validate
from jfed.core import Algorithm, ClientWork
from jfed.gossip import mix
from jfed.gossip.decentralised import adapt_then_mix, allowed, decentralised
from jfed.gossip.topology.graph import Topology
from jfed.gossip.topology.kinds import complete


def epidemic(work: ClientWork | None, peers: int, *, fanout: int, **options) -> Algorithm:
    """EL-Local (Algorithm 3): each peer tells `fanout` others, drawn by itself, so some hear many and some nobody.

    Args:
      work: as in `dpsgd`; None averages alone.
      peers: n.
      fanout: s, in [1, n - 1]; the paper takes about log2 n.
      **options: those of `decentralised` but `lost`. With `mix.on_mesh` a device permutes with all others, since any
        may be drawn.

    Raises:
      ValueError: if a number is out of range.
    """

    def draw(key: jax.Array) -> jax.Array:
        # Whom each tells: the `fanout` lowest of n - 1 draws.
        scores = jnp.where(jnp.eye(peers, dtype=bool), jnp.inf, jax.random.uniform(key, (peers, peers)))
        _, told = jax.lax.top_k(-scores, fanout)
        return jnp.zeros((peers, peers), bool).at[told, jnp.arange(peers)[:, None]].set(True)

    return _epidemic("epidemic", work, peers, fanout, draw, options)


def epidemic_oracle(work: ClientWork | None, peers: int, *, fanout: int, **options) -> Algorithm:
    """EL-Oracle (Algorithm 2): somebody draws a graph in which each tells, and hears, exactly `fanout` others.

    The graph is one of shifts: peers are shuffled, and each tells those at `fanout` random distances from it. Whom a
    peer hears is a set of so many others, all equally likely, as in the paper, where links are both ways.

    Args:
      work: as in `epidemic`.
      peers: n.
      fanout: s, in [1, n - 1].
      **options: as in `epidemic`.

    Raises:
      ValueError: if a number is out of range.
    """

    def draw(key: jax.Array) -> jax.Array:
        order_key, distance_key = jax.random.split(key)
        order = jax.random.permutation(order_key, peers)
        distances = 1 + jax.random.permutation(distance_key, peers - 1)[:fanout]
        place = jnp.arange(peers)
        hearer = order[(place[:, None] + distances[None]) % peers]
        return jnp.zeros((peers, peers), bool).at[hearer, order[:, None]].set(True)

    return _epidemic("epidemic_oracle", work, peers, fanout, draw, options)


def _epidemic(where, work, peers, fanout, links, options) -> Algorithm:
    _validate.at_least_one(where, "peers", peers, "16 would do")
    _validate.at_least_one(where, "fanout", fanout, "the paper takes about log2 of the peers")
    if fanout >= peers:
        raise ValueError(f"{where}(peers={peers}, fanout={fanout}): tell fewer than all; lower it, or add peers.")
    everybody: Topology = complete(peers)

    return decentralised(
        where,
        work,
        everybody,
        step=adapt_then_mix,
        lost=mix.renormalised,
        links=links,
        **allowed(where, options, without=("lost",)),
    )
