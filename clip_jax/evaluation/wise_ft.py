"""Between a model and what was fine-tuned from it: WiSE-FT (arXiv 2109.01903)."""

from typing import Any

import jax
import numpy as np


def interpolate(a: Any, b: Any, alpha: float) -> Any:
    """(1 - alpha) * a + alpha * b, array by array in float32.

    Running statistics of BatchNorm are interpolated like the parameters, as WiSE-FT does with a state dict.

    Args:
      a: variables of a model.
      b: those of another of the same architecture.
      alpha: from 0, which gives `a`, to 1.
    """
    return jax.tree.map(lambda x, y: np.float32(1 - alpha) * x + np.float32(alpha) * y, a, b)
