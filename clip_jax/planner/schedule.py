"""The cost of one execution of a compiled TPU program: time, as an estimate, and the bytes of its collectives.

The TPU compiler writes `estimated_cycles` next to the operations whose cost it models. A compiled program is also a
schedule, so its time is found by going through it in order, loops times their trip counts: an operation with an
estimate takes that many cycles; a transfer that is started and finished elsewhere goes on meanwhile, at the bandwidth
of what carries it, and is waited for if it is late. Operations without an estimate take the time of a bound: bytes
over bandwidth, or the floating point operations that a kernel's author declared over the peak. None is free but those
that only rename memory.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from clip_jax.planner.cost import CostEstimate, Traffic
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


class Carrier(Enum):
    """What takes one transfer after another while the device computes."""

    LINKS = auto()  # between the chips of a slice
    SEND = auto()  # to other slices
    RECV = auto()  # from other slices
    MEMORY = auto()


@dataclass(frozen=True)
class Work:
    """Something that runs while nothing else does."""

    cost: CostEstimate


@dataclass(frozen=True)
class Start:
    """A transfer sets off and takes `seconds` of its carrier; `traffic` is the cost of it that no schedule hides."""

    transfer: str
    carrier: Carrier
    seconds: float
    traffic: CostEstimate


@dataclass(frozen=True)
class Wait:
    """What comes next needs a transfer's result."""

    transfer: str


Event = Work | Start | Wait


def estimate(hlo: str, device: Device) -> CostEstimate:
    """The cost of one execution on one device.

    Args:
      hlo: `Compiled.as_text()` of a program compiled for a TPU.
      device: the device it was compiled for.
    """
    program = parse(hlo)
    return _Reader(program, device).cost(program.entry)


def one_after_the_other(events: Iterable[Event]) -> CostEstimate:
    """The cost of events in their order: each waits for the one before, and transfers for their carrier."""
    total, free, arrivals = CostEstimate(), {}, {}
    for event in events:
        match event:
            case Work(cost):
                total += cost
            case Start(transfer, carrier, seconds, traffic):
                free[carrier] = max(total.seconds, free.get(carrier, 0.0)) + seconds
                arrivals[transfer] = carrier, free[carrier]
                total += traffic
            case Wait(transfer):
                carrier, arrival = arrivals[transfer]
                late = max(0.0, arrival - total.seconds)
                kind = "copy_seconds" if carrier is Carrier.MEMORY else "collective_seconds"
                total += CostEstimate(**{kind: late})
    return total


@dataclass(frozen=True)
class _Reader:
    """Reads the operations of a program as events."""

    program: Program
    device: Device

    def cost(self, computation: str) -> CostEstimate:
        """Of one execution of a computation."""
        return one_after_the_other(self._event(op, computation) for op in self.program.computations[computation])

    def _event(self, op: Op, computation: str) -> Event:
        if op.opcode == "while":
            return Work(self._loop(op, computation))
        if op.opcode in ("call", "conditional"):
            return Work(max(map(self.cost, op.callees), key=lambda cost: cost.seconds))  # the slowest branch
        fused = self._fused_collective(op)
        if fused and op.name.startswith("async-collective-start"):
            cost = self._collective(fused, fused.opcode, shape_bytes(fused.shape))
            return _started(fused.attribute("channel_id"), Carrier.LINKS, cost)
        if fused and op.name.startswith("async-collective-done"):
            return Wait(fused.attribute("channel_id"))
        if op.opcode.endswith("-start") or op.opcode in ("send", "recv"):
            return self._start(op, computation)
        if op.opcode.endswith("-done"):
            return Wait(op.operands[0])
        if fused or op.opcode in COLLECTIVES:
            # A fusion with no cycles of its own around an all-reduce: each device keeps its part of the sum.
            kind = "reduce-scatter" if fused and fused.opcode == "all-reduce" else (fused or op).opcode
            return Work(self._collective(fused or op, kind, shape_bytes(op.shape)))
        if op.estimated_cycles is not None:
            return Work(CostEstimate(compute_seconds=op.estimated_cycles / self.device.clock_hz))
        return Work(CostEstimate(bounded_seconds=self._bound(op, computation)))

    def _loop(self, op: Op, computation: str) -> CostEstimate:
        trips, body = self.program.trip_count(op, computation), self.cost(op.attribute("body"))
        return body + CostEstimate(unknown_loops=frozenset([op.name])) if trips is None else body * trips

    def _start(self, op: Op, computation: str) -> Start:
        """A transfer that an operation of its own will wait for."""
        if op.opcode in ("send", "recv"):
            cost = self._collective(op, op.opcode, shape_bytes(op.shape[: op.shape.rindex("u32[]")]))
            return _started(op.name, Carrier[op.opcode.upper()], cost)
        kind, moved = op.opcode.removesuffix("-start"), self.program.transferred_bytes(op, computation)
        if kind in COLLECTIVES:
            return _started(op.name, Carrier.LINKS, self._collective(op, kind, moved))
        return Start(op.name, Carrier.MEMORY, moved / self.device.hbm_bandwidth, CostEstimate())

    def _collective(self, op: Op, kind: str, result_bytes: int) -> CostEstimate:
        """A collective's traffic, and a lower bound of its seconds."""
        unknown = frozenset()
        if kind in ("send", "recv"):
            seconds = SLICE_SECONDS + result_bytes / self.device.dcn_bandwidth
        elif kind == "collective-permute":
            seconds = HOP_SECONDS + result_bytes * self.device.ici_links / self.device.ici_bandwidth
        else:
            members = self.program.group_size(op)
            if members is None:
                members, unknown = self.program.devices, frozenset([op.name])
            # Bytes that each device must send, as a multiple of its result.
            share = {"all-reduce": 2 * (1 - 1 / members), "reduce-scatter": members - 1.0}.get(kind, 1 - 1 / members)
            seconds = HOP_SECONDS + share * result_bytes / self.device.ici_bandwidth
        traffic = {kind: Traffic(1, result_bytes)}
        return CostEstimate(collective_seconds=seconds, collectives=traffic, unknown_groups=unknown)

    def _bound(self, op: Op, computation: str) -> float:
        """A lower bound of the seconds of an operation without an estimate."""
        target = op.attribute("custom_call_target") or ""
        if op.opcode in _RENAMES or target.strip('"') in _RENAMING_CALLS:
            return 0.0
        moved = shape_bytes(op.shape) + self.program.operand_bytes(op, computation)
        declared = re.search(r'"flops":"?(\d+)', op.attributes)  # the cost_estimate of a Pallas kernel
        flops = int(declared[1]) if declared else 0
        return max(moved / self.device.hbm_bandwidth, flops / self.device.peak_flops)

    def _fused_collective(self, op: Op) -> Op | None:
        """The collective that a fusion without cycles of its own carries out."""
        if op.opcode != "fusion" or op.estimated_cycles is not None:
            return None
        inside = self.program.computations[op.attribute("calls")]
        nested = map(self._fused_collective, inside)
        return next(filter(None, (*(inner for inner in inside if inner.opcode in COLLECTIVES), *nested)), None)


def _started(transfer: str, carrier: Carrier, cost: CostEstimate) -> Start:
    """A collective that goes on meanwhile: its seconds count only as far as something waits for it."""
    return Start(transfer, carrier, cost.seconds, replace(cost, collective_seconds=0.0))
