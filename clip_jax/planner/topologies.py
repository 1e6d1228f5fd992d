"""TPU slices by their Cloud names, and the facts about their chips that a plan needs.

All figures are for one JAX device. That is a chip, except on v3 and tpu7x, where it is one of a chip's two cores.
"""

import re
from dataclasses import dataclass

from clip_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one JAX device of a TPU generation can do.

    Attributes:
      peak_flops: bfloat16 floating point operations per second.
      clock_hz: of its TensorCores. It is the peak over MXUs x 2 x side^2; on megacore chips (v4, v5p) the compiler
        counts cycles for both cores working together.
      hbm_limit: bytes that the compiler grants a program, from its own error message (libtpu 0.0.42).
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes per second that it sends over all its links in the slice together.
      ici_links: how many links those are.
      dcn_bandwidth: bytes per second that it sends to other slices, its share of the host's network.
    """

    peak_flops: float
    clock_hz: float
    hbm_limit: int
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How slices of one TPU generation are named and built.

    Attributes:
      device: facts about one JAX device.
      libtpu_name: how the compiler calls the generation.
      chip_config: "megacore" where both TensorCores of a chip act as one device.
      dimensions: of the torus, 2 or 3.
      cores_in_name: TensorCores per chip by which the number in a Cloud name counts (1: it counts chips).
      devices_per_chip: JAX devices.
      wraps_from: a side of at least this many chips, and a multiple of it, is closed to a ring.
      largest: chips of the largest slice.
    """

    device: Device
    libtpu_name: str
    chip_config: str
    dimensions: int
    cores_in_name: int
    devices_per_chip: int
    wraps_from: int
    largest: int

    @property
    def device_name(self) -> str:
        """What one JAX device is."""
        return "chip" if self.devices_per_chip == 1 else "core"


# Sources: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, tables of key specifications (peak, HBM bandwidth, ICI,
# DCN; ICI is quoted in both directions, a device sends half of it; v3 and v4: all-reduce bandwidth of a pod over its
# chips). Cores' MXUs, from which the clocks follow: Jouppi et al., CACM 63(7) 2020 (v3), ISCA 2023 (v4). DCN of v3 and
# v4 is not published; v5e's 25 Gbit/s is assumed.
GENERATIONS = {
    "v3": Generation(
        device=Device(
            peak_flops=61.5e12,
            clock_hz=0.94e9,
            hbm_limit=int(15.48 * GIB),
            hbm_bandwidth=450e9,
            ici_bandwidth=164e9,
            ici_links=4,
            dcn_bandwidth=1.56e9,
        ),
        libtpu_name="v3",
        chip_config="default",
        dimensions=2,
        cores_in_name=2,
        devices_per_chip=2,
        wraps_from=32,
        largest=1024,
    ),
    "v4": Generation(
        device=Device(
            peak_flops=275e12,
            clock_hz=1.05e9,
            hbm_limit=int(30.75 * GIB),
            hbm_bandwidth=1200e9,
            ici_bandwidth=268e9,
            ici_links=6,
            dcn_bandwidth=3.125e9,
        ),
        libtpu_name="v4",
        chip_config="megacore",
        dimensions=3,
        cores_in_name=2,
        devices_per_chip=1,
        wraps_from=4,
        largest=4096,
    ),
    "v5e": Generation(
        device=Device(
            peak_flops=197e12,
            clock_hz=1.5e9,
            hbm_limit=int(15.75 * GIB),
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,
            ici_links=4,
            dcn_bandwidth=3.125e9,
        ),
        libtpu_name="v5e",
        chip_config="default",
        dimensions=2,
        cores_in_name=1,
        devices_per_chip=1,
        wraps_from=16,
        largest=256,
    ),
    "v5p": Generation(
        device=Device(
            peak_flops=459e12,
            clock_hz=1.75e9,
            hbm_limit=int(95.74 * GIB),
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,
            ici_links=6,
            dcn_bandwidth=6.25e9,
        ),
        libtpu_name="v5",
        chip_config="megacore",
        dimensions=3,
        cores_in_name=2,
        devices_per_chip=1,
        wraps_from=4,
        largest=8960,
    ),
    "v6e": Generation(
        device=Device(
            peak_flops=918e12,
            clock_hz=1.75e9,
            hbm_limit=int(31.25 * GIB),
            hbm_bandwidth=1638e9,
            ici_bandwidth=400e9,
            ici_links=4,
            dcn_bandwidth=12.5e9,
        ),
        libtpu_name="v6e",
        chip_config="default",
        dimensions=2,
        cores_in_name=1,
        devices_per_chip=1,
        wraps_from=16,
        largest=256,
    ),
    "tpu7x": Generation(
        device=Device(
            peak_flops=1153.5e12,
            clock_hz=2.2e9,
            hbm_limit=int(94.75 * GIB),
            hbm_bandwidth=3690e9,
            ici_bandwidth=300e9,
            ici_links=6,
            dcn_bandwidth=6.25e9,
        ),
        libtpu_name="tpu7x",
        chip_config="default",
        dimensions=3,
        cores_in_name=2,
        devices_per_chip=2,
        wraps_from=4,
        largest=9216,
    ),
}

