"""What running a program costs each device: seconds by what they are spent on, and the traffic between devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from clip_jax.planner.topologies import Device


class Traffic(NamedTuple):
    """How often a kind of collective runs, and the bytes of its results on one device."""

    count: int
    bytes: int


@dataclass(frozen=True)
class CostEstimate:
    """Costs of what runs one after the other add up, and a loop multiplies those of its body.

    Attributes:
      compute_seconds: operations with an estimate of the compiler.
      bounded_seconds: operations without one, by a bound.
      collective_seconds: collectives, as far as nothing else runs meanwhile.
      copy_seconds: waiting for copies between memories on the chip.
      collectives: kind -> traffic. `send` and `recv` are the transfers between slices.
      unknown_loops: loops whose trip count the program does not say; their bodies count once.
      unknown_groups: collectives that do not say who takes part; they count as of all devices.
    """

    compute_seconds: float = 0.0
    bounded_seconds: float = 0.0
    collective_seconds: float = 0.0
    copy_seconds: float = 0.0
    collectives: Mapping[str, Traffic] = field(default_factory=dict)
    unknown_loops: frozenset[str] = frozenset()
    unknown_groups: frozenset[str] = frozenset()

    def __add__(self, other: "CostEstimate") -> "CostEstimate":
        none = Traffic(0, 0)
        pairs = {
            kind: (self.collectives.get(kind, none), other.collectives.get(kind, none))
            for kind in {**self.collectives, **other.collectives}
        }
        return CostEstimate(
            self.compute_seconds + other.compute_seconds,
            self.bounded_seconds + other.bounded_seconds,
            self.collective_seconds + other.collective_seconds,
            self.copy_seconds + other.copy_seconds,
            {kind: Traffic(a.count + b.count, a.bytes + b.bytes) for kind, (a, b) in pairs.items()},
            self.unknown_loops | other.unknown_loops,
            self.unknown_groups | other.unknown_groups,
        )

    def __mul__(self, times: int) -> "CostEstimate":
        return CostEstimate(
            self.compute_seconds * times,
            self.bounded_seconds * times,
            self.collective_seconds * times,
            self.copy_seconds * times,
            {kind: Traffic(times * count, times * size) for kind, (count, size) in self.collectives.items()},
            self.unknown_loops,
            self.unknown_groups,
        )

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
        """Model FLOPs utilisation, for `flops` per device and execution."""
        return flops / (self.seconds * device.peak_flops)
