"""Training speed of the kit's convolution, inside a compiled loop, against the lowerings it could have had.

Asked: which lowering trains the two usual CNNs fastest on a CPU, with one client or many at once. "kit" is
`models.conv2d`; "XLA" is `lax.conv_general_dilated` with the gradients JAX derives, grouped as soon as there are
several clients; "patches" is a concatenation of shifted images and one matrix product, batched over clients.
Share: useful operations (forward and weight gradients of every layer, input gradients of all but the first) a
second, over those of a 1024 x 1024 float32 matrix product, both by CPU time, least of several turns.

Command: taskset -c 0 python benchmarks/convolutions.py
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jfed import models, report

BATCH, STEPS, SECONDS = 10, 2, 1.5
WIDTHS = (1, 2, 4, 8, 16, 32, 64)


class Layer(NamedTuple):
    """A convolution [side, side, inputs] -> [out, out, outputs] and whether a pool follows."""

    side: int
    size: int
    inputs: int
    outputs: int
    padding: str
    pool: bool

    @property
    def operations(self) -> int:
        """Operations of one of its three products, for one example."""
        out = self.side - (0 if self.padding == "SAME" else self.size - 1)
        return 2 * out**2 * self.size**2 * self.inputs * self.outputs


class Net(NamedTuple):
    """Convolutions, then dense layers of these widths."""

    layers: tuple[Layer, ...]
    dense: tuple[int, ...]


NETS = {
    "CIFAR CNN (conv3-32, conv3-64, 128)": Net(
        (Layer(32, 3, 3, 32, "VALID", False), Layer(30, 3, 32, 64, "VALID", True)), (12544, 128, 10)
    ),
    "FedAvg CNN (conv5-32, conv5-64, 512)": Net(
        (Layer(28, 5, 1, 32, "SAME", True), Layer(14, 5, 32, 64, "SAME", True)), (3136, 512, 10)
    ),
}


def xla(x: jax.Array, kernel: jax.Array, *, padding: str) -> jax.Array:
    """JAX's convolution."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def patches(x: jax.Array, kernel: jax.Array, *, padding: str) -> jax.Array:
    """A convolution as one matrix product."""
    h, w, _, outputs = kernel.shape
    if padding == "SAME":
        x = jnp.pad(x, ((0, 0), (h // 2, h // 2), (w // 2, w // 2), (0, 0)))
    high, wide = x.shape[1] - h + 1, x.shape[2] - w + 1
    seen = jnp.concatenate([x[:, i : i + high, j : j + wide] for i in range(h) for j in range(w)], axis=3)
    return seen @ kernel.reshape(-1, outputs)


LOWERINGS = {"kit": models.conv2d, "XLA": xla, "patches": patches}


def best(runs: dict[str, Callable]) -> dict[str, float]:
    """Least CPU seconds of each, in turns, so that what disturbs one disturbs all."""
    for run in runs.values():
        jax.block_until_ready(run())
    times, began = {name: [] for name in runs}, time.perf_counter()
    while len(times["square"]) < 3 or time.perf_counter() - began < SECONDS:
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            times[name].append(time.process_time() - start)
    return {name: min(values) for name, values in times.items()}


def square() -> tuple[Callable, float]:
    """A matrix product to measure by, and its operations."""
    a = jax.random.normal(jax.random.key(0), (1024, 1024))
    program = jax.jit(lambda a: a @ a)
    return lambda: program(a), 2.0 * 1024**3


def layer_run(layer: Layer, conv: Callable) -> Callable:
    """Value and both gradients of one layer, in a loop that carries what they compute."""
    x = jax.random.normal(jax.random.key(1), (BATCH, layer.side, layer.side, layer.inputs))
    kernel = jax.random.normal(jax.random.key(2), (layer.size, layer.size, layer.inputs, layer.outputs)) * 0.1

    def step(_, pair):
        y, back = jax.vjp(lambda x, k: conv(x, k, padding=layer.padding), *pair)
        return jax.tree.map(lambda p, g: p - 1e-4 * g, pair, back(y))

    program = jax.jit(lambda pair: jax.lax.fori_loop(0, STEPS, step, pair))
    return lambda: program((x, kernel))


def net_run(net: Net, conv: Callable, width: int) -> Callable:
    """Steps of SGD for `width` clients at once, each with parameters of its own."""

    def init(key):
        keys = iter(jax.random.split(key, 8))
        kernels = [
            jax.random.normal(next(keys), (c.size, c.size, c.inputs, c.outputs)) / (c.size * c.inputs**0.5)
            for c in net.layers
        ]
        dense = [
            jax.random.normal(next(keys), pair) / pair[0] ** 0.5 for pair in zip(net.dense, net.dense[1:], strict=False)
        ]
        return [(k, jnp.zeros(k.shape[-1])) for k in kernels], [(d, jnp.zeros(d.shape[1])) for d in dense]

    def loss(params, x, y):
        for layer, (kernel, bias) in zip(net.layers, params[0], strict=True):
            x = conv(x, kernel, padding=layer.padding) + bias
            x = jax.nn.relu(models.max_pool(x) if layer.pool else x)
        x = x.reshape(BATCH, -1)
        for i, (kernel, bias) in enumerate(params[1]):
            x = (jax.nn.relu(x) if i else x) @ kernel + bias
        return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean()

    first = net.layers[0]
    x = jax.random.normal(jax.random.key(1), (STEPS, width, BATCH, first.side, first.side, first.inputs))
    y = jax.random.randint(jax.random.key(2), (STEPS, width, BATCH), 0, 10)

    def train(params, x, y):
        def step(t, params):
            gradient = jax.grad(loss)
            if width == 1:
                return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient(params, x[t, 0], y[t, 0]))
            return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.vmap(gradient)(params, x[t], y[t]))

        return jax.lax.fori_loop(0, STEPS, step, params)

    params = init(jax.random.key(0)) if width == 1 else jax.vmap(init)(jax.random.split(jax.random.key(0), width))
    program = jax.jit(train)
    return lambda: program(params, x, y)


def net_operations(net: Net) -> int:
    """Useful operations for one example."""
    convolutions = sum(layer.operations * (3 if i else 2) for i, layer in enumerate(net.layers))
    return convolutions + sum(3 * 2 * a * b for a, b in zip(net.dense, net.dense[1:], strict=False))


def rows_of(names: dict, times: dict, examples: int, operations: float, square_operations: float) -> dict:
    """Examples a second and share of the square product, for each lowering measured."""
    square_speed = square_operations / times["square"]
    return {
        name: f"{examples / times[name]:,.0f}/s {operations * examples / times[name] / square_speed:.0%}"
        for name in names
        if name in times
    }


def main() -> None:
    """Prints a table of layers and a table of whole nets at every width."""
    reference, square_operations = square()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; batch {BATCH}, {STEPS} steps a run")
    rows = []
    for name, net in NETS.items():
        for layer in net.layers:
            runs = {lowering: layer_run(layer, conv) for lowering, conv in LOWERINGS.items()} | {"square": reference}
            counts = rows_of(LOWERINGS, best(runs), BATCH * STEPS, 3 * layer.operations, square_operations)
            label = f"{layer.size}x{layer.size} {layer.inputs}-{layer.outputs} on {layer.side}x{layer.side}"
            rows.append({"net": name.split(" (")[0], "layer": label} | counts)
    print(report.table("One layer: value and both gradients, one client; examples/s and share", rows))
    rows = []
    with report.progress(len(NETS) * len(WIDTHS), "clients at once", unit="rows") as advance:
        for name, net in NETS.items():
            measured = dict(LOWERINGS)
            for width in WIDTHS:
                runs = {n: net_run(net, conv, width) for n, conv in measured.items()} | {"square": reference}
                times = best(runs)
                counts = rows_of(LOWERINGS, times, BATCH * STEPS * width, net_operations(net), square_operations)
                rows.append(
                    {"net": name.split(" (")[0], "clients at once": str(width)} | {n: "-" for n in LOWERINGS} | counts
                )
                # One three times slower than the best is not followed to more clients, to keep the run short.
                fastest = min(times[n] for n in measured)
                measured = {n: conv for n, conv in measured.items() if n == "kit" or times[n] < 3 * fastest}
                advance()
    print(report.table("A step of SGD, a kernel per client; examples/s and share", rows))


if __name__ == "__main__":
    main()
