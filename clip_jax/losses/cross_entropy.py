"""The cross entropy of a classification head, which sees images alone (arXiv 2109.01903, section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.losses.loss import Features, Scalar
from clip_jax.models import class_logits
from clip_jax.parallel import Partitioner


def cross_entropy_loss(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], label_smoothing: float = 0.0
) -> Scalar:
    """The mean cross entropy between softmax probabilities and targets.

    Args:
      logits: at least float32.
      labels: from 0 to classes - 1.
      label_smoothing: share of each target that is spread evenly over all classes, its own among them (arXiv
        1512.00567, section 7; `torch.nn.functional.cross_entropy`).

    Returns:
      Of the logits' type.
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    return -jnp.mean((1 - label_smoothing) * own + label_smoothing * log_probabilities.mean(axis=-1))


@dataclass(frozen=True)
class CrossEntropy:
    """A `Loss` of normalised image features and of the model's classifier.

    Attributes:
      label_smoothing: see `cross_entropy_loss`.
    """

    label_smoothing: float = 0.0
    target: ClassVar[str] = "label"
    untrained: ClassVar[tuple[str, ...]] = ("text/*", "logit_scale", "logit_bias")

    def start(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See `Loss`."""
        if "classifier" not in params:
            raise UserError("the loss cross_entropy trains a head, but the model has none: name model.classes")
        return dict(params)

    def bound(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See `Loss`."""
        return dict(params)

    def value(
        self,
        image_features: Features,
        text_features: Features | None,
        targets: Int[Array, "batch"],
        params: Mapping[str, Any],
        partitioner: Partitioner,
    ) -> Scalar:
        """See `Loss`."""
        return cross_entropy_loss(class_logits(image_features, params["classifier"]), targets, self.label_smoothing)
