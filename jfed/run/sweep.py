"""Many settings of a method, each over several seeds, as one compiled program.

A hyperparameter that enters a method as a number can as well be traced: settings then run side by
side under `vmap`. All settings of a seed start from the same model and draw the same cohorts, batches
and noise, so they differ in nothing but the setting; and since the schedule of the clients is then
the same for all, it is computed once, and what a client map skips for one it skips for all. Over
seeds schedules differ, and side by side nothing could be skipped: seeds run one after another, unless
told otherwise.

Letters: S settings, K seeds, T rounds, P points of a curve.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jfed import _machine, _validate, report
from jfed.core import Algorithm, Population, Sampler, Tree
from jfed.mesh import devices_along, shard_map
from jfed.run.rounds import scan_rounds


class Sweep(NamedTuple):
    """What a sweep found, on the host."""

    settings: list[dict[str, float]]  # S, in the order of the grid's product, its last name fastest
    rounds: np.ndarray  # [P] int, rounds completed at each point of a curve
    curves: dict[str, np.ndarray]  # {metric: [S, K, P]}; [:, :, -1] is the end of the runs
    params: Tree  # the final models, leaves [S, K, ...]; () unless asked for
    programs: int  # how many times the program ran to get through all settings


def sweep(
    make: Callable[..., Algorithm],
    grid: Mapping[str, Sequence[float]],
    *,
    init: Callable[[jax.Array], Tree],
    sampler: Sampler,
    population: Population,
    judge: Callable[[Tree], dict[str, jax.Array]],
    rounds: int,
    every: int | None = None,
    seeds: int = 1,
    seeds_at_once: int = 1,
    keep_params: bool = False,
    memory: float | None = None,
    mesh: Mesh | None = None,
    axis: str = "clients",
    progress: bool = True,
) -> Sweep:
    """Runs a method with every combination of hyperparameters in `grid`, over several seeds.

    Guarantees:
      * Seed `i` splits `jax.random.key(i)` into `(init_key, run_key)`. Each run equals the one alone,
        `scan_rounds(make(**setting), sampler, population, make(**setting).init(init(init_key)),
        run_key, rounds=rounds)`, up to the order of float additions.
      * One program is compiled if all settings fit; else they are dealt to equal chunks that do, and
        what is compiled are the trials needed to find their size, usually three.

    A run that diverges ends in NaN and harms no other.

    Args:
      make: builds the method from one value of each name in `grid`, which it is handed as traced
        numbers: learning rates, momenta, proximal weights, but nothing that decides a shape or a
        number of steps, such as a batch size. It is also called with the plain numbers, so that a
        value out of bounds is an error before anything compiles.
      grid: the values of each hyperparameter; all combinations run.
      init: `key -> params`, such as `model.init`.
      sampler: `(population, key, t) -> Cohort`, the same for all.
      population: the data of all clients.
      judge: pure, `params -> {name: scalar}`, evaluated inside the program; data it closes over become
        constants of that program.
      rounds: T.
      every: rounds between two points of the curves; by default only the end is judged.
      seeds: K, how many.
      seeds_at_once: seeds side by side. On a CPU more than 1 is slower (`benchmarks/sweep.py`).
      keep_params: whether to return the final models.
      memory: bytes that one program may take on each device for its results and temporaries; by default
        what the device has left, on CPUs their share of half of what the host has.
      mesh: deals the settings to its devices, which must be this process's; the method then runs whole on each.
      axis: mesh axis that settings are dealt along.
      progress: whether to show a bar; of many processes only the first does.

    Returns:
      A `Sweep`; see `sweep_table`, `best_setting` and `quickest_setting`.

    Raises:
      ValueError: if `grid` is empty or holds something that is not a finite number; if `rounds`, `every`,
        `seeds` or `seeds_at_once` is not a whole number of at least 1, or `every` does not divide
        `rounds`; if a judged metric is not a scalar; if a single setting needs more than `memory`; if the
        mesh has no such axis, or spans processes; or what `make` raises.

    >>> import optax
    >>> from jfed import algorithms, local, sampling
    >>> def make(learning_rate):
    ...     return algorithms.fedavg(local.full_batch(lambda w, x, key: (w - x) ** 2 / 2, optax.sgd(learning_rate)))
    >>> result = sweep(
    ...     make,
    ...     {"learning_rate": [0.5, 1.0]},
    ...     init=lambda key: jnp.array(0.0),
    ...     sampler=sampling.full(steps=lambda size: size),
    ...     population=Population(jnp.array([1.0, 3.0]), jnp.array([0, 1]), jnp.array([1, 1])),
    ...     judge=lambda w: {"w": w},
    ...     rounds=2,
    ...     every=1,
    ...     progress=False,
    ... )
    >>> print(result.curves["w"][:, 0])
    [[1.  1.5]
     [2.  2. ]]
    """
    for name, value in (("rounds", rounds), ("seeds", seeds), ("seeds_at_once", seeds_at_once)):
        _validate.at_least_one("sweep", name, value, "1 is the least there is to run")
    every = rounds if every is None else every
    _validate.at_least_one("sweep", "every", every, "leave it out to judge the end only")
    if rounds % every:
        raise ValueError(f"sweep(every={every}): every must divide rounds={rounds}; choose another of the two.")
    if memory is not None:
        _validate.positive("sweep", "memory", memory, "leave it out to use what the device has")
    devices = 1 if mesh is None else devices_along("sweep", mesh, axis)
    if mesh is not None and not set(mesh.devices.flat) <= set(jax.local_devices()):
        raise ValueError("sweep(mesh=...): the mesh spans processes; give each process its own part of the grid.")
    settings = _product(grid)
    for setting in settings:
        make(**setting)

    def one_run(setting: dict, seed: jax.Array, population: Population) -> tuple[dict, Tree]:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        algorithm = make(**setting)

        def stretch(state, start):
            state, _ = scan_rounds(algorithm, sampler, population, state, run_key, rounds=every, start=start)
            return state, _scalars(judge(algorithm.params(state)))

        state = algorithm.init(init(init_key))
        state, curves = jax.lax.scan(stretch, state, jnp.arange(0, rounds, every))
        return curves, algorithm.params(state) if keep_params else ()

    def all_runs(chunk: dict, population: Population) -> tuple[dict, Tree]:
        def one_seed(seed):
            return jax.vmap(one_run, (0, None, None))(chunk, seed, population)

        # A batch of one would still be a vmap, under which a client map skips nothing.
        return jax.lax.map(one_seed, jnp.arange(seeds), batch_size=seeds_at_once if seeds_at_once > 1 else None)

    if mesh is not None:
        all_runs = shard_map(mesh=mesh, in_specs=(P(axis), P()), out_specs=P(None, axis))(all_runs)
    table = {name: np.array([setting[name] for setting in settings]) for name in grid}
    population = jax.tree.map(jnp.asarray, population)

    @functools.cache
    def program(size: int):
        return jax.jit(all_runs).lower(_rows(table, np.arange(size) % len(settings)), population).compile()

    # The CPU devices of a process share its memory.
    budget = memory or _machine.free_memory() / (devices if jax.default_backend() == "cpu" else 1)
    each = _largest_chunk(lambda each: _bytes(program, each * devices), -(-len(settings) // devices), budget)
    size = each * devices
    starts = range(0, len(settings), size)
    found = []
    writer = progress and jax.process_index() == 0
    with report.progress(len(settings), "sweep", unit="settings", writer=writer) as advance:
        for start in starts:
            # The last chunk is filled up with its last setting, so that the same program serves.
            index = np.minimum(np.arange(start, start + size), len(settings) - 1)
            result = program(size)(_rows(table, index), population)
            found.append(jax.tree.map(lambda x: np.swapaxes(np.asarray(x), 0, 1), result))
            advance(min(size, len(settings) - start))
    curves, params = jax.tree.map(lambda *chunks: np.concatenate(chunks)[: len(settings)], *found)
    return Sweep(settings, np.arange(every, rounds + 1, every), curves, params, len(starts))


def _product(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of the grid's values, as plain numbers."""
    values = {name: np.asarray(column) for name, column in grid.items()}
    for name, column in values.items():
        if column.ndim != 1 or not column.size or column.dtype.kind not in "iuf" or not np.all(np.isfinite(column)):
            raise ValueError(f"sweep(grid[{name!r}]={grid[name]!r}): give a list of finite numbers.")
    if not values:
        raise ValueError("sweep(grid={}): there is nothing to sweep; name a hyperparameter and its values.")
    columns = [column.tolist() for column in values.values()]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*columns)]


