"""Every all-reduce of the kit: a new one joins the batteries by one row.

As a script, one of two processes of two devices that run them all, started by `together`.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jfed import collectives, mesh

ALL = {
    "one shot": collectives.one_shot_all_reduce,
    "two shots": collectives.two_shot_all_reduce,
    "parameter server": collectives.parameter_server_all_reduce,
    "two servers": collectives.sharded_servers_all_reduce,
    "ring": collectives.ring_all_reduce,
    "bidirectional ring": collectives.bidirectional_ring_all_reduce,
    "halving and doubling": collectives.halving_doubling_all_reduce,
    "doubling": collectives.doubling_all_reduce,
    "tree": collectives.tree_all_reduce,
    "hierarchical": collectives.hierarchical_all_reduce,
    "torus": collectives.torus_all_reduce,
}


def options_for(name, n):
    """The all-reduce, with options that are not the default where it has any."""
    if name == "two servers" and n > 3:
        return functools.partial(ALL[name], servers=n - 1)
    if name == "hierarchical":
        return functools.partial(ALL[name], group={8: 2, 6: 2, 4: 4}.get(n, n))
    if name == "torus" and n == 8:
        return functools.partial(ALL[name], rows=4)
    return ALL[name]


def trees(n, seed=0):
    """For each of n devices a tree of odd sizes, small ones, none, and dtypes of all sorts."""
    draw = np.random.default_rng(seed)

    def floats(*shape):
        return jnp.asarray(draw.normal(size=(n, *shape)), jnp.float32)

    return {
        "matrix": floats(17, 5),
        "one": floats(),
        "none": floats(0, 3),
        "half": floats(9).astype(jnp.bfloat16),
        "int": jnp.asarray(draw.integers(-(2**31), 2**31, (n, 3)), jnp.int32),
        "words": jnp.asarray(draw.integers(0, 2**32, (n, 4)), jnp.uint32),
        "flags": jnp.asarray(draw.integers(0, 2, (n, 2)), bool),
        "bytes": jnp.asarray(draw.integers(-100, 100, (n, 5)), jnp.int8),
        "complex": floats(2) + 1j * floats(2),
    }


def on_devices(f, n, *, check_vma=False):
    """The function of one device, on n."""

    def local(x):
        return jax.tree.map(lambda y: y[None], f(jax.tree.map(lambda y: y[0], x)))

    spec = PartitionSpec("devices")
    devices = mesh.make((n,), ("devices",))
    return jax.jit(jax.shard_map(local, mesh=devices, in_specs=spec, out_specs=spec, check_vma=check_vma))


def in_one(f):
    """The function of one device, on all in one."""
    return jax.jit(jax.vmap(f, axis_name="devices"))


def main(path):
    sharding = NamedSharding(mesh.make((4,), ("devices",)), PartitionSpec("devices"))
    place = {k: jax.make_array_from_callback(v.shape, sharding, lambda i, v=v: v[i]) for k, v in trees(4).items()}
    # One after another: in one program of them all, read from the cache, processes may wait for each other for ever.
    sums = {}
    for name in ALL:
        f = on_devices(lambda x, name=name: options_for(name, 4)(x, "devices"), 4)
        sums[name] = jax.block_until_ready(f(place))
    if jax.process_index() == 0:
        np.savez(
            path,
            **{
                f"{name} {leaf}": np.asarray(
                    x.addressable_data(0).astype(jnp.float32) if leaf == "half" else x.addressable_data(0)
                )
                for name, found in sums.items()
                for leaf, x in found.items()
            },
        )


if __name__ == "__main__":
    main(sys.argv[1])
