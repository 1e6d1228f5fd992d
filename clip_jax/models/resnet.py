"""The ModifiedResNet image tower (paper section 2.4; `ModifiedResNet` in OpenAI's clip/model.py).

Three differences from a plain ResNet: a stem of three convolutions, an average pool before every strided
convolution so that none aliases, and an attention pool instead of the final average.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.attention import ToHeads, dot_product_attention
from clip_jax.models.config import Execution, ResNetConfig
from clip_jax.models.convolution import convolve, pointwise
from clip_jax.models.initializers import constant, normal, torch_linear
from clip_jax.precision import at_least_float32

EXPANSION = 4
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9  # of the old value; PyTorch writes 0.1, the weight of the new one


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as torch.nn.BatchNorm2d does it.

    In training the statistics are those of the whole (global) batch, and the running variance takes the unbiased
    estimate, which flax.linen.BatchNorm does not. Statistics are at least float32.
    """

    dtype: jnp.dtype
    scale_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch height width channels"]:
        # A convolution comes before each: the partitioner might move its activations rather than its kernel.
        x = nn.with_logical_constraint(x, ("batch", "height", "width", "features"))
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", constant(0.0, "norm"), (channels,))
        wide = at_least_float32(x)
        if train:
            mean = wide.mean((0, 1, 2))
            var = jnp.square(wide - _per_channel(mean)).mean((0, 1, 2))
            if not self.is_initializing():
                samples = x.size // channels
                unbiased = var * (samples / max(samples - 1, 1))
                running_mean.value = _moving_average(running_mean.value, mean)
                running_var.value = _moving_average(running_var.value, unbiased)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
        y = (wide - _per_channel(mean)) * _per_channel(factor) + _per_channel(bias)
        return y.astype(self.dtype)


def _moving_average(old: Float[Array, "channels"], new: Float[Array, "channels"]) -> Float[Array, "channels"]:
    return (BATCH_NORM_MOMENTUM * old + (1 - BATCH_NORM_MOMENTUM) * new).astype(old.dtype)


def _per_channel(x: Float[Array, "channels"]) -> Float[Array, "1 1 1 channels"]:
    return x.reshape(1, 1, 1, -1)


def batch_norm(dtype: jnp.dtype, zero: bool = False) -> BatchNorm:
    """A BatchNorm whose scale starts at one, or at zero (the last of each block, so that blocks start as identity)."""
    return BatchNorm(dtype, scale_init=constant(0.0 if zero else 1.0, "norm"))


def conv(features: int, kernel: int, fan_in: int, dtype: jnp.dtype, stride: int = 1) -> nn.Conv:
    """A bias-free convolution, padded by kernel // 2 on every side ("SAME" would pad strided ones unevenly)."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=[(kernel // 2, kernel // 2)] * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=torch_linear(fan_in * kernel**2, "kernel_height", "kernel_width", "channels_in", "channels"),
        conv_general_dilated=pointwise if kernel == 1 else convolve,
    )


def average_pool(
    x: Float[Array, "batch height width channels"], stride: int
) -> Float[Array, "batch _height _width channels"]:
    """Non-overlapping mean over stride x stride cells; a remainder at the edge is dropped, as PyTorch does."""
    return nn.avg_pool(x, (stride, stride), strides=(stride, stride))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a residual; `planes` channels inside, four times as many outside."""

    inplanes: int
    planes: int
    stride: int
    dtype: jnp.dtype

    def setup(self):
        outplanes = self.planes * EXPANSION
        self.conv1 = conv(self.planes, 1, self.inplanes, self.dtype)
        self.bn1 = batch_norm(self.dtype)
        self.conv2 = conv(self.planes, 3, self.planes, self.dtype)
        self.bn2 = batch_norm(self.dtype)
        self.conv3 = conv(outplanes, 1, self.planes, self.dtype)
        self.bn3 = batch_norm(self.dtype, zero=True)
        if self.stride > 1 or self.inplanes != outplanes:
            self.downsample_conv = conv(outplanes, 1, self.inplanes, self.dtype)
            self.downsample_bn = batch_norm(self.dtype)

    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch _height _width _channels"]:
        y = nn.relu(self.bn1(self.conv1(x), train))
        y = nn.relu(self.bn2(self.conv2(y), train))
        if self.stride > 1:
            x, y = average_pool(x, self.stride), average_pool(y, self.stride)
        y = self.bn3(self.conv3(y), train)
        if self.stride > 1 or self.inplanes != self.planes * EXPANSION:
            x = self.downsample_bn(self.downsample_conv(x), train)
        return nn.relu(x + y)