def _rows(table: dict[str, np.ndarray], index: np.ndarray) -> dict[str, jax.Array]:
    """Weakly typed, as the plain numbers are: a float32 rate would turn bfloat16 params into float32."""

    def weak(column: np.ndarray) -> jax.Array:
        like = jnp.full(column.shape, column.dtype.type(0).item())
        return like.at[...].set(jnp.asarray(column, like.dtype))

    return {name: weak(column[index]) for name, column in table.items()}


def _scalars(judged: dict[str, jax.Array]) -> dict[str, jax.Array]:
    for name, value in judged.items():
        if jnp.shape(value) != ():
            raise ValueError(
                f"sweep(judge): metric {name!r} has shape {jnp.shape(value)}; every one must be a scalar, "
                "so take a mean."
            )
    return judged


def _bytes(program: Callable, size: int) -> float:
    """What a program of `size` settings takes besides its arguments; infinite if a compiler finds it too large."""
    try:
        needed = program(size).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    return needed.temp_size_in_bytes + needed.output_size_in_bytes


def _largest_chunk(bytes_of: Callable[[int], float], count: int, budget: float) -> int:
    """The largest size of equal chunks of `count` settings that is seen to fit, found in few trials.

    Bytes grow linearly in settings, or nearly so: one line through the last trial and a single
    setting predicts the next.
    """
    size, needed = count, bytes_of(count)
    if needed <= budget:
        return count
    one = bytes_of(1)
    if one > budget:
        raise ValueError(
            f"sweep(memory={budget:.0f}): one setting alone needs {report.human_bytes(one)}; raise memory, or use "
            "a client map of fewer lanes."
        )
    while needed > budget:
        each = (needed - one) / (size - 1)
        fitting = size // 2 if math.isinf(each) else min(size - 1, 1 + int((budget - one) / each))
        size = math.ceil(count / math.ceil(count / fitting))
        needed = bytes_of(size)
    return size
