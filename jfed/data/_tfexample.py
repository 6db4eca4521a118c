"""A reader of `tf.train.Example` records that needs neither TensorFlow nor protobuf.

An Example is a map from a feature's name to a list of bytes, floats or 64-bit integers. In protobuf's
wire format a message is a row of (number << 3 | wire type, value) pairs; this file knows the four
messages involved and no others. Lists of numbers may be packed (one length-delimited run) or not.

Source: the Protocol Buffers encoding guide; tensorflow/core/example/{example,feature}.proto.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def parse_example(record: bytes) -> dict[str, np.ndarray | list[bytes]]:
    """Parses one serialized Example.

    Returns:
      For each feature float32 [n], int64 [n], or a list of n byte strings.

    Raises:
      ValueError: if the record is cut short or is not an Example.

    >>> parse_example(bytes.fromhex("0a0c 0a0a 0a0179 1205 1a03 0a0105"))
    {'y': array([5])}
    """
    features: dict[str, np.ndarray | list[bytes]] = {}
    for number, message in _fields(record):
        if number != 1:
            continue  # an unknown field is skipped, as protobuf does
        for entry_number, entry in _fields(_message(message)):
            if entry_number != 1:
                continue
            pair = dict(_fields(_message(entry)))
            name = bytes(_message(pair.get(1, b"")))
            try:
                features[name.decode()] = _feature(_message(pair.get(2, b"")))
            except UnicodeDecodeError as error:
                raise ValueError(f"a feature's name {name!r} is not UTF-8") from error
    return features


def _feature(message: memoryview) -> np.ndarray | list[bytes]:
    out: np.ndarray | list[bytes] = []
    for kind, values in _fields(message):
        items = [value for number, value in _fields(_message(values)) if number == 1]
        if kind == 1:
            out = [bytes(_message(item)) for item in items]
        elif kind == 2:
            runs = [bytes(_message(item)) for item in items]
            if any(len(run) % 4 for run in runs):
                raise ValueError("a list of floats is not a whole number of floats")
            out = np.frombuffer(b"".join(runs), "<f4").astype(np.float32)
        elif kind == 3:
            runs = [np.array([item], np.uint64) if isinstance(item, int) else _varints(item) for item in items]
            out = np.concatenate([np.zeros(0, np.uint64), *runs]).view(np.int64)
    return out


def _fields(message: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """Field numbers and values: an int for a varint, bytes for all else."""
    view = memoryview(message)
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(view, at)
            yield tag >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(view, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} does not occur in an Example")
        if at + size > len(view):
            raise ValueError("the record is cut short")
        yield tag >> 3, view[at : at + size]
        at += size


def _message(value: Any) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")
    return memoryview(value)


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at >= len(view):
            raise ValueError("the record is cut short")
        byte = view[at]
        at += 1
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value & (2**64 - 1), at
    raise ValueError("a number has more than ten bytes")


def _varints(run: memoryview) -> np.ndarray:
    """A packed run of varints as uint64 [n], without a Python step for each: an image has thousands."""
    raw = np.frombuffer(run, np.uint8)
    if not raw.size:
        return np.zeros(0, np.uint64)
    ends = np.flatnonzero(raw < 128)
    if not ends.size or ends[-1] != raw.size - 1:
        raise ValueError("the record is cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("a number has more than ten bytes")
    place = np.arange(raw.size) - np.repeat(starts, lengths)
    return np.bitwise_or.reduceat((raw & 127).astype(np.uint64) << (7 * place).astype(np.uint64), starts)
