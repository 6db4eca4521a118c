"""Classifiers of images, as the federated literature uses them.

Every function returns a `Model`: images [B, height, width, channels] float32 to logits [B, classes].
Kernels start from flax's default (LeCun normal), biases from zero. No model holds batch statistics.
"""

from typing import Any

from jfed import _validate
from jfed.models.model import Model, from_nnx


def logistic_regression(num_features: int, num_classes: int) -> Model:
    """Multinomial logistic regression: one dense layer on the flattened input.

    Args:
      num_features: numbers in one example.
      num_classes: logits of one example.

    Returns:
      A `Model` of `num_features * num_classes + num_classes` parameters.

    >>> import jax
    >>> model = logistic_regression(60, 10)
    >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    610
    """
    return _mlp("logistic_regression", num_features=num_features, num_classes=num_classes)


def two_nn(num_features: int = 784, num_classes: int = 10) -> Model:
    """The 2NN of McMahan et al. 2017 (arXiv:1602.05629): two hidden ReLU layers of 200 units.

    Args:
      num_features: numbers in one example.
      num_classes: logits of one example.

    Returns:
      A `Model`; 199,210 parameters for 28 x 28 images and 10 classes.

    >>> import jax
    >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(two_nn().init, jax.random.key(0))))
    199210
    """
    return _mlp("two_nn", 200, 200, num_features=num_features, num_classes=num_classes)


def fedavg_cnn(num_classes: int = 10) -> Model:
    """The CNN of McMahan et al. 2017 (arXiv:1602.05629) for 28 x 28 x 1 images.

    Convolution 5x5 to 32 channels, 2x2 max pool, convolution 5x5 to 64, pool, 512 ReLU units; both
    convolutions padded to keep the size, which the paper's parameter count implies.

    Args:
      num_classes: logits of one example.

    Returns:
      A `Model`; 1,663,370 parameters for 10 classes, as in the paper.

    >>> import jax
    >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(fedavg_cnn().init, jax.random.key(0))))
    1663370
    """
    return _conv_net("fedavg_cnn", (28, 28, 1), num_classes, channels=(32, 64), hidden=(512,), groups=None)


def lenet_gn(image_shape: tuple[int, int, int] = (28, 28, 1), num_classes: int = 10) -> Model:
    """A small CNN with GroupNorm, for sweeps over many clients.

    Convolution 5x5 to 16 channels, GroupNorm (8 groups), 2x2 max pool, the same to 32 channels, 64
    ReLU units. GroupNorm's statistics are of one example, so no client's batch enters another's.

    Args:
      image_shape: (height, width, channels); height and width at least 4.
      num_classes: logits of one example.

    Returns:
      A `Model`; 114,410 parameters for 28 x 28 x 1 and 145,930 for 32 x 32 x 3 images, 10 classes.

    Raises:
      ValueError: if the image is too small for two pools.

    >>> import jax
    >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lenet_gn().init, jax.random.key(0))))
    114410
    """
    if len(image_shape) != 3 or min(image_shape[:2]) < 4:
        raise ValueError(
            f"lenet_gn(image_shape={image_shape}): image_shape must be (height, width, channels) with sides of at "
            "least 4, to survive two pools; use two_nn for smaller inputs."
        )
    return _conv_net("lenet_gn", image_shape, num_classes, channels=(16, 32), hidden=(64,), groups=8)


def _mlp(where: str, *hidden: int, num_features: int, num_classes: int) -> Model:
    _validate.at_least_one(where, "num_features", num_features, "it is the product of an example's shape")
    _validate.at_least_one(where, "num_classes", num_classes, "it is the number of labels")

    def make(rngs: Any) -> Any:
        from jfed.models.modules import MLP

        return MLP(num_features, *hidden, num_classes, rngs=rngs)

    return from_nnx(make)


def _conv_net(where: str, image_shape: tuple[int, int, int], num_classes: int, **widths: Any) -> Model:
    _validate.at_least_one(where, "num_classes", num_classes, "it is the number of labels")

    def make(rngs: Any) -> Any:
        from jfed.models.modules import ConvNet

        return ConvNet(image_shape, num_classes=num_classes, rngs=rngs, **widths)

    return from_nnx(make)
