"""The plan of a run: what one configuration needs on one TPU slice."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from clip_jax.models import parameter_count
from clip_jax.planner.cost import CostEstimate
from clip_jax.planner.flops import train_flops
from clip_jax.planner.topologies import Topology
from clip_jax.training.config import RunConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while the step runs.

    Attributes:
      arguments: train state and batch.
      temporaries: buffers of activations, gradients and everything else that lives within a step. They need not all
        be alive at the peak, and some take the place of the donated state.
      outputs: the new state and the metrics.
      aliased: outputs that take the place of arguments (the donated state).
      peak: the most that is alive at once, arguments included; this must fit.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """One configuration on one topology.

    Attributes:
      config: the run.
      topology: where it would run.
      memory: bytes per device.
      cost: of one step, or None where the program is too large to be compiled.
      compile_seconds: on this machine.
    """

    config: RunConfig
    topology: Topology
    memory: Memory
    cost: CostEstimate | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the compiler finds room for it."""
        return self.cost is not None and self.memory.peak <= self.topology.device.hbm_limit

    @property
    def flops_per_example(self) -> int:
        """Of the model's mathematics; see `flops.py`."""
        return train_flops(self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides memory and speed, under the names that the configuration gives it."""
        sizes = self.config.mesh.resolve(self.devices // self.topology.slices)
        mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
        execution = dataclasses.asdict(self.config.execution)
        return {"microbatches": self.config.microbatches, **execution, **mesh}

    @property
    def devices(self) -> int:
        """JAX devices in all slices together."""
        return self.topology.chips * self.topology.generation.devices_per_chip

    @property
    def mfu(self) -> float | None:
        """Estimated model FLOPs utilisation, or None without a compiled program."""
        flops = self.flops_per_example * self.config.batch_size / self.devices
        return self.cost.mfu(flops, self.topology.device) if self.cost else None

    def to_dict(self) -> dict[str, Any]:
        """As `--plan_output` writes it; what only a compiled program can tell is None without one."""
        config, topology, memory, cost = self.config, self.topology, self.memory, self.cost
        return {
            "topology": topology.name,
            "chips": topology.chips,
            "devices": self.devices,
            "global_batch": config.batch_size,
            "model": config.name,
            "parameters": parameter_count(config.model),
            "settings": self.settings,
            "hbm_bytes_limit": topology.device.hbm_limit,
            "hbm_bytes_peak": memory.peak,
            "hbm_bytes_arguments": memory.arguments,
            "hbm_bytes_temporaries": memory.temporaries,
            "hbm_bytes_outputs": memory.outputs,
            "hbm_bytes_aliased": memory.aliased,
            "fits": self.fits,
            "flops_per_example": self.flops_per_example,
            "estimated_step_seconds": cost and cost.seconds,
            "estimated_seconds_by_kind": cost and cost.seconds_by_kind(),
            "estimated_mfu": self.mfu,
            "estimated_examples_per_second": cost and config.batch_size / cost.seconds,
            "collectives": cost and {kind: traffic._asdict() for kind, traffic in cost.collectives.items()},
            "unknown_loops": cost and len(cost.unknown_loops),
            "unknown_groups": cost and len(cost.unknown_groups),
            "compile_seconds": self.compile_seconds,
        }
