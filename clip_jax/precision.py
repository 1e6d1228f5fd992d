"""The one rule of mixed precision: what must not be rounded is computed in float32, or wider where inputs are."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or as it is if it is float64 (under `jax_enable_x64`, for proofs)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
