"""Messages come back bit for bit, and take as few bytes as the papers, or the entropy, say."""

import bz2
import functools
import lzma
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed import compress, tree
from jfed.compress import _codes, _entropy, _pack, lossless

pytestmark = pytest.mark.slow  # one version of JAX is enough for a paper's mathematics

COMPRESSORS = {
    "top_k": compress.top_k(0.1),
    "top_k bitmap": compress.top_k(0.4),
    "top_k all": compress.top_k(1.0),
    "top_k blocks": compress.top_k(0.1, block=64),
    "top_k quantize": optax.chain(compress.top_k(0.1), compress.quantize(4)),
    "top_k blocks sign": optax.chain(compress.top_k(0.3, block=100), compress.scaled_sign()),
    "threshold": compress.threshold(1.0, capacity=0.5),
    "threshold full": compress.threshold(0.5, capacity=0.05),
    "threshold nearest": optax.chain(compress.threshold(1.5, capacity=0.5), compress.quantize(3, rounding="nearest")),
    "threshold stochastic": optax.chain(compress.threshold(1.5, capacity=0.5), compress.quantize(4)),
    "threshold bfloat16": optax.chain(compress.threshold(1.5, capacity=0.5), compress.low_precision("bfloat16")),
    "threshold rotate": optax.chain(compress.threshold(1.5, capacity=0.5), compress.rotate()),
    "random_k": compress.random_k(0.1),
    "ternary": compress.ternary(0.05),
    "quantize 1": compress.quantize(1),
    "quantize 3 row": compress.quantize(3, per="row"),
    "quantize 5": compress.quantize(5, per=7),
    "quantize 8": compress.quantize(8, rounding="nearest"),
    "qsgd 1": compress.qsgd(1),
    "qsgd 7": compress.qsgd(7, per=256),
    "qsgd 127": compress.qsgd(127, norm="max"),
    "terngrad": compress.terngrad(clip=2.5),
    "lloyd_max": compress.lloyd_max(3),
    "sign": compress.sign(),
    "natural": compress.natural(),
    "bfloat16": compress.low_precision("bfloat16"),
    "float8": compress.low_precision("float8_e4m3fn", per="row"),
    "drive": compress.drive(block=64),
    "eden": compress.eden(2),
    "power_sgd": compress.power_sgd(2),
    "count_sketch": compress.count_sketch(3, 20),
    "over_tree": compress.over_tree(compress.top_k(0.1), compress.quantize(4)),
    "error_feedback": compress.error_feedback(compress.top_k(0.1)),
    "nothing": optax.identity(),
}
compressors = pytest.mark.parametrize("name", COMPRESSORS)


@functools.cache
def sender(name):
    link = optax.with_extra_args_support(COMPRESSORS[name])
    return jax.jit(lambda u: link.update(u, link.init(u), None, key=jax.random.key(3), round=5)[0])


def updates(kind, name):
    """Arrays of 1003 and 7 numbers, a scalar, an empty one and integers."""
    draw = np.random.default_rng(1)
    of = {
        "normal": lambda shape: draw.normal(size=shape),
        "heavy": lambda shape: draw.standard_t(1.5, size=shape),
        "zeros": np.zeros,
        "equal": lambda shape: np.full(shape, -2.5),
        "nan": lambda shape: np.where(draw.random(shape) < 0.01, np.nan, draw.normal(size=shape)),
    }[kind]
    floats = {"w": of((17, 59)), "b": of((7,)), "s": of(()), "none": of((0, 3))}
    floats = {leaf: jnp.asarray(x, jnp.float32) for leaf, x in floats.items()}
    if name in ("top_k", "threshold", "power_sgd"):
        floats["h"] = jnp.asarray(of((9,)), jnp.bfloat16)
    return (
        floats if name in ("over_tree", "error_feedback") else floats | {"i": jnp.arange(5)}
    )  # these take no integers


