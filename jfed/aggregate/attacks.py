"""Attacks: what malicious clients send in place of their messages.

An attack is a function `(stack, malicious [C] bool, honest [C] bool, ids [C], key) -> stack` that
writes the rows of malicious clients; it knows all honest messages, the strongest attacker the
literature assumes. `attacked` puts it before an aggregator. Flipped labels, the attack that needs no
knowledge, are a matter of data: `jfed.data.shift.flip_labels`.

Letters: n clients in a round, f of them malicious; x_i the message of client i.
"""

from collections.abc import Callable
from statistics import NormalDist

import jax
import jax.numpy as jnp
import optax

from jfed import _validate, tree
from jfed.aggregate._rows import alike, check_number, combine, slots, wide
from jfed.core import Tree

Attack = Callable[[Tree, jax.Array, jax.Array, jax.Array, jax.Array | None], Tree]


def attacked(
    aggregator: optax.GradientTransformation, attack: Attack, is_malicious: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """The aggregator as it fares when some clients attack it.

    Guarantees:
      * Rows of honest clients reach the aggregator as they are, and so do weights.
      * Only clients present attack, and only such are known to the attack.
      * If nobody is malicious it is the aggregator itself, but for the key, which is split.

    Args:
      aggregator: what is attacked, `bucketing` included.
      attack: such as `sign_flip()`.
      is_malicious: ids [C] -> [C] bool, such as `lambda ids: ids < 5`; ids are slots where `update` is
        given none.

    >>> from jfed.aggregate import mean
    >>> agg = attacked(mean(), sign_flip(), lambda ids: ids == 3)
    >>> print(agg.update(jnp.array([1.0, 2.0, 5.0, 4.0]), agg.init(0.0), weights=jnp.ones(4))[0])
    1.0
    """
    inner = optax.with_extra_args_support(aggregator)

    def update_fn(stack, state, params=None, *, weights, ids=None, key=None, **extra_args):
        ids = slots(weights) if ids is None else ids
        attack_key, inner_key = (None, None) if key is None else jax.random.split(key)
        present, liar = weights > 0, is_malicious(ids)
        stack = attack(stack, present & liar, present & ~liar, ids, attack_key)
        return inner.update(stack, state, params, weights=weights, ids=ids, key=inner_key, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def sign_flip(scale: float = 1.0) -> Attack:
    """Each malicious client sends `-scale` times its own message.

    With `scale >= (n - f) / f` the mean no longer descends.

    Raises:
      ValueError: if `scale` is not a finite number.
    """
    check_number("sign_flip", "scale", scale, "1 turns the message round")

    def attack(stack, malicious, honest, ids, key):
        del honest, ids, key
        return tree.select(malicious, jax.tree.map(lambda x: (-scale * x).astype(x.dtype), stack), stack)

    return attack


def ipm(epsilon: float) -> Attack:
    """Inner product manipulation: `-epsilon` times the mean of the honest (Xie et al. 2019, arXiv:1903.03936).

    A small epsilon stays among honest messages and drags robust rules the wrong way, a large one the mean.
    Without an honest client it sends zeros.

    Args:
      epsilon: 0.1 against median and Krum, above (n - f) / f against the mean.

    Raises:
      ValueError: if `epsilon` is not a finite number.

    >>> everyone = jnp.arange(3)
    >>> print(ipm(0.5)(jnp.array([1.0, 3.0, 9.0]), everyone == 2, everyone != 2, everyone, None))
    [ 1.  3. -1.]
    """
    check_number("ipm", "epsilon", epsilon, "0.1 is usual")

    def attack(stack, malicious, honest, ids, key):
        del ids, key
        mean = combine(stack, alike(honest))
        return _send(stack, malicious, jax.tree.map(lambda x: -epsilon * x, mean))

    return attack


def alie(z: float) -> Attack:
    """A little is enough: the mean of the honest less z standard deviations (Baruch et al. 2019, arXiv:1902.06156).

    In each coordinate, all malicious clients send `mean - z * std` of the honest messages, std that of
    the population (divided by their number): within the spread of honest ones, so hard to tell, yet
    off to one side. Without an honest client it sends zeros.

    Args:
      z: `alie_z(n, f)` is the paper's.

    Raises:
      ValueError: if `z` is not a finite number.

    >>> everyone = jnp.arange(3)
    >>> print(alie(1.5)(jnp.array([1.0, 3.0, 9.0]), everyone == 2, everyone != 2, everyone, None))
    [1.  3.  0.5]
    """
    check_number("alie", "z", z, "alie_z(clients, byzantine) is the paper's")

    def attack(stack, malicious, honest, ids, key):
        del ids, key
        mean = combine(stack, alike(honest))
        # An absent row may hold a number whose square does not.
        off = tree.select(honest, jax.tree.map(lambda x, mu: x - mu[None], wide(stack), mean), tree.zeros(wide(stack)))
        variance = combine(jax.tree.map(jnp.square, off), alike(honest))
        return _send(stack, malicious, jax.tree.map(lambda mu, v: mu - z * jnp.sqrt(v), mean, variance))

    return attack


def alie_z(clients: int, byzantine: int) -> float:
    """The z of `alie` by its paper, z_max: the largest with which a majority would seem to back the liars.

    They need `s = floor(n / 2 + 1) - f` honest clients farther from the mean than themselves, so the
    normal distribution function at z_max is `(n - f - s) / (n - f)`.

    Args:
      clients: n, malicious ones included.
      byzantine: f.

    Raises:
      ValueError: if `byzantine` is not a whole number of at least 1, or not below half of `clients`.

    >>> print(round(alie_z(25, 5), 3), round(alie_z(50, 24), 2))
    0.253 1.43
    """
    _validate.at_least_one("alie_z", "byzantine", byzantine, "somebody must attack")
    _validate.at_least_one("alie_z", "clients", clients, "count all clients of a round")
    if 2 * byzantine >= clients:
        raise ValueError(
            f"alie_z(clients={clients}, byzantine={byzantine}): byzantine must be below half of clients; a majority "
            "needs nobody's backing, so choose any z."
        )
    s = clients // 2 + 1 - byzantine
    return NormalDist().inv_cdf((clients - byzantine - s) / (clients - byzantine))


def mimic(target: int | None = None) -> Attack:
    """All malicious clients send the message of one honest client (Karimireddy et al. 2022, arXiv:2006.09365).

    Nothing of it can be told from honest messages; with unlike data that client's are learnt too well, all
    others' too little. The paper looks for the client that matters most; here it is named.

    Args:
      target: id of the client to copy; where it is absent or malicious, and by default, that of the lowest
        id among the honest present. Without an honest client everybody sends zeros.

    >>> everyone = jnp.arange(3)
    >>> print(mimic()(jnp.array([1.0, 3.0, 9.0]), everyone == 2, everyone != 2, everyone, None))
    [1. 3. 1.]
    """

    def attack(stack, malicious, honest, ids, key):
        del key
        first = jnp.lexsort((ids, ~honest if target is None else ids != target, ~honest))[0]
        copied = combine(stack, jnp.zeros(honest.shape).at[first].set(honest[first].astype(jnp.float32)))
        return _send(stack, malicious, copied)

    return attack


def _send(stack: Tree, malicious: jax.Array, message: Tree) -> Tree:
    """`stack` with one wide message in all malicious rows."""
    everywhere = jax.tree.map(lambda x, m: jnp.broadcast_to(m[None].astype(x.dtype), x.shape), stack, message)
    return tree.select(malicious, everywhere, stack)
