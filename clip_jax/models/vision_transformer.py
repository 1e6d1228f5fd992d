"""The ViT image tower (paper section 2.4; `VisionTransformer` in OpenAI's clip/model.py)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.models.config import Execution, VisionTransformerConfig
from clip_jax.models.convolution import convolve
from clip_jax.models.initializers import normal, torch_linear, vision_block
from clip_jax.models.transformer import Transformer, layer_norm


class VisionTransformer(nn.Module):
    """Patches and a class token, through the Transformer; the class token's projection is the image's feature."""

    config: VisionTransformerConfig
    embed_dim: int
    activation: str
    execution: Execution

    def setup(self):
        config, dtype = self.config, self.execution.compute_dtype
        patch, std = config.patch_size, config.width**-0.5
        self.conv1 = nn.Conv(
            config.width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            conv_general_dilated=convolve,
            kernel_init=torch_linear(3 * patch * patch, "kernel_height", "kernel_width", "channels_in", "embed"),
        )
        self.class_embedding = self.param("class_embedding", normal(std, "norm"), (config.width,))
        self.positional_embedding = self.param(
            "positional_embedding", normal(std, "positions", "embed"), (config.tokens, config.width)
        )
        self.ln_pre = layer_norm(None, dtype)
        self.transformer = Transformer(
            layers=config.layers,
            heads=config.heads,
            mlp_width=config.mlp_width,
            activation=self.activation,
            causal=False,
            initializers=vision_block(config.width, config.mlp_width),
            execution=self.execution,
        )
        self.ln_post = layer_norm(None, dtype)
        self.proj = self.param("proj", normal(std, "embed", "projection"), (config.width, self.embed_dim))

    def __call__(
        self,
        images: Float[Array, "batch _height _width 3"],
        train: bool = False,
        patches: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch embed_dim"]:
        """The image features, not normalised, from all patches or from those that are named alone.

        `train` changes nothing in a ViT.
        """
        x, _ = self.transformer(self.embed(images, patches))
        return self.pool(x)

    def hidden_states(
        self, images: Float[Array, "batch _height _width 3"]
    ) -> Float[Array, "states batch tokens width"]:
        """The input of the first block and the output of each, stacked."""
        x = self.embed(images)
        return jnp.concatenate([x[None], self.transformer(x, collect=True)[1]])

    def probe_features(self, images: Float[Array, "batch _height _width 3"]) -> Float[Array, "batch width"]:
        """The class token before its projection."""
        return self.ln_post(self.transformer(self.embed(images))[0][:, 0])

    def embed(
        self, images: Float[Array, "batch _height _width 3"], kept: Int[Array, "batch kept"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """The sequence that enters the first block: class token and patches, with positions, through ln_pre."""
        dtype = self.execution.compute_dtype
        patches = self.conv1(images.astype(dtype))
        batch, _, _, width = patches.shape
        patches = patches.reshape(batch, -1, width)
        class_token = jnp.broadcast_to(self.class_embedding.astype(dtype), (batch, 1, width))
        x = jnp.concatenate([class_token, patches], axis=1)
        x = x + self.positional_embedding.astype(dtype)[None]
        if kept is not None:
            x = jnp.concatenate([x[:, :1], jnp.take_along_axis(x[:, 1:], kept[:, :, None], axis=1)], axis=1)
        x = self.ln_pre(x)
        return nn.with_logical_constraint(x, ("batch", "length", "features"))

    def pool(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch embed_dim"]:
        """The projected class token."""
        return self.ln_post(x[:, 0]) @ self.proj.astype(self.execution.compute_dtype)
