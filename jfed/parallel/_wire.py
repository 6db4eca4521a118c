"""Messages of a parameter server over TCP: raw arrays behind a header of sixteen bytes, never a pickle.

The transport is `multiprocessing.connection` of the standard library, with its mutual challenge of a shared key. Every
wait on a socket ends: at once if the process at the other end dies, else when no byte has moved for so many seconds.
For POSIX systems only, where SO_RCVTIMEO and SO_SNDTIMEO take two C longs.
"""

import hashlib
import itertools
import socket
import struct
import sys
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import NamedTuple

import jax
import numpy as np

from jfed.core import Tree

HELLO, WELCOME, PARAMS, GRADIENT, BUSY, DONE, REFUSED = (bytes([i]) for i in range(7))
LOST = (EOFError, OSError)
"""What reading or writing raises when the other side is gone, silent for too long, or not speaking this language."""

_HEADER = struct.Struct("<cxxxId")  # kind, a number, a loss
_TEXT = 2**16  # bytes; descriptions of params and refusals
_DIGEST = hashlib.sha256().digest_size
_HANDSHAKE = 10.0  # seconds


class Message(NamedTuple):
    """One message."""

    kind: bytes
    number: int
    value: float
    payload: memoryview


def send(line: Connection, kind: bytes, number: int = 0, value: float = 0.0, payload: bytes = b"") -> None:
    """Sends a message; raises one of `LOST`."""
    line.send_bytes(_HEADER.pack(kind, number, value) + payload)


def receive(line: Connection, size: int = 0) -> Message:
    """Waits for a message with a payload of at most `size` bytes, or a text; raises one of `LOST`."""
    message = line.recv_bytes(_HEADER.size + max(size, _TEXT))
    if len(message) < _HEADER.size:
        raise OSError("a message without a header")
    return Message(*_HEADER.unpack_from(message), memoryview(message)[_HEADER.size :])


def describe(tree: Tree) -> bytes:
    """The structure of a tree of arrays: its SHA-256, then words, a line a leaf, as far as there is room."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    words = [f"{jax.tree_util.keystr(path)} {np.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves]
    text = "\n".join([f"{sys.byteorder}-endian", *words]).encode()
    return hashlib.sha256(text).digest() + text[: _TEXT - _DIGEST]


def difference(one: bytes, other: bytes) -> str:
    """The first line in which two descriptions differ, or "" if they describe the same."""
    if one == other:
        return ""
    lines = [x[_DIGEST:].decode(errors="replace").splitlines() for x in (one, other)]
    pairs = itertools.zip_longest(*lines, fillvalue="nothing")
    beyond = f"other leaves after the first {len(lines[0])}"
    return next((f"{a} and not {b}" for a, b in pairs if a != b), f"{beyond}, too many to name,")


def pack(tree: Tree) -> bytes:
    """The bytes of all leaves, end to end."""
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))


def unpack(payload: memoryview, like: Tree) -> Tree:
    """The tree that was packed, of the shapes and dtypes of `like`; raises `OSError` if it cannot be."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.nbytes for x in leaves]).tolist()
    if len(payload) != (ends[-1] if ends else 0):
        raise OSError("a message of another length than the params")
    starts = [0, *ends][:-1]
    arrays = [
        np.frombuffer(payload[a:b], np.dtype(x.dtype)).reshape(x.shape)
        for a, b, x in zip(starts, ends, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def accept(listener: socket.socket, authkey: bytes, timeout: float) -> tuple[Connection, Message]:
    """Lets in somebody who knocks, and what it says first; raises `AuthenticationError` or one of `LOST`."""
    line = _line(listener.accept()[0], min(timeout, _HANDSHAKE))
    try:
        deliver_challenge(line, authkey)
        answer_challenge(line, authkey)
        return line, receive(line)
    except BaseException as error:
        line.close()
        raise _as_refusal(error) from error


def connect(address: tuple[str, int], authkey: bytes, timeout: float) -> Connection:
    """Knocks until somebody listens; raises `AuthenticationError` or one of `LOST`."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            plug = socket.create_connection(address, max(deadline - time.monotonic(), 0.1))
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    line = _line(plug, timeout)
    try:
        answer_challenge(line, authkey)
        deliver_challenge(line, authkey)
    except BaseException as error:
        line.close()
        raise _as_refusal(error) from error
    return line


def patience(line: Connection, seconds: float) -> None:
    """Ends every read and write on a line that makes no progress for so long."""
    with socket.socket(fileno=line.fileno()) as plug:
        _patience(plug, seconds)
        plug.detach()


def _line(plug: socket.socket, seconds: float) -> Connection:
    plug.settimeout(None)
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _patience(plug, seconds)
    return Connection(plug.detach())


def _patience(plug: socket.socket, seconds: float) -> None:
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        plug.setsockopt(socket.SOL_SOCKET, option, limit)


def _as_refusal(error: BaseException) -> BaseException:
    # Python 3.11 asserts that the other side opens with a challenge.
    return AuthenticationError("no challenge") if isinstance(error, AssertionError) else error
