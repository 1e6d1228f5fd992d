"""The train step compiled for a TPU slice on any machine, and what it needs there.

Nothing is allocated and no accelerator is touched. Memory and collectives are the compiler's facts about the very
program that would run; time is an estimate, see `hlo_cost.py`.
"""

import dataclasses
import importlib.util
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from clip_jax.errors import UserError
from clip_jax.models import parameter_count
from clip_jax.planner.flops import train_flops
from clip_jax.planner.hlo_cost import CostEstimate, estimate
from clip_jax.planner.topologies import GIB, Topology
from clip_jax.training.config import RunConfig, make_training
from clip_jax.training.state import abstract_state
from clip_jax.training.step import make_train_step

INSTALL = "pip install -r requirements-tpu.txt"


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
      memory: bytes a device.
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
        return train_flops(self.config.model, self.config.batch_size)

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
            "compile_seconds": self.compile_seconds,
        }


def use_compiler_only() -> None:
    """Keeps JAX off every accelerator and libtpu off the network. Call it before JAX touches a device.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--plan needs the TPU compiler, which is not installed; install it with: {INSTALL}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program for another machine cannot be read back
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3"}
    os.environ.update({"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **quiet})


def make_plan(config: RunConfig, topology: Topology) -> Plan:
    """Compiles the train step of a run for a topology.

    Raises:
      UserError: the mesh does not fit the devices, or the batch does not divide over them.
    """
    devices = topologies.get_topology_desc(**topology.description()).devices
    training = make_training(config, devices)
    partitioner = training.partitioner
    partitioner.check_batch_size(
        config.batch_size, config.microbatches, len({device.process_index for device in devices})
    )
    state = abstract_state(training)
    resolution, length = config.model.vision.image_resolution, config.model.text.context_length
    shape = (config.batch_size, resolution, resolution, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=partitioner.batch_sharding),
        "text": jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32, sharding=partitioner.batch_sharding),
    }
    step = make_train_step(training)
    _progress(f"compiling {config.name}, batch {config.batch_size}, for {topology.name}; this takes a minute or more")
    start = time.perf_counter()
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        arguments = sum(_bytes_a_device(leaf) for leaf in jax.tree.leaves((state, batch)))
        needed = bytes_needed(str(error))
        _progress(f"the compiler gave up after {seconds:.0f} s: {needed / GIB:.2f} GiB a device needed")
        return Plan(config, topology, Memory(arguments, needed - arguments, 0, 0, needed), None, seconds)
    seconds = time.perf_counter() - start
    _progress(f"compiled in {seconds:.0f} s")
    stats = compiled.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.peak_memory_in_bytes,
    )
    return Plan(config, topology, memory, estimate(compiled.as_text(), topology.device), seconds)


def bytes_needed(message: str) -> int:
    """The bytes a device, arguments included, that the compiler's error says it asked for in vain.

    Raises:
      RuntimeError: the error is another one.
    """
    found = re.search(r"(?:Used|HLO temporaries) \(?([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(message)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])


def _bytes_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