_NAME = re.compile(r"(?:(\d+)x)?(v3|v4|v5e|v5p|v6e|tpu7x)-(\d+)(?::(\d+(?:x\d+)+))?")
KNOWN_FORMS = (
    "v3-N, v4-N, v5p-N, tpu7x-N (N TensorCores, two per chip), v5e-N, v6e-N (N chips), with N a power of two; "
    "2xv5e-256 for two slices; v5p-384:4x4x12 to give a slice's shape in chips"
)


@dataclass(frozen=True)
class Topology:
    """A number of equal slices.

    Attributes:
      name: as the user gave it.
      generation: its chips.
      slices: how many.
      shape: chips along each dimension of one slice.
    """

    name: str
    generation: Generation
    slices: int
    shape: tuple[int, ...]

    @property
    def device(self) -> Device:
        """Facts about one of its devices."""
        return self.generation.device

    @property
    def chips(self) -> int:
        """In all slices together."""
        chips = self.slices
        for side in self.shape:
            chips *= side
        return chips

    def description(self) -> dict:
        """What `jax.experimental.topologies.get_topology_desc` takes."""
        generation = self.generation
        wrap = [side >= generation.wraps_from and side % generation.wraps_from == 0 for side in self.shape]
        torus = generation.dimensions == 2 or all(wrap)  # three dimensions close together, by whole cubes
        return {
            "platform": "tpu",
            "topology_name": f"{generation.libtpu_name}:{'x'.join(map(str, self.shape))}",
            "chip_config_name": generation.chip_config,
            "chips_per_host_bounds": (*(min(side, 2) for side in self.shape[:2]), 1),
            "num_slices": self.slices,
            "wrap": tuple(side and torus for side in [*wrap, False][:3]),
        }


def parse_topology(name: str) -> Topology:
    """The topology that a Cloud name means, such as `v5e-256`, `2xv5e-256` or `v5p-384:4x4x12`.

    Raises:
      UserError: the name has another form, or there is no such slice.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise UserError(f"unknown topology {name!r}; expected {KNOWN_FORMS}")
    slices, family, number, shape = found.groups()
    generation = GENERATIONS[family]
    chips, rest = divmod(int(number), generation.cores_in_name)
    if rest or not 1 <= chips <= generation.largest or int(slices or 1) < 1:
        sizes = f"1 to {generation.largest * generation.cores_in_name}, counted in {generation.cores_in_name} per chip"
        raise UserError(f"there is no topology {name!r}: {family} slices have {sizes}; expected {KNOWN_FORMS}")
    sides = tuple(map(int, shape.split("x"))) if shape else _usual_shape(name, chips, generation.dimensions)
    topology = Topology(name, generation, int(slices or 1), sides)
    if topology.chips != chips * topology.slices or len(sides) != generation.dimensions:
        raise UserError(f"{name!r}: {chips} chips in {generation.dimensions} dimensions were expected, got {shape}")
    return topology


def _usual_shape(name: str, chips: int, dimensions: int) -> tuple[int, ...]:
    """The shape that Cloud gives so many chips: as even as possible, smallest side first, but one flat board of 4."""
    doublings = chips.bit_length() - 1
    if chips != 2**doublings:
        raise UserError(f"{name!r} needs its shape in chips, for example v5p-384:4x4x12; expected {KNOWN_FORMS}")
    low, extra = divmod(doublings, dimensions)
    sides = tuple(2 ** (low + (axis >= dimensions - extra)) for axis in range(dimensions))
    return (2, 2, 1) if sides == (1, 2, 2) else sides
