"""Losses and metrics of single examples.

A loss here is a vector, one number an example, never a mean over the batch: masks, weights and
unequal clients then stay exact, whoever takes the mean. A metric is a pair (total, count) for each
example, so that any average of any subset is `sum(total) / sum(count)`.

Letters: B examples in a batch, T positions in a sequence, V classes or tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jfed.core import Tree
from jfed.models.model import Model

PADDING = -1
"""The label of a position that is not there: no loss, no metric, no gradient."""


def cross_entropy(model: Model) -> Callable:
    """Softmax cross-entropy, `loss(params, batch, key=None) -> [B]` float32, in nats.

    `batch["y"]` is integer, [B] for logits [B, V], or [B, T] for logits [B, T, V]; -1 marks padding.
    A sequence's loss is the mean over its valid positions; an example without any has loss 0.

    A label outside [-1, V) makes the loss of its example, and every gradient through it, NaN: a
    traced program cannot raise, and a clipped label would train on nonsense in silence.

    Args:
      model: gives the logits.

    Returns:
      The loss; its `key` is handed to `model.apply`, None for evaluation.

    Raises:
      ValueError: from the loss, if `y` is not integer or its shape is not that of the predictions.

    >>> from jfed.models.model import from_pair
    >>> loss = cross_entropy(from_pair(lambda key: (), lambda params, x: x))
    >>> print(loss((), {"x": jnp.zeros((3, 4)), "y": jnp.array([2, -1, 4])}).round(3))
    [1.386 0.      nan]
    """

    def loss_fn(params: Tree, batch: Tree, key: jax.Array | None = None) -> jax.Array:
        nll, _, valid = _score("cross_entropy", model.apply(params, batch["x"], key), batch["y"])
        count = _per_example(valid)
        return _per_example(nll) / jnp.maximum(count, 1.0)

    return loss_fn


def metrics(model: Model) -> Callable:
    """Loss and accuracy of a classifier, `fn(params, batch) -> {"loss": pair, "accuracy": pair}`.

    A pair is `(total [B], count [B])`, float32: the sum over an example's predictions, and how many
    there are (1 for an image, the valid positions of a sequence, 0 for padding). Labels are as in
    `cross_entropy`; one out of range makes the totals of its example NaN.

    Args:
      model: gives the logits; evaluated without a key.

    Returns:
      The function; names map to pairs.

    >>> from jfed.models.model import from_pair
    >>> fn = metrics(from_pair(lambda key: (), lambda params, x: x))
    >>> total, count = fn((), {"x": jnp.eye(3)[None], "y": jnp.array([[0, 2, -1]])})["accuracy"]
    >>> print(total, count)
    [1.] [2.]
    """

    def metrics_fn(params: Tree, batch: Tree) -> dict[str, tuple[jax.Array, jax.Array]]:
        nll, hit, valid = _score("metrics", model.apply(params, batch["x"]), batch["y"])
        count = _per_example(valid)
        return {"loss": (_per_example(nll), count), "accuracy": (_per_example(hit), count)}

    return metrics_fn


def squared_error(model: Model) -> Callable:
    """Squared error, `loss(params, batch, key=None) -> [B]` float32: the mean over an example's outputs.

    Args:
      model: gives predictions of the shape of `batch["y"]`.

    Returns:
      The loss; its `key` is handed to `model.apply`, None for evaluation.

    Raises:
      ValueError: from the loss, if predictions and `y` differ in shape.

    >>> from jfed.models.model import from_pair
    >>> loss = squared_error(from_pair(lambda key: (), lambda params, x: x))
    >>> print(loss((), {"x": jnp.array([[1.0, 3.0]]), "y": jnp.array([[0.0, 0.0]])}))
    [5.]
    """

    def loss_fn(params: Tree, batch: Tree, key: jax.Array | None = None) -> jax.Array:
        prediction, y = model.apply(params, batch["x"], key), batch["y"]
        if prediction.shape != y.shape:
            raise ValueError(
                f"squared_error(y of shape {y.shape}): y must have the predictions' shape {prediction.shape}; "
                "reshape y, e.g. y[:, None] for one output."
            )
        error = jnp.square(prediction.astype(jnp.float32) - y.astype(jnp.float32))
        return jnp.mean(error.reshape(error.shape[0], -1), axis=1)

    return loss_fn


def _score(where: str, logits: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Negative log-likelihood, hit and validity of every prediction, each float32 of the shape of `y`."""
    if logits.shape[:-1] != y.shape:
        raise ValueError(
            f"{where}(y of shape {y.shape}): y must have the shape {logits.shape[:-1]} of the predictions; "
            "give one integer label a prediction, and -1 where there is none."
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"{where}(y of dtype {y.dtype}): labels must be integers in [-1, {logits.shape[-1]}); "
            "for real targets use squared_error."
        )
    logits, y = logits.astype(jnp.float32), y.astype(jnp.int32)
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    # A comparison and a sum, not a gather, whose gradient is a scatter: slow on CPU, and of no fixed order on GPU.
    at_label = jnp.sum(jnp.where(classes == y[..., None], logits, 0.0), axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - at_label
    hit = (jnp.argmax(logits, axis=-1).astype(jnp.int32) == y).astype(jnp.float32)
    valid = y != PADDING
    wrong = (y < PADDING) | (y >= logits.shape[-1])
    # A factor, so that NaN reaches the gradient too; a where() would give a wrong label gradient 0.
    loud = jnp.where(wrong, jnp.nan, 1.0)
    return jnp.where(valid, nll * loud, 0.0), jnp.where(valid, hit * loud, 0.0), valid.astype(jnp.float32)


def _per_example(values: jax.Array) -> jax.Array:
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)
