"""What one device executes, read from the text of an optimised HLO module: every instruction, how often.

A compiled program counts a loop's body once wherever it reports; here bodies are multiplied by their trips.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
         "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|[suc]\d+|bf16|f\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation|async_computation)"
                     r"=%([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; `memory` is the layout's memory space, 0 for HBM."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> float:
        """Bytes, without a layout's padding."""
        return BYTES[self.dtype] * math.prod(self.dims) if self.dtype in BYTES else math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line; `attributes` is what stands behind its operands."""

    name: str
    op: str
    arrays: tuple[Array, ...]     # of the result; several if it is a tuple
    operands: tuple[str, ...]
    arguments: str                # the operands as they stand, e.g. the number of a parameter or constant
    attributes: str
    is_root: bool

    @property
    def size(self) -> float:
        return sum(array.size for array in self.arrays)

    @property
    def called(self) -> tuple[str, ...]:
        found = itertools.chain.from_iterable(
            (match[1],) if match[1] else re.findall(r"%([\w.\-]+)", match[2])
            for match in _CALLED.finditer(self.attributes))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, the computation it stands in, and how often a step runs it."""

    instruction: Instruction
    computation: str
    times: float


class Module:
    """The computations of a module by name. Raises: ValueError if the text is not that of one."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        block = None
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                block = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif block is not None and (found := _LINE.match(line)):
                instruction = _instruction(found[2], line[found.end():], bool(found[1]))
                block |= {name: _element(block, name) for name in instruction.operands if "#" in name}
                block[found[2]] = instruction
        if not self.entry:
            raise ValueError("this is no text of an HLO module: it has no ENTRY")

    def executed(self) -> Iterator[Executed]:
        """Every instruction that a run of the module reaches, inside fusions too."""
        times = collections.Counter({self.entry: 1.0})
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                yield Executed(instruction, name, times[name])
                trips = self._trips(instruction) if instruction.op == "while" else 1
                for called in instruction.called:
                    times[called] += times[name] * trips

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name not in seen:
                seen.add(name)
                for instruction in self.computations[name].values():
                    for called in instruction.called:
                        visit(called)
                order.append(name)
        visit(self.entry)
        return order[::-1]

    def _trips(self, loop: Instruction) -> int:
        """From what the compiler knows, or from a condition `counter < constant` (counters start at 0)."""
        known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes)
        if known:
            return int(known[1])
        name = re.search(r"condition=%([\w.\-]+)", loop.attributes)[1]
        body = list(self._inside(name))
        limits = [int(each.arguments) for each in body
                  if each.op == "constant" and re.fullmatch(r"\d+", each.arguments)]
        compares = [each for each in body if each.op == "compare"]
        if len(limits) == len(compares) == 1 and "direction=LT" in compares[0].attributes:
            return limits[0]
        raise ValueError(f"how often the loop %{loop.name} runs cannot be read from its condition %{name}; its "
                         "work cannot be counted")

    def _inside(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations[name].values():
            yield instruction
            for called in instruction.called:
                yield from self._inside(called)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    stop = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:stop], rest[stop:].lstrip()
    op, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    return Instruction(name, op, tuple(map(_array, _ARRAY.finditer(shape))),
                       tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", rest[:end])), rest[:end], rest[end + 1:],
                       is_root)


def _element(block: dict[str, Instruction], name: str) -> Instruction:
    """`%tuple#1`, as newer compilers write it, as the instruction of its own that older ones have for it."""
    whole, _, place = name.partition("#")
    return Instruction(name, "get-tuple-element", (block[whole].arrays[int(place)],), (whole,), f"%{whole}",
                       f", index={place}", False)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"a line of HLO does not end: {text[:80]!r}")


def _array(match: re.Match) -> Array:
    memory = re.search(r"S\((\d+)\)", match[3] or "")
    dims = tuple(map(int, match[2].split(","))) if match[2] else ()
    return Array(match[1], dims, int(memory[1]) if memory else 0)
