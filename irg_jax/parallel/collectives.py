"""What a device sends to others in one run of a compiled program, and what it computes and reads by itself.

Everything is read from the optimised HLO and multiplied by the trips of loops, so that the hops of a windowed
matmul (a loop of collective-permutes) count one by one.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from irg_jax.parallel.hlo import Executed, Instruction, Module

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all",
         "collective-broadcast")
# The operations that move nothing by themselves: what they stand for is counted where it is made or used.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
         "iota", "after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "async-done",
         "async-update")
_VIEW = "output_to_operand_aliasing={{}: (0, {})}"   # a fusion that gives its operand another layout in place


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str
    times: float       # that a run executes it
    group: int         # devices that take part together
    sent: float        # bytes a device sends each time, in the ring that is optimal for its kind
    is_async: bool     # others compute while it runs


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does by itself in a run."""

    flops: float       # of matmuls and convolutions; custom calls are opaque
    hbm_bytes: float   # read and written by top-level operations; each reads its operands once


def find_collectives(module: Module, num_devices: int) -> list[Collective]:
    """All collectives. Raises: ValueError if a loop's trips or an operation's devices cannot be read."""
    found = []
    for executed in module.executed():
        op = executed.instruction.op.removesuffix("-start")
        if op in KINDS:
            found.append(_collective(module, executed, op, num_devices))
    return [each for each in found if each.group > 1]


def _collective(module: Module, executed: Executed, kind: str, num_devices: int) -> Collective:
    instruction = executed.instruction
    block = module.computations[executed.computation]
    operands = sum(block[name].size for name in instruction.operands)
    group = 2 if kind == "collective-permute" else _group_size(instruction, num_devices)
    # A TPU compiler writes a reduce-scatter as an all-reduce in a fusion that keeps its own part.
    if kind == "all-reduce" and "all-reduce-scatter" in executed.computation:
        kind = "reduce-scatter"
    share = (group - 1) / group
    sent = {"all-gather": operands * (group - 1), "all-reduce": 2 * operands * share,
            "collective-permute": operands, "collective-broadcast": operands}.get(kind, operands * share)
    is_async = (instruction.op.endswith("-start") or "async" in executed.computation)
    return Collective(kind, executed.times, group, sent, is_async)


def _group_size(instruction: Instruction, num_devices: int) -> int:
    """Devices of a replica group, in any of the forms in which HLO lists them."""
    text = instruction.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])   # 'axis':(1)4 is a part of an axis
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if re.search(r"replica_groups=\{\}", text):
        return num_devices
    raise ValueError(f"the devices of %{instruction.name} cannot be read from {text[:120]!r}")


