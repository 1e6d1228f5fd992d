"""The mesh and the logical-axis rules: the one place that says what is sharded over what.

Three mesh axes. The batch is split over `data` and `fsdp` together; `fsdp` also splits parameters and optimizer
state along their `embed` (or `channels`) axis, gathered again where they are used; `tensor` splits attention heads,
MLP widths and the vocabulary.
"""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. A logical axis that is not named here is never split.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),  # the width of a tower, in parameters
    ("channels", "fsdp"),  # the output channels of a convolution
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)


@dataclass(frozen=True)
class MeshSizes:
    """Devices of a slice along each mesh axis; one of them may be -1 and takes what the others leave.

    Several slices multiply `data`, so that only gradients and the loss's features travel between them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def resolve(self, devices: int) -> tuple[int, int, int]:
        """The three sizes for so many devices of one slice.

        Raises:
          UserError: the sizes do not multiply to the number of devices.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"mesh sizes must be at least 1, and one of them may be -1; got {self}")
        known = int(np.prod([size for size in sizes if size != -1]))
        if devices % known or (-1 not in sizes and known != devices):
            divisors = [n for n in range(1, devices + 1) if devices % n == 0]
            raise UserError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not fit {devices} devices; "
                f"the sizes must multiply to {devices} (each one of {', '.join(map(str, divisors))}; -1 fills)"
            )
        return tuple(devices // known if size == -1 else size for size in sizes)


def make_mesh(sizes: MeshSizes, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over `devices` (default: all, of every process).

    On several TPU slices the `data` axis goes across them.

    Raises:
      UserError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = sizes.resolve(len(devices) // slices)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, microbatches: int, mesh: Mesh, processes: int = 1) -> None:
    """Every device, host and micro-batch must get the same number of examples.

    Raises:
      UserError: they do not; the message names the nearest sizes that work.
    """
    unit = int(np.lcm(batch_shards(mesh) * microbatches, processes))
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        raise UserError(
            f"batch_size must be a multiple of {unit} ({batch_shards(mesh)} batch shards x {microbatches} "
            f"microbatches, {processes} hosts), got {batch_size}; try {nearest}"
        )


def tree_shardings(tree: Any, mesh: Mesh, rules: Mapping[str, Any] | None = None) -> Any:
    """A NamedSharding for every leaf of a tree of (boxed) shapes, as `jax.eval_shape` of an init makes them.

    A leaf's axis stays whole where the mesh axis does not divide it (a stem of 32 channels over 256 chips, say).

    Args:
      tree: leaves are shapes, boxed by `nn.with_logical_partitioning` where they have logical axes.
      mesh: from `make_mesh`.
      rules: logical axis -> mesh axis, over those of `RULES`.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(tree), logical_rules(rules))

    def sharding(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        axes = [
            axis if axis is not None and size % _mesh_size(mesh, axis) == 0 else None
            for size, axis in zip(leaf.shape, (*spec, *[None] * len(leaf.shape)), strict=False)
        ]
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, nn.unbox(tree), specs)


def logical_rules(overrides: Mapping[str, Any] | None = None) -> tuple[tuple[str, Any], ...]:
    """`RULES` with some entries replaced or added."""
    return tuple({**dict(RULES), **(overrides or {})}.items())


@contextmanager
def use_mesh(mesh: Mesh, rules: Mapping[str, Any] | None = None):
    """Within it, `nn.with_logical_constraint` in the modules takes effect (without a mesh it silently does nothing)."""
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(logical_rules(rules)))
        yield


def _mesh_size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))
