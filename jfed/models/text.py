"""Models of the next token: `x` [B, T] int to logits [B, T, V], position t seeing tokens 0 to t only.

A token past the vocabulary gives NaN logits. Pad at the end, with any token of the vocabulary and the
label -1: no position that counts sees it.

Letters: B sequences of T tokens, V tokens in the vocabulary.
"""

from typing import Any

from jfed import _validate
from jfed.models.model import Model, from_nnx
from jfed.models.recurrent import gru_cell, lstm_cell


def char_lstm(vocabulary_size: int, *, embedding: int = 8, hidden: int = 256, layers: int = 2) -> Model:
    """The character model of McMahan et al. 2017 (arXiv:1602.05629): two LSTM layers of 256 units.

    Args:
      vocabulary_size: V.
      embedding: numbers a token is embedded in.
      hidden: units of a layer.
      layers: recurrent layers.

    Returns:
      A `Model`; 820,522 parameters for V = 90.

    >>> import jax
    >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(char_lstm(90).init, jax.random.key(0))))
    820522
    """
    sizes = {"vocabulary_size": vocabulary_size, "embedding": embedding, "hidden": hidden, "layers": layers}
    return _recurrent("char_lstm", sizes, cell=lstm_cell, gates=4, num_states=2)


def char_gru(vocabulary_size: int, *, embedding: int = 8, hidden: int = 256, layers: int = 1) -> Model:
    """The character model with GRU layers: three gates for the LSTM's four, one layer by default.

    Args:
      vocabulary_size: V.
      embedding: numbers a token is embedded in.
      hidden: units of a layer.
      layers: recurrent layers.

    Returns:
      A `Model`; 227,370 parameters for V = 90.

    >>> import jax
    >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(char_gru(90).init, jax.random.key(0))))
    227370
    """
    sizes = {"vocabulary_size": vocabulary_size, "embedding": embedding, "hidden": hidden, "layers": layers}
    return _recurrent("char_gru", sizes, cell=gru_cell, gates=3, num_states=1)


def transformer(
    vocabulary_size: int, *, width: int, layers: int, heads: int, context: int, dropout: float = 0.0
) -> Model:
    """A small decoder-only transformer: pre-norm, learned positions, GELU MLP of four times the width.

    Args:
      vocabulary_size: V.
      width: numbers a token is represented by, a multiple of `heads`.
      layers: blocks.
      heads: attention heads of a block.
      context: the longest sequence, T <= context.
      dropout: share of units dropped in training, in [0, 1]: of embeddings and of each branch's output.

    Returns:
      A `Model` of `layers * (12 width + 13) * width + (2 V + context + 2) * width + V` parameters.

    Raises:
      ValueError: if `width` is no multiple of `heads`; from `apply`, if the sequence exceeds `context`.

    >>> import jax
    >>> model = transformer(65, width=32, layers=2, heads=4, context=64)
    >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    31745
    """
    sizes = {"vocabulary_size": vocabulary_size, "width": width, "layers": layers, "heads": heads, "context": context}
    _check("transformer", sizes)
    _validate.within("transformer", "dropout", dropout, 0.0, 1.0, "0.0 is no dropout, a usual value 0.1")
    if width % heads:
        raise ValueError(
            f"transformer(width={width}): width must be a multiple of heads={heads}; "
            f"use width={heads * (width // heads + 1)}."
        )

    def make(rngs: Any) -> Any:
        from jfed.models.sequence_modules import Transformer

        return Transformer(**sizes, dropout=dropout, rngs=rngs)

    return from_nnx(make)


def _recurrent(where: str, sizes: dict[str, int], **kind: Any) -> Model:
    _check(where, sizes)

    def make(rngs: Any) -> Any:
        from jfed.models.sequence_modules import CharRNN

        return CharRNN(**sizes, **kind, rngs=rngs)

    return from_nnx(make)


def _check(where: str, sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        _validate.at_least_one(where, name, value, "it is the size of an array or a number of layers")
