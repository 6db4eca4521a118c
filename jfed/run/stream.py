"""Running an algorithm on clients whose examples are not on the device.

While one round trains, a thread draws the next cohort, gathers its rows on the host and sends them
to the device; with several devices or processes, it deals the clients first, so that no device and no
process gets rows that are not its own. A round has the keys that `iterate` gives it, and a client
draws from its id and not from where its rows lie, so the run is the same.

Dealing is list scheduling, longest first (Graham 1969).

Letters: T rounds, C clients in a cohort, N clients in the population, n devices.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jfed import _streams, _validate
from jfed.clients.dealt import deal_on_host
from jfed.core import Algorithm, Cohort, Population, Sampler, Tree, make_cohort
from jfed.data.source import Source, check_rows, fetch, row_of
from jfed.mesh import devices_along, onto
from jfed.run._cohorts import block, lay_out, send
from jfed.run.rounds import Moment, keys_of_round

_MOST_ROWS = 2**31 - 1  # `start` is int32


def stream(
    algorithm: Algorithm,
    sampler: Sampler,
    source: Source,
    state: Tree,
    key: jax.Array,
    *,
    rounds: int,
    start: int = 0,
    every: int = 1,
    capacity: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "clients",
) -> Iterator[Moment]:
    """`iterate` for a population that stays on the host: the same run, a cohort's rows at a time.

    Guarantees:
      * The result is that of `iterate` on a `Population` of the same rows.
      * One program, compiled once, whatever the cohorts.
      * At most two cohorts exist: the one training, and the one being made.
      * With a mesh, a process loads the clients dealt to its own devices and no others; a device gets
        at most `2 ceil(C / n)` of the cohort's C slots, which leaves longest-first dealing free to even
        out the local steps; the rest is padded with empty slots.

    With a mesh the algorithm's client map must be `clients.dealt(mesh, ...)`. State that lies on the
    mesh stays as it lies; other state is copied to all its devices.

    What goes wrong in the thread, such as an error of the source's `load`, is raised from the iterator.

    Args:
      algorithm: the method.
      sampler: `(population, key, t) -> Cohort`; it may look at sizes, and not at `examples`; `start`
        counts from a client's first row.
      source: from `jfed.data.on_host`, `memory_mapped` or `from_loader`.
      state: from `algorithm.init(params)`, or where an earlier run ended.
      key: the run's key.
      rounds: T, the length of the whole run.
      start: rounds run before, on the same key; those are not run again.
      every: rounds between yields.
      capacity: rows of the buffer on each device. By default enough for any cohort: those of the C
        (with a mesh, `2 ceil(C / n)`) largest clients. Lower it where a few clients are far larger than
        the rest; a client drawn twice needs its rows once.
      mesh: from `jfed.mesh.make`; may span processes. By default the default device.
      axis: mesh axis that clients are dealt along.

    Returns:
      An iterator of a `Moment` after each stretch, as `iterate` yields.

    Raises:
      ValueError: as in `iterate`; if `capacity` is not a whole number of at least 1, the mesh has no
        such axis, or buffers have more rows than int32 can count; from the iterator, if a cohort needs
        more rows than `capacity`.

    >>> from jfed import algorithms, data, local, sampling
    >>> work = local.gradient(lambda w, x, key: (w - x) ** 2)
    >>> source = data.on_host(np.arange(6.0, dtype=np.float32), [1, 2, 3])
    >>> fedsgd, sampler = algorithms.fedsgd(work, learning_rate=0.1), sampling.full(steps=work.steps)
    >>> for moment in stream(fedsgd, sampler, source, fedsgd.init(0.0), jax.random.key(0), rounds=3):
    ...     pass
    >>> print(moment.round, moment.metrics["reports"])
    3 [3]
    """
    _validate.at_least_one("stream", "rounds", rounds, "it is the length of the whole run")
    _validate.at_least_one("stream", "every", every, "1 yields after each round")
    start = int(start)
    if not 0 <= start <= rounds:
        raise ValueError(f"stream(start={start}): start must lie in [0, {rounds}], the rounds of the whole run.")
    if not isinstance(source, Source):
        raise ValueError(
            f"stream(source={type(source).__name__}): must be a Source; make one with data.on_host, "
            "data.memory_mapped or data.from_loader, or use run.iterate for a Population on the device."
        )
    devices = 1 if mesh is None else devices_along("stream", mesh, axis)
    # Beside an accelerator the host draws: on it, the draw would wait for the round under way.
    known = jax.device_put((source.size, np.asarray(jax.random.key_data(key))), _host())
    draw = functools.partial(_draw, sampler, jax.random.key_impl(key), *known)

    slots = jax.eval_shape(draw, np.int32(0)).ids.shape[0]
    if mesh is not None:
        slots = min(slots, 2 * -(-slots // devices))
    enough = max(int(np.sort(source.size)[-slots:].sum(dtype=np.int64)), 1)
    capacity = enough if capacity is None else capacity
    _validate.at_least_one("stream", "capacity", capacity, f"{enough} is enough for any cohort")
    if capacity * devices > _MOST_ROWS:
        raise ValueError(
            f"stream(capacity={capacity}): {devices} buffers of that many rows are more than int32 can count; "
            "lower capacity, or draw smaller cohorts."
        )

    def make(t: int) -> Cohort | None:
        if t == rounds:
            return None
        cohort = jax.tree.map(np.asarray, draw(np.int32(t)))
        hands = np.arange(slots)[None]
        if mesh is not None:
            hands = deal_on_host(cohort.steps, cohort.ids, source.size, devices=devices, slots=slots, capacity=capacity)
        cohort, owners = lay_out(cohort, hands, source.size, capacity)
        needed = max(int(source.size[ids].sum(dtype=np.int64)) for ids in owners)
        if needed > capacity:
            raise ValueError(
                f"stream(capacity={capacity}): the cohort of round {t} needs {needed} rows on one device; raise "
                f"capacity to that, or leave it out for {enough}, enough for any cohort."
            )

        def block_of(d: int) -> list[np.ndarray]:
            return block(
                "stream", source.row, capacity, ((f"client {i}", fetch(source, i)) for i in owners[d].tolist())
            )

        return send(cohort, block_of, source.row, capacity, mesh, axis)

    return _moments(algorithm, make, state, key, start, every, mesh)


def stream_clients(
    algorithm: Algorithm,
    clients: Iterable[Tree],
    state: Tree,
    key: jax.Array,
    *,
    cohort_size: int,
    capacity: int,
    steps: Callable[[jax.Array], jax.Array],
    start: int = 0,
    every: int = 1,
) -> Iterator[Moment]:
    """Rounds over clients that arrive one after another and are seen once: each cohort is the next C.

    The run ends with the clients; a last cohort of fewer has empty slots. Clients are numbered from
    `start * cohort_size` as they arrive, and weighted by their number of examples. Otherwise as `stream`;
    clients are taken in a thread, one cohort ahead, so at most two cohorts exist.

    Args:
      algorithm: the method.
      clients: trees of numpy arrays [n_i, ...], alike but for n_i; a generator will do.
      state: from `algorithm.init(params)`, or where an earlier run ended.
      key: the run's key.
      cohort_size: clients a round, C.
      capacity: rows a cohort may hold. Sizes are not known beforehand, so this is a promise: C times the
        largest client is always enough.
      steps: local steps by size, usually `work.steps`.
      start: rounds run before, on the same key; `clients` goes on where they ended.
      every: rounds between yields.

    Returns:
      An iterator of a `Moment` after each stretch.

    Raises:
      ValueError: if `cohort_size`, `capacity` or `every` is not a whole number of at least 1, or `start`
        is negative; from the iterator, if a cohort has more rows than `capacity`, or a client is unlike
        the first.

    >>> from jfed import algorithms, local
    >>> work = local.gradient(lambda w, x, key: (w - x) ** 2)
    >>> fedsgd = algorithms.fedsgd(work, learning_rate=0.1)
    >>> arriving = (np.full(n % 3 + 1, 1.0, np.float32) for n in range(5))
    >>> options = {"cohort_size": 2, "capacity": 6, "steps": work.steps}
    >>> for moment in stream_clients(fedsgd, arriving, fedsgd.init(0.0), jax.random.key(0), **options):
    ...     print(moment.round, moment.metrics["reports"])
    1 [2]
    2 [2]
    3 [1]
    """
    _validate.at_least_one("stream_clients", "cohort_size", cohort_size, "a good start is 10")
    _validate.at_least_one("stream_clients", "capacity", capacity, "cohort_size times the largest client is enough")
    _validate.at_least_one("stream_clients", "every", every, "1 yields after each round")
    if start < 0:
        raise ValueError(f"stream_clients(start={start}): start must be at least 0, the rounds run before.")
    clients, host, row = iter(clients), _host(), None

    def make(t: int) -> Cohort | None:
        nonlocal row
        taken = []
        for i, examples in enumerate(itertools.islice(clients, cohort_size), t * cohort_size):
            row = row_of(f"stream_clients(client {i})", examples) if row is None else row
            check_rows(f"stream_clients(client {i})", examples, row)
            taken.append((f"client {i}", [np.asarray(leaf) for leaf in jax.tree.leaves(examples)]))
        if not taken:
            return None
        size = np.zeros(cohort_size, np.int32)
        size[: len(taken)] = [leaves[0].shape[0] for _, leaves in taken]
        if (needed := int(size.sum(dtype=np.int64))) > capacity:
            raise ValueError(
                f"stream_clients(capacity={capacity}): the cohort of round {t} has {needed} rows; "
                "raise capacity to that, or make cohorts smaller."
            )
        cohort = jax.tree.map(np.asarray, _look_up(steps, *jax.device_put((np.cumsum(size) - size, size), host)))
        real = np.arange(cohort_size) < len(taken)
        cohort = cohort._replace(ids=np.where(real, t * cohort_size + cohort.ids, _streams.NOBODY).astype(np.int32))
        return send(cohort, lambda _: block("stream_clients", row, capacity, taken), row, capacity, None, "")

    return _moments(algorithm, make, state, key, int(start), every, None)


def _moments(
    algorithm: Algorithm,
    make: Callable[[int], Cohort | None],
    state: Tree,
    key: jax.Array,
    start: int,
    every: int,
    mesh: Mesh | None,
) -> Iterator[Moment]:
    """Runs round t on the cohort `make(t)`, each made while the round before trains, until there is none."""
    state, key = onto(state, mesh), onto(key, mesh)
    lies = None if mesh is None else tuple(leaf.sharding for leaf in jax.tree.leaves(state))
    done, metrics, stretch = start, (), []
    device = jax.config.jax_default_device  # a context manager sets it for one thread

    def made(t: int) -> Cohort | None:
        with jax.default_device(device):
            return make(t)

    with ThreadPoolExecutor(1, "jfed-stream") as thread:
        ahead = thread.submit(made, done)
        while (cohort := ahead.result()) is not None:
            # Two cohorts are here now; a third is not begun before the round of the first is over.
            jax.block_until_ready(metrics)
            state, metrics = _one_round(state, cohort, key, np.int32(done), algorithm=algorithm, lies=lies)
            del cohort
            done += 1
            ahead = thread.submit(made, done)
            stretch.append(metrics)
            if done % every == 0:
                yield Moment(done, state, _stacked(stretch))
                stretch = []
    if stretch:
        yield Moment(done, state, _stacked(stretch))


@functools.partial(jax.jit, static_argnames=("algorithm", "lies"))
def _one_round(
    state: Tree, cohort: Cohort, key: jax.Array, t: jax.Array, *, algorithm: Algorithm, lies: tuple | None
) -> tuple[Tree, dict]:
    """A round as `scan_rounds` runs it; with a mesh, `lies` says where each leaf of the state lies before and after."""
    _, round_key = keys_of_round(key, t)
    state, metrics = algorithm.round(state, cohort, round_key)
    if lies is not None:
        # Left to the compiler, a leaf might come back elsewhere, and the next round be another program.
        leaves, structure = jax.tree.flatten(state)
        state = jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, lies))
        metrics = jax.lax.with_sharding_constraint(metrics, NamedSharding(lies[0].mesh, P()))
    return state, metrics


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(sampler: Sampler, impl: str, size: jax.Array, key_data: jax.Array, t: jax.Array) -> Cohort:
    sample_key, _ = keys_of_round(jax.random.wrap_key_data(key_data, impl=impl), t)
    return sampler(Population((), jnp.zeros_like(size), size), sample_key, t)._replace(examples=())


@functools.partial(jax.jit, static_argnums=0)
def _look_up(steps: Callable, start: jax.Array, size: jax.Array) -> Cohort:
    return make_cohort(Population((), start, size), jnp.arange(size.shape[0]), steps=steps)


def _stacked(metrics: list[dict]) -> dict:
    return jax.tree.map(lambda *each: jnp.stack(each), *metrics)


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to start without it
        return jax.local_devices()[0]
