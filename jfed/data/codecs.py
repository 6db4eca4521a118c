"""What a device would upload if it sent its examples instead of training on them.

A codec makes files of examples, and examples of files: images by Pillow, which comes with matplotlib, and numbers of
words by the compressors of Python's standard library. `upload_bytes` counts what each client would send, to be laid
beside the bytes of messages.

Letters: N clients, n examples.
"""

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfed.core import Population
from jfed.data import _checks

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_CHANNELS = {"png": (1, 3, 4), "jpeg": (1, 3), "webp": (1, 3, 4)}
_COMPRESSORS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "lzma": (lzma.compress, lzma.decompress),
    "zlib": (lambda data: zlib.compress(data, 9), zlib.decompress),
    "bz2": (bz2.compress, bz2.decompress),
}
_HEADER = struct.Struct("<Bq")  # bytes of a token, and what is taken off each


class Codec(NamedTuple):
    """Examples as files and back."""

    encode: Callable  # examples [n, ...] -> list of bytes; none of no examples
    decode: Callable  # (list of bytes, like) -> examples [n, ...], with the dtype and the shape of a row of `like`


def image_codec(format: Literal["png", "jpeg", "webp"], *, quality: int | None = None) -> Codec:
    """A file for each image.

    Images are uint8, or floats in [0, 1] of which the nearest of 256 levels is stored: those of jfed's sets come from
    such files and are unchanged.

    Guarantees:
      * PNG, and WebP without `quality`, give every pixel back.
      * A damaged PNG is noticed; the other formats have no checksum.

    Args:
      format: `"png"`, `"jpeg"` or `"webp"`.
      quality: of what loses something, 1 to 100: 75 is usual. None loses nothing, which JPEG cannot.

    Returns:
      A `Codec` of images [n, rows, columns] or [n, rows, columns, channels], of 1, 3 or, not in JPEG, 4 channels.

    Raises:
      ValueError: if an argument is none of these; when it encodes, if the images have another shape or range; when it
        decodes, if a file is damaged or its image has another shape than those of `like`.

    >>> codec = image_codec("png")
    >>> images = np.zeros((2, 28, 28, 1), np.float32)
    >>> files = codec.encode(images)
    >>> len(files), codec.decode(files, images).shape
    (2, (2, 28, 28, 1))
    """
    if format not in ("png", "jpeg", "webp"):
        raise ValueError(f"image_codec(format={format!r}): it must be 'png', 'jpeg' or 'webp'.")
    if format == "png" and quality is not None:
        raise ValueError(f"image_codec('png', quality={quality!r}): PNG loses nothing; leave quality out.")
    if format == "jpeg" and quality is None:
        raise ValueError("image_codec('jpeg', quality=None): JPEG loses something; pass quality=75, or take 'png'.")
    whole = isinstance(quality, int | np.integer) and not isinstance(quality, bool)
    if quality is not None and not (whole and 1 <= quality <= 100):
        raise ValueError(
            f"image_codec(quality={quality!r}): quality must be a whole number from 1 to 100; 75 is usual."
        )
    options: dict[str, Any] = {"png": {}, "jpeg": {"optimize": True}, "webp": {}}[format]
    if format == "webp" and quality is None:
        options = {"lossless": True, "exact": True}  # exact keeps the colour of transparent pixels
    elif quality is not None:
        options = options | {"quality": quality}

    def encode(examples: Any) -> list[bytes]:
        from PIL import Image

        files = []
        for pixels in _pixels(np.asarray(examples), format):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format, **options)
            files.append(file.getvalue())
        return files

    def decode(files: Sequence[bytes], like: Any) -> np.ndarray:
        from PIL import Image

        row, dtype = tuple(like.shape[1:]), np.dtype(like.dtype)
        if len(row) not in (2, 3) or (len(row) == 3 and row[2] not in _CHANNELS[format]):
            raise ValueError(
                f"decode(like of shape {list(like.shape)}): a {format} is [rows, columns] or [rows, columns, channels] "
                f"of {', '.join(map(str, _CHANNELS[format]))} channels; pass the examples' own shape."
            )
        mode = _MODES[row[2] if len(row) == 3 else 1]
        out = np.empty((len(files), *row), np.uint8)
        for i, file in enumerate(files):
            try:
                with Image.open(io.BytesIO(file), formats=[format]) as image:
                    pixels, found = np.asarray(image.convert(mode)), image.mode
            except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
                raise ValueError(f"decode(files): file {i} is no whole {format}; pass what was encoded.") from error
            # A WebP has three channels at least, and a fourth where a pixel is transparent.
            if pixels.shape[:2] != row[:2] or (format != "webp" and found != mode):
                raise ValueError(
                    f"decode(files): file {i} holds {pixels.shape[0]} x {pixels.shape[1]} pixels of kind {found}, like "
                    f"has {row[0]} x {row[1]} of kind {mode}; pass the examples' own shape."
                )
            out[i] = pixels.reshape(row)
        if dtype == np.uint8:
            return out
        wide = np.float64 if dtype == np.float64 else np.float32
        return (out.astype(wide) / wide(255)).astype(dtype)

    return Codec(encode, decode)


