"""Memory of the contrastive loss alone, forward and backward, as the compiler reports it.

    python -m benchmarks.loss_memory

Prints two tables and writes them to benchmarks/results/loss_memory.md. No accelerator is needed.

1. 8 virtual CPU devices: temporaries of the gathered, one-directional losses that most trainers use ("dense-local",
   open_clip's `--local-loss --gather-with-grad`) and of our ring.
2. The TPU compiler for v5e-256, where `pip install libtpu` has put it: the ring up to a global batch of 1,048,576,
   with its transfers, and how many of them start before the tiles and end after.
"""

import contextlib
import os
import re
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from itertools import product
from math import prod
from pathlib import Path

# libtpu compiles for a described machine: it must not look for a real one, nor own it alone.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from clip_jax.losses import CONTRASTIVE, softmax_loss
from clip_jax.parallel import MeshConfig, Partitioner, make_partitioner

RESULTS = Path(__file__).parent / "results" / "loss_memory.md"
WIDTH = 512
CPU_TILES = (64, 512)
TPU_TILE = 1024
CPU_BATCHES = (16_384, 65_536)
TPU_BATCHES = tuple(32_768 * 2**power for power in range(6))
MEBIBYTE = 2**20
BYTES = {"f32": 4, "bf16": 2}


def dense_local_loss(images, texts, logit_scale, partitioner: Partitioner):
    """The peers' formulation: each device compares its images with all texts and its texts with all images."""
    axes = partitioner.batch_axes

    def local_loss(images, texts, logit_scale):
        first = jax.lax.axis_index(axes) * images.shape[0]
        labels = first + jnp.arange(images.shape[0])

        def cross_entropy(queries, keys):
            keys = jax.lax.all_gather(keys, axes, tiled=True)
            log_probabilities = jax.nn.log_softmax(jnp.exp(logit_scale) * queries @ keys.T)
            return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))

        return jax.lax.pmean((cross_entropy(images, texts) + cross_entropy(texts, images)) / 2, axes)

    sharded = jax.shard_map(local_loss, mesh=partitioner.mesh, in_specs=(P(axes), P(axes), P()), out_specs=P())
    return sharded(images, texts, logit_scale)


def compile_gradients(
    loss: Callable, partitioner: Partitioner, batch: int, dtype: jnp.dtype, scalars: int = 1
) -> Compiled:
    """Compiles loss and gradients for features sharded over the batch; gradients are sharded like them."""
    features = jax.ShapeDtypeStruct((batch, WIDTH), dtype, sharding=partitioner.batch_sharding)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=partitioner.replicated)
    values = [features, features] + [scalar] * scalars
    gradient = jax.value_and_grad(loss, argnums=tuple(range(len(values))))
    out_shardings = (partitioner.replicated, tuple(value.sharding for value in values))
    return jax.jit(gradient, out_shardings=out_shardings).lower(*values).compile()


def temporaries(compiled: Compiled) -> float:
    """MiB per device."""
    return compiled.memory_analysis().temp_size_in_bytes / MEBIBYTE


def transfers(compiled: Compiled) -> tuple[int, int, float]:
    """The ring's transfers in the scheduled program.

    Returns:
      how many collective-permutes a hop has, how many of them have tiles computed between start and end, and the
      MiB that a device sends a step.
    """
    count = overlapped = sent = 0
    hops = compiled.input_shardings[0][0].num_devices
    for computation in compiled.as_text().split("\n\n"):
        lines = computation.splitlines()
        in_loop = not any(line.startswith("ENTRY") for line in lines)
        for index, line in enumerate(lines):
            found = re.search(r"%(\S+) = \(?(f32|bf16)\[([\d,]+)\].* collective-permute(-start)?\(", line)
            if not found:
                continue
            name, dtype, shape, _ = found.groups()
            sent += BYTES[dtype] * prod(map(int, shape.split(","))) * (hops if in_loop else 1)
            if not in_loop:
                continue
            count += 1
            end = next((n for n, later in enumerate(lines) if f"collective-permute-done(%{name})" in later), index)
            overlapped += any(re.search(r" while\(|fusion\(.*dot_general", between) for between in lines[index:end])
    return count, overlapped, sent / MEBIBYTE


