"""The four models in plain JAX, as one would write them by hand.

Letters: B batch size, T time steps, H units.
"""

import jax
import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def losses_of(task: str, pooling: str, *, canonical: bool = False):
    """`losses(params, x, y) -> [B]`, the cross-entropy of each example; `y` may hold -1 where there is none."""
    conv = canonical_conv if canonical else plain_conv
    pool = reshaped_pool if pooling == "reshape" else window_pool
    forward = {"2nn": two_nn, "logreg": logreg, "lstm": lstm, "cnn": lambda p, x: cnn(p, x, conv, pool)}[task]

    def losses(params, x, y):
        log_p = jax.nn.log_softmax(forward(params, x))
        picked = jnp.take_along_axis(log_p, jnp.maximum(y, 0)[..., None], -1)[..., 0]
        if y.ndim == 1:
            return -picked
        valid = y >= 0
        return -jnp.sum(jnp.where(valid, picked, 0.0), -1) / jnp.maximum(jnp.sum(valid, -1), 1)

    return losses


def dense(p, name, x):
    """A dense layer."""
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def logreg(p, x):
    """Logistic regression."""
    return dense(p, "dense_0", x)


def two_nn(p, x):
    """784-200-200-10."""
    return dense(p, "dense_2", jax.nn.relu(dense(p, "dense_1", jax.nn.relu(dense(p, "dense_0", x)))))


def cnn(p, x, conv, pool):
    """Two convolutions, one pooling, two dense layers."""
    x = jax.nn.relu(conv(x, p["conv_0/kernel"]) + p["conv_0/bias"])
    x = pool(jax.nn.relu(conv(x, p["conv_1/kernel"]) + p["conv_1/bias"]))
    return dense(p, "dense_1", jax.nn.relu(dense(p, "dense_0", x.reshape(x.shape[0], -1))))


def lstm(p, x):
    """[B, T] characters to logits [B, T, V]; the inputs' product is one matmul before the loop."""
    u = p["embed/embedding"][x.T] @ p["layer_0/input"] + p["layer_0/bias"]
    w = p["layer_0/recurrent"]

    def step(state, u_t):
        h, c = state
        i, f, g, o = jnp.split(u_t + h @ w, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[0], w.shape[0]))
    return jnp.swapaxes(dense(p, "out", lax.scan(step, (zeros, zeros), u)[1]), 0, 1)


def window_pool(x):
    """2 x 2 maximum by `reduce_window`."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def reshaped_pool(x):
    """2 x 2 maximum over axes made by a reshape."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def plain_conv(x, kernel):
    """3 x 3, VALID."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=DIMENSIONS)


@jax.custom_vjp
def canonical_conv(x, kernel):
    """3 x 3, VALID; its gradients too are convolutions of NHWC by HWIO, the ones XLA:CPU is fast at in a loop."""
    return plain_conv(x, kernel)


def _forward(x, kernel):
    return plain_conv(x, kernel), (x, kernel)


def _backward(residuals, dy):
    x, kernel = residuals
    turned = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
    dx = lax.conv_general_dilated(dy, turned, (1, 1), ((2, 2), (2, 2)), dimension_numbers=DIMENSIONS)
    dk = plain_conv(jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(dy, (1, 2, 0, 3)))
    return dx, jnp.transpose(dk, (1, 2, 0, 3))


canonical_conv.defvjp(_forward, _backward)
