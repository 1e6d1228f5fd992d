"""One update of the model: encode, one loss over the global batch, AdamW, clamp the temperature."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from clip_jax.errors import UserError
from clip_jax.losses.losses import sigmoid_loss_ring, softmax_loss_ring
from clip_jax.models import CLIP, normalize
from clip_jax.parallel import batch_sharding, batch_shards, replicated, use_mesh
from clip_jax.processing import Preprocess
from clip_jax.training.state import TrainState, state_shardings

MAX_LOGIT_SCALE = float(np.log(100))
LOSSES = ("softmax", "sigmoid")

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True)
class StepConfig:
    """How a train step computes what it computes.

    Attributes:
      loss: "softmax" (CLIP) or "sigmoid" (SigLIP; the model needs `logit_bias`).
      loss_tile: rows of similarities in memory at a time.
      microbatches: pieces in which each device encodes its share of the batch. The loss is still one over the
        global batch, so the gradients do not depend on it (but BatchNorm's statistics do: see `encode`).
    """

    loss: str = "softmax"
    loss_tile: int = 1024
    microbatches: int = 1

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")
        if self.microbatches < 1 or self.loss_tile < 1:
            raise UserError(
                f"microbatches and loss_tile must be at least 1, got {self.microbatches} and {self.loss_tile}"
            )


def make_train_step(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    mesh: Mesh,
    rules: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted train step: (state, batch) -> (state, metrics); the old state's memory is reused.

    The batch holds `image`, uint8 (batch, R, R, 3), and `text`, int32 (batch, context_length), both split over
    the batch axes of the mesh. Metrics are float32 scalars: loss, logit_scale (the parameter), grad_norm.

    Raises:
      UserError: the sigmoid loss with a model without `logit_bias`, or the reverse.
    """
    if (config.loss == "sigmoid") != model.config.logit_bias:
        raise UserError(
            f"loss {config.loss!r} does not go with model.logit_bias={model.config.logit_bias}; the sigmoid loss "
            "needs a model with logit_bias=True, the softmax loss one without"
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Any) -> tuple[Float[Array, ""], Any]:
            variables = {**state.variables, "params": params}
            image_features, text_features, batch_stats = encode(
                model, variables, batch["image"], batch["text"], config.microbatches, mesh
            )
            return contrastive_loss(image_features, text_features, params, config, mesh), batch_stats

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}
        metrics = {
            "loss": loss,
            "logit_scale": params["logit_scale"],
            "grad_norm": optax.tree.norm(grads),
        }
        new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
        return new_state, metrics

    shardings = state_shardings(model, optimizer, mesh, rules)
    jitted = jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnames="state",
    )
    return _WithinMesh(jitted, mesh, rules)


@dataclass(frozen=True)
class _WithinMesh:
    """Calls (or lowers) a jitted function with the mesh and the rules that its modules look up."""

    jitted: Any
    mesh: Mesh
    rules: Mapping[str, Any] | None

    def __call__(self, *args: Any) -> Any:
        with use_mesh(self.mesh, self.rules):
            return self.jitted(*args)

    def lower(self, *args: Any) -> Any:
        with use_mesh(self.mesh, self.rules):
            return self.jitted.lower(*args)


def contrastive_loss(
    image_features: Float[Array, "batch embed_dim"],
    text_features: Float[Array, "batch embed_dim"],
    params: Mapping[str, Any],
    config: StepConfig,
    mesh: Mesh,
) -> Float[Array, ""]:
    """The loss over the global batch, by the ring, from normalised features."""
    features = image_features, text_features
    if config.loss == "softmax":
        return softmax_loss_ring(*features, params["logit_scale"], mesh=mesh, tile=config.loss_tile)
    return sigmoid_loss_ring(*features, params["logit_scale"], params["logit_bias"], mesh=mesh, tile=config.loss_tile)


def encode(
    model: CLIP,
    variables: Mapping[str, Any],
    images: UInt8[Array, "batch height width 3"],
    tokens: Int[Array, "batch length"],
    microbatches: int,
    mesh: Mesh,
) -> tuple[Float[Array, "batch embed_dim"], Float[Array, "batch embed_dim"], Any]:
    """Normalised features of both towers, and the new running statistics of BatchNorm ({} for a ViT).

    With several micro-batches, each device encodes its share of the batch piece by piece, keeping nothing but the
    features; the backward pass encodes each piece again. BatchNorm then normalises each micro-batch (over all
    devices) by its own statistics, and the running ones move once a step, by the mean over micro-batches.
    """

    def encode_piece(variables: Mapping[str, Any], piece: tuple[Array, Array]) -> tuple[tuple[Array, Array], Any]:
        images, tokens = piece
        # Images travel to the device as bytes and become the model's floats there.
        images = Preprocess.from_config(model.config).normalize(images)
        image_features, updated = model.apply(
            variables, images, train=True, method=model.encode_image, mutable=["batch_stats"]
        )
        text_features = model.apply(variables, tokens, method=model.encode_text)
        dtype = model.execution.compute_dtype
        features = tuple(normalize(x).astype(dtype) for x in (image_features, text_features))
        return features, updated.get("batch_stats", {})

    if microbatches == 1:
        (image_features, text_features), batch_stats = encode_piece(variables, (images, tokens))
        return image_features, text_features, batch_stats

    def scan_body(_: None, piece: tuple[Array, Array]) -> tuple[None, Any]:
        return None, jax.checkpoint(encode_piece, prevent_cse=False)(variables, piece)

    shards = batch_shards(mesh)
    pieces = tuple(_split(x, microbatches, shards) for x in (images, tokens))
    _, (features, batch_stats) = jax.lax.scan(scan_body, None, pieces)
    image_features, text_features = (_join(x, shards) for x in features)
    return image_features, text_features, jax.tree.map(lambda x: x.mean(axis=0), batch_stats)


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
