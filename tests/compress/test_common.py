"""What holds for every compressor. A new one joins by one row of COMPRESSORS.

Letters: d numbers of an array x, b bits, omega of E|C(x) - x|^2 <= omega |x|^2 for what is unbiased, delta of
E|C(x) - x|^2 <= (1 - delta) |x|^2 for a contraction. Sizes are in bytes.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jfed import compress, mesh

SHAPE = (7, 9)  # of most inputs: a matrix, neither a power of two nor a multiple of 8
D = math.prod(SHAPE)
DRAWS = 4096
FLOAT = 4  # bytes of a number that is not compressed, of a scale, of a norm
SEED = 8  # bytes that say which randomness was shared
HOLE = 23  # where a NaN or an infinity is


class Row(NamedTuple):
    """A compressor and what is claimed of it."""

    make: Callable[[], optax.GradientTransformation]
    size: Callable[[tuple[int, ...]], int]  # shape of a float32 array -> bytes
    omega: Callable[[np.ndarray], float] | None = None  # it is unbiased, with this variance for a vector x
    delta: Callable[[np.ndarray], float] | None = None  # a contraction, with this delta for a vector x
    needs: tuple[str, ...] = ()  # of the extra arguments `key` and `round`
    linear: bool = False
    adds_up: bool = False  # decoding a sum of payloads gives the sum of what they decode to
    keeps_zero: bool = True
    scales: bool = True  # twice the input is twice what it decodes to
    sees_all: bool = True  # every number of the input leaves a trace in the message
    floats_only: bool = False  # refuses trees that hold anything else


def packed(d, b):
    """Codes are packed in groups that fill whole bytes, and the last group is filled up."""
    group = math.lcm(8, b)
    return math.ceil(d * b / group) * group // 8


def groups(shape, per):
    """How many parts of an array have statistics of their own."""
    d = math.prod(shape)
    return 1 if per is None else math.prod(shape[:-1]) if per == "row" else math.ceil(d / per)


def parts(x, per):
    """The parts themselves, of an array of SHAPE as a vector."""
    length = {None: D, "row": SHAPE[-1]}.get(per, per)
    return [x[first : first + length] for first in range(0, D, length)]


def weighed(of_part, per):
    """The omega or 1 - delta of an array out of those of its parts."""
    return lambda x: sum(of_part(part) * (part @ part) for part in parts(x, per)) / (x @ x)


def places(d, k):
    """Positions of k among d: a bitmap, or indices that can also say nowhere."""
    return min(math.ceil(d / 8), packed(k, d.bit_length()))


def kept(fraction, d):
    return max(1, math.ceil(fraction * d))


def blocks(d, longest):
    """Lengths of the blocks that a rotation cuts d numbers into: whole ones, then the binary digits of what is left."""
    longest = min(longest, 2 ** int(math.log2(d)))
    rest = d % longest
    return d // longest * [longest] + [2**i for i in reversed(range(rest.bit_length())) if rest >> i & 1]


def coded(shape, b, per=None, statistics=1):
    return packed(math.prod(shape), b) + statistics * FLOAT * groups(shape, per)


def rotated(shape, longest, size_of_blocks):
    """Bytes of a rotated array: blocks of one length are one array [n, B], whose rows are groups."""
    lengths = blocks(math.prod(shape), longest)
    return SEED + sum(size_of_blocks((lengths.count(b), b)) for b in set(lengths))


def quantized(b, rounding="stochastic", per=None):
    top = 2**b - 1

    def omega(x):
        return len(x) * (x.max() - x.min()) ** 2 / (4 * top**2) / max(x @ x, 1e-30)

    def delta(x):  # nearest: the largest number moves by half a step at most, and no other by more than itself
        return (1 - 1 / top**2) * np.abs(x).max() ** 2 / max(x @ x, 1e-30)

    stochastic = rounding == "stochastic"
    length = {None: D, "row": SHAPE[-1]}.get(per, per)
    variance = weighed(omega, per)
    small = stochastic and length < 2 * top**2
    loss = variance if stochastic else weighed(lambda x: 1 - delta(x), per)
    return Row(
        lambda: compress.quantize(b, rounding=rounding, per=per),
        lambda shape: coded(shape, b, per, statistics=2),
        omega=variance if stochastic else None,
        delta=(lambda x: 1 - loss(x)) if small or (not stochastic and b > 1) else None,
        needs=("key",) if stochastic else (),
    )


def leveled(b, norm="l2", per=None):
    """QSGD with as many levels as b bits tell apart."""
    s = 2 ** (b - 1) - 1
    length = {None: D, "row": SHAPE[-1]}.get(per, per)

    def omega(d):
        return min(d / s**2, math.sqrt(d) / s) if norm == "l2" else d / (4 * s**2)

    return Row(
        lambda: compress.qsgd(s, norm=norm, per=per),
        lambda shape: coded(shape, b, per),
        omega=lambda x: omega(length),
        delta=(lambda x: 1 - omega(length)) if omega(length) < 1 else None,
        needs=("key",),
    )


def normal_levels(b, per=None):
    return Row(lambda: compress.lloyd_max(b, per=per), lambda shape: coded(shape, b, per))


def eden(b):
    return Row(
        lambda: compress.eden(b),
        lambda shape: rotated(shape, 4096, lambda block: coded(block, b, "row")),
        needs=("key",),
    )


def small_floats(dtype, relative, least, bits):
    """Each number moves by that fraction of it, or half the least number of the format when the largest is `top`."""
    top = {"float16": 65504.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}.get(dtype)

    def loss(x):
        scale = np.abs(x).max() / top if top else 1.0
        return np.sum(np.minimum(x**2, np.maximum((relative * x) ** 2, (scale * least / 2) ** 2))) / (x @ x)

    return Row(
        lambda: compress.low_precision(dtype),
        lambda shape: math.prod(shape) * bits // 8 + (FLOAT if top else 0),
        delta=lambda x: 1 - loss(x),
    )


def signs_delta(x):
    return np.abs(x).sum() ** 2 / (len(x) * (x @ x)) if x.any() else 1.0


def largest(x, k):
    return x[np.argsort(-np.abs(x), kind="stable")[:k]]


def energy(x, k):
    """The share of |x|^2 that the k largest hold."""
    return (largest(x, k) ** 2).sum() / (x @ x)


def sparse(fraction, d, bytes_a_value=FLOAT):
    k = kept(fraction, d)
    return k * bytes_a_value + places(d, k)


COMPRESSORS = {
    "quantize, 1 bit": quantized(1),
    "quantize, 4 bits": quantized(4),
    "quantize, 3 bits a block": quantized(3, per=8),
    "quantize to the nearest, 2 bits a row": quantized(2, "nearest", per="row"),
    "qsgd, 127 levels": leveled(8),
    "qsgd, 7 levels of the largest in a block": leveled(4, "max", per=8),
    "terngrad": Row(
        compress.terngrad,
        lambda shape: coded(shape, 2),
        omega=lambda x: np.abs(x).max() * np.abs(x).sum() / (x @ x) - 1,
        needs=("key",),
    ),
    "lloyd_max, 3 bits": normal_levels(3),
    "sign": Row(compress.sign, lambda shape: coded(shape, 1), keeps_zero=False, scales=False),
    "scaled_sign": Row(compress.scaled_sign, lambda shape: coded(shape, 1), delta=signs_delta),
    "bfloat16": small_floats("bfloat16", 2**-9, 0.0, 16),
    "float16": small_floats("float16", 2**-11, 2**-24, 16),
    "float8_e4m3fn": small_floats("float8_e4m3fn", 2**-4, 2**-9, 8),
    "float8_e5m2": small_floats("float8_e5m2", 2**-3, 2**-16, 8),
    "natural": Row(
        compress.natural,
        lambda shape: math.prod(shape) + packed(math.prod(shape), 1),
        omega=lambda x: 1 / 8,
        delta=lambda x: 1 - 1 / 8,
        needs=("key",),
    ),
    "top_k, bitmap": Row(
        lambda: compress.top_k(0.2),
        lambda shape: sparse(0.2, math.prod(shape)),
        delta=lambda x: energy(x, kept(0.2, D)),
    ),
    "top_k, indices": Row(
        lambda: compress.top_k(0.01), lambda shape: sparse(0.01, math.prod(shape)), delta=lambda x: energy(x, 1)
    ),
    "top_k, a block": Row(
        lambda: compress.top_k(0.25, block=16),
        lambda shape: math.ceil(math.prod(shape) / 16) * sparse(0.25, min(16, math.prod(shape))),
        delta=lambda x: 1 - sum((1 - energy(p, 4)) * (p @ p) for p in parts(x, 16) if p.any()) / (x @ x),
    ),
    "top_k, quantized": Row(
        lambda: optax.chain(compress.top_k(0.2), compress.quantize(4, rounding="nearest")),
        lambda shape: (
            coded((kept(0.2, math.prod(shape)),), 4, statistics=2)
            + places(math.prod(shape), kept(0.2, math.prod(shape)))
        ),
        delta=lambda x: (1 - 1 / 15**2) * np.abs(x).max() ** 2 / (x @ x),
    ),
    "threshold": Row(
        lambda: compress.threshold(0.5, capacity=0.2), lambda shape: sparse(0.2, math.prod(shape)), scales=False
    ),
    "random_k": Row(
        lambda: compress.random_k(0.3),
        lambda shape: FLOAT * kept(0.3, math.prod(shape)) + SEED,
        omega=lambda x: D / kept(0.3, D) - 1,
        needs=("round",),
        linear=True,
        adds_up=True,
        sees_all=False,
    ),
    "random_k, as they are": Row(
        lambda: compress.random_k(0.3, scale="none"),
        lambda shape: FLOAT * kept(0.3, math.prod(shape)) + SEED,
        delta=lambda x: kept(0.3, D) / D,
        needs=("round",),
        linear=True,
        adds_up=True,
        sees_all=False,
    ),
    "ternary": Row(
        lambda: compress.ternary(0.2),
        lambda shape: coded((kept(0.2, math.prod(shape)),), 1) + places(math.prod(shape), kept(0.2, math.prod(shape))),
        delta=lambda x: signs_delta(largest(x, kept(0.2, D))) * energy(x, kept(0.2, D)),
    ),
    "rotate": Row(
        lambda: compress.rotate(block=16),
        lambda shape: rotated(shape, 16, lambda block: FLOAT * math.prod(block)),
        delta=lambda x: 1.0,
        needs=("round",),
        linear=True,
        adds_up=True,
    ),
    "rotate, quantized": Row(
        lambda: optax.chain(compress.rotate(block=16), compress.quantize(4, per="row")),
        lambda shape: rotated(shape, 16, lambda block: coded(block, 4, "row", statistics=2)),
        # (max - min)^2 <= 2 |y|^2 in each block y
        omega=lambda x: 16 * 2 / (4 * 15**2),
        delta=lambda x: 1 - 16 * 2 / (4 * 15**2),
        needs=("key", "round"),
    ),
    "rotate, scaled_sign": Row(
        lambda: optax.chain(compress.rotate(block=16), compress.scaled_sign(per="row")),
        lambda shape: rotated(shape, 16, lambda block: coded(block, 1, "row")),
        delta=lambda x: 1 / 16,  # |y|_1 >= |y|_2 in each block y
        needs=("round",),
    ),
    "drive": Row(
        compress.drive, lambda shape: rotated(shape, 4096, lambda block: coded(block, 1, "row")), needs=("key",)
    ),
    "eden, 2 bits": eden(2),
    "power_sgd": Row(
        lambda: compress.power_sgd(1),
        lambda shape: FLOAT * (math.prod(shape) if len(shape) < 2 else math.prod(shape[:-1]) + shape[-1]),
        delta=lambda x: 0.0,
    ),
    "count_sketch": Row(
        lambda: compress.count_sketch(3, 7),
        lambda shape: FLOAT * min(3 * 7, math.prod(shape)),
        linear=True,
    ),
    "over_tree": Row(
        lambda: compress.over_tree(compress.top_k(0.2)),
        lambda shape: sparse(0.2, math.prod(shape)),
        delta=lambda x: energy(x, kept(0.2, D)),
        floats_only=True,
    ),
}


# What is no compressor of an array by itself, or has its laws in a file of its own.
ELSEWHERE = {"majority_vote", "prune", "frozen_zeros", "nonzeros", "fetch_sgd", "one_bit_adam"}
ELSEWHERE |= {"error_feedback", "ef21", "ef21_server", "momentum_correction", "decoded", "undecoded"}


def test_every_compressor_has_a_row():
    made = {name: getattr(compress, name) for name in compress.__all__ if name != "operator"}
    transforms = {
        name
        for name, maker in made.items()
        if inspect.isfunction(maker) and "GradientTransformation" in str(inspect.signature(maker).return_annotation)
    }
    makers = [row.make for row in COMPRESSORS.values()]
    text = "".join(inspect.getsource(m) if m.__name__ == "<lambda>" else f"compress.{m.__name__}(" for m in makers)
    assert {name for name in transforms if f"compress.{name}(" not in text} == ELSEWHERE


def make_inputs():
    rng = np.random.default_rng(0)
    few, one = np.zeros((2, D))
    few[rng.choice(D, 5, replace=False)] = rng.normal(size=5)
    one[40] = -3.0
    heavy = rng.lognormal(size=D) * rng.choice([-1, 1], D)
    hole, endless = rng.normal(size=(2, D))
    hole[HOLE], endless[HOLE] = np.nan, np.inf
    return {
        "normal": rng.normal(size=D),
        "heavy-tailed": heavy,
        "sparse": few,
        "one-hot": one,
        "zeros": np.zeros(D),
        "all equal": np.full(D, 0.7),
        "a millionth": heavy * 2.0**-20,
        "nearly nothing": heavy * 1e-36,
        "a NaN": hole,
        "an infinity": endless,
    }


INPUTS = {name: np.asarray(x, np.float32) for name, x in make_inputs().items()}
ORDINARY = ["normal", "heavy-tailed", "sparse", "one-hot"]
STACK = np.stack([x.reshape(SHAPE) for x in INPUTS.values()])
STEPS = 20
TURNS = np.stack([STACK[t % len(ORDINARY)] for t in range(STEPS)])  # one ordinary input after the other
KEYS, ROUNDS = jax.random.split(jax.random.key(1), DRAWS), np.arange(DRAWS)

# One worker runs the tests of a group, so that it compiles each program once.
rows = [pytest.param(name, marks=pytest.mark.xdist_group(str(i // 9))) for i, name in enumerate(COMPRESSORS)]
compressors = pytest.mark.parametrize("name", rows)


def those(claim):
    """Rows of which something is claimed."""
    return pytest.mark.parametrize("name", [row for row in rows if claim(COMPRESSORS[row.values[0]])])


def named(*names):
    """A few rows, where one of a kind is enough."""
    return pytest.mark.parametrize("name", [row for row in rows if row.values[0] in names])


def sent(compressor, x, key=KEYS[0], round=0):
    return compressor.update(x, compressor.init(x), key=key, round=round)[0]


@functools.lru_cache(maxsize=9)  # those of a group
def drawn(name):
    """What every input decodes to, [draws, D] of each; one draw if nothing is random."""
    compressor, n = COMPRESSORS[name].make(), DRAWS if COMPRESSORS[name].needs else 1
    draws = jax.vmap(lambda x, key, round: compress.decode(sent(compressor, x, key, round)), (None, 0, 0))
    decoded = jax.jit(jax.vmap(draws, (0, None, None)))(STACK, KEYS[:n], ROUNDS[:n])
    return dict(zip(INPUTS, np.asarray(decoded, np.float64).reshape(len(STACK), n, D), strict=True))


@functools.lru_cache(maxsize=9)
def turn_by_turn(name):
    """A program that sends TURNS, one after the other, with error feedback or, with `keep` 0, each for itself.

    It gives what was decoded, the last message and the residual; the message is carried through a loop.
    """
    link = compress.error_feedback(COMPRESSORS[name].make(), refuse=False)

    def all_turns(keep):
        start = link.init(TURNS[0])

        def step(carry, turn):
            x, key, round = turn
            state = jax.tree.map(lambda now, first: jnp.where(keep == 1, now, first), carry[0], start)
            message, state = link.update(x, state, key=key, round=round)
            return (state, message), compress.decode(message)

        shapes = jax.eval_shape(functools.partial(sent, COMPRESSORS[name].make()), jnp.asarray(TURNS[0]))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (state, last), decoded = jax.lax.scan(step, (start, nothing), (TURNS, KEYS[:STEPS], ROUNDS[:STEPS]))
        return decoded, last, state.residual

    return jax.jit(all_turns)


def is_unbiased(decoded, x):
    """Whether the mean of draws is x within 5 standard errors, in its own direction and in random ones.

    Sums over all numbers are nearly normal, as single numbers that are rarely sent are not.
    """
    v = np.random.default_rng(2).choice([-1.0, 1.0], (D, 64))
    v = np.concatenate([v, x[:, None]], axis=1)
    off = (decoded - x) @ v
    error = off.std(0) / math.sqrt(len(off))
    rounding = 1e-6 * np.abs(x).max() * np.abs(v).sum(0)
    return np.all(np.abs(off.mean(0)) <= 5 * error + rounding)


def loss_of(decoded, x):
    """Mean of |C(x) - x|^2 / |x|^2 less 5 standard errors, and what rounding adds."""
    loss = ((decoded - x) ** 2).sum(1) / (x @ x)
    return loss.mean() - 5 * loss.std() / math.sqrt(len(loss)) - 1e-6


def ordinary():
    return [(kind, INPUTS[kind].astype(np.float64)) for kind in ORDINARY]


@those(lambda row: row.omega)
def test_the_mean_of_many_draws_is_the_input(name):
    for kind, x in ordinary():
        assert is_unbiased(drawn(name)[kind], x), kind


@those(lambda row: row.omega)
def test_a_scale_wrong_by_three_percent_is_noticed(name):
    assert not all(is_unbiased(1.03 * drawn(name)[kind], x) for kind, x in ordinary())


@those(lambda row: row.omega)
def test_the_variance_is_within_its_bound(name):
    for kind, x in ordinary():
        assert loss_of(drawn(name)[kind], x) <= COMPRESSORS[name].omega(x), kind


@those(lambda row: row.delta)
def test_a_contraction_leaves_out_no_more_than_it_claims(name):
    for kind, x in ordinary():
        assert loss_of(drawn(name)[kind], x) <= 1 - COMPRESSORS[name].delta(x), kind


@compressors
def test_zeros_stay_zeros(name):
    if not COMPRESSORS[name].keeps_zero:
        pytest.skip("a sign alone is plus or minus one")
    assert not drawn(name)["zeros"].any()


@compressors
@pytest.mark.parametrize("kind", ["all equal", "nearly nothing"])
def test_finite_numbers_decode_to_finite_ones(name, kind):
    assert np.isfinite(drawn(name)[kind]).all()


@compressors
@pytest.mark.parametrize("kind", ["a NaN", "an infinity"])
def test_what_is_not_finite_does_not_vanish(name, kind):
    """Of random coordinates, if its own is among them."""
    seen = ~np.isfinite(drawn(name)[kind]).all(1)
    expected = True if COMPRESSORS[name].sees_all else drawn(name)["normal"][:, HOLE] != 0
    assert np.all(seen == expected)


@compressors
def test_a_millionth_of_the_input_is_a_millionth_of_what_it_decodes_to(name):
    if not COMPRESSORS[name].scales:
        pytest.skip("it compares with a number of its own")
    small = drawn(name)["a millionth"] * 2.0**20
    np.testing.assert_allclose(small, drawn(name)["heavy-tailed"], rtol=1e-6, atol=1e-6)


@compressors
def test_clients_side_by_side_are_those_in_turn(name):
    decoded, _, _ = turn_by_turn(name)(0)
    for t, alone in enumerate(np.asarray(decoded).reshape(STEPS, D)):
        draws = drawn(name)[ORDINARY[t % len(ORDINARY)]]
        np.testing.assert_allclose(draws[t % len(draws)], alone, rtol=1e-5, atol=1e-6)


EAGERLY = ["quantize, 4 bits", "scaled_sign", "float8_e5m2", "top_k, bitmap", "random_k", "power_sgd", "count_sketch"]


@named(*EAGERLY)
def test_a_compiled_message_is_an_eager_one(name):
    t = STEPS - 1
    eager = sent(COMPRESSORS[name].make(), jnp.asarray(TURNS[t]), KEYS[t], t)
    _, last, _ = turn_by_turn(name)(0)
    assert jax.tree.structure(last) == jax.tree.structure(eager)
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(eager), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@those(lambda row: row.delta)
def test_what_was_sent_and_what_is_left_are_the_sum_of_inputs(name):
    decoded, _, residual = turn_by_turn(name)(1)
    total = np.sum(np.asarray(decoded, np.float64), 0) + np.asarray(residual)
    np.testing.assert_allclose(total, np.sum(TURNS, 0, dtype=np.float64), rtol=1e-5, atol=1e-4)


@compressors
def test_a_message_says_what_is_claimed_of_its_compressor(name):
    row = COMPRESSORS[name]
    _, message, _ = turn_by_turn(name)(0)
    decoders = [node.decoder for node in compress.nodes(message)]
    assert all(decoder.contraction for decoder in decoders) == (row.delta is not None)
    assert all(decoder.linear for decoder in decoders) == row.linear
    assert compress.nbytes(message) == sum(np.asarray(x).nbytes for x in jax.tree.leaves(message)) == row.size(SHAPE)


VECTORS = [(1,), (7,), (8,), (1000,), (1003,)]


def size_of(row, shape):
    message = jax.eval_shape(lambda x: sent(row.make(), x), jax.ShapeDtypeStruct(shape, jnp.float32))
    return compress.nbytes(message)


@compressors
def test_the_size_of_a_message_is_the_formula(name):
    row = COMPRESSORS[name]
    assert [size_of(row, shape) for shape in VECTORS] == [row.size(shape) for shape in VECTORS]


OF_ANY_WIDTH = {
    "quantize": quantized,
    "qsgd": leveled,
    "lloyd_max": normal_levels,
    "eden": eden,
}
WIDTHS = [(family, bits) for family in OF_ANY_WIDTH for bits in range(1, 9) if (family, bits) != ("qsgd", 1)]


@pytest.mark.parametrize(("family", "bits"), WIDTHS)
def test_the_size_of_codes_is_the_formula_for_every_width(family, bits):
    row = OF_ANY_WIDTH[family](bits)
    assert [size_of(row, shape) for shape in VECTORS] == [row.size(shape) for shape in VECTORS]


def odd_shapes():
    rng = np.random.default_rng(4)
    floats = {shape: rng.normal(size=shape).astype(np.float32) for shape in [(), (1,), (7,), (2, 3, 4, 5)]}
    others = {"half": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16), "empty": np.zeros((0, 3), np.float32)}
    return {str(shape): x for shape, x in floats.items()} | others | {"integers": np.arange(3, dtype=np.int32)}


@compressors
def test_shapes_and_dtypes_come_back(name):
    row, shapes = COMPRESSORS[name], jax.tree.map(lambda x: (x.shape, x.dtype), odd_shapes())
    tree = {kind: x for kind, x in odd_shapes().items() if not (kind == "integers" and row.floats_only)}
    decoded = jax.eval_shape(lambda tree: compress.decode(sent(row.make(), tree)), tree)
    assert {kind: (x.shape, x.dtype) for kind, x in decoded.items()} == {kind: shapes[kind] for kind in tree}


ONE_OF_EACH = ["quantize, 4 bits", "quantize to the nearest, 2 bits a row", "qsgd, 127 levels", "lloyd_max, 3 bits"]
ONE_OF_EACH += ["scaled_sign", "float8_e4m3fn", "natural", "top_k, bitmap", "random_k", "rotate", "power_sgd"]


@named(*ONE_OF_EACH)
def test_numbers_of_every_shape_come_back_in_their_places(name):
    row = COMPRESSORS[name]
    tree = odd_shapes()
    decoded = jax.jit(lambda tree: compress.decode(sent(row.make(), tree)))(tree)
    for kind, x in tree.items():
        got, x = np.asarray(decoded[kind], np.float64).reshape(-1), np.asarray(x, np.float64).reshape(-1)
        if kind in ("empty", "integers"):
            np.testing.assert_array_equal(got, x)
        else:
            assert np.isfinite(got).all()
            # Of one draw; numbers in each other's places would be off by about twice |x|^2.
            bound = row.omega(x) * 5 if row.omega else 1.0
            assert ((got - x) ** 2).sum() <= (bound + 2**-8) * (x @ x), kind


@those(lambda row: row.linear)
def test_the_payload_of_a_sum_is_the_sum_of_payloads(name):
    a, b, both = (sent(COMPRESSORS[name].make(), x) for x in (STACK[0], STACK[1], STACK[0] + STACK[1]))
    total = jax.tree.map(jnp.add, a.payload, b.payload)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), total, both.payload)


@those(lambda row: row.adds_up)
def test_the_sum_of_payloads_decodes_to_the_sum(name):
    a, b = (sent(COMPRESSORS[name].make(), x) for x in (STACK[0], STACK[1]))
    total = dataclasses.replace(a, payload=jax.tree.map(jnp.add, a.payload, b.payload))
    expected = compress.decode(a) + compress.decode(b)
    np.testing.assert_allclose(compress.decode(total), expected, rtol=1e-5, atol=1e-5)


@those(lambda row: row.needs)
def test_what_draws_says_what_it_draws_from(name):
    compressor = COMPRESSORS[name].make()
    for missing in COMPRESSORS[name].needs:
        given = {"key": KEYS[0], "round": 0} | {missing: None}
        with pytest.raises(ValueError, match=f"pass {missing}="):
            compressor.update(STACK[0], compressor.init(STACK[0]), **given)


BYTES = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "f32": 4}


@named("quantize, 4 bits", "scaled_sign", "float8_e4m3fn", "float8_e5m2", "top_k, bitmap", "ternary")
def test_what_devices_gather_is_the_packed_message(name):
    devices = mesh.make()
    link, d = COMPRESSORS[name].make(), 1000

    def one_device(x, key):
        message = sent(link, x[0], key[0])
        return jax.lax.all_gather(message, "clients")

    spec = PartitionSpec("clients")
    gather = mesh.shard_map(mesh=devices, in_specs=(spec, spec), out_specs=PartitionSpec())(one_device)
    x = np.random.default_rng(0).normal(size=(devices.size, d)).astype(np.float32)
    program = jax.jit(gather).lower(x, KEYS[: devices.size]).compile().as_text()
    gathered = re.findall(r"= (.*) all-gather(?:-start)?\(", program)
    found = sorted(re.findall(r"(\w+)\[([\d,]*)\]", " ".join(gathered)))
    message = jax.eval_shape(lambda x: sent(link, x), x[0])
    names = {"uint8": "u8", "uint16": "u16", "uint32": "u32", "float32": "f32"}
    sizes = [(names[x.dtype.name], devices.size * x.size) for x in jax.tree.leaves(message)]
    assert sorted((kind, math.prod(map(int, shape.split(",")))) for kind, shape in found) == sorted(sizes)
    assert (
        sum(BYTES[k] * n for k, n in sizes)
        == devices.size * compress.nbytes(message)
        == devices.size * COMPRESSORS[name].size((d,))
    )
