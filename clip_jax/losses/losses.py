"""The contrastive losses: softmax (CLIP) and sigmoid (SigLIP), each dense and as a sharded ring.

The dense form writes the definition down and holds the batch x batch logits. The ring computes the same numbers and
gradients in O(local batch x tile + local batch x width) memory a device, whatever the global batch: see `ring.py`.
Every hop of the ring costs a fixed overhead, so while local batch x batch logits fit easily the dense form is faster;
the ring pays from some 1,000 examples a device (`benchmarks/results/loss_memory.md`).

Features are L2-normalised, float32 or bfloat16; logits, sums and the loss are float32. `logit_scale` is the
logarithm of the inverse temperature, as the model stores it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.errors import UserError
from clip_jax.losses import ring

BATCH_AXES = ("data", "fsdp")


def softmax_loss_dense(
    image_features: Float[Array, "batch width"],
    text_features: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's loss (arXiv 2103.00020, figure 3): the mean of the two cross entropies, image to text and back.

    Args:
      image_features: L2-normalised, float32 or bfloat16.
      text_features: likewise; row i belongs to image i, every other row is a negative.
      logit_scale: log of the factor on the cosines.

    Returns:
      float32, the mean over the batch.
    """
    scale = jnp.exp(logit_scale)
    cosines = ring.product("id,jd->ij", image_features, text_features)
    positives = ring.paired_cosines(image_features, text_features)
    # The cross entropy of row i is log sum_j exp(s_ij - s_ii); subtracting inside keeps a small loss accurate.
    image_to_text = jax.nn.logsumexp(scale * (cosines - positives[:, None]), axis=1)
    text_to_image = jax.nn.logsumexp(scale * (cosines - positives[None, :]), axis=0)
    return jnp.mean(image_to_text + text_to_image) / 2


def sigmoid_loss_dense(
    image_features: Float[Array, "batch width"],
    text_features: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
) -> Float[Array, ""]:
    """SigLIP's loss (arXiv 2303.15343, algorithm 1): every pair of the batch is a binary classification.

    Args:
      image_features: L2-normalised, float32 or bfloat16.
      text_features: likewise; row i belongs to image i, every other row is a negative.
      logit_scale: log of the factor on the cosines.
      logit_bias: added to every logit.

    Returns:
      float32, -log sigmoid(z logit) summed over all pairs, divided by the batch; z = 1 for a pair, else -1.
    """
    logits = jnp.exp(logit_scale) * ring.product("id,jd->ij", image_features, text_features) + logit_bias
    batch = logits.shape[0]
    signs = 2 * jnp.eye(batch) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / batch


def softmax_loss_ring(
    image_features: Float[Array, "batch width"],
    text_features: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
    mesh: Mesh,
    tile: int = 1024,
) -> Float[Array, ""]:
    """`softmax_loss_dense` over the mesh, without the logits matrix.

    Args:
      image_features: L2-normalised, float32 or bfloat16; the batch is sharded over `BATCH_AXES`.
      text_features: likewise.
      logit_scale: log of the factor on the cosines, replicated.
      mesh: with the axes of `BATCH_AXES`; devices along any other axis repeat the computation.
      tile: rows of logits that a device holds at a time, at most.

    Returns:
      float32, the mean over the global batch, the same on every device.

    Raises:
      UserError: the batch does not divide over the devices, or the tile is not positive.
    """
    batch = image_features.shape[0]
    devices = _ring(batch, mesh, tile)

    def local_loss(images, texts, logit_scale):
        total = ring.softmax_loss(images, texts, _vary(logit_scale), devices)
        return jax.lax.psum(total, BATCH_AXES) / (2 * batch)

    return _sharded(local_loss, mesh, scalars=1)(image_features, text_features, logit_scale)


def sigmoid_loss_ring(
    image_features: Float[Array, "batch width"],
    text_features: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    mesh: Mesh,
    tile: int = 1024,
) -> Float[Array, ""]:
    """`sigmoid_loss_dense` over the mesh, without the logits matrix.

    Args:
      image_features: L2-normalised, float32 or bfloat16; the batch is sharded over `BATCH_AXES`.
      text_features: likewise.
      logit_scale: log of the factor on the cosines, replicated.
      logit_bias: added to every logit, replicated.
      mesh: with the axes of `BATCH_AXES`; devices along any other axis repeat the computation.
      tile: rows of logits that a device holds at a time, at most.

    Returns:
      float32, the sum over all pairs divided by the global batch, the same on every device.

    Raises:
      UserError: the batch does not divide over the devices, or the tile is not positive.
    """
    batch = image_features.shape[0]
    devices = _ring(batch, mesh, tile)

    def local_loss(images, texts, logit_scale, logit_bias):
        total = ring.sigmoid_loss(images, texts, _vary(logit_scale), _vary(logit_bias), devices)
        return jax.lax.psum(total, BATCH_AXES) / batch

    return _sharded(local_loss, mesh, scalars=2)(image_features, text_features, logit_scale, logit_bias)


def _sharded(local_loss, mesh: Mesh, scalars: int):
    specs = (P(BATCH_AXES), P(BATCH_AXES), *[P()] * scalars)
    return jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=P())


# Each device gets its own copy of a parameter; the transpose adds the devices' gradients up.
_vary = partial(jax.lax.pcast, axis_name=BATCH_AXES, to="varying")


def _ring(batch: int, mesh: Mesh, tile: int) -> ring.Ring:
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % devices:
        below = batch // devices * devices
        nearest = " or ".join(str(size) for size in (below, below + devices) if size)
        raise UserError(
            f"expected a batch that divides over {devices} devices (data x fsdp), got {batch}: use {nearest}"
        )
    if tile < 1:
        raise UserError(f"expected a tile of at least one row, got {tile}: 1024 is a good start")
    return ring.make_ring(mesh, BATCH_AXES, tile)
