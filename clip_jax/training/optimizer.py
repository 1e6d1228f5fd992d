"""AdamW with the paper's settings: decoupled weight decay, linear warm-up, cosine decay (section 2.5, table 18)."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import optax

from clip_jax.errors import UserError

# Leaves that are gains or biases by name, wherever they stand; `logit_scale` is a gain on the logits.
NOT_DECAYED = ("bias", "scale", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW.

    Attributes:
      learning_rate: the peak, reached after the warm-up.
      weight_decay: decoupled; multiplied by the learning rate, as in torch.optim.AdamW.
      b1: decay of the first moment.
      b2: decay of the second moment; the paper has 0.98 for ViTs and 0.999 for ResNets.
      eps: added to the root of the second moment; 1e-6 for ViTs and 1e-8 for ResNets.
      warmup_steps: steps of linear warm-up.
      mu_dtype: type of the first moment; "bfloat16" saves 2 bytes a parameter.
    """

    learning_rate: float
    weight_decay: float = 0.2
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    warmup_steps: int = 2000
    mu_dtype: str = "float32"


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Step number (from 0) -> learning rate: (step + 1) / warmup_steps of the peak, then a cosine down to 0.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    if not 0 <= config.warmup_steps < total_steps:
        raise UserError(
            f"optimizer.warmup_steps must be at least 0 and less than total_steps; got {config.warmup_steps} and "
            f"{total_steps}"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
    )
    return lambda step: schedule(step + 1.0)  # optax would compute with an integer in float32, under x64 as well


def weight_decay_mask(params: Any) -> Any:
    """True for every leaf that decays: all weights that are not gains or biases, embeddings included."""

    def decays(path: tuple, _: Any) -> bool:
        return path[-1].key not in NOT_DECAYED

    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_box)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The optax transformation; its state holds nothing but the moments and the step count."""
    return optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        mu_dtype=config.mu_dtype,
        weight_decay=config.weight_decay,
        mask=weight_decay_mask,
    )
