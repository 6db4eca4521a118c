"""What liars send to honest peers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jfed import _validate, tree
from jfed.aggregate import Attack as ClientAttack
from jfed.core import Tree
from jfed.gossip.robust.received import Received, only

Attack = Callable[[Received, jax.Array, jax.Array], Tree]
"""`(received, evil [S] bool, key) -> heard`: what ONE peer hears after all, changed where a liar speaks."""


def dissensus(epsilon: float) -> Attack:
    """Liars pull a peer away from those that it hears (He, Karimireddy and Jaggi 2022, arXiv:2202.01545).

    Each sends `x_i - epsilon sum_k W_ik (x_k - x_i) / sum_j W_ij`, k the honest ones that i hears and j the liars.
    With epsilon 1 plain gossip moves nobody that hears a liar, above 1 it moves them apart.

    Args:
      epsilon: 1.5 in the authors' experiments.

    Raises:
      ValueError: if `epsilon` is not a finite number above 0.
    """
    _validate.positive("dissensus", "epsilon", epsilon, "1.5 pushes peers apart")

    def attack(received: Received, evil: jax.Array, key: jax.Array) -> Tree:
        del key
        honest = jnp.where(evil, 0.0, received.weight)
        liars = jnp.sum(jnp.where(evil, received.weight, 0.0))
        scale = epsilon / jnp.where(liars > 0, liars, 1.0)

        def one(x, h):
            pull = jnp.tensordot(honest, h - x[None], axes=1, precision=jax.lax.Precision.HIGHEST)
            return jnp.broadcast_to((x - scale * pull)[None], h.shape).astype(h.dtype)

        heard = only(received.weight > 0, received.heard)
        return tree.select(evil, jax.tree.map(one, received.own, heard), received.heard)

    return attack


def gaussian(scale: float) -> Attack:
    """Liars add noise to their models, drawn anew for each peer, message and number.

    Args:
      scale: its standard deviation.

    Raises:
      ValueError: if `scale` is not a finite number above 0.
    """
    _validate.positive("gaussian", "scale", scale, "several times the norm of a number in the model")

    def attack(received: Received, evil: jax.Array, key: jax.Array) -> Tree:
        leaves, structure = jax.tree.flatten(received.heard)
        keys = jax.random.split(key, len(leaves))
        noisy = [(x + scale * jax.random.normal(k, x.shape, x.dtype)).astype(x.dtype)
                 for x, k in zip(leaves, keys, strict=True)]  # fmt: skip
        return tree.select(evil, jax.tree.unflatten(structure, noisy), received.heard)

    return attack


def sending(attack: ClientAttack) -> Attack:
    """Any attack of `jfed.aggregate`, such as `sign_flip()`, `alie(z)` or `ipm(epsilon)`, upon each peer by itself.

    The honest messages that it knows are the peer's own model and those that it hears, all alike; ids are 0 for the
    peer, and 1 plus the slot.

    Args:
      attack: `(stack, malicious, honest, ids, key) -> stack`.
    """

    def attack_fn(received: Received, evil: jax.Array, key: jax.Array) -> Tree:
        there = only(received.came, received.heard)
        stack = jax.tree.map(lambda x, h: jnp.concatenate([x[None], h]), received.own, there)
        malicious = jnp.concatenate([jnp.zeros(1, bool), evil])
        honest = jnp.concatenate([jnp.ones(1, bool), received.came & ~evil])
        stack = attack(stack, malicious, honest, jnp.arange(malicious.shape[0], dtype=jnp.int32), key)
        return tree.select(evil, jax.tree.map(lambda x: x[1:], stack), received.heard)

    return attack_fn
