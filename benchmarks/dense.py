"""Time of a dense layer's SGD update by the kernel's gradient as a product, and as `models.linear` computes it.

Claim: with 16 rows a batch or fewer, `models.linear`'s update of a kernel takes less time than that by a product.

A step of a compiled loop is the backward pass and the update of one layer whose input needs no gradient; the kernel
is carried from step to step. With more rows the two are the same program.

Command: python benchmarks/dense.py
"""

import statistics
import time

import jax
import jax.numpy as jnp

from jfed import models, report

SHAPES = ((784, 200), (200, 200), (12544, 128))  # the 2NN's first two layers, the dense layer of pfl-research's CNN
ROWS = (4, 10, 16, 20)
STEPS, REPEATS = 50, 9


def program_of(product, rows: int, shape: tuple[int, int]):
    """A compiled call of `STEPS` updates."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((rows, shape[0]), shape, (rows, shape[1]))
    x, kernel, slope = (0.05 * jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))

    def step(_, loop):
        kernel, x, slope = loop
        gradient = jax.grad(lambda k: jnp.vdot(product(x, k), slope))(kernel)
        kernel = kernel - 0.01 * gradient
        # The batch depends on the step, as it would, so that nothing leaves the loop.
        return kernel, x.at[0, 0].add(1e-6 * kernel[0, 0]), slope.at[0, 0].add(1e-6 * kernel[0, 0])

    loop = jax.jit(lambda kernel: jax.lax.fori_loop(0, STEPS, step, (kernel, x, slope)))
    return lambda: jax.block_until_ready(loop(kernel))


def main() -> None:
    """Times all in turn, several times over, and prints medians."""
    rows = []
    for shape in SHAPES:
        for batch in ROWS:
            kinds = {"x @ kernel": jnp.matmul, "models.linear": models.linear}
            programs = {kind: program_of(product, batch, shape) for kind, product in kinds.items()}
            times = {kind: [] for kind in programs}
            for repeat in range(REPEATS + 1):
                for kind, run in programs.items():
                    began = time.perf_counter()
                    run()
                    if repeat:  # the first compiles
                        times[kind].append((time.perf_counter() - began) / STEPS)
            median = {kind: statistics.median(values) for kind, values in times.items()}
            rows.append(
                {"kernel": f"{shape[0]} x {shape[1]}", "rows": str(batch)}
                | {kind: f"{1e6 * value:.0f} us" for kind, value in median.items()}
                | {"linear / product": f"{median['models.linear'] / median['x @ kernel']:.2f}"}
            )
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, median of {REPEATS}")
    print(report.table("Update of a kernel", rows))


if __name__ == "__main__":
    main()
