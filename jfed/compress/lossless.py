"""The last step to a file or a socket: a message in fewer bytes, and the same message again, bit for bit.

Positions become Golomb codes, codes of up to 8 bits are entropy-coded where that is shorter, and empty places of
`threshold` are left out; floats are written as they are. This is work of the host. `estimated_nbytes` tells inside a
compiled program what would come of it, to within 0.3 % of messages of more than 3 kB.

Whoever decodes has a message of the same structure, so that neither shapes nor settings are sent.

Sources: Golomb codes of Sattler et al. 2019 (arXiv:1903.02891); Elias codes of Alistarh et al. 2017
(arXiv:1610.02132); the entropy coder of Duda 2013 (arXiv:1311.2540).
"""

import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jfed.compress import _codes, _entropy, _estimate, _walk
from jfed.compress._codes import elias_gamma, elias_gamma_decode, elias_omega, elias_omega_decode, golomb, golomb_decode
from jfed.compress.message import nodes
from jfed.core import Tree

__all__ = [
    "decode",
    "elias_gamma",
    "elias_gamma_decode",
    "elias_omega",
    "elias_omega_decode",
    "encode",
    "estimated_nbytes",
    "golomb",
    "golomb_decode",
]

_ODD = 4  # before packed codes that are not as an operator packs them; `_entropy.shorten` begins with less


def encode(message: Tree, *, levels: Literal["entropy", "elias"] = "entropy") -> bytes:
    """A message as bytes, from which `decode` makes it again.

    What is in them: a checksum of 4 bytes; Golomb codes of positions; packed codes, entropy-coded where that is
    shorter; codes of 8 and 16 bits the same way, byte by byte; everything else as it is.

    Args:
      message: what a compressor made of one update, with or without `Encoded` nodes; not batched by `vmap`, of which
        positions and packed codes would be written as they are.
      levels: how those of `qsgd` and `terngrad` are written. `"elias"` is QSGD's own code: gaps between those that are
        not 0, signs and levels in Elias' omega code. `"entropy"` is shorter from some dozens of bytes on.

    Returns:
      The bytes.

    Raises:
      ValueError: if `levels` is none of these.

    >>> from jfed import compress
    >>> largest = compress.ternary(0.01)
    >>> x = jax.random.normal(jax.random.key(0), (100_000,))
    >>> message, _ = largest.update(x, largest.init(x))
    >>> data = encode(message)
    >>> compress.nbytes(message), len(data)
    (2254, 1148)
    >>> bool(jnp.all(compress.decode(decode(data, message)) == compress.decode(message)))
    True
    """
    if levels not in ("entropy", "elias"):
        raise ValueError(f"encode(levels={levels!r}): it must be 'entropy' or 'elias'.")
    out: list[bytes] = []
    _walk.through(message, _writer(out, levels == "elias"))
    body = b"".join(out)
    return zlib.crc32(body, _fingerprint(message)).to_bytes(4, "little") + body


def decode(data: bytes, like: Tree) -> Tree:
    """The message that `encode` was given.

    Args:
      data: from `encode`.
      like: a message of the same compressor for the same model, of arrays or of their shapes, as `jax.eval_shape`
        gives them.

    Returns:
      The message, of jax arrays (numpy's, where jax has no such dtype).

    Raises:
      ValueError: if the checksum is wrong: the data are damaged or cut short, or `like` has another structure.
    """
    body = memoryview(data)[4:]
    if zlib.crc32(body, _fingerprint(like)).to_bytes(4, "little") != data[:4]:
        raise ValueError(
            f"decode(data of {len(data)} bytes): the checksum is wrong; the data are damaged or cut short, or `like` "
            "is no message of the compressor and model that they come from."
        )
    return _walk.through(like, _reader(body))


def estimated_nbytes(message: Tree) -> jax.Array:
    """What `len(encode(message))` will be, [] float32, inside a compiled program and under `vmap`.

    Golomb codes are counted exactly, entropy-coded arrays by the entropy of their histogram and what the coder adds:
    within 0.3 % of messages of more than 3 kB, and a dozen bytes of smaller ones with few arrays.

    >>> from jfed import compress
    >>> levels = compress.qsgd(7)
    >>> x = jax.random.normal(jax.random.key(0), (100_000,))
    >>> message, _ = levels.update(x, levels.init(x), key=jax.random.key(1))
    >>> abs(float(jax.jit(estimated_nbytes)(message)) / len(encode(message)) - 1) < 0.003
    True
    """
    sizes: list[Any] = [4]
    _walk.through(message, _estimate.estimator(sizes))
    return sum(jnp.asarray(size, jnp.float32) for size in sizes)


