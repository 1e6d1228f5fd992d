"""Multi-head attention as OpenAI's models use it, with the projections kept apart by head."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.config import Execution
from clip_jax.models.initializers import BlockInitializers, Initializer, constant

# Shorter sequences, such as the text's, gain nothing from a loop over heads.
LONG_SEQUENCE = 128


def dot_product_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    causal: bool = False,
    implementation: str = "xla",
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value, the softmax in float32.

    Args:
      query: one vector a query token and head.
      key: one vector a key token and head.
      value: likewise.
      causal: a token attends to itself and to those before it only.
      implementation: see `Execution.attention`.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def attention_by_head(
    query: Float[Array, "heads batch length head_dim"],
    key: Float[Array, "heads batch length head_dim"],
    value: Float[Array, "heads batch length head_dim"],
    query_bias: Float[Array, "heads head_dim"],
    *,
    causal: bool = False,
) -> Float[Array, "heads batch length head_dim"]:
    """`dot_product_attention` of query + query_bias in a loop over heads, each computed again in the backward pass.

    On a TPU one head's logits stay in the fast memory of the core, where all heads' would go to HBM and back many
    times a step.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def attend(head: tuple[Array, Array, Array, Array]) -> Float[Array, "batch length head_dim"]:
        query, key, value, bias = head
        qkv = (x[:, :, None] for x in (query + bias[None, None], key, value))
        return dot_product_attention(*qkv, causal=causal)[:, :, 0]

    return jax.lax.map(attend, (query, key, value, query_bias))


class ToHeads(nn.Module):
    """A linear map to one vector a head; PyTorch packs three of them into in_proj_weight."""

    heads: int
    dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length heads head_dim"]:
        kernel, bias = self.parameters(x.shape[-1])
        return jnp.einsum("blw,whd->blhd", x, kernel) + bias[None, None]

    def by_head(
        self, x: Float[Array, "batch length width"]
    ) -> tuple[Float[Array, "heads batch length head_dim"], Float[Array, "heads head_dim"]]:
        """The same with the heads first, and the bias apart."""
        kernel, bias = self.parameters(x.shape[-1])
        return jnp.einsum("blw,whd->hbld", x, kernel), bias

    @nn.compact
    def parameters(self, width: int) -> tuple[Float[Array, "width heads head_dim"], Float[Array, "heads head_dim"]]:
        """Kernel and bias in the compute type."""
        shape = (self.heads, width // self.heads)
        kernel = self.param("kernel", self.kernel_init, (width, *shape))
        bias = self.param("bias", self.bias_init, shape)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class FromHeads(nn.Module):
    """The linear map back; PyTorch calls it out_proj."""

    dtype: jnp.dtype
    kernel_init: Initializer

    def __call__(self, x: Float[Array, "batch length heads head_dim"]) -> Float[Array, "batch length width"]:
        kernel, bias = self.parameters(*x.shape[2:])
        return jnp.einsum("blhd,hdw->blw", x, kernel) + bias[None, None]

    def by_head(
        self, x: Float[Array, "heads batch length head_dim"], value_bias: Float[Array, "heads head_dim"]
    ) -> Float[Array, "batch length width"]:
        """The map of x + value_bias, for heads that come first."""
        kernel, bias = self.parameters(x.shape[0], x.shape[3])
        bias = bias + jnp.einsum("hd,hdw->w", value_bias, kernel)
        return jnp.einsum("hbld,hdw->blw", x, kernel) + bias[None, None]

    @nn.compact
    def parameters(
        self, heads: int, head_dim: int
    ) -> tuple[Float[Array, "heads head_dim width"], Float[Array, "width"]]:
        """Kernel and bias in the compute type."""
        width = heads * head_dim
        kernel = self.param("kernel", self.kernel_init, (heads, head_dim, width))
        bias = self.param("bias", constant(0.0, "norm"), (width,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)


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
        to_heads = [ToHeads(self.heads, dtype, kernel_init, bias_init, name=name) for name in ("query", "key", "value")]
        out = FromHeads(dtype, self.initializers.out("heads", "head_dim", "embed"), name="out")
        if self.execution.attention == "by_head" and x.shape[1] > LONG_SEQUENCE:
            # A key's bias shifts all logits of a query alike, which the softmax undoes; as its weights add up to 1, a
            # value's bias passes unchanged. So two of three need not be added to (nor summed over) every token.
            (query, query_bias), (key, _), (value, value_bias) = (project.by_head(x) for project in to_heads)
            y = attention_by_head(query, key, value, query_bias, causal=self.causal)
            return out.by_head(y, value_bias)
        attend = partial(dot_product_attention, causal=self.causal, implementation=self.execution.attention)
        if self.execution.remat == "attention":
            attend = jax.checkpoint(attend)
        return out(attend(*(project(x) for project in to_heads)))
