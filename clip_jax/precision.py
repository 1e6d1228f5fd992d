"""The one rule of mixed precision: what must not be rounded is computed in float32, or wider where inputs are."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32, or `dtype` if that is float64 (under `jax_enable_x64`, for proofs)."""
    return jnp.promote_types(dtype, jnp.float32)


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or as it is if it is float64."""
    return x.astype(wide_dtype(x.dtype))
