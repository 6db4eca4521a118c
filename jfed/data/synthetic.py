"""Generated problems: FedProx's Synthetic(alpha, beta), and quadratics that theory can be checked on.

In `synthetic` each client labels Gaussian rows with a linear model of its own; alpha is meant to move the
models apart, beta the rows (Li et al. 2020, arXiv:1812.06127, section 5.1). In `quadratics` each client has a
quadratic whose curvature, and whose gradient at the optimum of all, are prescribed, as in assumption
(A1) of Karimireddy et al. 2020 (arXiv:1910.06378). Generated in numpy, seeded by the jax key.

Letters: N clients, E examples, n_k rows of client k, D dimensions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import _validate
from jfed.core import Population, Tree
from jfed.data._checks import numpy_generator
from jfed.data.population import population

FEATURES, CLASSES = 60, 10
_TRAIN = 0.9
_DEVIATION = np.arange(1, FEATURES + 1) ** -0.6  # variances j ** -1.2


def synthetic(
    key: jax.Array, alpha: float, beta: float, *, num_clients: int = 30, size_factor: int = 1, size_sigma: float = 2.0
) -> tuple[Population, Population]:
    """FedProx's Synthetic(alpha, beta), as its published code makes it.

    Client k: `n_k = int(lognormal(4, size_sigma)) + 50`, `u_k ~ N(0, alpha^2)`, `B_k ~ N(0, beta^2)`,
    `v_k[j] ~ N(B_k, 1)`, `W_k [60, 10]` and `b_k [10] ~ N(u_k, 1)`; its rows are `x ~ N(v_k, diag(j^-1.2))`,
    `y = argmax(x W_k + b_k)`.

    Two things to know of it. The paper writes `N(0, alpha)` and `N(0, beta)`, which reads as variances; its code,
    which made the published curves, takes standard deviations, and so does this. (They agree for 0 and 1, not
    for Synthetic(0.5, 0.5).) And since `u_k` is added to all of `W_k` and `b_k`, it adds the same number to all
    ten logits of a row and changes no label: whatever alpha, the data are the same, and what tells the
    published sets apart is beta.

    The 100 users of pFedMe's Synthetic(0.5, 0.5) are `num_clients=100, size_factor=5` (Dinh et al. 2020,
    arXiv:2006.08848, and its code).

    The published q-FedAvg code (arXiv:1905.10497) has these sizes too, by which a few clients hold most of the rows;
    the accuracies of its paper are rather met with the sizes of `num_clients=100, size_sigma=0.8`, about 127 rows on
    average (`experiments/fairness_qfedavg.py`).

    Args:
      key: random key.
      alpha: standard deviation, over clients, of the mean of a client's model, at least 0; without effect, see above.
      beta: standard deviation, over clients, of the mean of a client's rows; at least 0.
      num_clients: N.
      size_factor: all n_k are multiplied by it.
      size_sigma: standard deviation of the logarithm of the sizes, but for the 50.

    Returns:
      `(train, test)`: of each client `int(0.9 n_k)` rows and the rest, at random; leaves `x` [E, 60] float32 and
      `y` [E] int32, labels in [0, 10).

    Raises:
      ValueError: if alpha or beta is not finite and at least 0, or `num_clients` or `size_factor` not a whole
        number of at least 1.

    >>> train, test = synthetic(jax.random.key(0), 1.0, 1.0)
    >>> train.size.shape, train.examples["x"].shape[1:], int(test.size.min())
    ((30,), (60,), 5)
    """
    _validate.at_least_zero("synthetic", "alpha", alpha, "0, 0.5 and 1 are the paper's")
    _validate.at_least_zero("synthetic", "beta", beta, "0, 0.5 and 1 are the paper's")
    _validate.at_least_zero("synthetic", "size_sigma", size_sigma, "2 is FedProx's, 0 makes all clients alike")
    _check("synthetic", num_clients, size_factor)
    rng = numpy_generator("synthetic", key)
    size = _sizes(rng, num_clients, size_factor, size_sigma)
    u, b = float(alpha) * rng.standard_normal(num_clients), float(beta) * rng.standard_normal(num_clients)
    v = b[:, None] + rng.standard_normal((num_clients, FEATURES))
    return _labelled(rng, size, v, lambda k: _model(rng, u[k]))


def synthetic_iid(key: jax.Array, *, num_clients: int = 30, size_factor: int = 1) -> tuple[Population, Population]:
    """FedProx's Synthetic-IID: all clients share one model `W, b ~ N(0, 1)` and the mean 0 of rows; else `synthetic`.

    Args:
      key: random key.
      num_clients: N.
      size_factor: all n_k are multiplied by it.

    Returns:
      `(train, test)` as `synthetic` has them.

    Raises:
      ValueError: if `num_clients` or `size_factor` is not a whole number of at least 1.
    """
    _check("synthetic_iid", num_clients, size_factor)
    rng = numpy_generator("synthetic_iid", key)
    size = _sizes(rng, num_clients, size_factor)
    model = _model(rng, 0.0)
    return _labelled(rng, size, np.zeros((num_clients, FEATURES)), lambda k: model)


def quadratics(
    key: jax.Array,
    *,
    num_clients: int,
    dimension: int,
    dissimilarity: float,
    curvature: tuple[float, float] = (0.1, 1.0),
    hessian_dissimilarity: float = 1.0,
    noise: float = 0.0,
    examples_per_client: int = 1,
) -> tuple[Population, jax.Array]:
    """Clients with `F_i(x) = 1/2 (x - b_i)^T A_i (x - b_i)`, and the optimum `x*` of their mean F.

    Train on them with `quadratic_loss`, a model being an array [D].

    Guarantees, up to rounding to float32:
      * `mean_i |grad F_i(x*)|^2 = G^2`, G the `dissimilarity`; it is the G of (A1) at the optimum.
      * The eigenvalues of every `A_i` lie within `curvature = (mu, L)`; with D > 1 and a
        `hessian_dissimilarity` of 0 or 1 both are reached.
      * The mean of a client's examples is `F_i` up to a constant; the gradients of its examples deviate from
        their mean by `noise`: `mean_e |grad f_e(x) - grad F_i(x)|^2 = noise^2` for every x.
      * Curvatures do not depend on `dissimilarity` and `noise`, nor does the optimum, which is exact for the
        numbers returned; it lies about 1 from 0 in each coordinate.

    Args:
      key: random key.
      num_clients: N, at least 2.
      dimension: D.
      dissimilarity: G, at least 0; with 0 all clients have the same optimum.
      curvature: `(mu, L)`, `0 < mu <= L`.
      hessian_dissimilarity: 0 gives all clients the same A, 1 one each with axes of its own, between the two a
        mixture. With the same A and as many local steps for all, FedAvg is unbiased.
      noise: of the gradient of an example, at least 0.
      examples_per_client: rows of each client; noise needs two.

    Returns:
      `(population, optimum)`: leaves `A` [E, D, D] and `b` [E, D] float32, and [D] float32.

    Raises:
      ValueError: if a number is out of its range, or there is noise with one example a client.

    >>> population, optimum = quadratics(jax.random.key(0), num_clients=8, dimension=3, dissimilarity=2.0)
    >>> gradients = jax.vmap(jax.grad(lambda x, one: quadratic_loss(x, one, None)[0]), (None, 0))
    >>> each = gradients(optimum, jax.tree.map(lambda leaf: leaf[:, None], population.examples))
    >>> print(jnp.round(jnp.linalg.norm(each.mean(0)), 3), jnp.round(jnp.sum(each**2, 1).mean(), 3))
    0.0 4.0
    """
    where = "quadratics"
    _validate.at_least_one(where, "num_clients", num_clients, "there must be two")
    _validate.at_least_one(where, "dimension", dimension, "10 shows most")
    _validate.at_least_one(where, "examples_per_client", examples_per_client, "1 has no noise")
    _validate.at_least_zero(where, "dissimilarity", dissimilarity, "0 gives all clients the same optimum")
    _validate.within(where, "hessian_dissimilarity", hessian_dissimilarity, 0.0, 1.0, "0 gives all clients the same")
    _validate.at_least_zero(where, "noise", noise, "0 gives every example its client's gradient")
    mu, smoothness = curvature
    if not 0 < mu <= smoothness < np.inf:
        raise ValueError(f"quadratics(curvature={curvature}): needs 0 < mu <= L; (0.1, 1.0) is a start.")
    for name, value, count in (("dissimilarity", dissimilarity, num_clients), ("noise", noise, examples_per_client)):
        if value > 0 and count < 2:
            raise ValueError(
                f"quadratics({name}={value}): what sums to 0 takes two; raise "
                f"{'num_clients' if name == 'dissimilarity' else 'examples_per_client'} or set {name} to 0."
            )
    rng = numpy_generator(where, key)
    shape = (num_clients, dimension)
    optimum = rng.standard_normal(dimension)
    spectrum = np.geomspace(mu, smoothness, dimension) if dimension > 1 else np.array([smoothness])
    own = _rotated(rng, spectrum, num_clients)
    a = (1 - hessian_dissimilarity) * _rotated(rng, spectrum, 1) + hessian_dissimilarity * own
    gradient = float(dissimilarity) * _centred(rng, shape)
    deviation = float(noise) * np.stack([_centred(rng, (examples_per_client, dimension)) for _ in range(num_clients)])
    offset = np.linalg.solve(a[:, None], (gradient[:, None] + deviation)[..., None])[..., 0]
    b = (optimum - offset).astype(np.float32)
    a = np.repeat(a.astype(np.float32)[:, None], examples_per_client, 1)
    rows = {"A": a.reshape(-1, dimension, dimension), "b": b.reshape(-1, dimension)}
    # The optimum of the numbers as they were rounded.
    exact = {name: leaf.astype(np.float64) for name, leaf in rows.items()}
    exact_optimum = np.linalg.solve(exact["A"].sum(0), np.einsum("eij,ej->i", exact["A"], exact["b"]))
    return population(rows, [examples_per_client] * num_clients), jnp.asarray(exact_optimum, jnp.float32)


def quadratic_loss(params: jax.Array, batch: Tree, key: Any) -> jax.Array:
    """`1/2 (x - b)^T A (x - b)` of each example of `quadratics`: the loss `(params [D], batch, key) -> [B]`."""
    del key
    away = params[None] - batch["b"]
    return jnp.einsum("ei,eij,ej->e", away, batch["A"], away, precision=jax.lax.Precision.HIGHEST) / 2


def _check(where: str, num_clients: int, size_factor: int) -> None:
    _validate.at_least_one(where, "num_clients", num_clients, "30 is FedProx's, 100 pFedMe's")
    _validate.at_least_one(where, "size_factor", size_factor, "1 is FedProx's, 5 pFedMe's")


def _sizes(rng: np.random.Generator, num_clients: int, size_factor: int, sigma: float = 2.0) -> np.ndarray:
    return (rng.lognormal(4.0, sigma, num_clients).astype(np.int64) + 50) * size_factor


def _model(rng: np.random.Generator, mean: float) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(mean, 1.0, (FEATURES, CLASSES)), rng.normal(mean, 1.0, CLASSES)


def _labelled(rng: np.random.Generator, size: np.ndarray, v: np.ndarray, model: Any) -> tuple[Population, Population]:
    """Rows of all clients labelled by `model(k)`; they are independent, so their first part is a random one."""
    parts: tuple[list, list] = ([], [])
    for k, n in enumerate(size):
        w, b = model(k)
        x = v[k] + _DEVIATION * rng.standard_normal((n, FEATURES))
        y = np.argmax(x @ w + b, axis=1)
        cut = int(_TRAIN * n)
        for part, rows in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
            part.append((x[rows].astype(np.float32), y[rows].astype(np.int32)))

    def joined(part: list) -> Population:
        x, y = (np.concatenate(column) for column in zip(*part, strict=True))
        return population({"x": x, "y": y}, [len(own) for _, own in part], num_classes=CLASSES)

    return joined(parts[0]), joined(parts[1])


def _rotated(rng: np.random.Generator, spectrum: np.ndarray, count: int) -> np.ndarray:
    """Symmetric matrices of that spectrum, with axes in any direction: [count, D, D]."""
    axes, r = np.linalg.qr(rng.standard_normal((count, spectrum.size, spectrum.size)))
    axes *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]  # else directions would not be uniform
    return np.einsum("nij,j,nkj->nik", axes, spectrum, axes)


def _centred(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Rows [count, D] that sum to 0 and whose squared norms are 1 on average; a single one is 0."""
    if shape[0] == 1:
        return np.zeros(shape)
    rows = rng.standard_normal(shape)
    rows -= rows.mean(0)
    return rows / np.sqrt(np.mean(np.sum(rows**2, 1)))
