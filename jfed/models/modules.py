"""The flax NNX modules behind the zoo; import this file only where NNX is wanted, it is slow to import.

B images of height H, width W and C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jfed.models import conv
from jfed.models.pool import max_pool


class Conv(nnx.Module):
    """`jfed.models.conv.conv2d` with a bias, under the parameter names and initialisers of `nnx.Conv`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | tuple[int, int],
        *,
        strides: int | tuple[int, int] = 1,
        padding: conv.Padding = "SAME",
        rngs: nnx.Rngs,
    ):
        """Makes `kernel` [h, w, in, out] (LeCun normal) and `bias` [out] (zero)."""
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.strides, self.padding = strides, padding
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*sides, in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H', W', out]."""
        y = conv.conv2d(x, self.kernel[...], strides=self.strides, padding=self.padding)
        return y + self.bias[...].reshape(1, 1, 1, -1)


class MLP(nnx.Module):
    """Dense layers with ReLU between them; the input is flattened."""

    def __init__(self, *sizes: int, rngs: nnx.Rngs):
        """`sizes` are the widths from input to output."""
        # Attributes, not a list: flax 0.11 has no nnx.List and flax 0.12 takes no plain one.
        self.depth = len(sizes) - 1
        for i in range(self.depth):
            setattr(self, f"dense_{i}", nnx.Linear(sizes[i], sizes[i + 1], rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [B, sizes[-1]]."""
        x = x.reshape(x.shape[0], -1)
        for i in range(self.depth):
            x = getattr(self, f"dense_{i}")(x if i == 0 else nnx.relu(x))
        return x


class ConvNet(nnx.Module):
    """Blocks of conv 5x5, optional GroupNorm, ReLU and 2x2 max pool, then an `MLP`."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: tuple[int, ...],
        hidden: tuple[int, ...],
        num_classes: int,
        *,
        groups: int | None,
        rngs: nnx.Rngs,
    ):
        """`channels` and `hidden` are the widths of the blocks and of the hidden dense layers."""
        height, width, features = image_shape
        self.blocks, self.normalised = len(channels), groups is not None
        for i, out in enumerate(channels):
            setattr(self, f"conv_{i}", Conv(features, out, 5, rngs=rngs))
            if groups is not None:
                setattr(self, f"norm_{i}", nnx.GroupNorm(out, num_groups=groups, rngs=rngs))
            height, width, features = height // 2, width // 2, out
        self.mlp = MLP(height * width * features, *hidden, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, classes]."""
        for i in range(self.blocks):
            x = getattr(self, f"conv_{i}")(x)
            if self.normalised:
                x = getattr(self, f"norm_{i}")(x)
            # max and relu commute: pooling first leaves relu a quarter of the values.
            x = nnx.relu(max_pool(x))
        return self.mlp(x)