def token_codec(compressor: Literal["lzma", "zlib", "bz2"] = "lzma") -> Codec:
    """One stream for all integers of a client: each in the fewest whole bytes that hold them all, then compressed.

    Args:
      compressor: of the standard library; lzma is best from some kilobytes on, zlib adds least to a few bytes.

    Returns:
      A `Codec` of integers [n, ...], which come back exactly.

    Raises:
      ValueError: if there is no such compressor; when it encodes, if the examples are no integers; when it decodes, if
        the stream is damaged, does not hold whole rows of `like` or numbers that its dtype cannot, or is not one.

    >>> codec = token_codec("zlib")
    >>> text = np.tile(np.array([[7, 300, 2, -1]], np.int32), (50, 1))
    >>> (stream,) = codec.encode(text)
    >>> text.nbytes, len(stream) < 40, bool((codec.decode([stream], text) == text).all())
    (800, True, True)
    """
    if compressor not in _COMPRESSORS:
        raise ValueError(f"token_codec(compressor={compressor!r}): it must be one of {', '.join(_COMPRESSORS)}.")
    compress, decompress = _COMPRESSORS[compressor]

    def encode(examples: Any) -> list[bytes]:
        tokens = np.asarray(examples)
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"encode(examples of {tokens.dtype}): tokens must be integers; number the words first.")
        if not tokens.size:
            return []
        least = min(int(tokens.min()), 0)  # padding may be -1
        size = next(s for s in (1, 2, 4, 8) if int(tokens.max()) - least < 256**s)
        above = tokens.astype(np.uint64) - np.uint64(least % 2**64)
        return [compress(_HEADER.pack(size, least) + above.astype(f"<u{size}").tobytes())]

    def decode(files: Sequence[bytes], like: Any) -> np.ndarray:
        row, dtype = tuple(like.shape[1:]), np.dtype(like.dtype)
        if not len(files):
            return np.empty((0, *row), dtype)
        if len(files) != 1:
            raise ValueError(f"decode({len(files)} files): one stream holds all of a client's; decode each by itself.")
        try:
            data = decompress(files[0])
            size, least = _HEADER.unpack_from(data)
            above = np.frombuffer(data, f"<u{size}", offset=_HEADER.size).astype(np.uint64)
            wide = (above + np.uint64(least % 2**64)).astype(np.uint64 if least >= 0 else np.int64)
            tokens = wide.astype(dtype).reshape(-1, *row)
        except (lzma.LZMAError, zlib.error, struct.error, OSError, EOFError, TypeError, ValueError) as error:
            raise ValueError(
                f"decode(files): no {compressor} stream of whole rows {list(row)}; pass what was encoded, and a `like` "
                "of the same rows."
            ) from error
        if not np.array_equal(tokens.reshape(-1), wide):
            raise ValueError(f"decode(like of {dtype}): the stream holds numbers beyond it; pass a wider dtype.")
        return tokens

    return Codec(encode, decode)


def upload_bytes(codec: Codec, population: Population, *, leaf: str = "x") -> np.ndarray:
    """The bytes that each client would send if it sent all its examples.

    The leaf `leaf` is coded by `codec`. Labels, and whatever else the examples hold, are sent too: integers as one
    stream a leaf by `token_codec("zlib")`, floats as they are. A client without examples sends nothing. Labels that
    follow from the rest, such as the next characters of a text, are better left out of the population first.

    Args:
      codec: of images or tokens.
      population: N clients.
      leaf: name of what the codec is for; examples that are a single array need none.

    Returns:
      [N] int64.

    Raises:
      ValueError: if there is no such leaf, a client's rows are not there, or the codec does not take the leaf.

    >>> from jfed.data import population
    >>> two = population({"x": np.zeros((5, 8, 8), np.uint8), "y": np.arange(5)}, [2, 3])
    >>> sent = upload_bytes(image_codec("png"), two)
    >>> sent.shape, bool(sent[1] > sent[0])
    ((2,), True)
    """
    _checks.owned_rows("upload_bytes", population)  # they are there
    examples, others = population.examples, []
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(examples)):
        coded = _checks.leaf_named(f"upload_bytes(leaf={leaf!r})", examples, leaf)
        others = jax.tree.leaves({name: x for name, x in examples.items() if name != leaf})
        examples = coded
    small = token_codec("zlib")
    examples, others = np.asarray(examples), [np.asarray(x) for x in others]
    total = []
    for first, count in zip(np.asarray(population.start), np.asarray(population.size), strict=True):
        rows = slice(int(first), int(first) + int(count))
        sent = sum(map(len, codec.encode(examples[rows])))
        for x in others:
            integers = np.issubdtype(x.dtype, np.integer)
            sent += sum(map(len, small.encode(x[rows]))) if integers else x[rows].nbytes
        total.append(sent)
    return np.asarray(total, np.int64)


def _pixels(images: np.ndarray, format: str) -> np.ndarray:
    """Images as Pillow takes them, uint8 [n, rows, columns] or [n, rows, columns, channels]."""
    channels = _CHANNELS[format]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in channels) or 0 in images.shape[1:]:
        raise ValueError(
            f"encode(examples of shape {list(images.shape)}): {format} takes [n, rows, columns] or "
            f"[n, rows, columns, channels] of {', '.join(map(str, channels))} channels; reshape them."
        )
    if images.dtype != np.uint8:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"encode(examples of {images.dtype}): images must be uint8, or floats in [0, 1].")
        if not np.all((images >= 0) & (images <= 1)):
            raise ValueError("encode(examples): floats must lie in [0, 1]; rescale them, or take off the mean later.")
        images = np.round(images.astype(np.float64) * 255).astype(np.uint8)
    return images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
