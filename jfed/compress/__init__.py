"""Compression as optax transforms whose messages are what would be on the wire.

    quantize  qsgd  terngrad  lloyd_max           codes of 1 to 8 bits
    sign  scaled_sign  majority_vote              one bit
    low_precision  natural                        smaller floats
    top_k  random_k  threshold  ternary           few numbers of many
    rotate  drive  eden                           random rotation
    power_sgd  count_sketch  fetch_sgd            low rank, sketches
    prune  cubic  frozen_zeros  nonzeros          weights that become zero, stay so and are not sent
    error_feedback  ef21  ef21_server  momentum_correction  one_bit_adam
    lossless                                      the host's last step
    over_tree  decode  decoded  undecoded  nbytes the model as one vector; what a message stands for and weighs

Links are chained: `optax.chain(top_k(0.01), quantize(4))` quantizes what was kept.
"""

from jfed.compress import lossless
from jfed.compress.count_sketch import FetchState, count_sketch, fetch_sgd
from jfed.compress.feedback import (
    EF21State,
    FeedbackState,
    MomentumState,
    ef21,
    ef21_server,
    error_feedback,
    momentum_correction,
)
from jfed.compress.floats import low_precision, natural
from jfed.compress.message import (
    Decoder,
    Encoded,
    Source,
    decode,
    decoded,
    nbytes,
    nodes,
    operator,
    over_tree,
    undecoded,
)
from jfed.compress.one_bit_adam import OneBitAdamState, one_bit_adam
from jfed.compress.power_sgd import power_sgd
from jfed.compress.prune import PruneState, cubic, frozen_zeros, kernels, nonzeros, prune
from jfed.compress.quantize import lloyd_max, qsgd, quantize, terngrad
from jfed.compress.rotate import drive, eden, rotate
from jfed.compress.sign import majority_vote, scaled_sign, sign
from jfed.compress.sparse import random_k, ternary, threshold, top_k

__all__ = [
    "Decoder",
    "EF21State",
    "Encoded",
    "FeedbackState",
    "FetchState",
    "MomentumState",
    "OneBitAdamState",
    "PruneState",
    "Source",
    "count_sketch",
    "cubic",
    "decode",
    "decoded",
    "drive",
    "eden",
    "ef21",
    "ef21_server",
    "error_feedback",
    "fetch_sgd",
    "frozen_zeros",
    "kernels",
    "lloyd_max",
    "lossless",
    "low_precision",
    "majority_vote",
    "momentum_correction",
    "natural",
    "nbytes",
    "nodes",
    "nonzeros",
    "one_bit_adam",
    "operator",
    "over_tree",
    "power_sgd",
    "prune",
    "qsgd",
    "quantize",
    "random_k",
    "rotate",
    "scaled_sign",
    "sign",
    "ternary",
    "terngrad",
    "threshold",
    "top_k",
    "undecoded",
]
