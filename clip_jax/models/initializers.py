"""How OpenAI's code draws the first weights (`CLIP.initialize_parameters` and PyTorch's defaults behind it).

Each initializer draws float32 and carries the logical names of the parameter's axes; clip_jax/parallel.py maps these
names to the mesh.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]


def normal(std: float, *axes: str) -> Initializer:
    """Gaussian of standard deviation `std`."""
    return nn.with_logical_partitioning(nn.initializers.normal(std, jnp.float32), axes)


def constant(value: float, *axes: str) -> Initializer:
    """Every entry is `value`."""
    return nn.with_logical_partitioning(nn.initializers.constant(value, jnp.float32), axes)


def uniform(bound: float, *axes: str) -> Initializer:
    """Uniform in [-bound, bound]."""
    return nn.with_logical_partitioning(partial(_draw_uniform, bound), axes)


def _draw_uniform(bound: float, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_linear(fan_in: int, *axes: str) -> Initializer:
    """PyTorch's default for the weight and the bias of Linear and Conv layers: uniform within 1/sqrt(fan_in)."""
    return uniform(fan_in**-0.5, *axes)


@dataclass(frozen=True)
class BlockInitializers:
    """First weights of a residual attention block, as functions of the axis names."""

    qkv: Callable[..., Initializer]
    out: Callable[..., Initializer]
    c_fc: Callable[..., Initializer]
    c_proj: Callable[..., Initializer]


def text_block(width: int, layers: int) -> BlockInitializers:
    """The text tower's blocks: standard deviations shrink with width, and with depth where the residual is fed."""
    residual_std = width**-0.5 * (2 * layers) ** -0.5

    def gaussian(std: float) -> Callable[..., Initializer]:
        return lambda *axes: normal(std, *axes)

    return BlockInitializers(
        qkv=gaussian(width**-0.5),
        out=gaussian(residual_std),
        c_fc=gaussian((2 * width) ** -0.5),
        c_proj=gaussian(residual_std),
    )


def vision_block(width: int, mlp_width: int) -> BlockInitializers:
    """The ViT's blocks: OpenAI's code leaves PyTorch's defaults (Xavier over the packed query-key-value matrix)."""
    return BlockInitializers(
        qkv=lambda *axes: uniform(math.sqrt(6 / (width + 3 * width)), *axes),
        out=lambda *axes: torch_linear(width, *axes),
        c_fc=lambda *axes: torch_linear(width, *axes),
        c_proj=lambda *axes: torch_linear(mlp_width, *axes),
    )