def _writer(out: list[bytes], elias: bool) -> _walk.Coder:
    def kept(rows, live):
        """Rows without those in empty slots, if these are all alike and so need be written only once."""
        if live is None or live.size != len(rows) or live.all():
            return rows
        empty = rows[~live]
        alike = bool((empty == empty[0]).all())
        out.append(bytes([alike]) + (empty[0].tobytes() if alike else b""))
        return rows[live] if alike else rows

    def plain(x, live):
        x = np.asarray(x)
        if x.size:
            rows = kept(np.frombuffer(x.tobytes(), np.uint8).reshape(x.size, -1), live)
            out.extend([_entropy.shorten(column, 8) for column in rows.T] if _walk.by_byte(x) else [rows.tobytes()])
        return x

    def packed(x, packing, live):
        x = np.asarray(x)
        codes = _walk.unpacked(x, packing, np)
        if not np.array_equal(_walk.repacked(codes, packing), x.reshape(-1)):
            out.append(bytes([_ODD]) + x.tobytes())
            return x
        codes = kept(codes, live)
        if elias and packing.levels:
            out.append(_entropy.shorten_levels(codes, packing.levels))
        else:
            out.append(_entropy.shorten(codes, packing.width))
        return x

    def places(x, places):
        x, (n, b, k) = np.asarray(x), places
        slots = _walk.slots(x, places, np)
        if slots.dtype == bool:
            positions = np.flatnonzero(slots)
        else:
            positions = (slots + b * np.arange(n)[:, None])[slots < b]
        if (np.diff(positions) > 0).all() and positions.size <= n * k:
            again, live = _walk.placed(positions, places)
            if live.sum() == positions.size and np.array_equal(again.reshape(x.shape), x):
                out.append(_entropy.varint(1 + n * k - positions.size) + _codes.golomb(positions, n * b))
                return x, live
        out.append(_entropy.varint(0) + x.tobytes())
        return x, None

    return _walk.Coder(plain, packed, places)


def _reader(data: memoryview) -> _walk.Coder:
    at = 0

    def take(size):
        nonlocal at
        at += size
        return np.frombuffer(data[at - size : at], np.uint8)

    def shortened(count, width, levels=0):
        nonlocal at
        codes, used = _entropy.lengthen(data[at:], count, width, levels)
        at += used
        return codes

    def kept(size, itemsize, live, read):
        """Rows [size, itemsize] of which `read(count)` makes those that were written."""
        if live is None or live.size != size or live.all() or not take(1)[0]:
            return read(size)
        rows = np.tile(take(itemsize), (size, 1))
        rows[live] = read(int(live.sum()))
        return rows

    def plain(x, live):
        dtype, size = np.dtype(x.dtype), math.prod(x.shape)
        if not size:
            return _array(np.zeros(x.shape, dtype))

        def read(count):
            if _walk.by_byte(x):
                return np.stack([shortened(count, 8) for _ in range(dtype.itemsize)], 1)
            return take(count * dtype.itemsize).reshape(count, dtype.itemsize)

        return _array(np.frombuffer(kept(size, dtype.itemsize, live, read).tobytes(), dtype).reshape(x.shape))

    def packed(x, packing, live):
        if data[at] == _ODD:
            return _array(take(1 + math.prod(x.shape))[1:].reshape(x.shape))
        codes = kept(packing.count, 1, live, lambda n: shortened(n, packing.width, packing.levels)[:, None])
        return _array(_walk.repacked(codes[:, 0], packing).reshape(x.shape))

    def places(x, places):
        nonlocal at
        n, b, k = places
        empty, at = _entropy.read_varint(data, at)
        if not empty:
            return _array(take(math.prod(x.shape)).reshape(x.shape)), None
        positions, used = _codes.read_golomb(data[at:], n * k + 1 - empty, n * b)
        at += used
        again, live = _walk.placed(positions, places)
        return _array(again.reshape(x.shape)), live

    return _walk.Coder(plain, packed, places)


def _array(x: np.ndarray) -> Any:
    return jnp.array(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _fingerprint(message: Tree) -> int:
    """A checksum of a message's structure, the same in every process."""
    leaves = jax.tree_util.tree_leaves_with_path(message)
    parts = [f"{jax.tree_util.keystr(path)} {tuple(x.shape)} {np.dtype(x.dtype)}" for path, x in leaves]
    parts += [f"{node.decoder.name} {_plainly(node.decoder.settings)}" for node in nodes(message)]
    return zlib.crc32("; ".join(parts).encode())


def _plainly(setting: Any) -> str:
    """A setting as text, without what differs between processes or in a float's last digits."""
    if isinstance(setting, tuple):
        return f"({', '.join(_plainly(s) for s in setting)})"
    if isinstance(setting, float):
        return f"{setting:.5g}"
    return repr(setting) if setting is None or isinstance(setting, str | int) else type(setting).__name__
