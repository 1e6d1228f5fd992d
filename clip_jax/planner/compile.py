"""The train step compiled for a TPU slice on any machine, and what it needs there.

Nothing is allocated and no accelerator is touched. Memory and collectives are the compiler's facts about the very
program that would run; time is an estimate, see `schedule.py`.
"""

import importlib.util
import os
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from clip_jax.errors import UserError
from clip_jax.models import abstract_inputs
from clip_jax.planner.plan import Memory, Plan
from clip_jax.planner.schedule import estimate
from clip_jax.planner.topologies import GIB, Topology
from clip_jax.platform import WITHOUT_TPU
from clip_jax.training.config import RunConfig, make_training
from clip_jax.training.state import Training, abstract_state
from clip_jax.training.step import make_train_step

INSTALL = "pip install -r requirements-tpu.txt"


def use_compiler_only() -> None:
    """Keeps JAX off every accelerator and libtpu off the network. Call it before JAX touches a device.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--plan needs the TPU compiler, which is not installed; install it with: {INSTALL}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program for another machine cannot be read back
    os.environ.update({"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **WITHOUT_TPU})


def make_plan(config: RunConfig, topology: Topology) -> Plan:
    """Compiles the train step of a run for a topology.

    Raises:
      UserError: the mesh does not fit the devices, or the batch does not divide over them.
    """
    devices = topologies.get_topology_desc(**topology.description()).devices
    training = make_training(config, devices)
    partitioner, hosts = training.partitioner, len({device.process_index for device in devices})
    partitioner.check_batch_size(config.batch_size, config.microbatches, hosts)
    state = abstract_state(training)
    batch = _batch(training, config)
    step = make_train_step(training)
    _progress(f"compiling {config.name}, batch {config.batch_size}, for {topology.name}; this takes a minute or more")
    start = time.perf_counter()
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        arguments = sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves((state, batch)))
        needed = bytes_needed(str(error))
        _progress(f"the compiler gave up after {seconds:.0f} s: {needed / GIB:.2f} GiB per device needed")
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


def _batch(training: Training, config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What a train step takes, as shapes."""
    sharding, size = training.partitioner.batch_sharding, config.batch_size
    images, tokens = abstract_inputs(config.model, size, jnp.uint8, sharding)
    if config.cache_features:
        images = jax.ShapeDtypeStruct((size, config.model.embed_dim), jnp.float32, sharding=sharding)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
    targets = {"text": tokens, "label": labels}
    return {"image": images, training.loss.target: targets[training.loss.target]}


def bytes_needed(message: str) -> int:
    """The bytes per device, arguments included, that the compiler's error says the program needs.

    Raises:
      RuntimeError: the error is another one.
    """
    found = re.search(r"(?:Used|HLO temporaries) \(?([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(message)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
