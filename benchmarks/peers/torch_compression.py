"""The operators of `jfed.compress` in PyTorch: as its own kernels and kits made for it have them, else by plain ops.

"ops" are a few whole-array operations that anyone would write, in place where that is possible, codes packed as jfed
packs them. Of the others messages are what they make of an array, packed or not.

Answers `ways` with the peers of each operator and versions, and an operator and a peer, tab between, with seconds to
encode and to decode the whole tree, bytes of the messages, and |C(x) - x|^2 / |x|^2.

Letters: d numbers of an array, b bits.
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from protocol import open_channel
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook, quantization_hooks

warnings.filterwarnings("ignore")  # torch says that its quantized tensors are to go
TINY = torch.finfo(torch.float32).tiny


class Way(NamedTuple):
    """How a peer encodes an array and decodes the message; `memory` is a dict of each array's own."""

    encode: Callable  # (x, memory) -> message
    decode: Callable  # (message, out, memory): writes into `out`
    whole: bool = False  # whether all arrays are laid end to end first


def pack(codes: torch.Tensor, b: int) -> torch.Tensor:
    """Codes [d] of b bits, 8 / b of them to a byte, those of a byte far apart."""
    g = 8 // b
    if g == 1:
        return codes
    rows = torch.nn.functional.pad(codes, (0, -codes.numel() % g)).view(g, -1)
    packed = rows[0].clone()
    for i in range(1, g):
        packed |= rows[i] << (i * b)
    return packed


def unpack(packed: torch.Tensor, b: int, d: int) -> torch.Tensor:
    """The inverse of `pack`."""
    g = 8 // b
    if g == 1:
        return packed
    rows = packed.new_empty(g, packed.numel())
    for i in range(g):
        torch.bitwise_right_shift(packed, i * b, out=rows[i])
    return rows.bitwise_and_(2**b - 1).view(-1)[:d]


def blocks(x: torch.Tensor, per: int | None) -> torch.Tensor:
    """[groups, B], the last filled up with zeros."""
    flat = x.reshape(-1)
    return flat.view(1, -1) if per is None else torch.nn.functional.pad(flat, (0, -flat.numel() % per)).view(-1, per)


def put(values: torch.Tensor, out: torch.Tensor) -> None:
    """Values, perhaps filled up, into an array."""
    out.view(-1).copy_(values.view(-1)[: out.numel()])


def rounded(level: torch.Tensor, nearest: bool) -> torch.Tensor:
    """To a neighbouring whole number, in place."""
    return level.round_() if nearest else level.add_(torch.rand_like(level)).floor_()


def quantize(b: int, nearest: bool, per: int | None = None) -> Way:
    """As `compress.quantize`."""
    top = 2**b - 1

    def encode(x, memory):
        rows = blocks(x, per)
        low, high = torch.aminmax(rows, dim=1, keepdim=True)
        if nearest:
            low, high = low.clamp_(max=0), high.clamp_(min=0)
        step = (high - low) / top
        if nearest:
            low = -torch.round(-low / step.clamp(min=TINY)) * step
        level = rounded((rows - low).mul_(1 / step.clamp(min=TINY)), nearest)
        return pack(level.clamp_(0, top).to(torch.uint8).view(-1), b), low, step

    def decode(message, out, memory):
        codes, low, step = message
        d = out.numel() if per is None else low.numel() * per
        put(unpack(codes, b, d).view(low.numel(), -1).float().mul_(step).add_(low), out)

    return Way(encode, decode)


def levels(s: int, b: int, norm: Callable) -> Way:
    """As `compress.qsgd` and `terngrad`."""

    def encode(x, memory):
        size = norm(x)
        level = rounded(x.abs().mul_(s / size.clamp(min=TINY)), False).clamp_(max=s)
        return pack(level.copysign_(x).add_(s).to(torch.uint8).view(-1), b), size

    def decode(message, out, memory):
        codes, size = message
        put(unpack(codes, b, out.numel()).float().sub_(s).mul_(size / s), out)

    return Way(encode, decode)


