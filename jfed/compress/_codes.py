"""Golomb and Elias codes of whole numbers, on the host.

Words are written and read by whole-array operations; only an Elias stream, in which each word says where the next
begins, is walked one by one. `read_...` functions return what they read and how many bytes it took.

Letters: d numbers, k of them kept, p = k / d, b the bits of a Golomb code's remainder.
"""

import math
from typing import Any

import numpy as np


def golomb(positions: Any, d: int) -> bytes:
    """Positions as Golomb codes of the gaps between them.

    The code of sparse ternary compression (Sattler et al. 2019, arXiv:1903.02891): a gap's quotient by 2^b in unary,
    its remainder in b bits. Here all quotients come before all remainders.
    A position takes b + 1 / (1 - (1-p)^(2^b)) bits if all sets of k positions are as likely.

    Args:
      positions: [k] integers in [0, d), ascending.
      d: numbers that they are positions of.

    Returns:
      Bytes from which `golomb_decode` finds the positions, given k and d.

    Raises:
      ValueError: if they are not ascending, or one lies outside [0, d).

    >>> coded = golomb([3, 40, 41], 64)
    >>> len(coded), golomb_decode(coded, 3, 64).tolist()
    (3, [3, 40, 41])
    """
    positions = np.asarray(positions, np.int64)
    gaps = np.diff(positions, prepend=-1) - 1
    if positions.size and (gaps.min() < 0 or positions[-1] >= d):
        raise ValueError(f"golomb(positions, d={d}): positions must ascend within [0, {d}); sort them.")
    b = int(golomb_parameter(positions.size / max(d, 1)))
    ends = np.cumsum((gaps >> b) + 1)
    unary = np.zeros(ends[-1] if ends.size else 0, np.uint8)
    unary[ends - 1] = 1
    return np.packbits(np.concatenate([unary, _bits(gaps & (2**b - 1), b)])).tobytes()


def golomb_decode(data: bytes, count: int, d: int) -> np.ndarray:
    """The inverse of `golomb`: [count] int64 positions.

    Raises:
      ValueError: if the data end too soon.
    """
    return read_golomb(data, count, d)[0]


def read_golomb(data: bytes, count: int, d: int) -> tuple[np.ndarray, int]:
    b = int(golomb_parameter(count / max(d, 1)))
    longest = ((max(d - count, 0) >> b) + count * (b + 1) + 7) // 8
    bits = np.unpackbits(np.frombuffer(data[:longest], np.uint8))
    ends = np.flatnonzero(bits)[:count]
    begin = int(ends[-1]) + 1 if ends.size else 0
    if ends.size < count or bits.size < begin + count * b:
        raise _short("golomb_decode", data)
    gaps = ((np.diff(ends, prepend=-1) - 1) << b) + _numbers(bits[begin : begin + count * b], b, count)
    return np.cumsum(gaps + 1) - 1, (begin + count * b + 7) // 8


def golomb_parameter(p: Any, xp: Any = np) -> Any:
    """The b that makes codes shortest: 1 + floor(log2(log(phi - 1) / log(1 - p))), phi the golden ratio, at least 0.

    >>> [int(golomb_parameter(p)) for p in (0.1, 0.01, 0.001)]
    [3, 6, 9]
    """
    p = xp.clip(p, 1e-10, 0.999)
    return xp.maximum(1 + xp.floor(xp.log2(math.log((math.sqrt(5) - 1) / 2) / xp.log1p(-p))), 0)


def elias_gamma(values: Any) -> bytes:
    """Elias' gamma code: a number of n bits after n - 1 zeros (Elias 1975).

    Args:
      values: [k] integers in [1, 2^32).

    Raises:
      ValueError: if one is not.

    >>> elias_gamma([1, 2, 5])[0]  # 1, 010 and the first four bits of 00101
    162
    """
    values = _positive("elias_gamma", values)
    return _joined(values.astype(np.uint64), 2 * _log2(values) + 1)


def elias_gamma_decode(data: bytes, count: int) -> np.ndarray:
    """The inverse of `elias_gamma`: [count] int64.

    Raises:
      ValueError: if the data end too soon.
    """
    return read_elias_gamma(data, count)[0]


