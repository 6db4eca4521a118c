"""Useful FLOP/s of a round, beside what the machine's matrix products give.

Claim: a round of the 2NN, and of pfl-research's CIFAR-10 CNN, does its useful arithmetic at 60 % or more
of the FLOP/s of a large square product measured in the same run.

Useful are the multiplications and additions of matrix products and convolutions, 2 each, that a
client's training cannot do without: forward and weight gradient of every layer, input gradient of all
but the first. For every model and batch size, alternately and several times over:

    square     a product of two 1024 x 1024 matrices on every device at once
    products   the layers' own products at the round's shapes, and nothing else
    one model  a plain jitted loop training one model, batches in stored order, the round's total batch
    round      a whole round of the kit: sampling excluded, shuffling, gathering, aggregation included

The rest of a round is what lies between: activations, loss and update (one model), the kit's
schedule, shuffle, gather and aggregation (round).

Command: python benchmarks/roofline.py
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jfed import algorithms, clients, core, data, local, mesh, models, report


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    repeats: int = 7  # of every measurement
    cohort: int = 50  # clients a round
    lanes: int = 1  # on each device
    devices: int | None = None  # CPU devices; by default one a core
    models: tuple[str, ...] = ("2NN", "CNN")
    smoke: bool = False  # tiny, to see that it works


def pfl_cnn() -> models.Model:
    """The CNN of pfl-research's CIFAR-10 benchmark, without dropout: 1.63 M parameters."""
    shapes = {"conv_0": (3, 3, 3, 32), "conv_1": (3, 3, 32, 64), "dense_0": (12544, 128), "dense_1": (128, 10)}

    def init(key):
        params = {}
        for (name, shape), k in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
            bound = np.sqrt(6 / (np.prod(shape[:-1]) + shape[-1]))
            kernel = jax.random.uniform(k, shape, minval=-bound, maxval=bound)
            params[name] = {"kernel": kernel, "bias": jnp.zeros(shape[-1])}
        return params

    def apply(params, x):
        for name in ("conv_0", "conv_1"):
            y = models.conv2d(x, params[name]["kernel"], padding="VALID")
            x = y + params[name]["bias"].reshape(1, 1, 1, -1)
            x = jax.nn.relu(x) if name == "conv_0" else x
        x = jax.nn.relu(models.max_pool(x)).reshape(x.shape[0], -1)
        x = jax.nn.relu(models.linear(x, params["dense_0"]["kernel"]) + params["dense_0"]["bias"][None])
        return models.linear(x, params["dense_1"]["kernel"]) + params["dense_1"]["bias"][None]

    return models.from_pair(init, apply)


# (positions an image, inputs, outputs) of each layer, as matrix products
TASKS = {
    "2NN": (models.two_nn, (784,), [(1, 784, 200), (1, 200, 200), (1, 200, 10)]),
    "CNN": (pfl_cnn, (32, 32, 3), [(900, 27, 32), (784, 288, 64), (1, 12544, 128), (1, 128, 10)]),
}


def flops(layers: list[tuple[int, int, int]]) -> int:
    """Useful FLOPs of one example in training."""
    return sum(2 * p * i * o * (3 if n else 2) for n, (p, i, o) in enumerate(layers))


def on_every_device(devices, work):
    """A compiled call of `work(i)` on each device at once, i its number."""

    @mesh.shard_map(
        mesh=devices, in_specs=(jax.sharding.PartitionSpec("clients"),), out_specs=jax.sharding.PartitionSpec("clients")
    )
    def each(number):
        return jnp.reshape(work(number[0]), (1,))

    program = jax.jit(each)
    numbers = jnp.arange(devices.shape["clients"], dtype=jnp.float32)
    return lambda: program(numbers)


def square(devices, n: int):
    """Two n x n matrices multiplied, a few times over."""

    def work(number):
        a = jax.random.normal(jax.random.key(0), (n, n)) + number
        return jax.lax.fori_loop(0, 8, lambda _, x: (a @ x) * (1 / n), a)[0, 0]

    return on_every_device(devices, work), 8 * 2 * n**3 * devices.shape["clients"]


