"""CLIP: an image tower and a text tower that meet in one space (paper section 2.3, figure 3)."""

from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.models.config import CLIPConfig, Execution, ResNetConfig, VisionTransformerConfig
from clip_jax.models.initializers import constant
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.text import TextOutput, TextTransformer
from clip_jax.models.vision_transformer import VisionTransformer
from clip_jax.precision import at_least_float32

FIRST_LOGIT_SCALE = float(np.log(1 / 0.07))  # of the paper; a loss of another recipe starts it elsewhere

# The module of each class that `CLIPConfig.vision` can be of.
IMAGE_TOWERS = {VisionTransformerConfig: VisionTransformer, ResNetConfig: ModifiedResNet}

Images = Float[Array | np.ndarray, "images _height _width 3"]
Tokens = Int[Array | np.ndarray, "texts length"]


class CLIP(nn.Module):
    """The model of OpenAI's clip/model.py.

    Images are floats (batch, R, R, 3), normalised by the config's mean and std; tokens are int32 (batch,
    context_length) as `tokenize` makes them. Variables: `params` (float32; float64 for proofs), and `batch_stats`
    if the image tower is a ResNet; with `train=True` pass `mutable=["batch_stats"]` to `apply`.

    Attributes:
      config: what the model is.
      execution: how it runs.
    """

    config: CLIPConfig
    execution: Execution = Execution()

    def setup(self):
        config, execution = self.config, self.execution
        image_tower = IMAGE_TOWERS[type(config.vision)]
        self.visual = image_tower(config.vision, config.embed_dim, config.activation, execution)
        self.text = TextTransformer(config.text, config.embed_dim, config.activation, execution)
        self.logit_scale = self.param("logit_scale", constant(FIRST_LOGIT_SCALE), ())
        if config.logit_bias:
            self.logit_bias = self.param("logit_bias", constant(0.0), ())
        if config.classes:
            shape = (len(config.classes), config.embed_dim)
            self.classifier = self.param("classifier", constant(0.0, "classes", "projection"), shape)

    def __call__(
        self, images: Images, tokens: Tokens, train: bool = False
    ) -> tuple[Float[Array, "images texts"], Float[Array, "texts images"]]:
        """(logits_per_image, logits_per_text): cosine similarities times exp(logit_scale), plus the bias if any."""
        image_features = normalize(self.encode_image(images, train))
        text_features = normalize(self.encode_text(tokens))
        logits_per_image = jnp.exp(self.logit_scale) * (image_features @ text_features.T)
        if self.config.logit_bias:
            logits_per_image = logits_per_image + self.logit_bias
        return logits_per_image, logits_per_image.T

    def encode_image(
        self, images: Images, train: bool = False, patches: Int[Array, "images kept"] | None = None
    ) -> Float[Array, "images embed_dim"]:
        """Image features, not normalised, in the compute dtype.

        Args:
          images: see the class.
          train: whether BatchNorm takes the batch's statistics.
          patches: of a ViT, the numbers of the patches of each image that it sees; None for all.
        """
        self._check_bound("encode_image", "images")
        chosen = () if patches is None else (patches,)
        return self.visual(self._checked_images(images), train, *chosen)

    def encode_text(self, tokens: Tokens) -> Float[Array, "texts embed_dim"]:
        """Text features, not normalised, in the compute dtype."""
        self._check_bound("encode_text", "tokens")
        return self.text(self._checked_tokens(tokens))

    def classify(self, images: Images) -> Float[Array, "images classes"]:
        """Logits of the classes of `config.classes`, at least float32: a head on normalised image features.

        Its rows are what WiSE-FT fine-tunes (arXiv 2109.01903, section 3): at first the zero-shot classifier's, times
        exp(logit_scale).
        """
        self._check_bound("classify", "images")
        if not self.config.classes:
            raise UserError("this model has no classification head: its config.classes is empty")
        return class_logits(normalize(self.encode_image(images)), self.classifier)

    def probe_features(self, images: Images) -> Float[Array, "images dim"]:
        """What a linear probe sees (paper appendix A.3): ViT: the class token before its projection, of the tower's
        width. ResNet: the image features.
        """
        return self.visual.probe_features(self._checked_images(images))

    def image_hidden_states(
        self, images: Images
    ) -> Float[Array, "states batch tokens width"] | list[Float[Array, "..."]]:
        """ViT: block inputs and outputs stacked. ResNet: the feature maps after the stem and after each block."""
        return self.visual.hidden_states(self._checked_images(images))

    def text_outputs(self, tokens: Tokens) -> TextOutput:
        """Hidden states, last hidden state, pooled output and features of the text tower."""
        return self.text.outputs(self._checked_tokens(tokens))

    def _check_bound(self, method: str, inputs: str) -> None:
        if self.scope is None:
            raise UserError(
                f"a model holds no weights: expected model.apply(variables, {inputs}, method=model.{method}), "
                f"got model.{method}({inputs})"
            )

    def _checked_images(self, images: Images) -> Float[Array, "images _height _width 3"]:
        resolution = self.config.vision.image_resolution
        if images.ndim != 4 or images.shape[1:] != (resolution, resolution, 3):
            raise UserError(
                f"expected images of shape (batch, {resolution}, {resolution}, 3), got {images.shape}; "
                "resize and crop them with the model's preprocess"
            )
        return jnp.asarray(images)

    def _checked_tokens(self, tokens: Tokens) -> Int[Array, "texts length"]:
        longest = self.config.text.context_length
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            raise UserError(
                f"expected tokens of shape (batch, at most {longest}), got {tokens.shape}; "
                f"make them with tokenize(texts, context_length={longest})"
            )
        if isinstance(tokens, np.ndarray):  # looking into a device's array would wait for it
            outside = tokens[(tokens < 0) | (tokens >= self.config.text.vocab_size)]
            if outside.size:
                raise UserError(
                    f"expected token ids from 0 to {self.config.text.vocab_size - 1}, got {outside[0]}: "
                    "tokenize texts with the model's own tokenizer"
                )
        return jnp.asarray(tokens)


