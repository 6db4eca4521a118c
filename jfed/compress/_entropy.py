"""Codes of up to 8 bits in the fewest bytes, on the host: packed, entropy-coded, or split off from the usual one.

The entropy coder is rANS (Duda 2013, arXiv:1311.2540), with states side by side so that numpy has work to do. Of
200,000 codes of `qsgd(7)`, nearly all of them 0, the libraries that come with Python take more bytes than the entropy:
zlib 45 %, bz2 24 %, lzma 60 %, zlib's Huffman coder alone 370 %; what is here takes 1.4 %.
"""

from typing import Any

import numpy as np

from jfed.compress import _pack
from jfed.compress._codes import elias_gamma, elias_omega, elias_omega_decode, golomb, read_elias_gamma, read_golomb

_PER_STATE = 600  # bytes that one state of the entropy coder takes up, so that 3 for itself are little
_CHUNK = 256  # steps whose frequencies are looked up at once
_SCALE = 14  # bits of a symbol's frequency
_LOW = 2**16  # a state lies in [_LOW, 2^32)
_RAW, _ENTROPY, _SPLIT, _ELIAS = range(4)  # how an array of codes is written


def shorten(codes: np.ndarray, width: int, *, split: bool = True) -> bytes:
    """Codes [n] uint8 below 2^width in the fewest bytes of what is tried, and a byte that says what that was.

    They are packed, or entropy-coded; or, where more than 15 of 16 are alike, those that are not are written, with
    their positions.
    """
    n, raw = codes.size, bytes([_RAW]) + pack(codes, width).tobytes()
    if not n:
        return raw
    counts = np.bincount(codes, minlength=2**width)
    usual = int(np.argmax(counts))
    if split and 16 * counts[usual] > 15 * n:
        others = np.flatnonzero(codes != usual)
        head = bytes([_SPLIT, usual]) + varint(others.size) + golomb(others, n)
        return min(head + shorten(codes[others], width, split=False), raw, key=len)
    if entropy_nbytes(counts) + 1 > len(raw):
        return raw
    return min(bytes([_ENTROPY]) + _entropy(codes, counts), raw, key=len)


def shorten_levels(codes: np.ndarray, levels: int) -> bytes:
    """Codes of -levels to levels as QSGD writes them: of what is not 0 signs, and gaps and levels in omega codes."""
    signed = codes.astype(np.int64) - levels
    places = np.flatnonzero(signed)
    words = np.stack([np.diff(places, prepend=-1), np.abs(signed[places])], 1).reshape(-1)
    signs, words = np.packbits(signed[places] < 0).tobytes(), elias_omega(words)
    return bytes([_ELIAS]) + varint(places.size) + varint(len(words)) + signs + words


def lengthen(data: bytes, count: int, width: int, levels: int = 0) -> tuple[np.ndarray, int]:
    """The inverse of `shorten` and of `shorten_levels`: codes [count] uint8."""
    kind, at = data[0], 1
    if kind == _RAW:
        size = _pack.nbytes(count, width)
        return unpack(np.frombuffer(data[at : at + size], np.uint8), width)[:count], at + size
    if kind == _ENTROPY:
        codes, used = _read_entropy(data[at:], count, width)
        return codes, at + used
    if kind == _SPLIT:
        codes = np.full(count, data[at], np.uint8)
        k, at = read_varint(data, at + 1)
        others, used = read_golomb(data[at:], k, count)
        at += used
        codes[others], used = lengthen(data[at:], k, width)
        return codes, at + used
    k, at = read_varint(data, at)
    size, at = read_varint(data, at)
    begin = at + (k + 7) // 8
    negative = np.unpackbits(np.frombuffer(data[at:begin], np.uint8), count=k)
    words = elias_omega_decode(data[begin : begin + size], 2 * k)
    signed = np.zeros(count, np.int64)
    signed[np.cumsum(words[::2]) - 1] = np.where(negative, -words[1::2], words[1::2])
    return (signed + levels).astype(np.uint8), begin + size


