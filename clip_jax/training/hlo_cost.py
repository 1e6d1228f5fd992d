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
from dataclasses import dataclass, field

from clip_jax.training.hlo import Op, Program, parse, shape_bytes
from clip_jax.training.topologies import Device

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
HOP_SECONDS = 1e-6  # assumed for the first byte of a collective to arrive
_RENAMES = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
_RENAMING_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
    "Sharding",
)


@dataclass
class Traffic:
    """How often a kind of collective runs in one execution, and the bytes of its results on one device."""

    count: int = 0
    bytes: int = 0


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
      collectives: kind -> its traffic.
      bounded: operation (or custom call's target) -> seconds.
      cycles_by_scope: where in the Python program the cycles are spent.
      unknown_loops: loops whose trip count the program does not say; they count once.
    """

    cycles: int = 0
    compute_seconds: float = 0.0
    bounded_seconds: float = 0.0
    collective_seconds: float = 0.0
    copy_seconds: float = 0.0
    collectives: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    bounded: Counter = field(default_factory=Counter)
    cycles_by_scope: Counter = field(default_factory=Counter)
    unknown_loops: int = 0

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
                now += max(self.run(name, times) for name in _callees(op))
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
        kind, moved = op.opcode.removesuffix("-start"), self.program.transferred_bytes(op, computation)
        if kind in COLLECTIVES:
            return "network", self._collective(op, kind, moved, times)
        return "hbm", moved / self.device.hbm_bandwidth

    def _collective(self, op: Op, kind: str, result_bytes: int, times: int) -> float:
        """Accounts a collective's traffic; returns a lower bound of its seconds."""
        traffic = self.cost.collectives[kind]
        traffic.count += times
        traffic.bytes += times * result_bytes
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
    found = re.search(r"(?:to_apply|branch_computations|true_computation)=\{?([^}]*?)\}?(?:, \w+=|$)", op.attributes)
    return re.findall(r"%([\w.-]+)", found[1])


def _phase(op: Op, program: Program) -> tuple[str, str]:
    """Whether an operation starts or finishes a transfer that goes on meanwhile, and the transfer's name."""
    if op.name.startswith("async-collective-") and (fused := _fused_collective(op, program)):
        return op.name.split("-")[2].partition(".")[0], fused.attribute("channel_id")
    if op.opcode.endswith("-start"):
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