def normalize(features: Float[Array, "batch embed_dim"]) -> Float[Array, "batch embed_dim"]:
    """Rows of unit L2 norm, computed and returned in at least float32 (no epsilon, as in the reference)."""
    features = at_least_float32(features)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def class_logits(
    features: Float[Array, "batch embed_dim"], classifier: Float[Array, "classes embed_dim"]
) -> Float[Array, "batch classes"]:
    """What a head makes of normalised image features, at least float32."""
    return jnp.matmul(at_least_float32(features), classifier.T, precision=jax.lax.Precision.HIGHEST)


def abstract_inputs(
    config: CLIPConfig,
    batch: int = 1,
    image_dtype: DTypeLike = jnp.float32,
    sharding: Sharding | None = None,
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Images (batch, R, R, 3) and int32 tokens (batch, context_length) as shapes, for whoever traces the model.

    Args:
      config: of the model.
      batch: how many of each.
      image_dtype: float32 as the model takes them, or uint8 as the train step does.
      sharding: of both, on a mesh.
    """
    resolution = config.vision.image_resolution
    images = jax.ShapeDtypeStruct((batch, resolution, resolution, 3), image_dtype, sharding=sharding)
    return images, jax.ShapeDtypeStruct((batch, config.text.context_length), jnp.int32, sharding=sharding)


def parameter_count(config: CLIPConfig) -> int:
    """How many trained numbers the model has, without making any."""
    return sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(config)["params"]))


@lru_cache(maxsize=4)
def variable_shapes(config: CLIPConfig) -> Any:
    """The model's variables as `jax.ShapeDtypeStruct`s; nothing is allocated, and no device asked for."""
    model = CLIP(config)
    return nn.unbox(jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs), *abstract_inputs(config)))
