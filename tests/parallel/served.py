"""What server and workers of the tests share: python served.py worker PORT NUMBER, ... server PORT ROUNDS."""

import sys
import time

import jax
import jax.numpy as jnp
import optax
from jax.experimental import io_callback

from jfed.parallel.asynchronous import random_batch
from jfed.parallel.parameter_server import serve, work

AUTHKEY = b"of the tests"
KEY = jax.random.key(3)
BATCH = random_batch(8)


def examples():
    x = jax.random.normal(jax.random.key(0), (200, 10))
    return {"x": x, "y": x @ jax.random.normal(jax.random.key(1), (10,)) / 3}


def params(width=16):
    draw = jax.random.normal
    return {"in": draw(jax.random.key(2), (10, width)) / 3, "out": draw(jax.random.key(4), (width,)) / 4}


def loss(params, batch, key):
    return (jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2


def slowly(seconds):
    """The same batches, one in at least so many seconds."""

    def batch(examples, key, worker):
        io_callback(lambda: time.sleep(seconds), None)
        return BATCH(examples, key, worker)

    return batch


if __name__ == "__main__":
    place = {"address": ("127.0.0.1", int(sys.argv[2])), "authkey": AUTHKEY}
    if sys.argv[1] in ("worker", "slow"):
        batch = BATCH if sys.argv[1] == "worker" else slowly(0.005)
        print(work(loss, params(), examples(), batch=batch, worker=int(sys.argv[3]), **place))
    else:

        def report(t, row, params):
            if t == 10:
                print("busy", flush=True)

        serve(optax.sgd(0.1), params(), workers=1, rounds=int(sys.argv[3]), key=KEY, report=report, **place)
