"""Reading the text of a compiled, scheduled XLA program: its computations, their operations, its loops' trip counts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

# `%name = shape opcode(operands), attributes`; neither shapes nor layouts hold a space followed by `word(`.
_OP = re.compile(r"^\s+(?:ROOT )?%?(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][a-z0-9-]*)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[^\s(]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Op:
    """One operation: `shape` is the text of its result's type, `attributes` all that follows the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def estimated_cycles(self) -> int | None:
        """The TPU compiler's own estimate for one execution, or None where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def attribute(self, key: str) -> str | None:
        """The word after `key=`, without its leading %."""
        found = re.search(rf"[, ]{key}=%?([^\s,]+)", self.attributes)
        return found[1] if found else None

    @property
    def scope(self) -> str:
        """Where in the Python program it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def callees(self) -> list[str]:
        """The computations of a call, or the branches of a conditional."""
        found = re.search(r"(?:to_apply|branch_computations)=\{?([^}=]*)", self.attributes)
        both = re.findall(r"(?:true|false)_computation=%([\w.-]+)", self.attributes)
        return re.findall(r"%([\w.-]+)", found[1]) if found else both


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: name -> operations in the order of execution.
      entry: the computation that the program starts with.
      devices: how many run it together.
    """

    computations: Mapping[str, tuple[Op, ...]]
    entry: str
    devices: int

    def trip_count(self, loop: Op, computation: str) -> int | None:
        """How often a `while` of `computation` runs its body; None if the program does not say.

        It says so in the loop's `known_trip_count`, or by a condition `counter < constant` (the counter starts at a
        constant and goes up by 1, as every `lax.scan` does).
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self._ops_of(loop.attribute("condition"))
        compare = self.computations[loop.attribute("condition")][-1]
        if compare.opcode != "compare" or compare.attribute("direction") != "LT":
            return None
        counter, bound = (condition[operand] for operand in compare.operands)
        limit = _constant(bound, condition)
        if counter.opcode != "get-tuple-element" or limit is None:
            return None
        outside = self._ops_of(computation)
        carried = outside[loop.operands[0]]
        if carried.opcode != "tuple":
            return None
        start = _constant(outside[carried.operands[int(counter.attribute("index"))]], outside)
        return None if start is None else max(0, limit - start)

    def group_size(self, collective: Op) -> int | None:
        """How many devices take part in a collective together; None if its text is of an unknown form."""
        text = collective.attributes.partition("replica_groups=")[2]
        if text.startswith("{}"):
            return self.devices
        if listed := re.match(r"\{\{([\d,]+)\}", text):
            return listed[1].count(",") + 1
        if tiled := re.match(r"\[\d+,(\d+)\]<=", text):
            return int(tiled[1])
        if meshed := re.match(r"mesh\[(.*?)\][^{]*\{(.*?)\}", text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return None

    def _ops_of(self, computation: str) -> dict[str, Op]:
        return self._by_name[computation]

    @cached_property
    def _by_name(self) -> dict[str, dict[str, Op]]:
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def transferred_bytes(self, start: Op, computation: str) -> int:
        """Bytes that arrive by an asynchronous operation, from the result of what finishes it."""
        return shape_bytes(next(op.shape for op in self.computations[computation] if start.name in op.operands))

    def operand_bytes(self, op: Op, computation: str) -> int:
        """Bytes of all operands of an operation of `computation`."""
        return sum(shape_bytes(self._by_name[computation][name].shape) for name in op.operands)


def parse(text: str) -> Program:
    """The program in `text`, as `Compiled.as_text()` gives it."""
    computations, current, entry = {}, None, ""
    counts = re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])
    for line in text.splitlines():
        header = None if line.startswith(" ") else _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif current is not None and (found := _OP.match(line)):
            operands, attributes = _split_operands(found["rest"])
            current.append(Op(found["name"], found["shape"], found["opcode"], operands, attributes))
    return Program({name: tuple(ops) for name, ops in computations.items()}, entry, math.prod(map(int, counts)))


def shape_bytes(shape: str) -> int:
    """Bytes of an array type or of all arrays of a tuple type, without the padding that a layout's tiles add."""
    total_bits = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])
        for size in filter(None, dimensions.split(",")):
            bits *= int(size)
        total_bits += bits
    return total_bits // 8


def _split_operands(rest: str) -> tuple[tuple[str, ...], str]:
    """`%a, /*index=1*/%b), attributes` -> ("a", "b"), attributes; a constant's operand is its value."""
    depths = accumulate((character == "(") - (character == ")") for character in rest)
    end = next(position for position, depth in enumerate(depths) if depth < 0)
    inside = re.sub(r"/\*.*?\*/", "", rest[:end])
    names = re.findall(r"%([\w.-]+)", inside) or ([inside] if inside else [])
    return tuple(names), rest[end + 1 :]


def _constant(op: Op, ops: Mapping[str, Op]) -> int | None:
    while op.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        op = ops[op.operands[0]]
    return int(op.operands[0]) if op.opcode == "constant" and op.operands[0].lstrip("-").isdigit() else None
