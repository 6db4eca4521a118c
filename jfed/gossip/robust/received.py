"""What one peer has before it: all that rules and attacks look at."""

from typing import NamedTuple

import jax

from jfed import tree
from jfed.core import Tree


class Received(NamedTuple):
    """What ONE peer has before it in a round."""

    own: Tree  # leaves [...], its own model, x_i
    own_weight: jax.Array  # [] float32, W_ii
    heard: Tree  # leaves [S, ...], what came in each slot; anything where nothing came
    weight: jax.Array  # [S] float32, W_ij; 0 where nothing came
    came: jax.Array  # [S] bool


def only(flags: jax.Array, messages: Tree) -> Tree:
    """Messages [S, ...], zeros where not wanted."""
    return tree.select(flags, messages, tree.zeros(messages))
