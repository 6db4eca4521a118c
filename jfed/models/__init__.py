"""Models as pairs of pure functions, a small zoo of them, and losses of single examples."""

from jfed.models.conv import conv2d
from jfed.models.dense import linear
from jfed.models.images import fedavg_cnn, lenet_gn, logistic_regression, two_nn
from jfed.models.losses import cross_entropy, metrics, squared_error
from jfed.models.model import Model, from_linen, from_nnx, from_pair
from jfed.models.pool import max_pool
from jfed.models.substitute import fast_convolutions
from jfed.models.text import char_gru, char_lstm, transformer

__all__ = [
    "Model",
    "char_gru",
    "char_lstm",
    "conv2d",
    "cross_entropy",
    "fast_convolutions",
    "fedavg_cnn",
    "from_linen",
    "from_nnx",
    "from_pair",
    "lenet_gn",
    "linear",
    "logistic_regression",
    "max_pool",
    "metrics",
    "squared_error",
    "transformer",
    "two_nn",
]
