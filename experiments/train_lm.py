"""A decoder-only transformer on Shakespeare's characters, trained over any mesh by one function.

Claim: how a model lies on devices does not matter to what it learns. The same run on one device, data-parallel, fully
sharded, tensor-parallel, in a pipeline or over a split sequence ends with the same losses, to 1e-5, and a run that was
stopped on one mesh goes on on another.

| mesh                          | options                                              | loss    | last    | held     |
|-------------------------------|------------------------------------------------------|---------|---------|----------|
| data=1                        |                                                      | 3.04661 | 3.02161 | 685.3 kB |
| data=8                        |                                                      | 3.04661 | 3.02161 | 685.3 kB |
| data=8                        | --fully-sharded --no-recompute                       | 3.04661 | 3.02161 |  85.7 kB |
| tensor=4                      | --sequence-parallel --overlap                        | 3.04661 | 3.02161 | 188.0 kB |
| data=2,sequence=4             | --sequence-attention zigzag                          | 3.04661 | 3.02161 | 685.3 kB |
| pipe=2                        | --schedule interleaved --microbatches 4              | 3.04661 | 3.02161 | 380.4 kB |
| data=2,pipe=2,tensor=2        |                                                      | 3.04661 | 3.02161 | 199.0 kB |
| data=2,pipe=2,tensor=2        | --fully-sharded --sequence-parallel --schedule zb_h1 | 3.04661 | 3.02161 | 101.1 kB |
| data=1, from 20 on as above   | --fully-sharded                                      | 3.04661 | 3.02161 | 101.1 kB |

Held-out loss and that of the last batch, in nats a character, after 40 steps of --width 32 --context 32 --batch-size 16
--steps 40 --every 20 --judged 64, of zb_h1 also --microbatches 4, and what a device holds of parameters and the
optimizer's state. After 1000 steps as below the loss is 1.83282 on data=1 as on data=2,pipe=2,tensor=2 (a perplexity of
6.251, 45.1 % of characters right); they differ by 1e-7, and the models write the same lines.

Held out are speeches after those trained on, of the same roles. Training takes windows anywhere in the others; the
learning rate of AdamW rises over the first twentieth of the steps and then falls along a cosine; there is no dropout.
The model must fit one device, where it is judged and writes.

`--mesh data=2,pipe=2,tensor=2` names axes of `jfed.parallel.layered.AXES` and devices along each; on CPUs there are as
many devices as it needs. Mesh, schedule, microbatches and what else says where things lie may change between a run and
its `--resume`, but for the number of chunks: 2 with the interleaved schedule, else 1. On the same mesh a killed run
ends in the same bits.

Source: Vaswani et al. 2017 (arXiv:1706.03762), the model; Shoeybi et al. 2019 (arXiv:1909.08053) and Narayanan et al.
2021 (arXiv:2104.04473), its layers and blocks on many devices.

Command: python experiments/train_lm.py --mesh data=2,pipe=2,tensor=2
Expected: a loss of 1.833, as with --mesh data=1.
Time: four minutes on two CPU cores, and two with --mesh data=1, beside other work.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jfed import core, data, experiment, models, plot, report, run
from jfed import mesh as meshes
from jfed.parallel import attention, experts, schedules, tensor
from jfed.parallel.layered import AXES, Axes, Layered
from jfed.parallel.sharded import on_mesh
from jfed.parallel.transformer import transformer

SCHEDULES: dict[str, Callable] = {
    "naive": schedules.naive,
    "gpipe": schedules.gpipe,
    "1f1b": schedules.one_f_one_b,
    "interleaved": functools.partial(schedules.interleaved, chunks=2),
    "zb_h1": schedules.zb_h1,
}
SEQUENCE: dict[str, Callable] = {
    "ring": attention.ring_attention,
    "zigzag": attention.zigzag_attention,
    "all_to_all": attention.all_to_all_attention,
}
MATRICES = ("kernel", "embedding", "positions")  # which weight decay acts on


@dataclasses.dataclass(frozen=True)
class Task(experiment.Options):
    """What is trained: the same for all parts of a run."""

    width: int = 64
    layers: int = 4
    heads: int = 4
    context: int = 64
    """Characters in a window."""
    experts: int = 0
    """In place of each feed-forward net, two of them for each character; 0 is none."""
    expert_groups: int = 1
    """Of a window's characters, each with room of its own at the experts; the devices along "sequence" divide them."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["xla", "cudnn"] = "xla"
    """Of a whole sequence; cudnn is for NVIDIA's GPUs and bfloat16."""
    batch_size: int = 32
    """Windows of a step."""
    steps: int = 1000
    learning_rate: float = 3e-3
    """The highest."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Norm of the gradient."""
    every: int = 100
    """Steps between evaluations."""
    judged: int = 512
    """Held-out windows."""