def products(devices, layers, batch: int, steps: int):
    """The layers' products: y = x w, dw = x' dy, dx = dy w', at the shapes of a local step."""

    def work(number):
        def arrays(place):
            p, i, o = place
            make = np.random.default_rng(0).standard_normal
            shapes = (batch * p, i), (i, o), (batch * p, o)
            return [jnp.asarray(make(shape), jnp.float32) * 0.01 for shape in shapes]

        def step(_, loop):
            # Behind the barrier operands may have changed, so that no product leaves the loop.
            operands, total = jax.lax.optimization_barrier(loop)
            for n, (x, w, dy) in enumerate(operands):
                dw = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))
                out = (x @ w, dw) + ((dy @ w.T,) if n else ())
                total += sum(jax.lax.optimization_barrier(y)[0, 0] for y in out)
            return operands, total

        return jax.lax.fori_loop(0, steps, step, ([arrays(place) for place in layers], number))[1]

    return on_every_device(devices, work), steps * batch * flops(layers) * devices.shape["clients"]


def one_model(model, layers, examples, batch: int, steps: int):
    """A plain loop of SGD on one model."""
    loss = models.cross_entropy(model)

    @jax.jit
    def train(params, examples):
        def step(t, params):
            rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, t * batch, batch), examples)
            gradient = jax.grad(lambda p: jnp.mean(loss(p, rows, None)))(params)
            return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

        return jax.lax.fori_loop(0, steps, step, params)

    params = model.init(jax.random.key(0))
    return (lambda: train(params, examples)), steps * batch * flops(layers)


def whole_round(devices, model, layers, examples, size: int, config: Config, batch: int):
    """A round of the kit, state and data on the devices."""
    population = data.population(examples, [size] * config.cohort)
    work = local.sgd(models.cross_entropy(model), optax.sgd(0.05), batch_size=batch)
    method = algorithms.fedavg(work, client_map=clients.sharded(devices, clients.lanes(config.lanes)))
    state = method.init(model.init(jax.random.key(0)))
    cohort = core.make_cohort(population, jnp.arange(config.cohort), steps=work.steps)
    state, cohort, key = mesh.replicate((state, cohort, jax.random.key(1)), devices)
    program = jax.jit(method.round)
    return (lambda: program(state, cohort, key)), config.cohort * size * flops(layers)


def measure(config: Config, name: str, batch: int) -> dict:
    """One row of the table."""
    make, shape, layers = TASKS[name]
    devices, model = mesh.make(), make()
    count = devices.shape["clients"]
    size = (10 if name == "2NN" else 5) * batch
    rng = np.random.default_rng(0)
    rows = config.cohort * size
    examples = {
        "x": rng.standard_normal((rows, *shape)).astype(np.float32),
        "y": rng.integers(0, 10, rows).astype(np.int32),
    }
    total = batch * config.lanes * count
    runs = {
        "square": square(devices, 256 if config.smoke else 1024),
        "products": products(devices, layers, batch, 2 if config.smoke else 20),
        "one model": one_model(model, layers, jax.tree.map(jnp.asarray, examples), total, rows // total),
        "round": whole_round(devices, model, layers, examples, size, config, batch),
    }
    seconds = {name: [] for name in runs}
    for call, _ in runs.values():
        jax.block_until_ready(call())
    for _ in range(config.repeats):
        for what, (call, _) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[what].append(time.perf_counter() - began)
    rate = {what: runs[what][1] / np.array(taken) / 1e9 for what, taken in seconds.items()}
    # Shares are medians of the ratios within one repeat, so that a machine that drifts does not matter.
    share = {what: statistics.median(rate[what] / rate["square"]) for what in rate}
    per_client = {what: statistics.median(seconds[what]) for what in ("one model", "round")}
    return (
        {"model": name, "batch": batch}
        | {f"{what}, GFLOP/s": f"{statistics.median(values):.0f}" for what, values in rate.items()}
        | {f"{what} / square": f"{share[what]:.2f}" for what in ("products", "one model", "round")}
        | {"a round": report.human_seconds(per_client["round"])}
    )


def main(config: Config) -> None:
    """Measures every model and prints the table."""
    mesh.use_cores(config.devices)
    cells = [("2NN", 10), ("2NN", 20), ("2NN", 50), ("CNN", 10), ("CNN", 20)]
    cells = [cell for cell in cells if cell[0] in config.models]
    if config.smoke:
        config, cells = dataclasses.replace(config, cohort=4, repeats=2), [("2NN", 10)]
    rows = [measure(config, *cell) for cell in cells]
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}, {config}")
    print(report.table("Useful FLOP/s of a round", rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
