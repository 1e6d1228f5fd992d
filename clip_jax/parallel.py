"""What is sharded over what: the one place that knows the mesh and the rules for the modules' logical axes.

Three mesh axes. The batch is split over `data` and `fsdp` together; `fsdp` also splits parameters and optimizer
state along their `embed` (or `channels`) axis, gathered again where they are used; `tensor` splits attention heads,
MLP widths, the vocabulary and the classes of a head.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.errors import UserError
from clip_jax.options import option

MESH_AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None

# Every logical axis of the modules -> the mesh axes that it is split over; None is never split.
RULES: Mapping[str, MeshAxes] = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "embed": "fsdp",  # the width of a tower, in parameters
        "channels": "fsdp",  # the output channels of a convolution
        "heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "classes": "tensor",
        **dict.fromkeys(("channels_in", "head_dim", "kernel_height", "kernel_width", "layers", "norm", "positions")),
        **dict.fromkeys(("features", "height", "length", "projection", "width")),
    }
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices of a slice along each mesh axis, and rules over those of `RULES`.

    One of the sizes may be -1 and takes what the others leave. Several slices multiply `data`, so that only gradients
    and the loss's features travel between them.
    """

    data: int = option(-1, "copies of parameters and moments in a slice; -1 takes all devices left", may_change=True)
    fsdp: int = option(1, "devices that share one copy", may_change=True)
    tensor: int = option(1, "devices that share heads, MLP widths, the vocabulary and classes", may_change=True)
    rules: Mapping[str, MeshAxes] = option({}, "logical axis -> mesh axes, over RULES in parallel.py", may_change=True)

    def __post_init__(self):
        for name, axes in self.rules.items():
            if name not in RULES:
                raise UserError(f"mesh.rules has no logical axis {name!r}; expected some of {', '.join(RULES)}")
            unknown = set(_tuple(axes)) - set(MESH_AXES)
            if unknown or (name == "batch" and not _tuple(axes)):
                raise UserError(f"mesh.rules.{name} must be some of {', '.join(MESH_AXES)}; got {axes!r}")

    def resolve(self, devices: int) -> tuple[int, int, int]:
        """The three sizes for so many devices of one slice.

        Raises:
          UserError: the sizes do not multiply to the number of devices.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"mesh sizes must be at least 1, and one of them may be -1; got {sizes}")
        known = math.prod(size for size in sizes if size != -1)
        if devices % known or (-1 not in sizes and known != devices):
            divisors = [n for n in range(1, devices + 1) if devices % n == 0]
            raise UserError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not fit {devices} devices; "
                f"the sizes must multiply to {devices} (each one of {', '.join(map(str, divisors))}; -1 fills)"
            )
        return tuple(devices // known if size == -1 else size for size in sizes)


@dataclass(frozen=True)
class Partitioner:
    """A mesh with axes `MESH_AXES`, and the rules that say what is split over it."""

    mesh: Mesh
    rules: Mapping[str, MeshAxes]

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the batch is split."""
        return _tuple(self.rules["batch"])

    @property
    def batch_shards(self) -> int:
        """Into how many pieces the batch is split."""
        return self._size(self.batch_axes)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Of an array whose first axis is the global batch."""
        return NamedSharding(self.mesh, PartitionSpec(self.batch_axes))

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: Any) -> Any:
        """A NamedSharding for every leaf of a tree of (boxed) shapes, as `jax.eval_shape` of an init makes them.

        A leaf's axis stays whole where the mesh axis does not divide it (a stem of 32 channels over 256 chips, say).

        Args:
          tree: leaves are shapes, boxed by `nn.with_logical_partitioning` where they have logical axes.
        """
        specs = nn.logical_to_mesh(nn.get_partition_spec(tree), tuple(self.rules.items()))

        def sharding(leaf: Any, spec: PartitionSpec) -> NamedSharding:
            axes = [
                axis if size % self._size(_tuple(axis)) == 0 else None
                for size, axis in zip(leaf.shape, (*spec, *[None] * len(leaf.shape)), strict=False)
            ]
            while axes and axes[-1] is None:
                axes.pop()
            return NamedSharding(self.mesh, PartitionSpec(*axes))

        return jax.tree.map(sharding, nn.unbox(tree), specs)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, `nn.with_logical_constraint` in the modules takes effect (outside it silently does nothing)."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(tuple(self.rules.items())):
            yield

    def jit(self, function: Callable, **options: Any) -> "Jitted":
        """`jax.jit(function, **options)`, called and lowered while this partitioner is active."""
        return Jitted(jax.jit(function, **options), self)

    def check_batch_size(self, batch_size: int, microbatches: int = 1, processes: int = 1) -> None:
        """Every device, host and micro-batch must get the same number of examples.

        Raises:
          UserError: they do not; the message names the nearest sizes that work.
        """
        unit = math.lcm(self.batch_shards * microbatches, processes)
        if batch_size < 1 or batch_size % unit:
            below = batch_size // unit * unit
            nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
            raise UserError(
                f"batch_size must be a multiple of {unit} ({self.batch_shards} batch shards x {microbatches} "
                f"microbatches, {processes} hosts), got {batch_size}; try {nearest}"
            )

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)


@dataclass(frozen=True)
class Jitted:
    """A jitted function that runs with the mesh and the rules that its modules look up."""

    function: Any
    partitioner: Partitioner

    def __call__(self, *args: Any) -> Any:
        with self.partitioner.active():
            return self.function(*args)

    def lower(self, *args: Any) -> Any:
        with self.partitioner.active():
            return self.function.lower(*args)


def make_partitioner(config: MeshConfig, devices: list[jax.Device] | None = None) -> Partitioner:
    """The mesh that `config` describes over `devices` (default: all, of every process), with its rules.

    On several TPU slices the `data` axis goes across them.

    Raises:
      UserError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = config.resolve(len(devices) // slices)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(np.asarray(grid), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Partitioner(mesh, MappingProxyType({**RULES, **config.rules}))


def _tuple(axes: MeshAxes | list[str]) -> tuple[str, ...]:
    """Mesh axes as a rule gives them: one, several or none."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
