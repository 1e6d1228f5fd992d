"""A block applied by every device to its own share of the batch, the whole of it or a few examples at a time.

What leaves a device is written down here rather than left to the partitioner: a block's parameters are gathered
before it runs and their gradients are added up after it, once. (Left to itself, the TPU compiler turns a product with
a split matrix into a loop over the devices' parts of it, where these are long enough: three times as slow on 16 chips.)

A TPU core has 64 to 128 MiB of memory as fast as its matrix unit. All heads' attention logits of a few images fit
there; those of a whole share go to HBM and back several times per step, which costs more than the arithmetic
(`docs/pods.md` has the figures).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

Apply = Callable[[Any, Float[Array, "batch length width"]], Float[Array, "batch length width"]]


def on_each_share(apply: Apply, tokens: int = 0) -> Apply:
    """`apply(params, x)` on every device's share of the batch, with whole parameters (but for tensor parallelism).

    Args:
      apply: maps each example by itself: (params, (batch, length, width)) to the same shape.
      tokens: the most that a device works on at a time, in whole examples; 0 for its share.
    """
    apply = in_pieces(apply, tokens) if tokens else apply

    def on_shares(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        axes, rules = _batch_axes(x.shape[0]), nn.get_logical_axis_rules()
        if not axes:
            return apply(params, x)

        def local(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
            # Its own copy for each device: the transpose adds the gradients up here, outside any loop over pieces.
            params = jax.lax.pcast(params, axes, to="varying")
            with nn.logical_axis_rules(_without(axes, rules)):
                return apply(params, x)

        return jax.shard_map(local, in_specs=(P(), P(axes)), out_specs=P(axes), axis_names=set(axes))(params, x)

    return on_shares


def in_pieces(apply: Apply, tokens: int) -> Apply:
    """`apply(params, x)` in a loop over equal pieces of at most `tokens` tokens (but at least one example)."""

    def loop(params: Any, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        size = largest_divisor(x.shape[0], at_most=tokens // x.shape[1])
        pieces = x.reshape(-1, size, *x.shape[1:])
        return jax.lax.map(partial(apply, params), pieces).reshape(x.shape)

    return loop


def adds_bfloat16() -> bool:
    """Whether the devices of the mesh in use can add bfloat16 up among themselves: XLA's CPU backend aborts on it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is None or device.platform != "cpu"


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` up to `at_most`, and at least 1."""
    return max(divisor for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= max(1, at_most))


def _batch_axes(batch: int) -> tuple[str, ...]:
    """The axes of the mesh in use that split the batch; none where they do not divide it."""
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    names = _names(nn.logical_to_mesh_axes(("batch",), rules)[0]) if rules else ()
    axes = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    shares = math.prod(mesh.shape[name] for name in axes)
    return axes if batch % shares == 0 else ()


def _without(axes: tuple[str, ...], rules: Any) -> list[tuple[str, Any]]:
    """The rules that hold within a share: nothing is split over `axes` there."""
    return [(name, axis) for name, axis in rules if not set(axes) & set(_names(axis))]


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes as a rule gives them: one, several or none."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
