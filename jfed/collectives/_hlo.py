"""Reads what a compiled program sends, from the text of its optimised HLO, of CPU, GPU or TPU."""

import math
import re
from typing import NamedTuple

import numpy as np

from jfed.collectives._sends import COLLECTIVES, UNKNOWN, Sent, bytes_of, groups, least, permuted, same_in_all, unknown

_CALLS = ("calls", "to_apply", "called_computations", "branch_computations", "true_computation", "false_computation")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<= ]*)\]")


class _Op(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: list[str]
    rest: str  # its attributes


class _Body(NamedTuple):
    ops: dict[str, _Op]
    root: _Op | None


def sends(text: str, trips: int | None) -> tuple[int, list[tuple[Sent, int]]]:
    """The number of devices, all that send, and how often each of them runs.

    Raises:
      ValueError: as `count.compiled`.
    """
    if not text.startswith("HloModule"):
        raise ValueError("compiled(text): this is no HLO; give jax.jit(f).lower(x).compile().as_text().")
    head = text.split("\n", 1)[0]
    n = int(np.prod([int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)] or [1]))
    bodies, main = _parsed(text)
    known: dict[str, list] = {}

    def body(name):
        if name not in known:
            known[name] = [send for op in bodies[name].ops.values() for send in operation(bodies[name], op)]
        return known[name]

    def operation(where, op):
        kind, starts = op.kind.removesuffix("-start"), op.kind.endswith("-start")
        if kind.endswith(("-done", "-update")):
            return []
        if kind == "while":
            test, inner = (re.search(rf"\b{part}=%?([\w.\-]+)", op.rest)[1] for part in ("condition", "body"))
            if not body(test) and not body(inner):
                return []
            turns = _turns(bodies, where, op, test, inner, trips)
            return [(send, times * turns) for send, times in body(inner)] + [
                (send, times * (turns + 1)) for send, times in body(test)
            ]
        size = sum(_size(where.ops[operand].shape) for operand in op.operands if operand in where.ops)
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}(?:,|$)(?!\{)", op.rest)[1]
            return [(permuted(n, [int(i) for i in re.findall(r"\d+", pairs)], size, waits=not starts), 1)]
        if kind.replace("-", "_") in COLLECTIVES:
            return [(least(kind.replace("-", "_"), n, _groups(n, op.rest), size), 1)]
        if kind.replace("-", "_") in UNKNOWN:
            raise unknown("compiled(text)", kind)
        called = [name for part in _CALLS for name in _names(op.rest, part) if name in bodies]
        found = [body(name) for name in called]
        if kind == "conditional":
            return same_in_all("compiled", found)
        return [(send._replace(waits=send.waits and not starts), times) for one in found for send, times in one]

    return n, body(main)


def _parsed(text: str) -> tuple[dict[str, _Body], str]:
    bodies, main, name = {}, "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head:
            name = head[2]
            bodies[name] = _Body({}, None)
            main = name if head[1] else main
        elif name and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
            op = _op(found[2], found[3])
            bodies[name].ops[op.name] = op
            bodies[name] = bodies[name]._replace(root=op if found[1] else bodies[name].root)
        elif line.startswith("}"):
            name = ""
    return bodies, main


def _op(name: str, text: str) -> _Op:
    end = _closed(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    kind, _, rest = rest.partition("(")
    end = _closed("(" + rest) - 1
    inside = rest[: end - 1]
    operands = re.findall(r"%([\w.\-]+)", inside) if "%" in inside else [inside]
    return _Op(name, shape, kind, operands, rest[end:])


def _closed(text: str) -> int:
    """Behind the parenthesis that closes the first."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    return len(text)


def _size(shape: str) -> int:
    return sum(
        bytes_of(dtype, [int(size) for size in re.findall(r"\d+", sizes)]) for dtype, sizes in _SHAPE.findall(shape)
    )


def _names(rest: str, part: str) -> list[str]:
    found = re.search(rf"\b{part}=(\{{[^}}]*\}}|%?[\w.\-]+)", rest)
    return re.findall(r"[\w.\-]+", found[1]) if found else []


def _groups(n: int, rest: str) -> list:
    found = re.search(r"replica_groups=(mesh\[.*?\]\s*(?:[^{,]*)\{[^}]*\}|\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\S+)", rest)
    if not found or found[1] == "{}":
        return [range(n)]
    text = found[1]
    if text.startswith("mesh"):
        mesh, axes = re.fullmatch(r"mesh\[(.*?)\](.*)", text).groups()
        sizes, along = dict(re.findall(r"'([^']+)'=(\d+)", mesh)), re.fullmatch(r" \{((?:'[^']+',?)+)\}", axes)
        if not along or math.prod(map(int, sizes.values())) != n:
            raise ValueError(f"compiled(text): groups of devices written in an unknown way: {text}; use traced.")
        return groups({k: int(v) for k, v in sizes.items()}, re.findall(r"'([^']+)'", along[1])).tolist()
    if text.startswith("{"):
        return [[int(i) for i in re.findall(r"\d+", group)] for group in re.findall(r"\{([\d, ]+)\}", text)]
    shape, sizes, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(n).reshape([int(i) for i in sizes.split(",")])
    ids = ids.transpose([int(i) for i in order.split(",")]) if order else ids
    return ids.reshape([int(i) for i in shape.split(",")]).tolist()


def _turns(bodies, where, op, test, inner, trips) -> int:
    """How often a loop goes round: as the compiler notes, or as its counter says."""
    noted = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', op.rest)
    if noted:
        return int(noted[1])
    counted = _counted(bodies, where, op, test, inner)
    if counted is None:
        counted = trips
    if counted is None:
        raise ValueError("compiled(trips=None): a loop sends, and its text says not how often; say so by trips=.")
    return counted


def _counted(bodies, where, op, test, inner):
    start = where.ops.get(op.operands[0])
    last, turn = bodies[test].root, bodies[inner].root
    if last is None or last.kind != "compare" or "direction=LT" not in last.rest or turn is None or start is None:
        return None
    counter, end = (bodies[test].ops[name] for name in last.operands)
    if counter.kind != "get-tuple-element" or start.kind != "tuple" or turn.kind != "tuple":
        return None
    place = _index(counter)
    add = bodies[inner].ops[turn.operands[place]]
    if add.kind != "add":
        return None

    def number(body, name):
        one = body.ops.get(name)
        while one is not None and one.kind in ("copy", "bitcast", "copy-done", "copy-start"):
            one = body.ops.get(one.operands[0])
        return int(one.operands[0]) if one is not None and one.kind == "constant" else None

    def in_turn(name):
        one = bodies[inner].ops[name]
        fixed = one.kind == "get-tuple-element" and turn.operands[_index(one)] == name
        return number(where, start.operands[_index(one)]) if fixed else number(bodies[inner], name)

    begin, end = number(where, start.operands[place]), number(bodies[test], end.name)
    step = next((found for found in map(in_turn, add.operands) if found is not None), None)
    return None if None in (begin, end, step) or step < 1 else max(-(-(end - begin) // step), 0)


def _index(op: _Op) -> int:
    return int(re.search(r"index=(\d+)", op.rest)[1])