def pod() -> Partitioner:
    """A described v5e-256 slice: 16 x 16 chips, a ring in both directions."""
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name="v5e:16x16",
        chip_config_name="default",
        chips_per_host_bounds=(2, 2, 1),
        num_slices=1,
        wrap=(True, True, False),
    )
    return make_partitioner(MeshConfig(), topology.devices)


def ring(name: str, partitioner: Partitioner, tile: int, batch: int, dtype: jnp.dtype) -> Compiled:
    """A loss over the mesh, with its gradients."""
    loss = CONTRASTIVE[name]

    def value(images, texts, *parameters):
        return loss.over_mesh(images, texts, dict(zip(loss.initial, parameters, strict=True)), partitioner, tile)

    return compile_gradients(value, partitioner, batch, dtype, scalars=len(loss.initial))


def compare_on_cpu() -> list[str]:
    """Rows of the first table."""
    partitioner = make_partitioner(MeshConfig())
    rows = [
        "| global batch | tile | dense-local, MiB | softmax ring, MiB | less | sigmoid ring, MiB |",
        "|" + "---:|" * 6,
    ]
    for batch, tile in product(CPU_BATCHES, CPU_TILES):
        dense = partial(dense_local_loss, partitioner=partitioner)
        local = temporaries(compile_gradients(dense, partitioner, batch, jnp.float32))
        softmax, sigmoid = (temporaries(ring(name, partitioner, tile, batch, jnp.float32)) for name in CONTRASTIVE)
        rows.append(f"| {batch:,} | {tile} | {local:,.1f} | {softmax:.1f} | {local / softmax:.0f}x | {sigmoid:.1f} |")
    return rows


def scale_on_tpu() -> list[str]:
    """Rows of the second table, or the one line that says why there is none."""
    if util.find_spec("libtpu") is None:
        return ["Not measured: the TPU compiler is missing; `pip install libtpu` and run again."]
    partitioner = pod()
    rows = [
        "| global batch | features of a chip, MiB | softmax ring, MiB | sigmoid ring, MiB | dense, MiB "
        "| transfers per hop | overlapped | sent by a chip, MiB |",
        "|" + "---:|" * 8,
    ]
    for batch in TPU_BATCHES:
        softmax, sigmoid = (ring(name, partitioner, TPU_TILE, batch, jnp.bfloat16) for name in CONTRASTIVE)
        count, overlapped, sent = transfers(softmax)
        dense = "does not fit"
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            dense = f"{temporaries(compile_gradients(softmax_loss, partitioner, batch, jnp.bfloat16)):,.0f}"
        features = 2 * batch * WIDTH * 2 / partitioner.mesh.size / MEBIBYTE
        rows.append(
            f"| {batch:,} | {features:.2f} | {temporaries(softmax):.2f} | {temporaries(sigmoid):.2f} "
            f"| {dense} | {count} | {overlapped} | {sent:,.0f} |"
        )
    return rows


def main() -> None:
    """Prints and writes both tables."""
    jax.config.update("jax_num_cpu_devices", 8)
    libtpu = metadata.version("libtpu") if util.find_spec("libtpu") else "absent"
    lines = [
        "# Memory of the contrastive loss",
        "",
        f"`python -m benchmarks.loss_memory`: width {WIDTH}; jax {jax.__version__}, libtpu {libtpu}.",
        "Temporaries per device of loss and gradients, from the compiler's `memory_analysis`.",
        "",
        "## 8 virtual CPU devices, float32",
        "",
        *compare_on_cpu(),
        "",
        f"## v5e-256 by the TPU compiler, bfloat16, tile {TPU_TILE}",
        "",
        *scale_on_tpu(),
        "",
        "Temporaries are those in HBM: tiles that fit into a chip's VMEM take none. Dense is `softmax_loss`,",
        'which the compiler shards by itself. "Overlapped" counts the transfers of a hop (forward and backward)',
        "that the schedule starts before the tiles and ends after them.",
    ]
    print("\n".join(lines))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
