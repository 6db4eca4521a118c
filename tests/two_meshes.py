"""One of two processes that restore what one saved, and save it again.

python -m jfed.launch -n 2 --devices-per-process 4 two_meshes.py FOLDER
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jfed import checkpoint, mesh
from jfed.parallel.cohort import specs_like

SPECS = {"w": P("x", "y"), "half": P("y"), "edges": P(("x", "y")), "whole": P()}
LARGE = (8192, 4096)  # 134 MB


def values():
    """Params, an optimizer's state after a step, and keys, made in numpy alike everywhere."""
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(16, 24)).astype(np.float32),
        "half": rng.normal(size=(8, 3)).astype(jnp.bfloat16),
        "edges": np.array([-0.0, np.nan, np.inf, 1e-45] + [-0.0] * 12, np.float32),
        "whole": rng.normal(size=5).astype(np.float32),
    }
    optimizer = optax.adamw(1e-3)
    opt = optimizer.update(jax.tree.map(lambda p: p * 2, params), optimizer.init(params), params)[1]
    return {"params": params, "opt": opt, "keys": jax.random.split(jax.random.key(3), 8), "step": jnp.int32(7)}


def shapes(devices):
    """What to restore them as on a mesh with axes x and y."""
    tree = jax.eval_shape(values)
    specs = specs_like(tree, tree["params"], SPECS) | {"keys": P("y")}
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices, spec)), tree, specs
    )


def placed(devices):
    """The values on a mesh with axes x and y."""

    def one(x, like):
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(x))
            words = jax.make_array_from_callback(words.shape, like.sharding, lambda index: words[index])
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

    return jax.tree.map(one, values(), shapes(devices))


def same_parts(restored, devices):
    """Whether what this process holds of a tree are the bits of the values, laid out as asked."""

    def words(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return [(shard.index, np.asarray(shard.data).tobytes()) for shard in x.addressable_shards]

    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(placed(devices)), strict=True)
    return all(words(a) == words(b) and a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)


def large(devices, spec):
    sharding = NamedSharding(devices, spec)
    rows = np.arange(LARGE[1], dtype=np.float32)[None]

    def part(index):
        first, last, _ = index[0].indices(LARGE[0])
        return np.arange(first, last, dtype=np.float32)[:, None] + rows[:, index[1]]

    return jax.make_array_from_callback(LARGE, sharding, part)


def peak():
    """The most memory this process has had, in bytes."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main(folder):
    devices = mesh.make((2, 4), ("x", "y"))
    step, tree = checkpoint.restore(folder / "small", shapes(devices))
    assert same_parts(tree, devices)
    checkpoint.save(folder / "small", step + 1, tree)

    before = peak()
    _, tree = checkpoint.restore(
        folder / "large", jax.ShapeDtypeStruct(LARGE, jnp.float32, sharding=NamedSharding(devices, P("x", "y")))
    )
    grew = peak() - before
    assert all((shard.data[0, 0] == shard.index[0].start + shard.index[1].start) for shard in tree.addressable_shards)
    (folder / f"grew_{jax.process_index()}").write_text(str(grew))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