@dataclasses.dataclass(frozen=True)
class Config(Task):
    """Settings, those of where things lie included."""

    mesh: str | None = None
    """Such as data=2,pipe=2,tensor=2; by default all devices that divide the batch, along data."""
    schedule: Literal["naive", "gpipe", "1f1b", "interleaved", "zb_h1"] | None = None
    """Of the axis pipe; by default 1f1b."""
    microbatches: int | None = None
    """By default 4 for each device along pipe, if they divide the batch, or 1."""
    fully_sharded: bool = False
    """Cut parameters and the optimizer's state along data, too."""
    recompute: bool = True
    """Compute activations again for the gradient, rather than keep them."""
    sequence_parallel: bool = False
    """Split characters along tensor between its layers."""
    overlap: bool = False
    """Send those of sequence_parallel in rings, during products."""
    sequence_attention: Literal["ring", "zigzag", "all_to_all"] | None = None
    """Over the axis sequence; by default ring, in a pipeline all_to_all."""


SMOKE = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "context": 32,
    "batch_size": 8,
    "steps": 4,
    "every": 2,
    "judged": 8,
}


def main(config: Config) -> None:
    """Trains, then shows a table, two pictures and what the model writes."""
    if min(config.steps, config.every, config.batch_size) < 1:
        raise ValueError(
            "train_lm(steps, every, batch_size): each must be at least 1; leave them out for the defaults."
        )
    sizes = axes_of(config)
    devices = meshes.make(tuple(sizes.values()), tuple(sizes))
    train, test, vocabulary = data.shakespeare(window=config.context)
    symbols = -(-(len(vocabulary) + 1) // 16) * 16  # so that devices along tensor divide them
    model = model_of(config, sizes, symbols)
    share = config.batch_size // (sizes.get("data", 1) * sizes.get("expert", 1))
    usual = math.gcd(share, 4 * sizes["pipe"]) if "pipe" in sizes and share else 1
    placed = {"schedule": None, "microbatches": usual if config.microbatches is None else config.microbatches}
    if config.schedule is not None or "pipe" in sizes:
        placed["schedule"] = SCHEDULES[config.schedule or "1f1b"]
    method = on_mesh(
        model,
        optimizer_of(config),
        mesh=devices,
        fully_sharded=config.fully_sharded,
        recompute=config.recompute,
        **placed,
    )
    text = jax.tree.map(lambda x: np.asarray(x).reshape(-1), train.examples)
    population = core.Population(text, np.zeros(1, np.int32), np.array([len(text["x"])], np.int32))
    population = meshes.replicate(population, devices)
    alone = models.Model(model.init, logits_of(config, model))
    metrics, held_out = models.metrics(alone), chosen(test.examples, config.judged)
    gathered = jax.jit(lambda params: params, out_shardings=NamedSharding(devices, PartitionSpec()))
    name = ",".join(f"{axis}={n}" for axis, n in sizes.items())
    print(f"{len(text['x'])} characters to train on, {symbols} symbols, mesh {name}\n")

    def one_seed(folder: report.Run, key: jax.Array) -> dict[str, Any]:
        init_key, train_key, write_key = jax.random.split(key, 3)
        resumed, spent = time.monotonic(), []

        def judge(params: core.Tree) -> dict[str, Any]:
            jax.block_until_ready(params)
            spent.append(time.monotonic() - resumed)
            whole = jax.tree.map(np.asarray, gathered(params))
            return run.evaluate(metrics, whole, held_out, batch_size=64)

        params = model.init(init_key)
        numbers, held = sum(x.size for x in jax.tree.leaves(params)), bytes_held(method.init(params))
        moments = experiment.record(
            folder,
            method,
            windows(config.batch_size, config.context),
            population,
            params,
            meshes.replicate(train_key, devices),
            rounds=config.steps,
            every=config.every,
            judge=judge,
            description="train_lm",
        )
        for row, params in moments:
            resumed = time.monotonic()
        pictures(folder, config, name)
        written = write(config, alone, jax.tree.map(np.asarray, gathered(params)), vocabulary, write_key)
        if folder.writer:
            (folder.folder / "sample.txt").write_text(written + "\n", encoding="utf-8")
        # The first stretch compiles, and the last may be shorter.
        whole = spent[1 : len(spent) - (config.steps % config.every > 0)]
        rate = config.batch_size * config.context * config.every / float(np.median(whole)) if whole else None
        return {
            "loss": row["loss"],
            "perplexity": math.exp(row["loss"]),
            "accuracy": row["accuracy"],
            "train_loss": row["train_loss"],
            "tokens_per_second": rate,
            "parameters": numbers,
            "bytes_held": held,
            "bubble": bubble(placed, sizes, config.recompute),
            "mesh": name,
            **{name: row[name] for name in ("bytes_up", "bytes_down", "seconds")},
            "rounds": row["round"],
        }

    # Where things lie is no part of what a run is.
    task = Task(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Task)})
    whole, summary = experiment.over_seeds("train_lm", task, one_seed)
    rate = summary["tokens_per_second"]
    shown = {
        "mesh": summary["mesh"],
        "loss, nats a character": f"{summary['loss']:.5f}",
        "perplexity": f"{summary['perplexity']:.3f}",
        "next-character accuracy": f"{100 * summary['accuracy']:.1f} %",
        "loss of the last batch": f"{summary['train_loss']:.5f}",
        "steps": f"{summary['rounds']:.0f}",
        "tokens a second": "" if rate is None else f"{rate:.4g}",
        "parameters": f"{summary['parameters']:.0f}",
        "held by a device": report.human_bytes(summary["bytes_held"]),
        "idle in a pipeline, predicted": f"{100 * summary['bubble']:.1f} %",
        "training time": report.human_seconds(summary["seconds"]),
        "pictures and metrics": str(whole.folder),
    }
    print(report.table("train_lm", [{"": name, "result": value} for name, value in shown.items()]), "\n")
    if whole.writer:
        print((whole.folder / "seed_0" / "sample.txt").read_text(encoding="utf-8"))
    report.finish(whole, summary)


