"""The one place that accepts or rejects a step: what a bad one would have changed stays as it was, to the bit."""

import math
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from clip_jax.errors import UserError
from clip_jax.options import option


@dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and how many of them end the run; a number that is not finite always skips its step."""

    max_skipped: int = option(10, "steps skipped in a row at which the run stops", may_change=True)
    spike_sigma: float = option(
        0.0, "standard deviations above its recent mean at which a loss or gradient norm is skipped; 0 for never"
    )
    spike_window: int = option(128, "accepted steps that are recent; until there are so many nothing is a spike")

    def __post_init__(self):
        if self.max_skipped < 1:
            raise UserError(f"guard.max_skipped must be at least 1, got {self.max_skipped}")
        if not 0 <= self.spike_sigma < math.inf:
            raise UserError(f"guard.spike_sigma must be at least 0, got {self.spike_sigma}")
        if self.spike_window < 2:
            raise UserError(f"guard.spike_window must be at least 2, got {self.spike_window}")


@flax.struct.dataclass
class GuardState:
    """What is carried from step to step to judge the next one.

    Attributes:
      skipped: int32 scalar, how many steps of the run were skipped.
      skipped_in_a_row: int32 scalar, how many of them since the last accepted one.
      recent: float32 (2, window), loss and gradient norm of the last accepted steps, the newest last, NaN where there
        were none yet; None if nothing is a spike.
    """

    skipped: Any
    skipped_in_a_row: Any
    recent: Any


def initial_guard(config: GuardConfig) -> GuardState:
    """Of a run that has not begun."""
    recent = jnp.full((2, config.spike_window), jnp.nan, jnp.float32) if config.spike_sigma else None
    return GuardState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), recent)


def accepts(
    guard: GuardState, config: GuardConfig, loss: Float[Array, ""], grad_norm: Float[Array, ""], batch_stats: Any
) -> Bool[Array, ""]:
    """Whether a step is good: its loss, gradients and new running statistics are finite, and it is no spike.

    Norms speak for all leaves: they are finite only where each leaf is. They overflow before the leaves do (at entries
    of about 1e19 in float32), which is as bad a sign. An update so large that parameters overflow shows in the next
    step's loss, and such parameters are not saved.

    Args:
      guard: before the step.
      config: the rule for spikes.
      loss: of the step.
      grad_norm: over all leaves.
      batch_stats: the running statistics of BatchNorm that the step would lead to.
    """
    observed = jnp.stack([loss, grad_norm])
    good = jnp.isfinite(observed).all() & jnp.isfinite(optax.tree.norm(batch_stats))
    if not config.spike_sigma:
        return good
    # Comparisons with NaN are false: as long as the window is not full, nothing is a spike.
    bound = guard.recent.mean(axis=1) + config.spike_sigma * guard.recent.std(axis=1)
    return good & ~(observed > bound).any()


def advance(
    guard: GuardState, accepted: Bool[Array, ""], loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> GuardState:
    """The state after a step that was accepted or skipped."""
    skipped = 1 - accepted.astype(jnp.int32)
    recent = guard.recent
    if recent is not None:
        newest = jnp.stack([loss, grad_norm]).astype(recent.dtype)[:, None]
        recent = jnp.where(accepted, jnp.concatenate([recent[:, 1:], newest], axis=1), recent)
    return GuardState(guard.skipped + skipped, (guard.skipped_in_a_row + skipped) * skipped, recent)
