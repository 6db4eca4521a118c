"""Convolutions data-parallel, dense layers model-parallel: each kind of layer is split where that costs least.

Convolutional layers hold few numbers and make many activities, so every worker has all of them and a share of the
examples, and gradients are summed. Dense layers hold many numbers and make few, so every worker has a share of each
layer's units, all examples pass all workers, and activities are sent. In between, workers exchange what the last
convolution made, in turns, by one of three schemes:

    assemble_all    all send everything at once: one turn of B examples
    in_turns        one worker after another sends to all its own: n turns of b
    in_parts        all send an n-th of theirs, n times: n turns of b

The whole gradient is that of one device. With several turns, what the next one needs is sent while this one computes,
if the compiler sees to it; and dense layers may be updated after each (`hybrid_variable_batch`).

Source: Krizhevsky 2014 (arXiv:1404.5997), section 4, whose steps (a), (b) and (c) the schemes are.

Letters: n workers, b examples of each, B = n b in a batch, F features of an example; a layer has I inputs, O units.
"""

from jfed.parallel.hybrid.alexnet import alexnet
from jfed.parallel.hybrid.models import Dense, HybridModel, HybridParams, dense_layers, whole
from jfed.parallel.hybrid.schemes import Scheme, Turns, assemble_all, bytes_sent, in_parts, in_turns
from jfed.parallel.hybrid.training import HybridState, hybrid, hybrid_variable_batch

__all__ = [
    "Dense",
    "HybridModel",
    "HybridParams",
    "HybridState",
    "Scheme",
    "Turns",
    "alexnet",
    "assemble_all",
    "bytes_sent",
    "dense_layers",
    "hybrid",
    "hybrid_variable_batch",
    "in_parts",
    "in_turns",
    "whole",
]