def axes_of(config: Config) -> dict[str, int]:
    """Axes of the mesh and devices along each; makes a CPU into so many, if it has fewer cores.

    Raises:
      ValueError: if `mesh` is no list of axes and sizes.
    """
    where = f"train_lm(mesh={config.mesh!r})"
    if config.mesh is None:
        return {"data": math.gcd(max(config.batch_size // (config.microbatches or 1), 1), jax.device_count())}
    sizes: dict[str, int] = {}
    for part in config.mesh.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or axis in sizes:
            raise ValueError(f"{where}: {axis!r} must be one of {', '.join(AXES)}, each once; write data=2,tensor=2.")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{where}: {axis}={size} must be a whole number of at least 1; write data=2,tensor=2.")
        sizes[axis] = int(size)
    needed = math.prod(sizes.values())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if needed > cores and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        meshes.use_cores(needed)
    return sizes


def model_of(config: Config, sizes: dict[str, int], symbols: int) -> Layered:
    """The transformer.

    Raises:
      ValueError: if the attention is not to be had here, or as `transformer`.
    """
    if config.attention == "cudnn" and (jax.default_backend() != "gpu" or config.compute_dtype != "bfloat16"):
        raise ValueError("train_lm(attention='cudnn'): it needs a GPU and --compute-dtype bfloat16; take xla.")
    sequence_attention = config.sequence_attention or ("all_to_all" if "pipe" in sizes else "ring")
    mixture = experts.mixture_of_experts(config.experts, groups=config.expert_groups) if config.experts else None
    return transformer(
        symbols,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        context=config.context,
        sequence_parallel=config.sequence_parallel,
        overlap=config.overlap,
        attention=functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=config.attention),
        sequence_attention=SEQUENCE[sequence_attention],
        compute_dtype=jnp.dtype(config.compute_dtype),
        feed_forward=mixture,
    )


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """AdamW with a clipped gradient, a rate that rises and falls, and decay of matrices alone.

    As language models have it (Brown et al. 2020, arXiv:2005.14165, appendix B).
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(config.steps // 20, 1), max(config.steps, 2), 0.1 * config.learning_rate
    )

    def matrices(params: core.Tree) -> core.Tree:
        return jax.tree_util.tree_map_with_path(lambda path, x: path[-1].key in MATRICES, params)

    adamw = optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def windows(batch_size: int, context: int) -> Callable:
    """A sampler of windows that begin anywhere in a text, examples [E] characters."""

    def sample(population: core.Population, key: jax.Array, t: jax.Array) -> core.Tree:
        del t
        last = jax.tree.leaves(population.examples)[0].shape[0] - context
        start = jax.random.randint(key, (batch_size, 1), 0, last + 1)
        return jax.tree.map(lambda x: x[start + jnp.arange(context)[None]], population.examples)

    return sample


def chosen(examples: core.Tree, count: int) -> core.Tree:
    """So many of the held-out windows, the same in every run."""
    size = len(examples["x"])
    if not 1 <= count <= size:
        raise ValueError(f"train_lm(judged={count}): there are {size} held-out windows; take at least 1, at most all.")
    rows = np.random.default_rng(0).permutation(size)[:count]
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[rows]), examples)


def logits_of(config: Config, model: Layered) -> Callable:
    """`(params, x [b, T], key) -> [b, T, V]`: the model on one device."""
    functions = model.functions(Axes())

    def apply(params: core.Tree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        parts = model.split(params)
        start = functions.enter(parts.enter, {"x": x})
        h, _ = jax.lax.scan(lambda h, block: (functions.block(block, h), None), start, parts.blocks)
        h = tensor.layer_norm(h["h"] if config.experts else h, parts.leave["norm"])
        return tensor.column_dense(h, **parts.leave["out"], dtype=jnp.float32)

    return apply


def bytes_held(state: core.Tree) -> int:
    """By the device of this process that holds most, of parameters and the optimizer's state."""
    held: dict[Any, int] = {}
    for x in jax.tree.leaves(state):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def bubble(placed: dict[str, Any], sizes: dict[str, int], recompute: bool) -> float:
    """Share of time in which devices of the pipeline wait, forward pass and both gradients equally long."""
    if placed["schedule"] is None:
        return 0.0
    table = placed["schedule"](sizes["pipe"], placed["microbatches"])
    return schedules.predict(table, recompute=float(recompute)).bubble


def pictures(folder: report.Run, config: Config, name: str) -> None:
    """Loss and accuracy by steps."""
    rows = report.rows(folder.folder)
    steps = [row["round"] for row in rows]
    size = f"{config.layers} blocks of width {config.width}"
    curves = {
        "loss": {"held out": [row["loss"] for row in rows], "last batch": [row["train_loss"] for row in rows]},
        "accuracy": {"held out": [100 * row["accuracy"] for row in rows]},
    }
    for what, unit in (("loss", "nats a character"), ("accuracy", "% of characters")):
        plot.plot_curves(
            folder.folder / f"{what}.png",
            {which: (steps, values) for which, values in curves[what].items()},
            xlabel="steps",
            ylabel=f"{what}, {unit}",
            title=f"{size}, {name}",
        )


def write(config: Config, model: models.Model, params: core.Tree, vocabulary: str, key: jax.Array) -> str:
    """A window of characters, each drawn by the model's probabilities sharpened by a temperature of 0.8."""
    newline = 1 + vocabulary.index("\n")

    @jax.jit
    def program(params, key):
        def put(i, text):
            logits = model.apply(params, text[None], None)[0, i, 1 : len(vocabulary) + 1]
            drawn = 1 + jax.random.categorical(jax.random.fold_in(key, i), logits / 0.8)
            return text.at[i + 1].set(drawn.astype(text.dtype))

        return jax.lax.fori_loop(0, config.context - 1, put, jnp.full(config.context, newline, jnp.int32))

    return "".join(vocabulary[i - 1] for i in np.asarray(program(params, key)).tolist()).strip("\n")


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
