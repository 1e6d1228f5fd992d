"""AdamW with the paper's settings: decoupled weight decay, linear warm-up, cosine decay (section 2.5, table 18)."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import optax

from clip_jax.errors import UserError
from clip_jax.options import option

# Leaves that are gains or biases by name, wherever they stand; `logit_scale` is a gain on the logits.
NOT_DECAYED = ("bias", "scale", "logit_scale", "logit_bias")

MOMENT_TYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW; the defaults are the paper's for ViT-B (tables 18 and 20)."""

    learning_rate: float = option(5e-4, "the peak, reached after the warm-up")
    weight_decay: float = option(
        0.2, "decoupled, times the learning rate as in torch.optim.AdamW; not on gains, biases"
    )
    b1: float = option(0.9, "decay of the first moment")
    b2: float = option(0.98, "decay of the second moment; the paper has 0.999 for ResNets")
    eps: float = option(1e-6, "added to the root of the second moment; the paper has 1e-8 for ResNets")
    warmup_steps: int = option(2000, "steps of linear warm-up")
    mu_dtype: str = option("float32", "type of the first moment; bfloat16 saves 2 bytes per parameter")

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} must be above 0, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optimizer.weight_decay must be at least 0, got {self.weight_decay}")
        if self.mu_dtype not in MOMENT_TYPES:
            raise UserError(f"optimizer.mu_dtype must be one of {', '.join(MOMENT_TYPES)}; got {self.mu_dtype!r}")


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
        mu_dtype=None if config.mu_dtype == "float32" else config.mu_dtype,  # None: as parameters, float64 in proofs
        weight_decay=config.weight_decay,
        mask=weight_decay_mask,
    )
