"""Reads what a StableHLO module sends."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from jfed.collectives._sends import COLLECTIVES, UNKNOWN, Sent, bytes_of, groups, least, permuted, same_in_all, unknown

_TURNS = {"LT": lambda gap, step: -(-gap // step), "LE": lambda gap, step: gap // step + 1}


def sends(n: int, module: Any) -> list[tuple[Sent, int]]:
    """All that send in a module for n devices, and how often each of them runs.

    Raises:
      ValueError: as `count.lowered`.
    """
    symbols = {op.attributes["sym_name"].value: op for op in module.body.operations if "sym_name" in op.attributes}
    known: dict[str, list] = {}

    def function(name):
        if name not in known:
            known[name] = list(regions(symbols[name].regions))
        return known[name]

    def regions(found) -> Iterable[tuple[Sent, int]]:
        for region in found:
            for block in region.blocks:
                for op in block.operations:
                    yield from operation(op.operation)

    def operation(op):
        kind = op.name.removeprefix("stablehlo.")
        if kind in ("func.call", "call"):
            yield from function(op.attributes["callee"].value)
        elif kind == "while":
            test, body = (list(regions([region])) for region in op.regions)
            turns = _turns(op, bool(test)) if test or body else 0
            yield from ((send, times * turns) for send, times in body)
        elif kind in ("case", "if"):
            yield from same_in_all("lowered", [list(regions([region])) for region in op.regions])
        elif kind == "collective_permute":
            yield permuted(n, np.array(op.attributes["source_target_pairs"]), _size(op)), 1
        elif kind in COLLECTIVES:
            yield least(kind, n, _groups(symbols, op.attributes["replica_groups"]), _size(op)), 1
        elif kind in UNKNOWN or (kind == "custom_call" and "ragged" in str(op.attributes["call_target_name"])):
            raise unknown("lowered(f)", kind)
        else:
            yield from regions(op.regions)

    return function("main")


def _size(op: Any) -> int:
    return sum(bytes_of(*_shape(str(operand.type))) for operand in op.operands)


def _shape(text: str) -> tuple[str, list[int]]:
    sizes, dtype = re.match(r"tensor<((?:\d+x)*)([^,>]+)", text).groups()
    return dtype, [int(size) for size in sizes.split("x")[:-1]]


def _groups(symbols: dict[str, Any], attribute: Any) -> list:
    text = str(attribute)
    if "replica_group_mesh_axes" not in text:
        return [[device for device in group if device >= 0] for group in np.array(attribute).tolist()]
    mesh = str(symbols[re.search(r"mesh = @([\w.]+)", text)[1]])
    if "sub_axis" in text or "device_ids" in mesh:
        raise ValueError(f"lowered(f): groups of devices written in an unknown way: {text}; use traced.")
    sizes = dict(re.findall(r'"([^"]+)"=(\d+)', mesh))
    return groups({name: int(size) for name, size in sizes.items()}, re.findall(r'name = "([^"]+)"', text)).tolist()


def _turns(op: Any, asks: bool) -> int:
    """How often a while loop that counts goes round; one whose condition asks other devices counts nothing."""
    test, body = (region.blocks[0] for region in op.regions)
    compare = _made_by(_last(test).operands[0])
    if not asks and compare is not None and compare.name == "stablehlo.compare":
        counter, end = compare.operands
        direction = re.search(r"[A-Z]{2}", str(compare.attributes["comparison_direction"]))[0]
        place = next((i for i, argument in enumerate(test.arguments) if argument == counter), None)
        if place is not None and direction in _TURNS:
            add = _made_by(_last(body).operands[place])
            if add is not None and add.name == "stablehlo.add":
                step = next((number for number in map(_number, add.operands) if number is not None), None)
                counts = any(operand == body.arguments[place] for operand in add.operands)
                begin, end = _number(op.operands[place]), _number(end)
                if counts and None not in (step, begin, end) and step > 0:
                    return max(_TURNS[direction](end - begin, step), 0)
    raise ValueError("lowered(f): a while loop sends whose turns are not counted; use a scan, or traced with trips=.")


def _last(block: Any) -> Any:
    return list(block.operations)[-1].operation


def _made_by(value: Any) -> Any:
    """The operation that makes a value; None of an argument."""
    owner = getattr(value.owner, "operation", value.owner)
    return owner if hasattr(owner, "name") else None


def _number(value: Any) -> int | None:
    made_by = _made_by(value)
    if made_by is None or made_by.name != "stablehlo.constant":
        return None
    return int(np.array(made_by.attributes["value"]).reshape(-1)[0])
