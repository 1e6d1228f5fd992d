"""Convolutions whose kernels are put together before they are used.

Left to itself, the TPU compiler turns a convolution with a split kernel into a loop over the devices' parts of it,
where these are long enough. See `shares.py` for the same in Transformer blocks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kernel = Float[Array, "kernel_height kernel_width channels_in channels_out"]


def whole(kernel: Kernel) -> Kernel:
    """The kernel as every device needs it: with all output channels."""
    return nn.with_logical_constraint(kernel, ("kernel_height", "kernel_width", "channels_in", "features"))


def convolve(
    x: Float[Array, "batch height width _in"], kernel: Kernel, *args, **kwargs
) -> Float[Array, "batch _height _width _out"]:
    """What `nn.Conv` calls: a convolution with the whole kernel."""
    return jax.lax.conv_general_dilated(x, whole(kernel), *args, **kwargs)


def pointwise(
    x: Float[Array, "batch height width _in"], kernel: Float[Array, "1 1 _in _out"], *_, precision, **__
) -> Float[Array, "batch height width _out"]:
    """A 1x1 convolution as the matrix product that it is: XLA on CPUs differentiates that several times as fast."""
    return jnp.einsum("bhwi,io->bhwo", x, whole(kernel)[0, 0], precision=precision)