def signs(scaled: bool) -> Way:
    """As `compress.sign` and `scaled_sign`."""

    def encode(x, memory):
        return pack((x < 0).view(torch.uint8).view(-1), 1), x.abs().mean() if scaled else torch.ones(())

    def decode(message, out, memory):
        codes, scale = message
        put(unpack(codes, 1, out.numel()).float().mul_(-2 * scale).add_(scale), out)

    return Way(encode, decode)


def natural() -> Way:
    """As `compress.natural`."""

    def encode(x, memory):
        bits = x.view(-1).view(torch.int32)
        draw = torch.randint_like(bits, 2**23)
        exponents = draw.add_(bits & 0x7FFFFFFF).bitwise_right_shift_(23).clamp_(max=255).to(torch.uint8)
        return pack((x < 0).view(torch.uint8).view(-1), 1), exponents

    def decode(message, out, memory):
        codes, exponents = message
        values = exponents.to(torch.int32).bitwise_left_shift_(23).view(torch.float32)
        put(unpack(codes, 1, out.numel()).float().mul_(-2).add_(1).mul_(values), out)

    return Way(encode, decode)


def low_precision(dtype: torch.dtype) -> Way:
    """As `compress.low_precision`."""
    top = None if dtype == torch.bfloat16 else torch.finfo(dtype).max

    def encode(x, memory):
        if top is None:
            return (x.to(dtype),)
        scale = torch.linalg.vector_norm(x, math.inf) / top
        return (x / scale).to(dtype), scale

    def decode(message, out, memory):
        out.copy_(message[0])
        if top is not None:
            out.mul_(message[1])

    return Way(encode, decode)


def top_k(fraction: float, values: Way | None = None) -> Way:
    """As `compress.top_k`, with another operator on its values; positions are sent in 32 bits."""

    def encode(x, memory):
        flat = x.view(-1)
        k = max(1, math.ceil(fraction * flat.numel() - 1e-9))
        at = torch.topk(flat.abs(), k, sorted=False).indices
        kept = flat[at]
        return at.int(), kept if values is None else values.encode(kept, memory)

    def decode(message, out, memory):
        at, kept = message
        if values is not None:
            kept, coded = torch.empty(at.numel()), kept
            values.decode(coded, kept, memory)
        out.zero_().view(-1)[at.long()] = kept

    return Way(encode, decode)


def random_k(fraction: float) -> Way:
    """As `compress.random_k`, by the head of `torch.randperm`."""

    def drawn(seed, d):
        draw = torch.Generator().manual_seed(seed)
        return torch.randperm(d, generator=draw)[: max(1, math.ceil(fraction * d - 1e-9))]

    def encode(x, memory):
        memory["round"] = memory.get("round", 0) + 1
        return memory["round"], x.view(-1)[drawn(memory["round"], x.numel())].div_(fraction)

    def decode(message, out, memory):
        seed, kept = message
        out.zero_().view(-1)[drawn(seed, out.numel())] = kept

    return Way(encode, decode)


def rotated(values: Callable | None = None, back: Callable | None = None, block: int = 4096) -> Way:
    """As `compress.rotate`, padded to whole blocks: signs, then two products with a Hadamard matrix of 64."""
    h = torch.ones(1, 1)
    while h.shape[0] ** 2 < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    h /= math.sqrt(h.shape[0])

    def flips(seed, like):
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, 2, like.shape, dtype=torch.int8, generator=draw).mul_(2).sub_(1)

    def turned(rows):
        return (h @ rows.view(-1, *h.shape) @ h).view(rows.shape)

    def padded(x):
        flat = x.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)

    def encode(x, memory):
        memory["round"] = memory.get("round", 0) + 1
        rows = padded(x)
        y = turned(rows * flips(memory["round"], rows))
        return memory["round"], y if values is None else values(y)

    def decode(message, out, memory):
        seed, y = message
        y = y if back is None else back(y)
        put(turned(y).mul_(flips(seed, y)), out)

    return Way(encode, decode)


