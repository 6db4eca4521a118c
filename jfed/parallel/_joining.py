"""How workers join a parameter server, and how they part."""

import contextlib
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, wait

from jfed.parallel import _wire

_GOODBYE = 5.0  # seconds that workers get to take leave in


def gather(
    address: tuple[str, int], authkey: bytes, workers: int, timeout: float, description: bytes, seed: int
) -> dict[int, Connection]:
    """The lines to all workers, once they have joined."""
    try:
        listener = socket.create_server(address, backlog=workers + 8)
    except OSError as error:
        raise ConnectionError(
            f"serve(address={address!r}): cannot listen there ({error}); choose a free port of this machine."
        ) from None
    lines: dict[int, Connection] = {}
    deadline, beat = time.monotonic() + timeout, min(1.0, timeout / 4)
    with listener, contextlib.ExitStack() as otherwise:
        otherwise.callback(lambda: [line.close() for line in lines.values()])
        while len(lines) < workers:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = sorted(set(range(workers)) - lines.keys())
                raise ConnectionError(
                    f"serve(address={address!r}, workers={workers}): workers {missing} did not join within "
                    f"{timeout:g} s; start work(...) with those numbers sooner, or raise timeout."
                )
            if wait([listener], min(left, beat)):
                _let_in(listener, authkey, timeout, workers, description, seed, lines)
            for worker in list(lines):
                try:
                    _wire.send(lines[worker], _wire.BUSY)
                except _wire.LOST:
                    lines.pop(worker).close()
                    warnings.warn(f"serve: worker {worker} was lost before the start; it may join again.", stacklevel=3)
        otherwise.pop_all()
    return lines


def _let_in(
    listener: socket.socket,
    authkey: bytes,
    timeout: float,
    workers: int,
    description: bytes,
    seed: int,
    lines: dict[int, Connection],
) -> None:
    """Adds to `lines` who knocks, or says why not, to both sides."""
    try:
        line, hello = _wire.accept(listener, authkey, timeout / 2)
    except AuthenticationError:
        return warnings.warn("serve: somebody with another authkey was turned away; give both the same.", stacklevel=4)
    except _wire.LOST:
        return warnings.warn("serve: somebody knocked and did not speak as a worker does; ignored.", stacklevel=4)
    theirs, why = bytes(hello.payload), ""
    if hello.kind != _wire.HELLO:
        why = "the server did not understand; run the same version of jfed on both sides."
    elif not hello.number < workers:
        why = f"the server has workers 0 to {workers - 1}; give one of these numbers."
    elif hello.number in lines:
        why = f"the server has a worker {hello.number} already; give each a number of its own."
    elif differs := _wire.difference(description, theirs):
        why = f"the server's params have {differs}; make the same model on both sides."
    with contextlib.suppress(*_wire.LOST):
        if why:
            _wire.send(line, _wire.REFUSED, 0, 0.0, why.encode())
        else:
            _wire.send(line, _wire.WELCOME, seed)
            _wire.patience(line, timeout / 2)  # a worker stuck in a message must not make the others give up
            lines[hello.number] = line
            return
    line.close()
    if why:
        warnings.warn(f"serve: worker {hello.number} was turned away: {why}", stacklevel=4)


@contextlib.contextmanager
def reassured(lines: dict[int, Connection], beat: float) -> Iterator[threading.Lock]:
    """Tells all workers every `beat` seconds that the server lives, however long it is at something else.

    Whoever writes to a line, or adds or takes one, must hold the lock.
    """
    lock, over = threading.Lock(), threading.Event()

    def tell_all() -> None:
        while not over.wait(beat):
            with lock:
                for line in lines.values():
                    with contextlib.suppress(*_wire.LOST):  # `serve` notices when it reads
                        _wire.send(line, _wire.BUSY)

    thread = threading.Thread(target=tell_all, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()


def take_leave(lines: dict[int, Connection], sent: list[int]) -> None:
    """Tells all workers that it is over, and reads what they still send, until they hang up.

    To close a socket that has unread bytes resets it, and the worker might lose the last message.
    """
    for worker, line in lines.items():
        with contextlib.suppress(*_wire.LOST):
            _wire.send(line, _wire.DONE, sent[worker])
    left, deadline = list(lines.values()), time.monotonic() + _GOODBYE
    while left and time.monotonic() < deadline:
        for line in wait(left, max(deadline - time.monotonic(), 0.0)):
            try:
                line.recv_bytes()
            except _wire.LOST:
                left.remove(line)
