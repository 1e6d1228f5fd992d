"""The residual attention blocks that the ViT and the text tower share.

Blocks are stacked: every parameter of the stack has a leading axis of length `layers`, whatever the execution
options, so a checkpoint has one layout. Names follow OpenAI's clip/model.py.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.attention import MultiheadAttention
from clip_jax.models.config import Execution
from clip_jax.models.initializers import BlockInitializers, constant, torch_linear
from clip_jax.models.shares import Apply, adds_bfloat16, largest_divisor, on_each_share

LAYER_NORM_EPSILON = 1e-5

# Values of `Execution.remat` that act on an iteration of the layer loop -> what `jax.checkpoint` keeps of it.
POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * sigmoid(1.702 x), the activation of OpenAI's models."""
    return x * jax.nn.sigmoid(1.702 * x)


def activation_function(name: str) -> Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]:
    """The function that `CLIPConfig.activation` names; "gelu" is the exact one, as in PyTorch."""
    return {"quick_gelu": quick_gelu, "gelu": partial(jax.nn.gelu, approximate=False)}[name]


def layer_norm(name: str | None, dtype: jnp.dtype) -> nn.LayerNorm:
    """LayerNorm with OpenAI's epsilon: statistics in at least float32, the result in `dtype`."""
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPSILON,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=constant(1.0, "norm"),
        bias_init=constant(0.0, "norm"),
        name=name,
    )


class MLP(nn.Module):
    """Linear to `mlp_width`, activation, linear back."""

    mlp_width: int
    activation: str
    initializers: BlockInitializers
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        width, dtype = x.shape[-1], self.execution.compute_dtype
        h = nn.Dense(
            self.mlp_width,
            dtype=dtype,
            kernel_init=self.initializers.c_fc("embed", "mlp"),
            bias_init=torch_linear(width, "mlp"),
            name="c_fc",
        )(x)
        h = nn.with_logical_constraint(activation_function(self.activation)(h), ("batch", "length", "mlp"))
        return nn.Dense(
            width,
            dtype=dtype,
            kernel_init=self.initializers.c_proj("mlp", "embed"),
            bias_init=torch_linear(self.mlp_width, "norm"),
            name="c_proj",
        )(h)


class ResidualAttentionBlock(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    heads: int
    mlp_width: int
    activation: str
    causal: bool
    initializers: BlockInitializers
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        dtype = self.execution.compute_dtype
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))
        attn = MultiheadAttention(self.heads, self.causal, self.initializers, self.execution, name="attn")
        x = x + attn(layer_norm("ln_1", dtype)(x))
        mlp = MLP(self.mlp_width, self.activation, self.initializers, self.execution, name="mlp")
        return x + mlp(layer_norm("ln_2", dtype)(x))


class Transformer(nn.Module):
    """A stack of residual attention blocks, executed by a scan over their stacked parameters.

    Returns the last block's output and, if `collect`, the outputs of all blocks stacked on a leading axis.

    With `collect`, or where "intermediates" are mutable (`sow`, `capture_intermediates`), Flax runs the blocks; what
    they sow is stacked. Otherwise `run_stack` does, as shares of the batch and loops over pieces of them have no
    lifted form: there Flax's interceptors see the blocks' modules by their paths within a block.
    """

    layers: int
    heads: int
    mlp_width: int
    activation: str
    causal: bool
    initializers: BlockInitializers
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], collect: bool = False
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "layers batch length width"] | None]:
        make_block = partial(
            ResidualAttentionBlock,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            causal=self.causal,
            initializers=self.initializers,
            execution=self.execution,
        )
        if collect or self.is_initializing() or self.is_mutable_collection("intermediates"):
            stack = nn.scan(
                lambda block, x, _: (block(x),) * 2,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=self.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stack(make_block(name="resblocks"), x, None)
        block, params = make_block(parent=None), nn.unbox(self.variables["params"]["resblocks"])

        def apply(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
            return block.apply({"params": params}, x)

        return run_stack(apply, params, x, self.execution), None


def run_stack(
    apply: Apply, params: Any, x: Float[Array, "batch length width"], execution: Execution
) -> Float[Array, "batch length width"]:
    """`apply(params, x)` with the parameters of one block after another, executed as `execution` says."""
    layers = jax.tree.leaves(params)[0].shape[0]
    blocks = largest_divisor(layers, at_most=execution.unroll)

    def iteration(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        for i in range(blocks):
            x = apply(jax.tree.map(itemgetter(i), params), x)
        return x

    on_share = on_each_share(rematerialised(iteration, execution.remat), execution.block_tokens)

    def gathered(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        # Kernels travel as they are computed with. Not where pieces' gradients are added up: that is float32's task.
        as_they_are = execution.block_tokens or not adds_bfloat16()
        return on_share(params if as_they_are else kernels_as(execution.compute_dtype, params), x)

    # Once more, so that the backward pass gathers parameters again rather than keep them all.
    layer = rematerialised(gathered, execution.remat)
    params = jax.tree.map(lambda leaf: leaf.reshape(-1, blocks, *leaf.shape[1:]), params)
    return jax.lax.scan(lambda x, params: (layer(params, x), None), x, params)[0]


def kernels_as(dtype: jnp.dtype, params: Any) -> Any:
    """The same parameters with matrices in `dtype`; gains and biases stay as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path[-1].key == "kernel" else leaf, params
    )


def rematerialised(function: Apply, remat: str) -> Apply:
    """`function` with its backward pass recomputing what `Execution.remat` says ("attention" acts inside the block)."""
    return jax.checkpoint(function, prevent_cse=False, policy=POLICIES[remat]) if remat in POLICIES else function
