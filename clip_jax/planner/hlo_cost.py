"""What one execution of a compiled TPU program costs: time, as an estimate, and the bytes of its collectives.

The TPU compiler writes `estimated_cycles` next to the operations whose cost it models. A compiled program is also a
schedule, so its time is found by walking it in order, loops times their trip counts: an operation with an estimate
takes that many cycles; a transfer that is started and finished elsewhere goes on meanwhile, at the bandwidth of what
carries it, and is waited for if it is late. Operations without an estimate take the time of a bound: bytes over
bandwidth, or the floating point operations that a kernel's author declared over the peak. None is free but those that
only rename memory.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from clip_jax.planner.hlo import Op, Program, parse, shape_bytes
from clip_jax.planner.topologies import Device

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Assumed until the first byte arrives: from a chip of the slice, and from a host of another one.
HOP_SECONDS = 1e-6
SLICE_SECONDS = 5e-5
_RENAMES = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
_RENAMING_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
    "Sharding",
)


class Traffic(NamedTuple):
    """How often a kind of collective runs in one execution, and the bytes of its results on one device."""

    count: int
    bytes: int


@dataclass
class CostEstimate:
    """One execution of a program on each device.

    Attributes:
      cycles: the compiler's estimates, added up.
      seconds: of the whole schedule; the sum of the four parts below.
      compute_seconds: of operations with an estimate.
      bounded_seconds: of operations without one, by a bound; what they are is in `bounded`.
      collective_seconds: of collectives, as far as nothing else runs meanwhile.
      copy_seconds: of waiting for copies between memories on the chip.
      collective_counts: kind -> how often it runs. `send` and `recv` are the transfers between slices.
      collective_bytes: kind -> bytes of its results.
      bounded: operation (or custom call's target) -> seconds.
      cycles_by_scope: where in the Python program the cycles are spent.
      unknown_loops: loops whose trip count the program does not say; they count once.
    """

    cycles: int = 0
    compute_seconds: float = 0.0
    bounded_seconds: float = 0.0
    collective_seconds: float = 0.0
    copy_seconds: float = 0.0
    collective_counts: Counter = field(default_factory=Counter)
    collective_bytes: Counter = field(default_factory=Counter)
    bounded: Counter = field(default_factory=Counter)
    cycles_by_scope: Counter = field(default_factory=Counter)
    unknown_loops: int = 0

    @property
    def collectives(self) -> dict[str, Traffic]:
        """Kind of collective -> its traffic."""
        return {kind: Traffic(count, self.collective_bytes[kind]) for kind, count in self.collective_counts.items()}

    @property
    def seconds(self) -> float:
        """Of one execution."""
        return sum(self.seconds_by_kind().values())

    def seconds_by_kind(self) -> dict[str, float]:
        """The four parts that make up a step."""
        return {
            "computation": self.compute_seconds,
            "operations without an estimate": self.bounded_seconds,
            "collectives": self.collective_seconds,
            "copies": self.copy_seconds,
        }

    def add(self, other: "CostEstimate") -> None:
        """Adds the cost of something that runs after or before it."""
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, part.name, mine + theirs)

    def mfu(self, flops: float, device: Device) -> float:
        """Model FLOPs utilisation, of `flops` a device and execution."""
        return flops / (self.seconds * device.peak_flops)


def estimate(hlo: str, device: Device) -> CostEstimate:
    """The cost of one execution on one device.

    Args:
      hlo: `Compiled.as_text()` of a program compiled for a TPU.
      device: the device it was compiled for.
    """
    program = parse(hlo)
    cost = CostEstimate()
    _Schedule(program, device, cost).run(program.entry, 1)
    return cost


@dataclass
class _Schedule:
    program: Program
    device: Device
    cost: CostEstimate

    def run(self, computation: str, times: int) -> float:
        """Adds `times` executions of a computation to the cost; returns the seconds of one."""
        now, busy_until, arrives = 0.0, defaultdict(float), {}
        for op in self.program.computations[computation]:
            step, transfer = _phase(op, self.program)
            if op.opcode == "while":
                now += self._loop(op, computation, times)
            elif op.opcode in ("call", "conditional"):
                now += self._branch(op, times)
            elif step == "start":
                carrier, seconds = self._transfer(op, computation, times)
                busy_until[carrier] = max(now, busy_until[carrier]) + seconds
                arrives[transfer] = carrier, busy_until[carrier]
            elif step == "done":
                carrier, arrival = arrives[transfer]
                wait = max(0.0, arrival - now)
                if carrier == "hbm":
                    self.cost.copy_seconds += times * wait
                else:
                    self.cost.collective_seconds += times * wait
                now += wait
            else:
                now += self._execute(op, computation, times)
        return now

    def _loop(self, op: Op, computation: str, times: int) -> float:
        trips = self.program.trip_count(op, computation)
        if trips is None:
            self.cost.unknown_loops += 1
            trips = 1
        return trips * self.run(op.attribute("body"), times * trips) if trips else 0.0

    def _branch(self, op: Op, times: int) -> float:
        """Of several branches, the slowest counts."""
        costs = {name: CostEstimate() for name in _callees(op)}
        seconds = {name: _Schedule(self.program, self.device, cost).run(name, times) for name, cost in costs.items()}
        slowest = max(seconds, key=seconds.get)
        self.cost.add(costs[slowest])
        return seconds[slowest]

    def _execute(self, op: Op, computation: str, times: int) -> float:
        """Accounts an operation that nothing overlaps with; returns its seconds."""
        fused = _fused_collective(op, self.program)
        if fused or op.opcode in COLLECTIVES:
            # A fusion with no cycles of its own around an all-reduce: each device keeps its part of the sum.
            kind = "reduce-scatter" if fused and fused.opcode == "all-reduce" else (fused or op).opcode
            seconds = self._collective(fused or op, kind, shape_bytes(op.shape), times)
            self.cost.collective_seconds += times * seconds
        elif op.estimated_cycles is not None:
            seconds = op.estimated_cycles / self.device.clock_hz
            self.cost.cycles += times * op.estimated_cycles
            self.cost.cycles_by_scope[op.scope] += times * op.estimated_cycles
            self.cost.compute_seconds += times * seconds
        else:
            seconds, label = self._bound(op, computation)
            if seconds:
                self.cost.bounded[label] += times * seconds
            self.cost.bounded_seconds += times * seconds
        return seconds

    def _transfer(self, op: Op, computation: str, times: int) -> tuple[str, float]:
        """What carries an asynchronous transfer, and for how long."""
        if fused := _fused_collective(op, self.program):
            return "network", self._collective(fused, fused.opcode, shape_bytes(fused.shape), times)
        if op.opcode in ("send", "recv"):
            payload = shape_bytes(op.shape[: op.shape.rindex("u32[]")])
            return op.opcode, self._collective(op, op.opcode, payload, times)
        kind, moved = op.opcode.removesuffix("-start"), self.program.transferred_bytes(op, computation)
        if kind in COLLECTIVES:
            return "network", self._collective(op, kind, moved, times)
        return "hbm", moved / self.device.hbm_bandwidth

    def _collective(self, op: Op, kind: str, result_bytes: int, times: int) -> float:
        """Accounts a collective's traffic; returns a lower bound of its seconds."""
        self.cost.collective_counts[kind] += times
        self.cost.collective_bytes[kind] += times * result_bytes
        if kind in ("send", "recv"):
            return SLICE_SECONDS + result_bytes / self.device.dcn_bandwidth
        members = group_size(op)
        if kind == "collective-permute":
            return HOP_SECONDS + result_bytes * self.device.ici_links / self.device.ici_bandwidth
        # Bytes that each device must send, as a multiple of its result.
        share = {"all-reduce": 2 * (1 - 1 / members), "reduce-scatter": members - 1.0}.get(kind, 1 - 1 / members)
        return HOP_SECONDS + share * result_bytes / self.device.ici_bandwidth

    def _bound(self, op: Op, computation: str) -> tuple[float, str]:
        """A lower bound of the seconds of an operation without an estimate, and what to call it."""
        label = op.attribute("custom_call_target") or op.opcode
        if op.opcode in _RENAMES or label.strip('"') in _RENAMING_CALLS:
            return 0.0, label
        moved = shape_bytes(op.shape) + self.program.operand_bytes(op, computation)
        declared = re.search(r'"flops":"?(\d+)', op.attributes)  # the cost_estimate of a Pallas kernel
        flops = int(declared[1]) if declared else 0
        return max(moved / self.device.hbm_bandwidth, flops / self.device.peak_flops), label


def group_size(op: Op) -> int:
    """How many devices take part in a collective together."""
    text = op.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    if tiled := re.match(r"\[\d+,(\d+)\]", text):
        return int(tiled[1])
    if meshed := re.match(r"mesh\[(.*?)\][^{]*\{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
        members = 1
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed[2]):
            members *= int(part or sizes[axis])
        return members
    return 2


def _callees(op: Op) -> list[str]:
    found = re.search(r"(?:to_apply|branch_computations)=\{?([^}=]*)", op.attributes)
    both = re.findall(r"(?:true|false)_computation=%([\w.-]+)", op.attributes)
    return re.findall(r"%([\w.-]+)", found[1]) if found else both


def _phase(op: Op, program: Program) -> tuple[str, str]:
    """Whether an operation starts or finishes a transfer that goes on meanwhile, and the transfer's name."""
    if op.name.startswith("async-collective-") and (fused := _fused_collective(op, program)):
        return op.name.split("-")[2].partition(".")[0], fused.attribute("channel_id")
    if op.opcode.endswith("-start") or op.opcode in ("send", "recv"):
        return "start", op.name
    if op.opcode.endswith("-done"):
        return "done", op.operands[0]
    return "", ""


def _fused_collective(op: Op, program: Program) -> Op | None:
    """The collective that a fusion without cycles of its own carries out."""
    if op.opcode != "fusion" or op.estimated_cycles is not None:
        return None
    inside = program.computations[op.attribute("calls")]
    nested = (_fused_collective(inner, program) for inner in inside)
    return next(filter(None, (*(inner for inner in inside if inner.opcode in COLLECTIVES), *nested)), None)
