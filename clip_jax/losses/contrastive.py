"""The contrastive losses: what two of them have in common, and their computation over a mesh."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from clip_jax.errors import UserError
from clip_jax.losses.captions import Captions, captions_of
from clip_jax.losses.loss import Features, Scalar
from clip_jax.losses.ring import make_ring
from clip_jax.parallel import Partitioner


@dataclass(frozen=True)
class Contrastive:
    """A `Loss` of normalised image and text features and of a few scalar parameters of the model.

    Attributes:
      dense: (image_features, text_features, *parameters, captions=None) -> loss over the batch. The definition; it
        holds the batch x batch logits, and is the faster form while these are small.
      part: (image_features, text_features, *parameters, captions, ring) -> this device's part of the loss, summed over
        its examples. It holds one tile of the logits at a time.
      initial: the parameters' names, in the order in which both functions take them, and the values they start from.
      bounds: name -> (lowest, highest) value that a parameter is clipped to after every update.
      tile: rows of logits that a device holds at a time, at most.
      repeated_captions: one of `REPEATED_CAPTIONS`.
    """

    dense: Callable[..., Scalar]
    part: Callable[..., Scalar]
    initial: Mapping[str, float]
    bounds: Mapping[str, tuple[float, float]]
    tile: int = 1024
    repeated_captions: str = "negatives"
    target: ClassVar[str] = "text"
    untrained: ClassVar[tuple[str, ...]] = ("classifier",)

    def start(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See `Loss`."""
        if missing := [name for name in self.initial if name not in params and name != "logit_bias"]:
            raise UserError(f"this loss needs the parameter {missing[0]}, which the model does not have")
        has_bias = "logit_bias" in params
        if has_bias != ("logit_bias" in self.initial):
            raise UserError(
                f"this loss {'has no' if has_bias else 'needs a'} logit_bias, but model.logit_bias is {has_bias}; "
                f"set --config.model.logit_bias={not has_bias}, or choose another loss"
            )

        def filled(name: str) -> Any:  # a leaf, perhaps boxed with the names of its axes
            return jax.tree.map(partial(jnp.full_like, fill_value=self.initial[name]), params[name])

        return {**params, **{name: filled(name) for name in self.initial}}

    def bound(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See `Loss`."""
        bounds = {name: bounds for name, bounds in self.bounds.items() if name in params}
        return {**params, **{name: jnp.clip(params[name], low, high) for name, (low, high) in bounds.items()}}

    def value(
        self,
        image_features: Features,
        text_features: Features,
        targets: Int[Array, "batch length"],
        params: Mapping[str, Any],
        partitioner: Partitioner,
    ) -> Scalar:
        """See `Loss`."""
        captions = captions_of(targets, self.repeated_captions)
        return self.over_mesh(image_features, text_features, params, partitioner, self.tile, captions)

    def over_mesh(
        self,
        image_features: Features,
        text_features: Features,
        params: Mapping[str, Any],
        partitioner: Partitioner,
        tile: int,
        captions: Captions | None = None,
    ) -> Scalar:
        """The value of `dense` for a batch that is split over a mesh, without the logits matrix.

        Every hop of the ring costs a fixed overhead, so while local batch x batch logits fit easily the dense form is
        faster; the ring pays from some 1,000 examples per device (`benchmarks/results/loss_memory.md`).

        Args:
          image_features: L2-normalised, float32 or bfloat16; split over the batch axes of the mesh.
          text_features: likewise.
          params: hold the loss's parameters, replicated.
          partitioner: devices along other axes of its mesh repeat the computation.
          tile: rows of logits that a device holds at a time, at most.
          captions: split like the features; None if those that are equal are negatives like all others.

        Returns:
          At least float32, the mean over the global batch, the same on every device.

        Raises:
          UserError: the batch does not divide over the devices.
        """
        batch, axes = image_features.shape[0], partitioner.batch_axes
        partitioner.check_batch_size(batch)
        ring = make_ring(partitioner.mesh, axes, tile)

        def mean(images: Array, texts: Array, captions: Captions | None, *parameters: Array) -> Scalar:
            # Each device gets its own copy of a parameter; the transpose adds the devices' gradients up.
            own = [jax.lax.pcast(parameter, axes, to="varying") for parameter in parameters]
            return jax.lax.psum(self.part(images, texts, *own, captions, ring), axes) / batch

        specs = (*[P(axes)] * 3, *[P()] * len(self.initial))
        sharded = jax.shard_map(mean, mesh=partitioner.mesh, in_specs=specs, out_specs=P())
        return sharded(image_features, text_features, captions, *[params[name] for name in self.initial])
