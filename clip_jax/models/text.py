"""The causal text tower (paper section 2.4; the text half of `CLIP` in OpenAI's clip/model.py)."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.models.config import Execution, TextConfig
from clip_jax.models.initializers import normal, text_block
from clip_jax.models.transformer import Transformer, layer_norm


@flax.struct.dataclass
class TextOutput:
    """Everything the text tower computes, for code that conditions on more than the pooled feature.

    Attributes:
      hidden_states: (layers + 1, batch, length, width): the input of the first block and the output of each.
      last_hidden_state: (batch, length, width): the last block's output through ln_final.
      pooled_output: (batch, width): last_hidden_state at the end-of-text token.
      text_features: (batch, embed_dim): pooled_output through text_projection, not normalised.
    """

    hidden_states: Any
    last_hidden_state: Any
    pooled_output: Any
    text_features: Any


class TextTransformer(nn.Module):
    """Token and position embeddings, causal blocks; the feature is taken at the end-of-text token.

    Padding needs no mask: it comes after end-of-text, where causal attention cannot look.
    """

    config: TextConfig
    embed_dim: int
    activation: str
    execution: Execution

    def setup(self):
        config, dtype = self.config, self.execution.compute_dtype
        self.token_embedding = self.param(
            "token_embedding", normal(0.02, "vocab", "embed"), (config.vocab_size, config.width)
        )
        self.positional_embedding = self.param(
            "positional_embedding", normal(0.01, "positions", "embed"), (config.context_length, config.width)
        )
        self.transformer = Transformer(
            layers=config.layers,
            heads=config.heads,
            mlp_width=config.mlp_width,
            activation=self.activation,
            causal=True,
            initializers=text_block(config.width, config.layers),
            execution=self.execution,
        )
        self.ln_final = layer_norm(None, dtype)
        self.text_projection = self.param(
            "text_projection",
            normal(config.width**-0.5, "embed", "projection"),
            (config.width, self.embed_dim),
        )

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch embed_dim"]:
        """The text features, not normalised."""
        x, _ = self.transformer(self.embed(tokens))
        # LayerNorm acts on each token alone, so only the pooled one needs it.
        return self.project(self.ln_final(end_of_text(x, tokens)))

    def outputs(self, tokens: Int[Array, "batch length"]) -> TextOutput:
        """Hidden states and pooled output besides the features."""
        x = self.embed(tokens)
        last, hidden = self.transformer(x, collect=True)
        last_hidden_state = self.ln_final(last)
        pooled = end_of_text(last_hidden_state, tokens)
        return TextOutput(
            hidden_states=jnp.concatenate([x[None], hidden]),
            last_hidden_state=last_hidden_state,
            pooled_output=pooled,
            text_features=self.project(pooled),
        )

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The sequence that enters the first block."""
        dtype = self.execution.compute_dtype
        positions = self.positional_embedding[: tokens.shape[1]]
        # The table's columns are put together before rows are looked up: parts of rows, looked up for the whole batch
        # on every device, would have to travel instead.
        table = nn.with_logical_constraint(jnp.asarray(self.token_embedding, dtype), ("vocab", "features"))
        x = table[tokens] + positions.astype(dtype)[None]
        return nn.with_logical_constraint(x, ("batch", "length", "features"))

    def project(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch embed_dim"]:
        """Into the space shared with images."""
        return pooled @ self.text_projection.astype(self.execution.compute_dtype)


def end_of_text(
    x: Float[Array, "batch length width"], tokens: Int[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Each row's vector at its end-of-text token, the first occurrence of the largest id."""
    # Unlike x[rows, ends], this is a look-up within each row to the partitioner too: nothing travels.
    return jnp.take_along_axis(x, tokens.argmax(axis=-1)[:, None, None], axis=1)[:, 0]
