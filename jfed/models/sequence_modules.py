"""The flax NNX modules behind the sequence models; import this file only where NNX is wanted.

B sequences of T tokens, V tokens in the vocabulary, H units or width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jfed.models.recurrent import lookup, recur


class RecurrentLayer(nnx.Module):
    """One LSTM or GRU layer, its gates in one product."""

    def __init__(self, in_features: int, hidden: int, *, cell: Callable, gates: int, num_states: int, rngs: nnx.Rngs):
        """Makes `input` [in, G] and `recurrent` [H, G] (LeCun normal) and `bias` [G] (zero)."""
        self.cell, self.hidden, self.num_states = cell, hidden, num_states
        self.input = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (in_features, gates * hidden)))
        # flax's own cells start this one orthogonal: a QR decomposition, which XLA:CPU can hang on under vmap.
        self.recurrent = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (hidden, gates * hidden)))
        self.bias = nnx.Param(jnp.zeros(gates * hidden))

    def project(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., G], the inputs' share of the gates without bias."""
        return x @ self.input[...]

    def __call__(self, u: jax.Array) -> jax.Array:
        """[T, B, G] from `project` -> [T, B, H], from a zero state."""
        u = u + self.bias[...].reshape(1, 1, -1)
        zeros = jnp.zeros((u.shape[1], self.hidden), u.dtype)
        return recur(self.cell, u, self.recurrent[...], (zeros,) * self.num_states)


class CharRNN(nnx.Module):
    """Embedding, recurrent layers, and a dense layer to the logits of the next token."""

    def __init__(
        self, vocabulary_size: int, *, embedding: int, hidden: int, layers: int, rngs: nnx.Rngs, **kind: Callable | int
    ):
        """`kind` are the cell, gates and num_states of `RecurrentLayer`."""
        self.layers = layers
        self.embed = nnx.Embed(vocabulary_size, embedding, rngs=rngs)
        for i in range(layers):
            layer = RecurrentLayer(embedding if i == 0 else hidden, hidden, rngs=rngs, **kind)
            setattr(self, f"layer_{i}", layer)
        self.out = nnx.Linear(hidden, vocabulary_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T] int -> [B, T, V]."""
        first, vocabulary = self.layer_0, self.embed.num_embeddings
        # The product of every token, in place of every position; backwards, V products a position in place of two.
        if vocabulary <= min(x.size, 16 * self.embed.features):
            h = first(lookup(first.project(self.embed.embedding[...]), x.T))
        else:
            h = first(first.project(self.embed(x.T)))
        for i in range(1, self.layers):
            layer = getattr(self, f"layer_{i}")
            h = layer(layer.project(h))
        return jnp.swapaxes(self.out(h), 0, 1)


class Block(nnx.Module):
    """A pre-norm transformer block: causal attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float, *, rngs: nnx.Rngs):
        """`width` must be a multiple of `heads`."""
        self.heads = heads
        self.norm_attention, self.norm_mlp = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.qkv, self.attention_out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.mlp_in, self.mlp_out = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H] -> [B, T, H]."""
        b, t, width = x.shape
        q, k, v = jnp.split(self.qkv(self.norm_attention(x)).reshape(b, t, 3 * self.heads, -1), 3, axis=2)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, width)
        x = x + self.dropout(self.attention_out(attended))
        return x + self.dropout(self.mlp_out(nnx.gelu(self.mlp_in(self.norm_mlp(x)))))


class Transformer(nnx.Module):
    """Token and learned position embeddings, blocks, a final norm and a dense layer to the logits."""

    def __init__(
        self, vocabulary_size: int, *, width: int, layers: int, heads: int, context: int, dropout: float, rngs: nnx.Rngs
    ):
        """`context` is the longest sequence there are positions for."""
        self.layers, self.context = layers, context
        self.embed = nnx.Embed(vocabulary_size, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, width)))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        for i in range(layers):
            setattr(self, f"block_{i}", Block(width, heads, dropout, rngs=rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, vocabulary_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T] int -> [B, T, V]."""
        if x.shape[1] > self.context:
            raise ValueError(
                f"transformer(context={self.context}): the sequence has {x.shape[1]} tokens, at most {self.context} "
                "have a position; cut the sequence or build the model with a longer context."
            )
        h = self.dropout(self.embed(x) + self.positions[...][None, : x.shape[1]])
        for i in range(self.layers):
            h = getattr(self, f"block_{i}")(h)
        return self.out(self.norm(h))
