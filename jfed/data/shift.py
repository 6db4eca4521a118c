"""Feature shift: clients that see the same things differently.

Where a partition changes which labels a client has, these change what its inputs look like, and leave
the labels alone. Both are pure: they return a new `Population` over the same rows.

Sources: after Li et al. 2022 (NIID-Bench, arXiv:2102.02079), noise-based feature imbalance, for
`noise`; Ghosh et al. 2020 (arXiv:2006.04088), rotated images, for `rotate`.

Letters: N clients, E examples.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jfed.core import Population
from jfed.data._checks import at_least_zero, leaf_named, numpy_generator
from jfed.data.population import owner


def noise(key: jax.Array, population: Population, *, sigma: float, leaf: str = "x") -> Population:
    """Adds Gaussian noise that grows with the client's number.

    The i-th of N clients, counted from 1, gets noise of VARIANCE sigma * i / N, so that sigma is the
    variance of the last and every client has some. This is after the noise-based feature imbalance of
    NIID-Bench (Li et al. 2022), and not the same to the letter: its README calls the parameter the
    maximum variance of the noise, its code scales by net_id / (n_parties - 1), where the first party
    is number 0. Nothing is clipped to a range of pixels.

    Args:
      key: random key.
      population: N clients.
      sigma: variance of the last client's noise, in squared units of the leaf; at least 0.
      leaf: name of the floating leaf [E, ...] that is changed.

    Returns:
      A new `Population`; rows nobody owns are unchanged.

    Raises:
      ValueError: if sigma is negative or not finite, there is no such leaf, or it is not floating.

    >>> clean = Population({"x": jnp.zeros((6000, 2))}, jnp.array([0, 3000]), jnp.array([3000, 3000]))
    >>> noisy = noise(jax.random.key(0), clean, sigma=1.0).examples["x"]
    >>> print(round(float(noisy[:3000].var()), 1), round(float(noisy[3000:].var()), 1))
    0.5 1.0
    """
    numpy_generator("noise", key)  # only for its check of the key
    at_least_zero("noise", "sigma", sigma, "0.1 is usual for inputs in [0, 1]")
    x = jnp.asarray(leaf_named(f"noise(leaf={leaf!r})", population.examples, leaf))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"noise(leaf={leaf!r}): {x.dtype} cannot hold noise; scale it to floating numbers first.")
    number = owner(population) + 1  # 0 for a row nobody owns, so without noise
    scale = np.sqrt(float(sigma) * number / population.size.shape[0])
    scale = jnp.asarray(scale.reshape((-1,) + (1,) * (x.ndim - 1)), x.dtype)
    return _replace(population, leaf, x + scale * jax.random.normal(key, x.shape, x.dtype))


def rotate(population: Population, *, leaf: str = "x") -> Population:
    """Turns client i's square images by 90 degrees times (i mod 4), counter-clockwise.

    Four groups of clients then need four models, though no label is shared out unevenly: the test bed
    of clustered methods (Ghosh et al. 2020, there with equal blocks of clients instead of i mod 4).

    Args:
      population: N clients.
      leaf: name of the images, [E, H, H] or [E, H, H, channels].

    Returns:
      A new `Population`.

    Raises:
      ValueError: if there is no such leaf or its images are not square.

    >>> images = Population({"x": jnp.array([[[1, 2], [3, 4]]] * 2)}, jnp.array([0, 1]), jnp.array([1, 1]))
    >>> print(rotate(images).examples["x"][1])
    [[2 4]
     [1 3]]
    """
    x = np.asarray(leaf_named(f"rotate(leaf={leaf!r})", population.examples, leaf))
    if x.ndim not in (3, 4) or x.shape[1] != x.shape[2]:
        raise ValueError(
            f"rotate(leaf={leaf!r}): shape {list(x.shape)} is not [E, H, H] or [E, H, H, channels]; reshape rows into "
            "square images first."
        )
    turns = np.maximum(owner(population), 0) % 4
    out = x.copy()
    for k in range(1, 4):
        out[turns == k] = np.rot90(x[turns == k], k, axes=(1, 2))
    return _replace(population, leaf, jnp.asarray(out))


def _replace(population: Population, leaf: str, x: jax.Array) -> Population:
    return population._replace(examples={**population.examples, leaf: x})