def total_by_kind(collectives: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a run, by kind."""
    totals: collections.Counter[str] = collections.Counter()
    for each in collectives:
        totals[each.kind] += each.times * each.sent
    return dict(totals)


def total_by_group(collectives: Iterable[Collective]) -> dict[str, float]:
    """The same by kind and by how many devices take part: "all-gather of 16"."""
    totals: collections.Counter[str] = collections.Counter()
    for each in collectives:
        totals[f"{each.kind} of {each.group}"] += each.times * each.sent
    return dict(totals)


def measure_work(module: Module) -> Work:
    """See `Work`."""
    flops = traffic = 0.0
    fused = {called for block in module.computations.values() for each in block.values()
             if each.op not in ("while", "conditional", "call") for called in each.called}
    for executed in module.executed():
        instruction, block = executed.instruction, module.computations[executed.computation]
        if instruction.op in ("dot", "convolution"):
            flops += executed.times * _matmul_flops(instruction, block)
        if executed.computation not in fused and instruction.op not in _FREE:
            traffic += executed.times * _traffic(module, instruction, block)
    return Work(flops, traffic)


def _matmul_flops(instruction: Instruction, block: dict[str, Instruction]) -> float:
    out = math.prod(instruction.arrays[0].dims)
    left, right = (block[name].arrays[0].dims for name in instruction.operands)
    if instruction.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return 2.0 * out * math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    spatial = sorted(set(names[3]) - {"b", "f"})
    window = _window(instruction.attributes, len(spatial))
    pairs = math.prod(
        _valid_pairs(left[names[1].index(axis)], instruction.arrays[0].dims[names[3].index(axis)], *part)
        for axis, part in zip(spatial, window))
    batch = instruction.arrays[0].dims[names[3].index("b")]
    features = instruction.arrays[0].dims[names[3].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2.0 * batch * features * pairs * right[names[2].index("i")] / (int(groups[1]) if groups else 1)


def _window(attributes: str, count: int) -> list[tuple[int, int, int, int, int]]:
    """Per spatial axis: size, stride, low padding, input dilation, kernel dilation."""
    text = (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]
    def part(name, default):
        found = re.search(rf"\b{name}=(\S+)", text)
        return found[1].split("x") if found else [default] * count
    low = [each.split("_")[0] for each in part("pad", "0_0")]
    rows = zip(part("size", "1"), part("stride", "1"), low, part("lhs_dilate", "1"), part("rhs_dilate", "1"))
    return [tuple(map(int, row)) for row in rows]


def _valid_pairs(length: int, out: int, size: int, stride: int, low: int, dilation: int, spread: int) -> int:
    """(output, kernel) positions along an axis that meet an input value: neither padding nor a dilation's gap.

    A batched matmul is a convolution that meets few: its batch is an axis with as many kernel positions.
    """
    place = np.arange(out)[:, None] * stride - low + np.arange(size) * spread
    return int(np.sum((place >= 0) & (place <= (length - 1) * dilation) & (place % dilation == 0)))


def _traffic(module: Module, instruction: Instruction, block: dict[str, Instruction]) -> float:
    """Bytes of HBM that a top-level operation reads and writes; slices count as what they take."""
    size = lambda each: sum(array.size for array in each.arrays if not array.memory)
    if instruction.op in ("dynamic-slice", "slice", "gather"):
        return 2 * size(instruction)
    if instruction.op == "dynamic-update-slice":
        return 2 * size(block[instruction.operands[1]])
    if instruction.op == "copy-start":       # its result: what is written, what is read, a mark
        return size(dataclasses.replace(instruction, arrays=instruction.arrays[:2]))
    if (instruction.op == "async-start"
            and _root(module, instruction.called[0]).op in ("dynamic-slice", "slice")):
        part = instruction.arrays[-2]    # behind the operands, and before a mark
        return part.size * ((not part.memory) + (not block[instruction.operands[0]].arrays[0].memory))
    inside = module.computations[instruction.called[0]] if instruction.op == "fusion" else {}
    read = sum(_read(module, inside, index, size(block[name]))
               for index, name in enumerate(instruction.operands))
    return read + _written(inside, size(instruction))


def _root(module: Module, name: str) -> Instruction:
    return next(each for each in module.computations[name].values() if each.is_root)


def _read(module: Module, inside: dict[str, Instruction], index: int, whole: float) -> float:
    """Bytes of a fusion's operand that are read: slices of it, if nothing but slices is taken of it."""
    parameter = next((each.name for each in inside.values()
                      if each.op == "parameter" and each.arguments == str(index)), None)
    return _taken(module, inside, parameter, whole)


def _taken(module: Module, inside: dict[str, Instruction], name: str | None, whole: float) -> float:
    """`_read` of a value within a fusion; fusions may lie in one another, some as another view of a value."""
    users = [each for each in inside.values() if name in each.operands]
    if not users or not whole:
        return whole

    def part(user: Instruction) -> float:
        if user.op in ("dynamic-slice", "slice", "gather"):
            return user.size
        if user.op == "fusion" and _VIEW in user.attributes:
            return _taken(module, inside, user.name, whole)
        if user.op == "fusion":
            within = module.computations[user.called[0]]
            return sum(_read(module, within, place, whole)
                       for place, operand in enumerate(user.operands) if operand == name)
        return 0.0 if user.op == "dynamic-update-slice" and user.operands[0] == name else math.inf
    return min(whole, sum(map(part, users)))


def _written(inside: dict[str, Instruction], whole: float) -> float:
    updates = [each for each in inside.values() if each.op == "dynamic-update-slice"]
    return min(whole, sum(inside[each.operands[1]].size for each in updates)) if updates else whole
