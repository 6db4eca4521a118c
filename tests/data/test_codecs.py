"""What examples are coded to is decoded to the same, or nearly; and what each client would send adds up."""

import numpy as np
import pytest

from jfed import data
from jfed.core import Population
from jfed.data.codecs import image_codec, token_codec, upload_bytes

LOSSLESS = {"png": image_codec("png"), "webp": image_codec("webp")}
TOKENS = {name: token_codec(name) for name in ("lzma", "zlib", "bz2")}


def fashion(count=100):
    return data.fashion_small()[0]["x"][:count]


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("row", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_a_codec_that_loses_nothing_gives_every_pixel_back(name, row, dtype):
    images = np.random.default_rng(0).integers(0, 256, (3, *row)).astype(np.uint8)
    if dtype != np.uint8:
        images = images.astype(dtype) / dtype(255)
    files = LOSSLESS[name].encode(images)
    back = LOSSLESS[name].decode(files, images)
    assert len(files) == 3 and back.dtype == dtype
    np.testing.assert_array_equal(back, images)


def test_fashion_images_come_back_from_smaller_files():
    # Of the first hundred images, 784 bytes each: PNG takes 504 and WebP 451 on average (Pillow 13.0).
    images = fashion()
    for name, mean in (("png", 504), ("webp", 451)):
        files = LOSSLESS[name].encode(images)
        np.testing.assert_array_equal(LOSSLESS[name].decode(files, images), images)
        assert np.mean([len(file) for file in files]) == pytest.approx(mean, rel=0.05)


def test_lossy_files_are_smaller_the_worse_they_are():
    images = fashion(20)
    for format in ("jpeg", "webp"):
        sizes, errors = [], []
        for quality in (95, 75, 20):
            codec = image_codec(format, quality=quality)
            files = codec.encode(images)
            sizes.append(sum(map(len, files)))
            errors.append(np.abs(codec.decode(files, images) - images).mean())
        assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
        assert 0 < errors[0] < 0.01 < errors[2] < 0.05


def test_floats_between_levels_go_to_the_nearest():
    images = np.random.default_rng(0).random((2, 9, 9)).astype(np.float32)
    back = LOSSLESS["png"].decode(LOSSLESS["png"].encode(images), images)
    assert np.abs(back - images).max() <= 1 / 510 + 1e-6


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_come_back(name):
    draw, codec = np.random.default_rng(0), TOKENS[name]
    for dtype, low, high in (
        (np.int32, 0, 76),
        (np.int32, -1, 10_000),
        (np.int64, -(2**63), 2**63),
        (np.uint64, 2**63, 2**64),
        (np.int8, -128, 128),
        (np.uint16, 0, 2**16),
    ):
        for row in ((), (80,), (3, 5)):
            tokens = draw.integers(low, high, (11, *row), dtype)
            back = codec.decode(codec.encode(tokens), tokens[:2])
            assert back.dtype == dtype
            np.testing.assert_array_equal(back, tokens)


def test_tokens_take_no_more_bytes_each_than_they_need():
    # Random ones cannot be compressed: 1 byte up to 256 different ones, 2 up to 65536.
    draw = np.random.default_rng(0)
    for high, size in ((256, 1), (300, 2), (2**16, 2), (2**20, 4)):
        tokens = draw.integers(0, high, (2000, 10)).astype(np.int32)
        stored = token_codec("zlib").encode(tokens)
        assert len(stored) == 1 and len(stored[0]) <= 20_000 * size + 40
        assert len(stored[0]) > 20_000 * np.log2(high) / 8 - 1


def test_no_examples_are_no_files():
    for codec, like in ((LOSSLESS["png"], np.zeros((0, 4, 4, 3), np.uint8)), (TOKENS["lzma"], np.zeros((0, 80), int))):
        assert codec.encode(like) == []
        back = codec.decode([], like)
        assert back.shape == like.shape and back.dtype == like.dtype


def test_what_clients_send_adds_up():
    images, labels = fashion(12), np.arange(12) % 10
    population = data.population({"x": images, "y": labels}, [5, 0, 7], allow_empty=True)
    sent = upload_bytes(LOSSLESS["png"], population)
    assert sent.dtype == np.int64 and sent.shape == (3,)
    each = [len(file) for file in LOSSLESS["png"].encode(images)]
    coded = [sum(map(len, TOKENS["zlib"].encode(part))) for part in (labels[:5], labels[5:])]
    assert sent.tolist() == [sum(each[:5]) + coded[0], 0, sum(each[5:]) + coded[1]]


def test_what_clients_send_includes_every_leaf():
    tokens = np.arange(60, dtype=np.int32).reshape(6, 10)
    codec = TOKENS["bz2"]
    alone = [len(codec.encode(part)[0]) for part in (tokens[:4], tokens[4:])]
    assert upload_bytes(codec, data.population(tokens, [4, 2])).tolist() == alone
    extra = {"text": tokens, "z": np.zeros((6, 3), np.float32), "deep": {"w": np.zeros(6, np.float32)}}
    sent = upload_bytes(codec, data.population(extra, [4, 2]), leaf="text")
    assert sent.tolist() == [alone[0] + 4 * 16, alone[1] + 2 * 16]


def test_bad_arguments_are_errors_that_say_how():
    for arguments, message in (
        (("gif", None), "must be 'png', 'jpeg' or 'webp'"),
        (("png", 80), "leave quality out"),
        (("jpeg", None), "pass quality=75"),
        (("jpeg", 0), "from 1 to 100"),
        (("webp", 7.5), "from 1 to 100"),
        (("webp", 75.0), "from 1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            image_codec(arguments[0], quality=arguments[1])
    with pytest.raises(ValueError, match="one of lzma, zlib, bz2"):
        token_codec("gzip")


def test_what_a_codec_cannot_code_is_an_error_that_says_how():
    jpeg = image_codec("jpeg", quality=75)
    for images, message in (
        (np.zeros((2, 28 * 28)), "reshape them"),
        (np.zeros((2, 8, 8, 4)), "of 1, 3 channels"),
        (np.zeros((2, 8, 8), np.int32), "must be uint8, or floats"),
        (np.full((2, 8, 8), 1.5), "must lie in .0, 1."),
        (np.full((2, 8, 8), np.nan), "must lie in .0, 1."),
    ):
        with pytest.raises(ValueError, match=message):
            jpeg.encode(images)
    with pytest.raises(ValueError, match="number the words first"):
        token_codec().encode(np.zeros((2, 8)))


def test_damaged_files_are_refused():
    images, tokens = fashion(2), np.arange(40).reshape(4, 10)
    for format, quality in (("png", None), ("webp", None), ("jpeg", 75)):
        codec = image_codec(format, quality=quality)
        first, second = codec.encode(images)
        for damaged in (b"", b"no image at all", second[: len(second) // 2]):
            with pytest.raises(ValueError, match=f"file 1 is no whole {format}; pass what was encoded"):
                codec.decode([first, damaged], images)
        with pytest.raises(ValueError, match="holds 28 x 28 pixels of kind (L|RGB), like has 14 x 14"):
            codec.decode([first], images[:, :14, :14])
        for like in (images[:, 0, :, 0], np.zeros((2, 28, 28, 2))):
            with pytest.raises(ValueError, match="pass the examples' own shape"):
                codec.decode([first], like)
    for format, quality in (("png", None), ("jpeg", 75)):
        codec = image_codec(format, quality=quality)
        with pytest.raises(ValueError, match="of kind L, like has 28 x 28 of kind RGB"):
            codec.decode(codec.encode(images), np.zeros((2, 28, 28, 3)))
    for name, codec in TOKENS.items():
        (stream,) = codec.encode(tokens)
        for damaged, like in ((b"", tokens), (stream[:-4], tokens), (b"no stream", tokens), (stream, tokens[:, :7])):
            with pytest.raises(ValueError, match=f"no {name} stream of whole rows"):
                codec.decode([damaged], like)
        with pytest.raises(ValueError, match="decode each by itself"):
            codec.decode([stream, stream], tokens)
        with pytest.raises(ValueError, match="numbers beyond it"):
            codec.decode(codec.encode(tokens + 300), tokens.astype(np.uint8))


def test_upload_bytes_names_the_leaf_and_the_rows_that_are_not_there():
    population = data.population({"image": fashion(4), "y": np.arange(4)}, [2, 2])
    with pytest.raises(ValueError, match="no leaf 'x' among the examples"):
        upload_bytes(LOSSLESS["png"], population)
    with pytest.raises(ValueError, match="client 1 owns rows"):
        upload_bytes(
            LOSSLESS["png"], Population(population.examples, population.start, population.size + 1), leaf="image"
        )