def long(name, d=40_000):
    """A message of many kilobytes, of numbers whose scale differs from place to place as layers' do."""
    draw = np.random.default_rng(2)
    x = draw.normal(size=(d // 100, 100)) * np.repeat(np.exp(draw.normal(size=d // 1000)), 10)[:, None]
    return sender(name)(jnp.asarray(x, jnp.float32))


def same(a, b):
    (a, structure), (b, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    a, b = [np.asarray(x) for x in a], [np.asarray(x) for x in b]
    return structure == other and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


@compressors
def test_a_message_comes_back_bit_for_bit(name):
    send = sender(name)
    for kind in ("normal", "heavy", "zeros", "equal", "nan"):
        update = updates(kind, name)
        message, like = send(update), jax.eval_shape(send, update)
        assert same(lossless.decode(lossless.encode(message), like), message), kind
        assert same(lossless.decode(lossless.encode(message, levels="elias"), message), message), kind


def test_plain_arrays_of_any_type_come_back():
    draw = np.random.default_rng(0)
    message = {
        str(dtype): draw.integers(0, 2, size=(3, 5)).astype(dtype)
        for dtype in (bool, np.int8, np.uint8, np.uint16, np.int64, np.float16, np.float64, np.complex64, jnp.bfloat16)
    }
    back = lossless.decode(lossless.encode(message), message)
    assert same(back, message)
    assert isinstance(back["<class 'numpy.float64'>"], np.ndarray)  # jax would make it float32


@pytest.mark.parametrize("name", ["top_k quantize", "qsgd 1", "threshold"])
def test_messages_of_many_clients_at_once_come_back(name):
    many = jnp.asarray(np.random.default_rng(3).normal(size=(3, 211)), jnp.float32)
    for clients in (many, many[:1]):
        message = jax.vmap(sender(name))(clients)
        assert same(lossless.decode(lossless.encode(message), message), message)


def test_packed_arrays_that_no_operator_packed_come_back():
    for name in ("top_k", "top_k bitmap", "threshold", "quantize 3 row"):
        message = sender(name)(jnp.arange(211.0))
        message = jax.tree.map(lambda x: x ^ 255 if x.dtype == jnp.uint8 else x, message)
        assert same(lossless.decode(lossless.encode(message), message), message), name


@pytest.mark.parametrize(
    ("p", "b", "bits", "kilobytes"), [(0.1, 3, 4.756, 75.45), (0.01, 6, 8.108, 11.94), (0.001, 9, 11.495, 1.64)]
)
def test_golomb_codes_take_what_the_paper_says(p, b, bits, kilobytes):
    # b* and the mean bits of a position, b* + 1 / (1 - (1-p)^(2^b*)), are of Sattler et al. 2019, arXiv:1903.02891;
    # messages of d = 2^20 are k (bits + 1) + 32 bits.
    assert _codes.golomb_parameter(p) == b
    assert round(b + 1 / (1 - (1 - p) ** 2**b), 3) == bits
    d = 2**20
    k = math.ceil(p * d)
    assert round((k * (bits + 1) / 8 + 4) / 1000, 2) == kilobytes
    draw = np.random.default_rng(0)
    positions = np.sort(draw.choice(d, k, replace=False))
    coded = lossless.golomb(positions, d)
    np.testing.assert_array_equal(lossless.golomb_decode(coded, k, d), positions)
    # The bits of a quotient are geometric: 1.1 to 1.6 of standard deviation each.
    assert abs(8 * len(coded) / k - bits) < 5 * 1.6 / math.sqrt(k) + 8 / k
    update = np.zeros(d, np.float32)
    update[positions] = draw.choice([-1.0, 1.0], k)
    message = compress.ternary(p).update(jnp.asarray(update), (optax.EmptyState(),) * 2)[0]
    assert len(lossless.encode(message)) == len(coded) + (k + 7) // 8 + 4 + 6  # checksum, and a byte for each array
    assert len(lossless.encode(message)) / 1000 == pytest.approx(kilobytes, rel=0.01)


def test_golomb_codes_of_any_positions_come_back():
    draw = np.random.default_rng(0)
    for d in (1, 2, 7, 64, 1003, 10**9):
        for k in {0, 1, min(d, 5), min(d, 1000)}:
            positions = np.unique(draw.integers(0, d, k)) if d > 10**6 else np.sort(draw.choice(d, k, replace=False))
            coded = lossless.golomb(positions, d)
            np.testing.assert_array_equal(lossless.golomb_decode(coded, positions.size, d), positions)
    np.testing.assert_array_equal(lossless.golomb_decode(lossless.golomb([999_999], 10**6), 1, 10**6), [999_999])


def gamma(n):
    return "0" * (n.bit_length() - 1) + f"{n:b}"


def omega(n):
    word = "0"
    while n > 1:
        word, n = f"{n:b}" + word, n.bit_length() - 1
    return word


@pytest.mark.parametrize(
    ("code", "encode", "decode"),
    [
        (gamma, lossless.elias_gamma, lossless.elias_gamma_decode),
        (omega, lossless.elias_omega, lossless.elias_omega_decode),
    ],
)
def test_elias_codes_are_the_textbook_s(code, encode, decode):
    draw = np.random.default_rng(0)
    values = [*range(1, 300), *(2**i + j for i in range(2, 32) for j in (-1, 0, 1)), 2**32 - 1]
    values += np.exp(draw.uniform(0, 22, 1000)).astype(int).tolist()
    text = "".join(code(v) for v in values)
    data = encode(values)
    assert "".join(f"{byte:08b}" for byte in data) == text + "0" * (-len(text) % 8)
    assert decode(data, len(values)).tolist() == values
    assert encode([]) == b"" and decode(b"", 0).size == 0


def test_elias_words_of_the_literature():
    # The tables of Elias 1975, IEEE Transactions on Information Theory 21(2).
    assert [gamma(n) for n in (1, 2, 4, 8)] == ["1", "010", "00100", "0001000"]
    assert [omega(n) for n in (1, 2, 4, 8, 16)] == ["0", "100", "101000", "1110000", "10100100000"]


def test_qsgd_in_elias_codes_is_what_the_paper_writes():
    # Alistarh et al. 2017, arXiv:1610.02132: the norm, then of each number that is not 0 the gap, sign and level.
    message = long("qsgd 7")
    levels = jnp.full_like(message.rest["norm"], 7)  # a norm of s makes a level of each number
    codes = compress.decode(compress.Encoded({}, message.rest | {"norm": levels}, message.decoder))
    codes = np.asarray(codes).reshape(-1).round().astype(int)
    places = np.flatnonzero(codes)
    gaps = np.diff(places, prepend=-1)
    words = [
        omega(gap) + "1" + omega(abs(level)) for gap, level in zip(gaps.tolist(), codes[places].tolist(), strict=True)
    ]
    bits = len("".join(words)) + 32 * message.rest["norm"].size
    assert bits / 8 <= len(lossless.encode(message, levels="elias")) <= bits / 8 + 14


def entropy(counts):
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("usual", [0.0, 0.3, 0.8, 0.9, 0.93, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_codes_take_their_entropy(width, usual):
    draw = np.random.default_rng(width)
    n, most = 50_000, 2**width
    codes = np.minimum(np.abs(draw.normal(size=n) * most / 6), most - 1).astype(np.uint8)
    codes[draw.random(n) < usual] = most // 2
    data = _entropy.shorten(codes, width)
    back, used = _entropy.lengthen(data, n, width)
    assert used == len(data)
    np.testing.assert_array_equal(back, codes)
    least = n * entropy(np.bincount(codes)) / 8
    # A table of 2^width frequencies; and Golomb codes of gaps are up to 2 % above theirs.
    assert len(data) <= least * (1.02 if usual > 0.93 else 1.008) + 2**width * 1.5 + 14


def test_no_library_comes_as_near_to_the_entropy_of_sparse_codes():
    message = long("qsgd 1")
    packed = np.asarray(message.rest["codes"]).tobytes()
    ours = len(lossless.encode(message))
    assert all(ours < 0.8 * len(f(packed)) for f in (lambda x: zlib.compress(x, 9), bz2.compress, lzma.compress))


def test_codes_of_any_length_and_frequency_come_back():
    draw = np.random.default_rng(0)
    for trial in range(200):
        width = int(draw.integers(1, 9))
        n = int(draw.choice([0, 1, 2, 3, 7, 8, 9, 100, 1003, 5000]))
        p = draw.dirichlet(np.full(2**width, draw.choice([0.01, 0.1, 1.0])))
        codes = draw.choice(2**width, n, p=p).astype(np.uint8)
        data = _entropy.shorten(codes, width)
        back, used = _entropy.lengthen(data + b"more", n, width)
        np.testing.assert_array_equal(back, codes)
        assert used == len(data) <= 1 + _entropy.pack(codes, width).size, trial


def test_packing_on_the_host_is_that_of_the_compiled_program():
    draw = np.random.default_rng(0)
    for width in (*range(1, 9), 11, 17, 21):
        codes = draw.integers(0, 2**width, 61).astype(np.uint8 if width <= 8 else np.uint32)
        packed = _entropy.pack(codes, width)
        np.testing.assert_array_equal(packed, _pack.pack(jnp.asarray(codes), width))
        np.testing.assert_array_equal(_entropy.unpack(packed, width)[:61], codes)


def test_empty_slots_cost_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=10_000), jnp.float32)
    for later in (), (compress.quantize(4, rounding="nearest"),):
        sizes = []
        for capacity in (0.1, 0.2, 0.9):  # indices twice, and a bitmap
            link = optax.chain(compress.threshold(2.0, capacity=capacity), *later)
            message = jax.jit(link.update)(x, link.init(x))[0]
            sizes.append(len(lossless.encode(message)))
        # A count of empty slots, and what is in one.
        assert max(sizes) - min(sizes) <= 12, sizes


LONG = ("top_k", "top_k bitmap", "top_k quantize", "threshold", "threshold nearest", "threshold stochastic")
LONG += ("threshold bfloat16", "ternary", "quantize 8", "qsgd 1", "qsgd 7", "natural", "float8", "eden")


@pytest.mark.parametrize("name", LONG)
def test_the_estimate_is_the_size(name):
    message = long(name)
    size, estimate = len(lossless.encode(message)), jax.jit(lossless.estimated_nbytes)(message)
    assert estimate.dtype == jnp.float32 and estimate.shape == ()
    assert float(estimate) == pytest.approx(size, rel=0.003, abs=10)


@pytest.mark.parametrize("name", ["threshold nearest", "top_k quantize", "qsgd 7", "natural", "power_sgd", "over_tree"])
def test_the_estimate_of_small_messages_is_near(name):
    estimate = jax.jit(lossless.estimated_nbytes)
    for kind in ("normal", "zeros", "nan"):
        message = sender(name)(updates(kind, name))
        assert float(estimate(message)) == pytest.approx(len(lossless.encode(message)), rel=0.02, abs=12), kind


def test_the_estimate_is_mapped_over_clients():
    clients = jnp.asarray(np.random.default_rng(4).standard_t(3, size=(3, 5000)), jnp.float32)
    for name in ("threshold", "qsgd 7", "threshold nearest"):
        messages = jax.vmap(sender(name))(clients)
        many = jax.jit(jax.vmap(lossless.estimated_nbytes))(messages)
        each = [len(lossless.encode(tree.take(messages, i))) for i in range(3)]
        np.testing.assert_allclose(many, each, rtol=0.01)


def test_damaged_data_are_refused():
    send = sender("top_k quantize")
    message = send(jnp.arange(-100.0, 111.0))
    data = lossless.encode(message)
    for damaged in (b"", data[:3], data[:-1], data + b"\0", data[:9] + bytes([data[9] ^ 4]) + data[10:]):
        with pytest.raises(ValueError, match="checksum is wrong"):
            lossless.decode(damaged, message)
    others = [send(jnp.arange(212.0)), {"a": message}, sender("top_k")(jnp.arange(211.0))]
    for other in others:
        with pytest.raises(ValueError, match="no message of the compressor and model"):
            lossless.decode(data, other)


def test_levels_of_another_number_are_refused():
    x = jnp.arange(-10.0, 11.0)
    a, b = (compress.qsgd(s).update(x, optax.EmptyState(), key=jax.random.key(0))[0] for s in (4, 7))
    assert jax.tree.map(jnp.shape, a.rest) == jax.tree.map(jnp.shape, b.rest)
    with pytest.raises(ValueError, match="checksum is wrong"):
        lossless.decode(lossless.encode(a), b)


def test_the_format_stays():
    # Written when the format was made; another process, or a later version, must read it.
    signs = compress.scaled_sign()
    message, _ = signs.update(jnp.array([1.0, -3.0]), signs.init(None))
    assert lossless.encode(message).hex() == "e5e36e5f000200000040"


def test_what_cannot_be_coded_is_an_error_that_says_how():
    with pytest.raises(ValueError, match="encode.levels='huffman'.: it must be"):
        lossless.encode(jnp.ones(3), levels="huffman")
    for positions in ([2, 1], [1, 1], [-1, 2], [3, 8]):
        with pytest.raises(ValueError, match="must ascend within .0, 8.; sort them"):
            lossless.golomb(positions, 8)
    for encode in (lossless.elias_gamma, lossless.elias_omega):
        for values in ([0, 1], [2**32]):
            with pytest.raises(ValueError, match="add 1 if there are zeros"):
                encode(values)
    with pytest.raises(ValueError, match="golomb_decode.data of 1 bytes.: they end too soon"):
        lossless.golomb_decode(lossless.golomb([3, 40, 41], 64)[:1], 3, 64)
    for encode, decode in (
        (lossless.elias_gamma, lossless.elias_gamma_decode),
        (lossless.elias_omega, lossless.elias_omega_decode),
    ):
        for data in (b"", encode([1000, 1000])[:-1], b"\0"):
            with pytest.raises(ValueError, match="they end too soon"):
                decode(data, 9)
