"""One update of the model: encode, one loss over the global batch, AdamW, bound the loss's parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped, UInt8

from clip_jax.models import CLIP, VisionTransformerConfig, normalize
from clip_jax.parallel import Jitted, Partitioner
from clip_jax.processing import Preprocess
from clip_jax.training.adapters import gradient_of_factors, merged
from clip_jax.training.guard import accepts, advance
from clip_jax.training.parameters import merge, split
from clip_jax.training.state import Training, TrainState, state_shardings

Batch = Mapping[str, Array]
Metrics = dict[str, Shaped[Array, ""]]


def make_train_step(training: Training) -> Jitted:
    """The jitted train step: (state, batch) -> (state, metrics); the old state's memory is reused.

    The batch holds `image`, uint8 (batch, R, R, 3), or features of images, float32 (batch, embed_dim), and what the
    loss compares images with: `text`, int32 (batch, context_length), or `label`, int32 (batch,). All are split over the
    batch axes of the mesh. Metrics are scalars: loss, logit_scale (the parameter) and grad_norm in at least float32,
    and the counts of skipped steps. A step that `guard.accepts` rejects leaves parameters, statistics and the
    optimizer's state, its count included, as they were.

    Raises:
      UserError: the model lacks a parameter of the loss.
    """
    model, loss, partitioner = training.model, training.loss, training.partitioner

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = split(state.params, training.frozen)
        patches = kept_patches(training, state.step, len(batch["image"]))

        def loss_fn(trained: Any) -> tuple[Float[Array, ""], Any]:
            params = merge(trained, frozen)
            variables = {**state.variables, "params": params}
            *features, batch_stats = encode(
                model,
                variables,
                batch["image"],
                batch["text"] if loss.target == "text" else None,
                training.microbatches,
                partitioner,
                train=not training.running_statistics,
                patches=patches,
            )
            return loss.value(*features, batch[loss.target], params, partitioner), batch_stats

        (value, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        learned = trained
        if state.adapters:
            learned = state.adapters.factors
            grads = gradient_of_factors(state.adapters, training.adapters.scale, grads)
        grad_norm = optax.tree.norm(grads)
        accepted = accepts(state.guard, training.guard, value, grad_norm, batch_stats)

        def updated() -> tuple[Any, Any, Any, Any, Any]:
            updates, opt_state = training.optimizer.update(grads, state.opt_state, learned)
            new, adapters = optax.apply_updates(learned, updates), state.adapters
            if adapters:
                adapters = adapters.replace(factors=new)
                new = merged(adapters, training.adapters.scale)
            new = loss.bound(new)
            ema = optax.incremental_update(new, state.ema, 1 - training.ema_decay) if training.ema_decay else {}
            return new, opt_state, batch_stats or state.batch_stats, ema, adapters

        # A branch, because choosing between the old and the new leaf by leaf would read and write them once more.
        kept = trained, state.opt_state, state.batch_stats, state.ema, state.adapters
        trained, opt_state, batch_stats, ema, adapters = jax.lax.cond(accepted, updated, lambda: kept)
        guard = advance(state.guard, accepted, value, grad_norm)
        params = merge(trained, frozen)
        metrics = {
            "loss": value,
            "logit_scale": params["logit_scale"],
            "grad_norm": grad_norm,
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.skipped_in_a_row,
        }
        return TrainState(state.step + 1, params, batch_stats, opt_state, guard, ema, adapters), metrics

    shardings = state_shardings(training)
    return partitioner.jit(
        train_step,
        in_shardings=(shardings, partitioner.batch_sharding),
        out_shardings=(shardings, partitioner.replicated),
        donate_argnames="state",
    )


def encode(
    model: CLIP,
    variables: Mapping[str, Any],
    images: UInt8[Array, "batch height width 3"] | Float[Array, "batch embed_dim"],
    tokens: Int[Array, "batch length"] | None,
    microbatches: int,
    partitioner: Partitioner,
    train: bool = True,
    patches: Int[Array, "batch kept"] | None = None,
) -> tuple[Float[Array, "batch embed_dim"], Float[Array, "batch embed_dim"] | None, Any]:
    """Normalised features of both towers, and the new running statistics of BatchNorm ({} if there are none).

    Without tokens the text tower does not run, and has no features. Images that come as features are not encoded.

    With several micro-batches, each device encodes its share of the batch piece by piece, keeping nothing but the
    features; the backward pass encodes each piece again. BatchNorm then normalises each micro-batch (over all
    devices) by its own statistics, and the running ones move once a step, by the mean over micro-batches. Without
    `train` it normalises by the running ones, and there are no new ones. Of the images it sees `patches`, or all.
    """

    def encode_piece(variables: Mapping[str, Any], piece: tuple[Any, ...]) -> tuple[tuple[Any, Any], Any]:
        images, tokens, patches = piece
        if images.ndim == 2:
            image_features, updated = images.astype(model.execution.compute_dtype), {}
        else:
            # Images travel to the device as bytes and become the model's floats there.
            images = Preprocess.from_config(model.config).normalize(images, model.execution.wide_dtype)
            image_features, updated = model.apply(
                variables, images, train, patches, method=model.encode_image, mutable=["batch_stats"] if train else []
            )
        text_features = None if tokens is None else model.apply(variables, tokens, method=model.encode_text)
        dtype = model.execution.compute_dtype
        features = jax.tree.map(lambda x: normalize(x).astype(dtype), (image_features, text_features))
        return features, updated.get("batch_stats", {})

    if microbatches == 1:
        (image_features, text_features), batch_stats = encode_piece(variables, (images, tokens, patches))
        return image_features, text_features, batch_stats

    def scan_body(_: None, piece: tuple[Any, ...]) -> tuple[None, Any]:
        return None, jax.checkpoint(encode_piece, prevent_cse=False)(variables, piece)

    shards = partitioner.batch_shards
    pieces = jax.tree.map(lambda x: _split(x, microbatches, shards), (images, tokens, patches))
    _, (features, batch_stats) = jax.lax.scan(scan_body, None, pieces)
    image_features, text_features = jax.tree.map(lambda x: _join(x, shards), features)
    return image_features, text_features, jax.tree.map(lambda x: x.mean(axis=0), batch_stats)


def kept_patches(training: Training, step: Int[Array, ""], batch: int) -> Int[Array, "batch kept"] | None:
    """The patches of each image that a ViT sees in a step, by their numbers; None for all.

    FLIP (arXiv 2212.00794): a random share of the patches of an image is left out, which costs little accuracy and
    saves as much of the image tower. What is left out is a function of seed and step, on any mesh.
    """
    if not training.patch_dropout:
        return None
    vision = training.model.config.vision
    key = jax.random.fold_in(jax.random.key(training.seed), step)
    order = jnp.argsort(jax.random.uniform(key, (batch, vision.tokens - 1)), axis=1)
    return order[:, : patches_kept(vision, training.patch_dropout)]


def patches_kept(config: VisionTransformerConfig, patch_dropout: float) -> int:
    """How many patches of an image a ViT sees in training."""
    return max(1, int((config.tokens - 1) * (1 - patch_dropout)))


def _split(x: Array, microbatches: int, shards: int) -> Array:
    """(batch, ...) -> (microbatches, batch / microbatches, ...), every shard cutting up its own rows."""
    x = x.reshape(shards, microbatches, -1, *x.shape[1:])
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(microbatches, -1, *x.shape[3:])


def _join(x: Array, shards: int) -> Array:
    """Inverse of `_split`."""
    microbatches = x.shape[0]
    x = x.reshape(microbatches, shards, -1, *x.shape[2:])
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(-1, *x.shape[3:])