class AttentionPool2d(nn.Module):
    """Attention whose one query is the mean over the feature map; its output is the image's feature."""

    tokens: int
    heads: int
    embed_dim: int
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch embed_dim"]:
        batch, _, _, channels = x.shape
        dtype = self.execution.compute_dtype
        std = channels**-0.5
        positions = self.param("positional_embedding", normal(std, "positions", "embed"), (self.tokens, channels))
        x = x.reshape(batch, -1, channels)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + positions.astype(dtype)[None]
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))
        kernel_init, bias_init = normal(std, "embed", "heads", "head_dim"), torch_linear(channels, "heads", "head_dim")
        query, key, value = (
            ToHeads(self.heads, dtype, kernel_init, bias_init, name=name)(tokens)
            for name, tokens in (("q_proj", x[:, :1]), ("k_proj", x), ("v_proj", x))
        )
        y = dot_product_attention(query, key, value)
        c_proj = nn.Dense(
            self.embed_dim,
            dtype=dtype,
            kernel_init=normal(std, "embed", "projection"),
            bias_init=torch_linear(channels, "projection"),
            name="c_proj",
        )
        return c_proj(y.reshape(batch, channels))


class ModifiedResNet(nn.Module):
    """Stem, four stages of bottlenecks, attention pool. `train` normalises by the batch's statistics.

    `activation` is the text tower's; this one has ReLU throughout.
    """

    config: ResNetConfig
    embed_dim: int
    activation: str
    execution: Execution

    def setup(self):
        config, dtype = self.config, self.execution.compute_dtype
        width = config.width
        self.conv1 = conv(width // 2, 3, 3, dtype, stride=2)
        self.bn1 = batch_norm(dtype)
        self.conv2 = conv(width // 2, 3, width // 2, dtype)
        self.bn2 = batch_norm(dtype)
        self.conv3 = conv(width, 3, width // 2, dtype)
        self.bn3 = batch_norm(dtype)
        block = Bottleneck
        if self.execution.remat != "none":
            # Convolutions have no products worth keeping apart from the rest: any rematerialisation is by block.
            block = nn.remat(Bottleneck, static_argnums=(2,))
        self.layer1 = self._stage(block, width, width, config.layers[0], stride=1)
        self.layer2 = self._stage(block, width * 4, width * 2, config.layers[1], stride=2)
        self.layer3 = self._stage(block, width * 8, width * 4, config.layers[2], stride=2)
        self.layer4 = self._stage(block, width * 16, width * 8, config.layers[3], stride=2)
        self.attnpool = AttentionPool2d(config.tokens, config.heads, self.embed_dim, self.execution)

    def _stage(self, block: type[nn.Module], inplanes: int, planes: int, blocks: int, stride: int) -> list[nn.Module]:
        dtype = self.execution.compute_dtype
        first = block(inplanes, planes, stride, dtype)
        return [first] + [block(planes * EXPANSION, planes, 1, dtype) for _ in range(blocks - 1)]

    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, "batch embed_dim"]:
        """The image features, not normalised."""
        return self.attnpool(self.feature_maps(images, train)[-1])

    def probe_features(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch embed_dim"]:
        """The image features: the attention pool ends in its own projection."""
        return self(images)

    def hidden_states(
        self, images: Float[Array, "batch height width 3"]
    ) -> list[Float[Array, "batch _height _width _channels"]]:
        """The feature maps after the stem and after each block."""
        return self.feature_maps(images, train=False)

    def feature_maps(
        self, images: Float[Array, "batch height width 3"], train: bool
    ) -> list[Float[Array, "batch _height _width _channels"]]:
        """The feature maps after the stem and after each block, in order."""
        x = images.astype(self.execution.compute_dtype)
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = nn.relu(norm(convolution(x), train))
        maps = [average_pool(x, 2)]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                maps.append(block(maps[-1], train))
        return maps
