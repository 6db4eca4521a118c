"""The decoder-only transformer of `jfed.models`, written for one device of any mesh.

Pre-norm blocks of causal attention and a feed-forward net, learned positions, cross-entropy over the vocabulary.
Parameters are the tree of `jfed.models.transformer`, loss and gradients those of its `cross_entropy`, on every mesh.
A tensor axis splits heads, hidden units and the vocabulary, a sequence axis tokens, whose keys and values then go round
to all queries. A mixture of experts may stand in for the feed-forward net.

Source: Radford et al. 2019 ("Language models are unsupervised multitask learners"), the blocks; Shoeybi et al. 2019
(arXiv:1909.08053), how they are split.

Letters: V tokens in the vocabulary, H the width, L blocks, b examples of T tokens on a device, t devices along tensor.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jfed import _validate
from jfed.core import Tree
from jfed.parallel import conjugate, tensor
from jfed.parallel.attention import ring_attention
from jfed.parallel.experts import FeedForward
from jfed.parallel.layered import Axes, Functions, Layered, Parts, divides

_EVERYWHERE = PartitionSpec()
_NORM = {"scale": _EVERYWHERE, "bias": _EVERYWHERE}
_COLUMN = {"kernel": PartitionSpec(None, "tensor"), "bias": PartitionSpec("tensor")}
_ROW = {"kernel": PartitionSpec("tensor", None), "bias": _EVERYWHERE}
# [H, 3, H] and [3, H], so that each device has queries, keys and values of its own heads.
_QKV = {"kernel": PartitionSpec(None, None, "tensor"), "bias": PartitionSpec(None, "tensor")}


def transformer(
    vocabulary_size: int,
    *,
    width: int,
    layers: int,
    heads: int,
    context: int,
    sequence_parallel: bool = False,
    overlap: bool = False,
    attention: Callable | None = None,
    sequence_attention: Callable = ring_attention,
    compute_dtype: jnp.dtype = jnp.float32,
    feed_forward: FeedForward | None = None,
) -> Layered:
    """`jfed.models.transformer`, without dropout, to be trained over any mesh.

    A batch is `{"x": [b, T], "y": [b, T]}`, tokens and labels, -1 for padding; x, y and T are a device's own where the
    mesh splits the sequence, which then has consecutive tokens on consecutive devices. A loss is the mean over an
    example's labels, 0 if it has none, float32; a label outside [-1, V) or a token outside [0, V) makes it NaN.

    Sent by a device in a step, over t devices of a tensor axis: a block sums 4 times b T H numbers, and once more where
    it is computed again for the gradient; enter and leave together sum b T H 2 times, and b T 3 times. With
    `sequence_parallel` each sum is a gather and a scatter, computing again is two gathers and a scatter, and gradients
    of norms and biases, 6 H a block and 2 H at the end, and of T H positions are summed besides.

    Args:
      vocabulary_size: V.
      width: H, a multiple of `heads`.
      layers: L.
      heads: attention heads of a block.
      context: the longest sequence.
      sequence_parallel: between column and row layers each device of the tensor axis holds T / t tokens, rather than
        all hold all: as many bytes are sent, activations take less memory.
      overlap: the messages of `sequence_parallel` go round in rings of permutes, under way during products.
      attention: `(q, k, v) -> out`, [b, T, heads, H / heads] each, causal; by default `jax.nn.dot_product_attention`.
        Where the mesh splits the sequence, `sequence_attention` takes its place.
      sequence_attention: `(q, k, v, axis_name) -> out`, such as those of `jfed.parallel.attention`.
      compute_dtype: of activations, of messages, and of what products multiply. Parameters stay as they are, and norms,
        sums and the loss are float32.
      feed_forward: of `jfed.parallel.experts`; by default a GELU net of 4 H hidden units. Its balance loss is added to
        each example's. Blocks then have "experts" in place of "mlp_in" and "mlp_out".

    Returns:
      A `Layered`; between blocks `h` is [b, T, H], or {"h", "balance" [b]} with a `feed_forward`.

    Raises:
      ValueError: if a size is not a whole number of at least 1, `heads` does not divide `width`, there is `overlap`
        without `sequence_parallel`, or `compute_dtype` is not of floats; from `check`, if the tensor axis does not
        divide heads or the vocabulary; when traced, if a sequence is longer than `context`, or not divided by the
        tensor axis under `sequence_parallel`, or labels do not fit.

    >>> model = transformer(65, width=32, layers=2, heads=4, context=64)
    >>> parts, one = model.split(model.init(jax.random.key(0))), model.functions(Axes())
    >>> batch = {"x": jnp.zeros((3, 16), jnp.int32), "y": jnp.ones((3, 16), jnp.int32)}
    >>> h, _ = jax.lax.scan(lambda h, params: (one.block(params, h), None), one.enter(parts.enter, batch), parts.blocks)
    >>> print(h.shape, one.leave(parts.leave, h, batch).shape)
    (3, 16, 32) (3,)
    """
    where = "transformer"
    sizes = {"vocabulary_size": vocabulary_size, "width": width, "layers": layers, "heads": heads, "context": context}
    for name, value in sizes.items():
        _validate.at_least_one(where, name, value, "it is the size of an array or a number of layers")
    if width % heads:
        raise ValueError(
            f"{where}(width={width}): width must be a multiple of heads={heads}; "
            f"use width={-(-width // heads) * heads}."
        )
    _validate.flags(where, sequence_parallel=sequence_parallel, overlap=overlap)
    if overlap and not sequence_parallel:
        raise ValueError(f"{where}(overlap=True): it is the messages of sequence_parallel that overlap; set that too.")
    for name, value in {
        "attention": _attention if attention is None else attention,
        "sequence_attention": sequence_attention,
    }.items():
        if not callable(value):
            raise ValueError(f"{where}({name}={value!r}): give a function of jfed.parallel, or leave it out.")
    if feed_forward is not None and not isinstance(feed_forward, FeedForward):
        raise ValueError(f"{where}(feed_forward={feed_forward!r}): give mixture_of_experts(...), or leave it out.")
    if not _is_float(compute_dtype):
        raise ValueError(f"{where}(compute_dtype={compute_dtype!r}): must be a dtype of floats; take jnp.bfloat16.")
    names = [f"block_{i}" for i in range(layers)]
    layout = tensor.OVERLAPPED if overlap else tensor.SPLIT if sequence_parallel else tensor.WHOLE

    def init_fn(key: jax.Array) -> Tree:
        embed_key, positions_key, out_key, *keys = jax.random.split(key, 3 + layers)
        drawn = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        return {
            "embed": {"embedding": drawn(embed_key, (vocabulary_size, width), jnp.float32)},
            "positions": 0.02 * jax.random.normal(positions_key, (context, width), jnp.float32),
            "norm": _norm(width),
            "out": _dense(out_key, width, vocabulary_size),
        } | {name: block_init(one) for name, one in zip(names, keys, strict=True)}

    def block_init(key: jax.Array) -> Tree:
        qkv_key, attention_key, in_key, out_key = jax.random.split(key, 4)
        params = {
            "norm_attention": _norm(width),
            "norm_mlp": _norm(width),
            "qkv": _dense(qkv_key, width, 3 * width),
            "attention_out": _dense(attention_key, width, width),
        }
        if feed_forward is not None:
            return params | {"experts": feed_forward.init(in_key, width)}
        return params | {
            "mlp_in": _dense(in_key, width, 4 * width),
            "mlp_out": _dense(out_key, 4 * width, width),
        }

    def split_fn(params: Tree) -> Parts:
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
        blocks["qkv"] = jax.tree.map(lambda x: x.reshape(*x.shape[:-1], 3, width), blocks["qkv"])
        enter, leave = ({name: params[name] for name in part} for part in (("embed", "positions"), ("norm", "out")))
        return Parts(enter, blocks, leave)

    def join_fn(parts: Parts) -> Tree:
        qkv = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], 3 * width), parts.blocks["qkv"])
        blocks = parts.blocks | {"qkv": qkv}
        each = {name: jax.tree.map(lambda x, i=i: x[i], blocks) for i, name in enumerate(names)}
        return {**parts.enter, **each, **parts.leave}

    def check_fn(sizes: dict[str, int]) -> None:
        divides(where, sizes, "tensor", heads=heads)
        divides(where, sizes, "tensor", vocabulary_size=vocabulary_size)
        if feed_forward is not None:
            feed_forward.check(sizes)

    def functions_fn(axes: Axes) -> Functions:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if axes.sequence is not None:
                return sequence_attention(q, k, v, axes.sequence)
            return _attention(q, k, v) if attention is None else attention(q, k, v)

        def enter(params: Tree, batch: Tree) -> Tree:
            x = batch["x"]
            _check_tokens(x, context, axes, layout)
            positions = _own_positions(params["positions"], x.shape[1], axes.sequence).astype(compute_dtype)
            table = params["embed"]["embedding"]
            h = tensor.embedding(x, table, axes.tensor, layout=layout, dtype=compute_dtype)
            h = h + layout.part(positions, axes.tensor)[None]
            return h if feed_forward is None else {"h": h, "balance": jnp.zeros(x.shape[0], jnp.float32)}

        def attention_branch(params: Tree, h: jax.Array) -> jax.Array:
            h = tensor.layer_norm(h, params["norm_attention"], axes.tensor, layout=layout)
            kernel, bias = params["qkv"]["kernel"].reshape(width, -1), params["qkv"]["bias"].reshape(-1)
            qkv = tensor.column_dense(h, kernel, bias, axes.tensor, layout=layout)
            q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, -1, width // heads), 2, 0)
            attended = attend(q, k, v).reshape(*qkv.shape[:2], -1)
            return tensor.row_dense(attended, **params["attention_out"], axis_name=axes.tensor, layout=layout)

        def mlp_branch(params: Tree, h: jax.Array) -> jax.Array:
            h = tensor.layer_norm(h, params["norm_mlp"], axes.tensor, layout=layout)
            h = tensor.column_dense(h, **params["mlp_in"], axis_name=axes.tensor, layout=layout)
            return tensor.row_dense(jax.nn.gelu(h), **params["mlp_out"], axis_name=axes.tensor, layout=layout)

        def experts_branch(params: Tree, h: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = tensor.layer_norm(h, params["norm_mlp"], axes.tensor, layout=layout)
            out, balance = feed_forward.apply(params["experts"], layout.whole(h, axes.tensor), axes)
            return layout.part(out, axes.tensor), balance

        def block(params: Tree, h: Tree) -> Tree:
            if feed_forward is None:
                h = h + attention_branch(params, h)
                return h + mlp_branch(params, h)
            x = h["h"] + attention_branch(params, h["h"])
            out, balance = experts_branch(params, x)
            return {"h": x + out.astype(x.dtype), "balance": h["balance"] + balance}

        def leave(params: Tree, h: Tree, batch: Tree) -> jax.Array:
            _check_labels(batch)
            x, balance = (h, 0.0) if feed_forward is None else (h["h"], h["balance"])
            x = tensor.layer_norm(x, params["norm"], axes.tensor, layout=layout)
            logits = tensor.column_dense(x, **params["out"], axis_name=axes.tensor, layout=layout, dtype=jnp.float32)
            nll = tensor.cross_entropy(logits, batch["y"], axes.tensor)
            valid = (batch["y"].astype(jnp.int32) != -1).astype(jnp.float32)
            total, count = (conjugate.summed(jnp.sum(z, axis=1), axes.sequence) for z in (nll, valid))
            return total / jnp.maximum(count, 1.0) + balance

        return Functions(enter, block, leave)

    block_specs = {"norm_attention": _NORM, "norm_mlp": _NORM, "qkv": _QKV, "attention_out": _ROW}
    if feed_forward is None:
        block_specs |= {"mlp_in": _COLUMN, "mlp_out": _ROW}
    else:
        block_specs |= {"experts": feed_forward.specs}
    specs = Parts(
        enter={"embed": {"embedding": PartitionSpec("tensor", None)}, "positions": _EVERYWHERE},
        blocks=block_specs,
        leave={"norm": _NORM, "out": _COLUMN},
    )
    return Layered(init_fn, split_fn, join_fn, specs, functions_fn, check_fn, layers, Axes._fields)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _is_float(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # no dtype at all
        return False


def _norm(width: int) -> Tree:
    return {"scale": jnp.ones(width, jnp.float32), "bias": jnp.zeros(width, jnp.float32)}


def _dense(key: jax.Array, inputs: int, outputs: int) -> Tree:
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}


def _own_positions(positions: jax.Array, length: int, axis_name: str | None) -> jax.Array:
    """The rows of this device's tokens."""
    if axis_name is None:
        return positions[:length]
    return lax.dynamic_slice_in_dim(positions, lax.axis_index(axis_name) * length, length)


def _check_tokens(x: jax.Array, context: int, axes: Axes, layout: tensor.Layout) -> None:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"transformer(x of shape {x.shape} and dtype {x.dtype}): tokens must be integers [B, T].")
    s, t = conjugate.size(axes.sequence), conjugate.size(axes.tensor)
    if x.shape[1] * s > context:
        raise ValueError(
            f"transformer(context={context}): the sequence has {x.shape[1] * s} tokens, at most {context} have a "
            "position; cut the sequence or build the model with a longer context."
        )
    if layout is not tensor.WHOLE and x.shape[1] % t:
        raise ValueError(
            f"transformer(sequence_parallel=True): the mesh's axis {axes.tensor!r} has {t} devices, which must divide "
            f"the {x.shape[1]} tokens of a device; take sequences of a multiple of {s * t}."
        )


def _check_labels(batch: Tree) -> None:
    x, y = batch["x"], batch["y"]
    if y.shape != x.shape or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"transformer(y of shape {y.shape} and dtype {y.dtype}): labels must be integers of the tokens' shape "
            f"{x.shape}; give one a token, and -1 where there is none."
        )