def entropy_nbytes(counts: Any, xp: Any = np) -> Any:
    """Bytes that the entropy coder takes for symbols of these counts [2^width], nearly; `xp` is numpy or jax's."""
    n = xp.maximum(xp.sum(counts), 1)
    share = counts * (2**_SCALE / n)
    frequency = xp.where(counts > 0, xp.maximum(xp.round(share), 1), 0)
    bits = xp.sum(counts * xp.log2(xp.maximum(xp.sum(frequency), 1) / xp.maximum(frequency, 1)))
    table = xp.sum(2 * xp.floor(xp.log2(frequency + 1)) + 1)
    states = xp.maximum(1, xp.round(bits / 8 / _PER_STATE))
    return 1 + xp.ceil(table / 8) + bits / 8 + 3 * states  # a state takes 4, and holds 8 of the bits


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """`_pack.pack` on the host; codes [..., n] give bytes [..., m]."""
    g = _pack.group(width)
    rows = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // g) * g), codes.dtype)
    rows[..., : codes.shape[-1]] = codes
    rows = rows.reshape(*codes.shape[:-1], g, -1)
    out = np.zeros((*codes.shape[:-1], g * width // 8, rows.shape[-1]), np.uint8)
    for i in range(g):
        for byte in range(g * width // 8):
            shift = i * width - 8 * byte
            if -width < shift < 8:
                row = rows[..., i, :]
                out[..., byte, :] |= (row << shift if shift >= 0 else row >> -shift).astype(np.uint8)
    return out.reshape(*codes.shape[:-1], -1)


def unpack(packed: Any, width: int, xp: Any = np) -> Any:
    """The inverse of `pack`, with what filled up the last group: bytes [..., m] give codes [..., n]."""
    g = _pack.group(width)
    parts = packed.reshape(*packed.shape[:-1], g * width // 8, -1).astype(np.uint8 if width <= 8 else np.uint32)
    rows = []
    for i in range(g):
        row = 0
        for byte in range(g * width // 8):
            shift = i * width - 8 * byte
            if -width < shift < 8:
                part = parts[..., byte, :]
                row = row | (part >> shift if shift >= 0 else part << -shift)
        rows.append(row & (2**width - 1))
    return xp.concatenate(rows, -1)


def varint(n: int) -> bytes:
    """A whole number in bytes of 7 bits, lowest first."""
    out = []
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends."""
    n, shift = 0, 0
    while data[at] > 127:
        n |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return n | data[at] << shift, at + 1


def _entropy(symbols: np.ndarray, counts: np.ndarray) -> bytes:
    """How many states, a table of frequencies, the last states, and the words that states shed on the way."""
    frequency = _frequencies(counts)
    f = frequency.astype(np.uint64)
    full, rest = f << np.uint64(32 - _SCALE), np.uint64(2**_SCALE) - f
    begin = np.cumsum(f) - f
    lanes = max(1, round(float(entropy_nbytes(counts)) / _PER_STATE))
    rows = np.full((-(-symbols.size // lanes), lanes), np.argmax(frequency), np.uint8)
    rows.reshape(-1)[: symbols.size] = symbols
    shed, words = np.empty(rows.shape, bool), np.empty(rows.shape, np.uint16)
    x = np.full(lanes, _LOW, np.uint64)
    for last in range(len(rows), 0, -_CHUNK):  # backwards: what is coded last is read first
        first = max(0, last - _CHUNK)
        s = rows[first:last]
        steps = zip(full[s], f[s], rest[s], begin[s], shed[first:last], words[first:last], strict=True)
        for full_t, f_t, rest_t, begin_t, shed_t, words_t in reversed(list(steps)):
            np.greater_equal(x, full_t, out=shed_t)
            words_t[:] = x  # the lowest bits
            x >>= shed_t.astype(np.uint64) << np.uint64(4)
            x += x // f_t * rest_t + begin_t  # = x // f 2^scale + x % f + begin
    head = varint(lanes) + elias_gamma(frequency + 1)
    return head + x.astype("<u4").tobytes() + words[shed].astype("<u2").tobytes()


def _read_entropy(data: bytes, count: int, width: int) -> tuple[np.ndarray, int]:
    lanes, begin = read_varint(data, 0)
    table, used = read_elias_gamma(data[begin : begin + 4 * 2**width], 2**width)
    at, frequency = begin + used, table - 1
    symbol = np.repeat(np.arange(2**width, dtype=np.uint8), frequency)
    if symbol.size != 2**_SCALE:
        raise ValueError("decode(data): frequencies do not add up; the data are damaged, send them again.")
    f = frequency[symbol].astype(np.uint64)
    place = (np.arange(2**_SCALE) - (np.cumsum(frequency) - frequency)[symbol]).astype(np.uint64)
    rows = np.empty((-(-count // lanes), lanes), np.uint8)
    x = np.frombuffer(data[at : at + 4 * lanes], "<u4").astype(np.uint64)
    at += 4 * lanes
    words = np.frombuffer(data[at : at + (len(data) - at) // 2 * 2], "<u2").astype(np.uint64)
    taken = 0
    for t in range(len(rows)):
        slot = x & np.uint64(2**_SCALE - 1)
        rows[t] = symbol[slot]
        x = f[slot] * (x >> np.uint64(_SCALE)) + place[slot]
        low = np.flatnonzero(x < _LOW)
        if low.size:
            x[low] = (x[low] << np.uint64(16)) | words[taken : taken + low.size]
            taken += low.size
    return rows.reshape(-1)[:count], at + 2 * taken


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts scaled to add up to 2^scale, none that was above 0 becoming 0."""
    share = counts * (2**_SCALE / counts.sum())
    frequency = np.where(counts > 0, np.maximum(np.floor(share), 1), 0).astype(np.int64)
    short = 2**_SCALE - frequency.sum()
    if short > 0:
        frequency[np.argsort(frequency - share, kind="stable")[:short]] += 1
    for _ in range(-short):
        frequency[np.argmax(frequency)] -= 1
    return frequency
