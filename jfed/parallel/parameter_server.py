"""A real parameter server: one process that steps, others that compute gradients, over TCP.

The server runs the very function that the simulation runs (`jfed.parallel.asynchronous`) and records who arrived when.
Workers draw the very batches. So `recorded(trace)` replays a real run inside the compiled engine, and what took an
hour on ten machines can be looked at again on one.

Start `serve` in one process and `work` in each of n others, in any order. Who dies is noticed at once, who falls
silent after `timeout` seconds.

Letters: n workers, K gradients to a step of the server, T gradients.
"""

import functools
import time
import warnings
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import wait
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfed import _validate
from jfed.core import Tree
from jfed.parallel import _joining, _server, _wire
from jfed.parallel.arrivals import Trace


class Served(NamedTuple):
    """What a parameter server ends with."""

    params: Tree  # the model
    trace: Trace  # of the T gradients, `seconds` those of the clock on the wall
    losses: np.ndarray  # [T] float64, of each batch at the model it was computed at
    lost: tuple[int, ...]  # workers that did not make it to the end


def serve(
    optimizer: optax.GradientTransformation,
    params: Tree,
    *,
    address: tuple[str, int],
    authkey: bytes,
    workers: int,
    rounds: int,
    key: jax.Array,
    bound: int | None = None,
    correction: optax.GradientTransformation | None = None,
    buffer: int = 1,
    timeout: float = 60.0,
    report: Callable[[int, dict, Callable[[], Tree]], None] | None = None,
) -> Served:
    """Serves `params` to n workers until T gradients have arrived.

    It starts when all workers have joined. One that is lost later is named in a warning, and the others go on; under a
    bound they no longer wait for it.

    Guarantees:
      * `run.scan_rounds` with `key` and `asynchronous(..., arrivals=recorded(trace))`, of the workers' loss and batch
        and the optimizer, correction and buffer here, gives these losses and params, up to float rounding.

    Args:
      optimizer: of the server; it is also given `value`, the mean of the K losses that workers found.
      params: the initial model.
      address: `(host, port)` to listen at; "127.0.0.1" is seen by this machine only, "" by all networks. The key
        says who may join, but nothing is encrypted.
      authkey: a secret shared with the workers.
      workers: n.
      rounds: T, of gradients, a multiple of K.
      key: the run's; workers are told what they need of it.
      bound: gradients a worker may be ahead of the slowest when it fetches; None for any number.
      correction: as in `asynchronous`.
      buffer: K.
      timeout: seconds to wait for all workers to join, and for a worker's next gradient.
      report: called after each gradient with how many have arrived, `{"loss", "worker", "staleness", "seconds"}`, and a
        function that returns the latest model. Gradients wait while it runs, however long; no worker is given up.

    Returns:
      A `Served`.

    Raises:
      ValueError: if an argument is out of its bounds.
      ConnectionError: if the address cannot be listened at, not all workers joined in time, or the last was lost.

    >>> import socket, threading
    >>> with socket.create_server(("127.0.0.1", 0)) as probe:
    ...     place = {"address": probe.getsockname(), "authkey": b"secret"}
    >>> model, examples = jnp.array(1.0), jnp.zeros(8)  # in truth, the worker is another process
    >>> options = place | {"batch": lambda x, key, worker: x, "worker": 0}
    >>> worker = threading.Thread(target=work, args=(lambda w, x, key: (w - x) ** 2, model, examples), kwargs=options)
    >>> worker.start()
    >>> result = serve(optax.sgd(0.25), model, workers=1, rounds=3, key=jax.random.key(0), **place)
    >>> print(result.params, result.losses, result.trace.worker)
    0.125 [1.     0.25   0.0625] [0 0 0]
    >>> worker.join()
    """
    whole = functools.partial(_validate.at_least_one, "serve")
    whole("workers", workers, "they are numbered from 0")
    whole("rounds", rounds, "it counts gradients")
    parts = _server.parts_of("serve", optimizer, correction, buffer)
    if rounds % buffer:
        raise ValueError(
            f"serve(rounds={rounds}, buffer={buffer}): the last {rounds % buffer} gradients would make no step; take "
            f"rounds={rounds + buffer - rounds % buffer}."
        )
    _server.check_bound("serve", bound)
    _check("serve", address, authkey, timeout)
    params = jax.tree.map(_server.strong, params)
    seed = int(_server.seed_of(_server.first_key(key)))
    server = _server.start(parts, params, workers)
    # Compiled before anybody joins, so that no worker waits for it.
    number, nobody, loss = np.int32(0), np.zeros(workers, bool), np.zeros((), jnp.zeros(()).dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def receive_fn(server, worker, gradient, value):
        return _server.receive(parts, _server.stored(server), worker, gradient, value)

    receive = receive_fn.lower(server, number, params, loss).compile()
    fetch = jax.jit(_server.fetch, donate_argnums=0).lower(server, nobody).compile()

    lines = _joining.gather(address, authkey, workers, timeout, _wire.describe(params), seed)
    size, beat = sum(x.nbytes for x in jax.tree.leaves(params)), min(1.0, timeout / 4)
    events: list[tuple] = []  # (worker, fetched, seconds, loss)
    sent, waits, lost = [0] * workers, set(range(workers)), []
    heard = [time.monotonic()] * workers

    def lose(worker: int, why: str) -> None:
        with lock:
            lines.pop(worker).close()
        waits.discard(worker)
        lost.append(worker)
        after = f"serve: worker {worker} {why} after {len(events)} of {rounds} gradients"
        if not lines:
            raise ConnectionError(f"{after}, and was the last; see what it says, and start all again.")
        warnings.warn(f"{after}; going on with {len(lines)} of {workers}.", stacklevel=3)

    def tell(worker: int, *message) -> None:
        try:
            with lock:
                _wire.send(lines[worker], *message)
        except _wire.LOST:
            lose(worker, "was lost")

    def release() -> None:
        nonlocal server
        while free := {w for w in waits if bound is None or sent[w] - min(sent[v] for v in lines) <= bound}:
            waits.difference_update(free)
            fetched = np.isin(np.arange(workers), sorted(free))
            if events:  # at first all have the initial model
                events[-1][1][:] |= fetched
                server = fetch(server, fetched)
            model = _wire.pack(server.params)
            for worker in sorted(free):
                heard[worker] = time.monotonic()
                tell(worker, _wire.PARAMS, sent[worker], 0.0, model)

    def take(worker: int) -> None:
        nonlocal server, before, heard
        try:
            message = _wire.receive(lines[worker], size)
            if message.kind != _wire.GRADIENT or message.number != sent[worker] or worker in waits:
                raise OSError("a message out of turn")
            gradient = _wire.unpack(message.payload, params)
        except _wire.LOST:
            return lose(worker, "was lost")
        now = time.monotonic()
        with np.errstate(over="ignore"):  # a float64 loss, of workers that have them, where the server has not
            value = np.asarray(message.value, loss.dtype)
        server, age = receive(server, np.int32(worker), gradient, value)
        events.append((worker, nobody.copy(), now - before, message.value))
        sent[worker] += 1
        waits.add(worker)
        if report is not None:
            row = {"loss": message.value, "worker": worker, "staleness": int(age), "seconds": now - before}
            report(len(events), row, lambda: jax.tree.map(jnp.copy, server.params))
            heard = [at + time.monotonic() - now for at in heard]
        before = now

    try:
        with _joining.reassured(lines, beat) as lock:
            before = time.monotonic()
            release()
            while len(events) < rounds:
                who = {line: worker for worker, line in lines.items()}
                for line in wait(list(who), beat):
                    if len(events) < rounds and who[line] in lines:
                        take(who[line])
                        release()
                now = time.monotonic()
                for worker in [w for w in lines if w not in waits and now - heard[w] > timeout]:
                    lose(worker, f"has been silent for {timeout:g} s")
                    release()
        _joining.take_leave(lines, sent)
    finally:
        for line in lines.values():
            line.close()
    worker, fetched, seconds, losses = (np.array(column) for column in zip(*events, strict=True))
    trace = Trace(worker.astype(np.int32), fetched, seconds.astype(np.float32))
    return Served(server.params, trace, losses, tuple(lost))


def work(
    loss: Callable,
    params: Tree,
    examples: Tree,
    *,
    batch: Callable,
    address: tuple[str, int],
    authkey: bytes,
    worker: int,
    timeout: float = 60.0,
) -> int:
    """Computes gradients for the server at `address` until it has enough.

    Args:
      loss: `(params, batch, key) -> [B]` or their mean, [], as in `asynchronous`.
      params: any of the model's shapes and dtypes; its values are the server's.
      examples: what batches are cut from; of all workers alike, if the run is to be replayed.
      batch: `(examples, key, worker) -> batch`, as in `asynchronous`.
      address: the server's `(host, port)`.
      authkey: the secret shared with it.
      worker: its number, from 0.
      timeout: seconds to wait for the server to listen, and then to say anything.

    Returns:
      How many of its gradients the server took.

    Raises:
      ValueError: if an argument is out of its bounds, or the loss has another shape.
      ConnectionError: if there is no such server, it does not let the worker in, or it is lost.
    """
    where = f"work(address={address!r}, worker={worker!r})"
    if isinstance(worker, bool) or not isinstance(worker, int | np.integer) or not 0 <= worker < 2**31:
        raise ValueError(f"work(worker={worker!r}): worker must be a whole number of at least 0, below the server's n.")
    _check("work", address, authkey, timeout)
    params, examples = jax.tree.map(_server.strong, params), jax.tree.map(jnp.asarray, examples)
    gradient_of = jax.jit(_server.gradient_of("work", loss, batch))
    gradient_of = gradient_of.lower(params, examples, np.uint32(0), np.int32(0), np.int32(0)).compile()
    try:
        line = _wire.connect(address, authkey, timeout)
    except AuthenticationError:
        raise ConnectionError(f"{where}: the server there has another authkey; give both the same.") from None
    except _wire.LOST as error:
        raise ConnectionError(
            f"{where}: no parameter server answers there ({error}); start serve(...) first, or correct the address."
        ) from None
    size, count, seed = sum(x.nbytes for x in jax.tree.leaves(params)), 0, np.uint32(0)
    answer = None  # what is not sent yet
    with line:
        try:
            _wire.send(line, _wire.HELLO, int(worker), 0.0, _wire.describe(params))
            while (message := _wire.receive(line, size)).kind != _wire.DONE:
                if message.kind == _wire.REFUSED:
                    break
                if message.kind == _wire.WELCOME:
                    seed = np.uint32(message.number)
                elif message.kind == _wire.PARAMS:
                    model = jax.tree.map(jnp.asarray, _wire.unpack(message.payload, params))
                    value, gradient = gradient_of(model, examples, seed, np.int32(worker), np.int32(message.number))
                    answer = message.number, float(value), _wire.pack(gradient)
                elif message.kind != _wire.BUSY:
                    raise OSError("a message of no known kind")
                if answer is not None and not line.poll():  # what came meanwhile may be that the server has enough
                    _wire.send(line, _wire.GRADIENT, *answer)
                    count, answer = answer[0] + 1, None
        except _wire.LOST:
            raise ConnectionError(
                f"{where}: the server was lost after {count} gradients of this worker; see what it says, and start all "
                "again."
            ) from None
    if message.kind == _wire.REFUSED:
        raise ConnectionError(f"{where}: {bytes(message.payload).decode()}")
    return message.number


def _check(where: str, address: tuple[str, int], authkey: bytes, timeout: float) -> None:
    fits = isinstance(address, tuple) and len(address) == 2 and isinstance(address[0], str)
    if not fits or isinstance(address[1], bool) or not isinstance(address[1], int) or not 0 < address[1] < 2**16:
        raise ValueError(
            f"{where}(address={address!r}): address must be a host and a port in [1, 65535]; a good start is "
            '("127.0.0.1", 5005).'
        )
    if not isinstance(authkey, bytes) or not authkey:
        raise ValueError(f"{where}(authkey=...): authkey must be at least one byte; secrets.token_bytes(16) makes one.")
    _validate.positive(where, "timeout", timeout, "60 seconds is usual")
