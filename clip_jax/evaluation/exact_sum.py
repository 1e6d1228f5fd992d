"""Sums of arrays that do not depend on the order in which the arrays are added: of whole numbers.

Each number is rounded to a multiple of a small unit, which two integers hold, the second one what the first one leaves.
Integers add up exactly, on any number of devices. The idea is that of reproducible summation (Demmel and Nguyen, 2013)
where a bound of the sum is known beforehand.
"""

import math
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

Parts = tuple[Int[Array, "..."], Int[Array, "..."]]


@dataclass(frozen=True)
class ExactSum:
    """Adds up arrays of one floating-point type, with integers of the same width.

    Attributes:
      bound: above the absolute value of every sum of some of the numbers.
      count: of the arrays to add, at most.
      dtype: of the numbers, float32 or float64.
      units: what 1 means in each of the two integers, powers of two.
    """

    bound: float
    count: int
    dtype: DTypeLike
    units: tuple[float, float] = field(init=False)

    def __post_init__(self):
        digits = 8 * np.dtype(self.dtype).itemsize - 2
        large = 2.0 ** (math.frexp(self.bound)[1] - digits)
        object.__setattr__(self, "units", (large, large * 2.0 ** (math.frexp(self.count)[1] - digits)))

    def zeros_like(self, array: Float[Array, "..."]) -> Parts:
        """The sum of nothing, on the devices that hold the array."""
        zeros = (0 * array).astype(self._integer)
        return zeros, zeros

    def add(self, parts: Parts, array: Float[Array, "..."]) -> Parts:
        """The sum with one more array."""
        large, small = self.units
        rounded = jnp.round(array / large)
        left = array - rounded * large
        return parts[0] + rounded.astype(self._integer), parts[1] + jnp.round(left / small).astype(self._integer)

    def value(self, parts: tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
        """The sum as float64."""
        return sum(part.astype(np.float64) * unit for part, unit in zip(parts, self.units, strict=True))

    @property
    def _integer(self) -> np.dtype:
        return np.dtype(f"int{8 * np.dtype(self.dtype).itemsize}")