def read_elias_gamma(data: bytes, count: int) -> tuple[np.ndarray, int]:
    bits, window = _windows(data)
    place = np.where(bits == 1, np.arange(bits.size), bits.size)
    first = np.minimum.accumulate(place[::-1])[::-1]  # the next 1 from each bit on
    zeros = first - np.arange(bits.size)
    begins, end = _words("elias_gamma_decode", data, zeros * 2 + 1, count)
    return _read(window, first[begins], zeros[begins] + 1), (end + 7) // 8


def elias_omega(values: Any) -> bytes:
    """Elias' omega code: a number after its length after the length of that and so on (Elias 1975).

    The code of QSGD (Alistarh et al. 2017, arXiv:1610.02132).

    Args:
      values: [k] integers in [1, 2^32).

    Raises:
      ValueError: if one is not.

    >>> elias_omega([1, 2, 5])[0]  # 0, 100 and the first four bits of 101010
    74
    """
    left = _positive("elias_omega", values)
    codes, lengths = np.zeros(left.shape, np.uint64), np.ones(left.shape, np.int64)
    while np.any(more := left > 1):
        size = _log2(left)
        codes = np.where(more, codes | (left.astype(np.uint64) << lengths.astype(np.uint64)), codes)
        lengths = np.where(more, lengths + size + 1, lengths)
        left = np.where(more, size, left)
    return _joined(codes, lengths)


def elias_omega_decode(data: bytes, count: int) -> np.ndarray:
    """The inverse of `elias_omega`: [count] int64.

    Raises:
      ValueError: if the data end too soon.
    """
    bits, window = _windows(data)
    # The word that would begin at each bit; those that do are found afterwards.
    value, end = np.ones(bits.size, np.int64), np.arange(bits.size)
    going = np.flatnonzero(bits)
    while going.size:
        size = np.minimum(value[going] + 1, 33)  # longer ones are no words
        value[going] = _read(window, end[going], size)
        end[going] = end[going] + size
        going = going[end[going] < bits.size]
        going = going[bits[end[going]] == 1]
    begins, _ = _words("elias_omega_decode", data, end + 1 - np.arange(bits.size), count)
    return value[begins]


def _bits(values: np.ndarray, width: int) -> np.ndarray:
    """Numbers [n] as flags [n width], the highest bit first."""
    return ((values[:, None] >> np.arange(width - 1, -1, -1)) & 1).astype(np.uint8).reshape(-1)


def _numbers(bits: np.ndarray, width: int, count: int) -> np.ndarray:
    return bits.reshape(count, width) @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))


def _joined(codes: np.ndarray, lengths: np.ndarray) -> bytes:
    """Words of different lengths end to end."""
    ends = np.cumsum(lengths)
    left = np.repeat(ends, lengths) - 1 - np.arange(ends[-1] if ends.size else 0)  # bits of the word still to come
    return np.packbits((np.repeat(codes, lengths) >> left.astype(np.uint64)) & np.uint64(1) == 1).tobytes()


def _windows(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Bits [8 n], and for each byte the 64 bits that begin there [n + 8], zeros after the end."""
    raw = np.frombuffer(data, np.uint8)
    padded = np.concatenate([raw, np.zeros(16, np.uint8)]).astype(np.uint64)
    window = np.zeros(raw.size + 8, np.uint64)
    for i in range(8):
        window |= padded[i : i + window.size] << np.uint64(56 - 8 * i)
    return np.unpackbits(raw), window


def _read(window: np.ndarray, at: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Numbers of `size` bits, at most 57, that begin at bit `at`."""
    word = window[np.minimum(at >> 3, window.size - 1)] << (at & 7).astype(np.uint64)
    return (word >> (64 - np.minimum(size, 57)).astype(np.uint64)).astype(np.int64)


def _words(where: str, data: bytes, lengths: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Where each of `count` words begins, and where the last ends, given the length of one at every bit."""
    steps, begins, at = lengths.tolist(), [], 0
    for _ in range(count):
        if at >= len(steps):
            raise _short(where, data)
        begins.append(at)
        at += steps[at]
    if at > len(steps):
        raise _short(where, data)
    return np.asarray(begins, np.int64), at


def _log2(values: np.ndarray) -> np.ndarray:
    """The whole part of it."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1


def _positive(where: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.int64).reshape(-1)
    if values.size and (values.min() < 1 or values.max() >= 2**32):
        raise ValueError(f"{where}(values): they must lie in [1, 2^32); add 1 if there are zeros.")
    return values


def _short(where: str, data: bytes) -> ValueError:
    return ValueError(f"{where}(data of {len(data)} bytes): they end too soon; pass all that was encoded.")
