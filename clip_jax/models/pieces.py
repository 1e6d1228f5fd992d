"""A block applied to a few examples at a time, so that what it computes in between stays in fast memory.

A TPU core has 64 to 128 MiB of memory as fast as its matrix unit. All heads' attention logits of a few images fit
there; those of a device's whole share of the batch go to HBM and back several times a step, which costs more than the
arithmetic (`docs/pods.md` has the figures).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

Apply = Callable[[Any, Float[Array, "batch length width"]], Float[Array, "batch length width"]]


def in_pieces(apply: Apply, tokens: int) -> Apply:
    """`apply(params, x)` in a loop over pieces of at most `tokens` tokens (but whole examples) on each device.

    Where the batch is split over a mesh, every device cuts up its own share. Parameters are gathered before the loop
    and their gradients added up over devices after it: once, not once a piece.

    Args:
      apply: maps each example by itself: (params, (batch, length, width)) to the same shape.
      tokens: the most in a piece. Pieces are equal, so their size is a divisor of the device's share.
    """

    def loop(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        size = largest_divisor(x.shape[0], at_most=tokens // x.shape[1])
        pieces = x.reshape(-1, size, *x.shape[1:])
        return jax.lax.map(partial(apply, params), pieces).reshape(x.shape)

    def on_every_share(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        rules = nn.get_logical_axis_rules()
        axes = _names(nn.logical_to_mesh_axes(("batch",), rules)[0]) if rules else ()
        if not axes:
            return loop(params, x)

        def local(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
            # Its own copy for each device: the transpose adds the gradients up here, outside the loop.
            params = jax.lax.pcast(params, axes, to="varying")
            with nn.logical_axis_rules(_without(axes, rules)):
                return loop(params, x)

        return jax.shard_map(local, in_specs=(P(), P(axes)), out_specs=P(axes), axis_names=set(axes))(params, x)

    return on_every_share


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` up to `at_most`, and at least 1."""
    return max(divisor for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= max(1, at_most))


def _without(axes: tuple[str, ...], rules: Any) -> list[tuple[str, Any]]:
    """The rules that hold within a device's share: nothing is split over `axes` there."""
    return [(name, axis) for name, axis in rules if not set(axes) & set(_names(axis))]


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes as a rule gives them: one, several or none."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
