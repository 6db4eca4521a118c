"""Shift: clients that see the same things differently, or call them by other names.

Where a partition changes which examples a client has, these change what is in them: inputs, and with
`flip_labels` the labels of malicious clients. All are pure: they return a new `Population` over the
same rows.

Sources: after Li et al. 2022 (NIID-Bench, arXiv:2102.02079), noise-based feature imbalance, for
`noise`; Ghosh et al. 2020 (arXiv:2006.04088), rotated images, for `rotate`; Karimireddy et al. 2022
(arXiv:2006.09365), label flipping, for `flip_labels`.

Letters: N clients, E examples.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate
from jfed.core import Population
from jfed.data._checks import check_labels_of, leaf_named, numpy_generator
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
    _validate.at_least_zero("noise", "sigma", sigma, "0.1 is usual for inputs in [0, 1]")
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


def flip_labels(population: Population, clients: Any, *, num_classes: int, leaf: str = "y") -> Population:
    """Turns label y of some clients into `num_classes - 1 - y`: the attack that needs to know nothing.

    Malicious clients then train honestly on wrong labels. Attacks on messages are in `jfed.aggregate`.

    Args:
      population: N clients.
      clients: ids of those whose labels flip, integers in [0, N).
      num_classes: labels lie in [0, num_classes); -1, padding where there is one label a position, stays.
      leaf: name of the labels, integers [E] or [E, ...].

    Returns:
      A new `Population`; rows of other clients and rows nobody owns are unchanged.

    Raises:
      ValueError: if an id is not an integer in [0, N), there is no such leaf, or a label is out of range.

    >>> clean = Population({"y": jnp.array([0, 1, 2, 3])}, jnp.array([0, 2]), jnp.array([2, 2]))
    >>> print(flip_labels(clean, [1], num_classes=10).examples["y"])
    [0 1 7 6]
    """
    ids, n = np.atleast_1d(np.asarray(clients)), population.size.shape[0]
    if ids.size and (not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= n):
        raise ValueError(f"flip_labels(clients={clients!r}): name clients by integers in [0, {n}).")
    where = f"flip_labels(leaf={leaf!r})"
    y = np.asarray(leaf_named(where, population.examples, leaf))
    check_labels_of(where, y, num_classes)
    liar = np.isin(owner(population), ids).reshape((-1,) + (1,) * (y.ndim - 1))
    flipped = np.where(liar & (y >= 0), num_classes - 1 - y, y)
    return _replace(population, leaf, jnp.asarray(flipped.astype(y.dtype)))


def _replace(population: Population, leaf: str, x: jax.Array) -> Population:
    return population._replace(examples={**population.examples, leaf: x})
