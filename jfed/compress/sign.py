"""One bit a number: its sign.

Letters: d numbers, delta of |C(x) - x|^2 <= (1 - delta) |x|^2.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jfed.compress import _groups
from jfed.compress._groups import Per
from jfed.compress.message import Decoder, Encoded, operator


def sign() -> optax.GradientTransformationExtraArgs:
    """Signs alone: every number becomes +1 or -1 (signSGD, Bernstein et al. 2018, arXiv:1802.04434); 0 counts as +1.

    No contraction: around it error feedback diverges. With `majority_vote` on the server it is signSGD's vote.

    On the wire: d bits, and 32 that say 1, or NaN if the array's magnitudes do not add up to a finite number.
    """
    return _signs("sign", lambda y: 1 + 0 * jnp.sum(jnp.abs(y), -1, keepdims=True), None, contraction=False)


def scaled_sign(
    *, scale: Literal["mean", "unbiased"] = "mean", per: Per = None
) -> optax.GradientTransformationExtraArgs:
    """Signs times a scale, the mean magnitude: (|x|_1 / d) sign(x) (Karimireddy et al. 2019, arXiv:1901.09847).

    Guarantees:
      * `scale="mean"` is the scale of least error, and a contraction with delta = |x|_1^2 / (d |x|_2^2): 2/pi for
        normal numbers.
      * A group whose magnitudes do not add up to a finite number decodes to none.

    On the wire: d bits and 32 a group.

    Args:
      scale: `"mean"`, or `"unbiased"`, |x|_2^2 / |x|_1, with which signs are unbiased after a random rotation.
      per: what has a scale of its own, see `quantize`.

    Raises:
      ValueError: if `scale` or `per` is none of these.

    >>> signs = scaled_sign()
    >>> message, _ = signs.update(jnp.array([1.0, -3.0]), signs.init(jnp.zeros(2)))
    >>> print(message.rest)
    {'codes': Array([2], dtype=uint8), 'scale': Array([2.], dtype=float32)}
    """
    _groups.check("scaled_sign", per)
    if scale not in ("mean", "unbiased"):
        raise ValueError(f"scaled_sign(scale={scale!r}): it must be 'mean' or 'unbiased'.")

    def size(y):
        total = jnp.sum(jnp.abs(y), -1, keepdims=True)
        if scale == "mean":
            return total / y.shape[-1]
        return jnp.sum(y * y, -1, keepdims=True) / jnp.where(total == 0, 1, total)

    return _signs("scaled_sign", size, per, contraction=scale == "mean")


def majority_vote() -> optax.GradientTransformation:
    """The server's side of signSGD: the sign of what it is given, the mean of votes; 0 where they are equal.

    >>> vote = majority_vote()
    >>> print(vote.update(jnp.array([0.2, -0.6, 0.0]), vote.init(jnp.zeros(3)))[0])
    [ 1. -1.  0.]
    """
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))


def _signs(name, scale, per, *, contraction):
    def encode(x, source):
        del source
        coded = _groups.encode(x, per, 1, lambda y: {"scale": scale(y)}, lambda y, s, noise: (y < 0).astype(jnp.uint8))
        settings = (x.shape, jnp.dtype(x.dtype).name, per)
        return Encoded({}, coded, Decoder(name, _decode, settings, contraction, False, _groups.packed(x, per, 1)))

    return operator(name, encode)


def _decode(payload, rest, shape, dtype, per):
    return _groups.decode(rest, lambda c, s: jnp.where(c == 1, -s["scale"], s["scale"]), shape, dtype, per, 1)
