"""What a loss is to the rest of the project."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from clip_jax.parallel import Partitioner

Features = Float[Array, "batch width"]
Scalar = Float[Array, ""]


@runtime_checkable
class Loss(Protocol):
    """What a train step minimises: one number of the global batch, whatever the mesh.

    Attributes:
      target: what images are compared with, by its name in a batch: "text" or "label". Without "text" the text tower
        does not run.
      untrained: patterns of the parameters that the loss does not depend on; a run leaves them as they are.
    """

    target: str
    untrained: tuple[str, ...]

    def start(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A model's parameters with those of the loss at their first values.

        Raises:
          UserError: the model lacks one of them, or has one that this loss does not know.
        """
        ...

    def bound(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of a model with those of the loss, as far as they are among them, clipped to their bounds."""
        ...

    def value(
        self,
        image_features: Features,
        text_features: Features | None,
        targets: Int[Array, "batch *shape"],
        params: Mapping[str, Any],
        partitioner: Partitioner,
    ) -> Scalar:
        """The mean over the global batch, at least float32, the same on every device.

        Args:
          image_features: L2-normalised, float32 or bfloat16; split over the batch axes of the mesh.
          text_features: likewise; None if the text tower has not run.
          targets: what the batch has under the name `target`: tokens (batch, context_length) or labels (batch,).
          params: of the model.
          partitioner: the mesh.
        """
        ...
