"""Multi-head attention as OpenAI's models use it, with the projections kept apart by head."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.config import Execution
from clip_jax.models.initializers import BlockInitializers, Initializer, constant
from clip_jax.precision import wide_dtype


def dot_product_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    causal: bool = False,
    implementation: str = "xla",
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value, the softmax in at least float32.

    Args:
      query: one vector per query token and head.
      key: one vector per key token and head.
      value: likewise.
      causal: a token attends to itself and to those before it only.
      implementation: see `Execution.attention`.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=wide_dtype(query.dtype))
    if causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class ToHeads(nn.Module):
    """A linear map to one vector per head; PyTorch packs three of them into in_proj_weight."""

    heads: int
    dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length heads head_dim"]:
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)
        kernel = self.param("kernel", self.kernel_init, (width, *shape)).astype(self.dtype)
        bias = self.param("bias", self.bias_init, shape).astype(self.dtype)
        return jnp.einsum("blw,whd->blhd", x, kernel) + bias[None, None]


class FromHeads(nn.Module):
    """The linear map back; PyTorch calls it out_proj."""

    dtype: jnp.dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "batch length heads head_dim"]) -> Float[Array, "batch length width"]:
        heads, head_dim = x.shape[-2:]
        width = heads * head_dim
        kernel = self.param("kernel", self.kernel_init, (heads, head_dim, width)).astype(self.dtype)
        bias = self.param("bias", constant(0.0, "norm"), (width,)).astype(self.dtype)
        return jnp.einsum("blhd,hdw->blw", x, kernel) + bias[None, None]


class MultiheadAttention(nn.Module):
    """Self-attention: project to heads, attend, project back."""

    heads: int
    causal: bool
    initializers: BlockInitializers
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        dtype = self.execution.compute_dtype
        kernel_init = self.initializers.qkv("embed", "heads", "head_dim")
        bias_init = constant(0.0, "heads", "head_dim")
        query, key, value = (
            ToHeads(self.heads, dtype, kernel_init, bias_init, name=name)(x) for name in ("query", "key", "value")
        )
        attend = partial(dot_product_attention, causal=self.causal, implementation=self.execution.attention)
        if self.execution.remat == "attention":
            attend = jax.checkpoint(attend)
        y = attend(query, key, value)
        return FromHeads(dtype, self.initializers.out("heads", "head_dim", "embed"), name="out")(y)