def drive() -> Way:
    """As `compress.drive`."""

    def values(y):
        scale = y.square().sum(1, keepdim=True) / y.abs().sum(1, keepdim=True).clamp(min=TINY)
        return pack((y < 0).view(torch.uint8).view(-1), 1), scale

    def back(coded):
        codes, scale = coded
        return unpack(codes, 1, codes.numel() * 8).view(scale.numel(), -1).float().mul_(-2 * scale).add_(scale)

    return rotated(values, back)


def eden(b: int) -> Way:
    """As `compress.eden`, of two bits."""
    centroids = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])
    borders = (centroids[1:] + centroids[:-1]) / 2

    def values(y):
        power = y.square().sum(1, keepdim=True)
        codes = torch.bucketize(y / (power / y.shape[1]).sqrt_().clamp(min=TINY), borders, out_int32=True)
        inner = (centroids[codes] * y).sum(1, keepdim=True)
        return pack(codes.to(torch.uint8).view(-1), b), power / inner.clamp(min=TINY)

    def back(coded):
        codes, scale = coded
        return centroids[unpack(codes, b, codes.numel() * 8 // b).int()].view(scale.numel(), -1).mul_(scale)

    return rotated(values, back)


def power_sgd(rank: int) -> Way:
    """PowerSGD's two products, made orthonormal by what torch's own hook for `DistributedDataParallel` calls."""

    def encode(x, memory):
        if x.ndim < 2:
            return (x.clone(),)
        q = memory.setdefault("q", torch.randn(x.shape[1], rank))
        p = x @ q
        powerSGD_hook._orthogonalize(p.unsqueeze(0))
        torch.matmul(x.T, p, out=q)
        return p, q

    def decode(message, out, memory):
        if len(message) == 1:
            out.copy_(message[0])
        else:
            torch.matmul(message[0], message[1].T, out=out)

    return Way(encode, decode)


def count_sketch(rows: int, columns: int) -> Way:
    """A table of sums in buckets drawn once for all; an estimate is the median over rows."""

    def hashes(d, memory):
        if "buckets" not in memory:
            memory["buckets"] = torch.randint(0, columns, (rows, d))
            memory["signs"] = torch.randint(0, 2, (rows, d), dtype=torch.int8).mul_(2).sub_(1)
        return zip(memory["buckets"], memory["signs"], strict=True)

    def encode(x, memory):
        table = torch.zeros(rows, columns)
        for row, (bucket, sign) in zip(table, hashes(x.numel(), memory), strict=True):
            row.index_add_(0, bucket, x * sign)
        return (table,)

    def decode(message, out, memory):
        pairs = zip(message[0], hashes(out.numel(), memory), strict=True)
        torch.median(torch.stack([row[bucket] * sign for row, (bucket, sign) in pairs]), 0, out=(out, memory_for(out)))

    def memory_for(out):
        return torch.empty(out.shape, dtype=torch.long)

    return Way(encode, decode, whole=True)


def error_feedback(inner: Way) -> Way:
    """As `compress.error_feedback`."""

    def encode(x, memory):
        residual = memory.setdefault("residual", torch.zeros_like(x))
        made = memory.setdefault("made", torch.empty_like(x))
        residual.add_(x)
        message = inner.encode(residual, memory)
        inner.decode(message, made, memory)
        residual.sub_(made)
        return message

    return Way(encode, inner.decode)


def per_tensor() -> Way:
    """The quantized tensors of torch, 8 bits between least and largest."""

    def encode(x, memory):
        low, high = (float(v) for v in torch.aminmax(x))
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, TINY)
        return (torch.quantize_per_tensor(x, scale, round(-low / scale), torch.quint8),)

    return Way(encode, lambda message, out, memory: out.copy_(message[0].dequantize()))


def hook_per_tensor() -> Way:
    """What torch's hook `quantization_pertensor_hook` computes before and after it gathers."""

    def encode(x, memory):
        low, high = torch.aminmax(x)
        scale = (high - low) / 255
        zero = torch.round(-low / scale)
        return quantization_hooks._quantize_per_tensor_backend(x, scale, zero), scale, zero

    def decode(message, out, memory):
        out.copy_(quantization_hooks._dequantize_per_tensor_backend(*message))

    return Way(encode, decode)


def embedding_bag(name: str, per: int = 256) -> Way:
    """Kernels of torch for rows of embeddings of 8, 4 or 2 bits; least number and step lie beside a row's codes."""
    prepack = getattr(torch.ops.quantized, f"embedding_bag_{name}_prepack")
    unpack = getattr(torch.ops.quantized, f"embedding_bag_{name}_unpack")
    return Way(lambda x, memory: (prepack(blocks(x, per)),), lambda message, out, memory: put(unpack(message[0]), out))


def bitsandbytes(b: int, per: int) -> Way:
    """Blocks of bitsandbytes: 8 bits of its "dynamic" map, or NF4."""
    from bitsandbytes import functional

    if b == 8:
        encode, decode = partial(functional.quantize_blockwise, blocksize=per), functional.dequantize_blockwise
    else:
        encode = partial(functional.quantize_4bit, blocksize=per, quant_type="nf4")
        decode = functional.dequantize_4bit
    return Way(lambda x, memory: encode(x.view(-1)), lambda message, out, memory: put(decode(*message), out))


def torchao(per: int) -> Way:
    """Affine quantization of torchao, 8 bits in blocks."""
    from torchao.quantization import quant_primitives as ao

    def encode(x, memory):
        rows = blocks(x, per)
        scale, zero = ao.choose_qparams_affine(rows, ao.MappingType.ASYMMETRIC, (1, rows.shape[1]), torch.uint8)
        return ao.quantize_affine(rows, (1, rows.shape[1]), scale, zero, torch.uint8), scale, zero

    def decode(message, out, memory):
        codes, scale, zero = message
        put(ao.dequantize_affine(codes, (1, codes.shape[1]), scale, zero, torch.uint8), out)

    return Way(encode, decode)


def hivemind(name: str) -> Way:
    """Messages of hivemind, as its peers send them."""
    from hivemind import compression

    kit = getattr(compression, name)()
    return Way(lambda x, memory: kit.compress(x, None), lambda message, out, memory: out.copy_(kit.extract(message)))


def ways() -> dict[str, dict[str, Callable[[], Way]]]:
    """By operator and by peer, what makes it."""
    found: dict[str, dict[str, Callable[[], Way]]] = {}
    for b in (8, 4, 2, 1):
        for rounding, nearest in (("", False), (", nearest", True)):
            for name, per in (("", None), (", per=256", 256)):
                found[f"quantize({b}{rounding}{name})"] = {"ops": partial(quantize, b, nearest, per)}
    norm, largest = torch.linalg.vector_norm, partial(torch.linalg.vector_norm, ord=math.inf)
    found |= {
        "qsgd(7)": {"ops": partial(levels, 7, 4, norm)},
        "terngrad": {"ops": partial(levels, 1, 2, largest)},
        "sign": {"ops": partial(signs, False)},
        "scaled_sign": {"ops": partial(signs, True)},
        "natural": {"ops": natural},
        "bfloat16": {"ops": partial(low_precision, torch.bfloat16)},
        "float8_e4m3fn": {"ops": partial(low_precision, torch.float8_e4m3fn)},
        "float8_e5m2": {"ops": partial(low_precision, torch.float8_e5m2)},
        "top_k(.01)": {"ops": partial(top_k, 0.01)},
        "top_k(.05)": {"ops": partial(top_k, 0.05)},
        "random_k(.01)": {"ops": partial(random_k, 0.01)},
        "ternary(.05)": {"ops": lambda: top_k(0.05, signs(True))},
        "rotate": {"ops": rotated},
        "drive": {"ops": drive},
        "eden(2)": {"ops": partial(eden, 2)},
        "power_sgd(2)": {"hook's ops": partial(power_sgd, 2)},
        "count_sketch(5, 100_000) of all": {"ops": partial(count_sketch, 5, 100_000)},
        "top_k(.05), quantize(4, nearest)": {"ops": lambda: top_k(0.05, quantize(4, True))},
        "error_feedback(scaled_sign)": {"ops": lambda: error_feedback(signs(True))},
    }
    found["quantize(8, nearest)"] |= {
        "quantize_per_tensor": per_tensor,
        "hook's ops": hook_per_tensor,
        "hivemind Uniform8Bit": partial(hivemind, "Uniform8BitQuantization"),
        "hivemind Quantile8Bit": partial(hivemind, "Quantile8BitQuantization"),
    }
    found["quantize(8, nearest, per=256)"] |= {
        "embedding_bag_byte": partial(embedding_bag, "byte"),
        "bitsandbytes, 8 bits": partial(bitsandbytes, 8, 256),
        "torchao": partial(torchao, 256),
        "hivemind Blockwise (4096)": partial(hivemind, "BlockwiseQuantization"),
    }
    found["quantize(4, nearest, per=256)"] |= {
        "embedding_bag_4bit": partial(embedding_bag, "4bit"),
        "bitsandbytes, NF4": partial(bitsandbytes, 4, 256),
    }
    found["quantize(2, nearest, per=256)"] |= {"embedding_bag_2bit": partial(embedding_bag, "2bit")}
    found["bfloat16"] |= {"hivemind Float16": partial(hivemind, "Float16Compression")}
    return found


def nbytes(message: Any) -> int:
    """Bytes of all arrays in a message."""
    if isinstance(message, torch.Tensor):
        return message.numel() * message.element_size()
    if isinstance(message, tuple | list):
        return sum(nbytes(part) for part in message)
    if hasattr(message, "absmax"):  # the state of bitsandbytes; its map is the same for all
        return nbytes(message.absmax)
    return len(message.buffer) if hasattr(message, "buffer") else 4


class Timed:
    """A way on a tree."""

    def __init__(self, way: Way, tree: list[torch.Tensor], seconds: float):
        self.way, self.tree = way, tree
        laid = [torch.cat([x.view(-1) for x in tree])] if way.whole else tree
        self.made, self.memory = [torch.empty_like(x) for x in laid], [{} for _ in laid]
        self.once()  # whatever is built at first
        self.repeats = max(1, min(50, round(seconds / sum(self.once()))))
        pairs = [(x.double(), y.double()) for x, y in zip(laid, self.made, strict=True)]
        error = sum(float((y - x).square().sum()) for x, y in pairs) / sum(float(x.square().sum()) for x, _ in pairs)
        self.facts = {"bytes": sum(nbytes(m) for m in self.messages), "error": error}

    def once(self) -> tuple[float, float]:
        """Seconds to encode and to decode."""
        began = time.perf_counter()
        laid = [torch.cat([x.view(-1) for x in self.tree])] if self.way.whole else self.tree
        self.messages = [self.way.encode(x, memory) for x, memory in zip(laid, self.memory, strict=True)]
        encoded = time.perf_counter()
        for message, out, memory in zip(self.messages, self.made, self.memory, strict=True):
            self.way.decode(message, out, memory)
        return encoded - began, time.perf_counter() - encoded

    def answer(self) -> dict:
        """A turn."""
        took = [self.once() for _ in range(self.repeats)]
        encode, decode = (sum(seconds) / self.repeats for seconds in zip(*took, strict=True))
        return {"encode": encode, "decode": decode} | self.facts


@torch.no_grad()
def main() -> None:
    """Answers until it is told to finish."""
    hear, say = open_channel()
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["cores"])
    tree = [torch.from_numpy(np.load(file)) for file in sorted(Path(spec["arrays"]).glob("*.npy"))]
    say({"ready": True})
    table, timed, now = ways(), {}, None
    while (command := hear()) != "finish":
        if command == "ways":
            versions = {name: metadata.version(name) for name in ("torch", "hivemind", "bitsandbytes", "torchao")}
            say({"ways": {name: list(row) for name, row in table.items()}, "versions": versions})
            continue
        name, peer = command.split("\t")
        if name != now:
            timed.clear()  # lets go of the last operator's arrays
        if peer not in timed:
            timed[peer] = Timed(table[name][peer](), tree, spec["seconds"])
        now = name
        say(timed[peer].answer())


if __name__ == "__main__":
    main()
