"""Low-rank adapters (LoRA, Hu et al., 2021, arXiv 2106.09685) as a function of parameters; no module knows of them.

A kernel W is trained as W + alpha / rank * A B, of which W stays and A and B learn. The state's parameters are always
the sums, so whatever takes a model takes an adapted one. A kernel's first axes are its inputs, the rest its outputs; A
has the inputs and the rank, B the rank and the outputs, so that heads stay apart and are split over the mesh as ever.
The blocks of a stack have factors of their own.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from clip_jax.errors import UserError
from clip_jax.options import option
from clip_jax.training.parameters import check_patterns, matches

# Modules whose kernels map to one vector per head: in a block, and in a ResNet's attention pool.
_TO_HEADS = ("query", "key", "value", "q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """Which kernels are adapted, and how; everything else is frozen then. The defaults are LoRA's (section 4.2)."""

    rank: int = option(0, "inner width of the two factors, such as 8; 0 for no adapters")
    alpha: float = option(16.0, "the product of the factors is scaled by alpha / rank")
    kernels: tuple[str, ...] = option(("*/query/kernel", "*/value/kernel"), "patterns of the kernels that get one")

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"adapters.rank must be at least 0, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"adapters.alpha must be above 0, got {self.alpha}")
        if self.rank and not self.kernels:
            raise UserError("adapters.kernels names no kernel; give patterns such as */query/kernel, or set rank to 0")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank


@flax.struct.dataclass
class Adapters:
    """The adapters of a model, as two trees.

    Attributes:
      base: the kernels as they were, which stay.
      factors: where a kernel stands in `base`, a dictionary of its factors "a" and "b", float32.
    """

    base: Any
    factors: Any


def adapted_paths(config: AdapterConfig, params: Mapping[str, Any]) -> list[str]:
    """The paths of the kernels that get adapters.

    Args:
      config: says which.
      params: of the model, or their shapes.

    Raises:
      UserError: a pattern matches no kernel, or the rank is larger than that of a kernel can be.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items() if _is_matrix(path, leaf)}
    check_patterns(config.kernels, shapes, "adapters.kernels", "matrix of the model")
    paths = [path for path in shapes if matches(path, config.kernels)]
    for path in paths:
        shape = shapes[path][_stacked(path) :]
        highest = min(math.prod(shape[: _inputs(path, shape)]), math.prod(shape[_inputs(path, shape) :]))
        if config.rank > highest:
            raise UserError(f"adapters.rank is {config.rank}, but {path} has at most rank {highest}")
    return paths


def initial_adapters(config: AdapterConfig, kernels: Any, key: jax.Array) -> Adapters:
    """Adapters that change nothing yet: B is zero, A uniform within 1 / sqrt(inputs), as in LoRA's own code.

    Args:
      config: with a rank above 0.
      kernels: those that are adapted, still boxed with the names of their axes.
      key: of the run; what a kernel gets depends on its path only, not on the others or the mesh.
    """
    flat = flatten_dict(kernels, sep="/")
    factors = {path: _initial_factors(path, kernel, config.rank, key) for path, kernel in flat.items()}
    return Adapters(jax.tree.map(jnp.copy, kernels), unflatten_dict(factors, sep="/"))


def merged(adapters: Adapters, scale: float) -> Any:
    """W + scale * A B of every adapted kernel, in the precision of the parameters."""
    factors = flatten_dict(adapters.factors, sep="/")

    def merge(path: str, base: Float[Array, "..."]) -> Float[Array, "..."]:
        return base + scale * _product(factors[f"{path}/a"], factors[f"{path}/b"], _stacked(path))

    return unflatten_dict({path: merge(path, base) for path, base in flatten_dict(adapters.base, sep="/").items()}, "/")


def gradient_of_factors(adapters: Adapters, scale: float, gradient: Any) -> Any:
    """What the gradient of the merged kernels is for the factors."""
    _, pull_back = jax.vjp(lambda factors: merged(adapters.replace(factors=factors), scale), adapters.factors)
    return pull_back(gradient)[0]


def _initial_factors(path: str, kernel: Any, rank: int, key: jax.Array) -> dict[str, Any]:
    names, shape, stacked = kernel.names, nn.unbox(kernel).shape, _stacked(path)
    middle = stacked + _inputs(path, shape[stacked:])
    bound = math.prod(shape[stacked:middle]) ** -0.5
    draw = jax.random.fold_in(key, zlib.crc32(path.encode()))
    a = jax.random.uniform(draw, (*shape[:middle], rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[:stacked], rank, *shape[middle:]), jnp.float32)
    return {
        "a": nn.LogicallyPartitioned(a, (*names[:middle], None)),
        "b": nn.LogicallyPartitioned(b, (*names[:stacked], None, *names[middle:])),
    }


def _product(a: Float[Array, "..."], b: Float[Array, "..."], stacked: int) -> Float[Array, "..."]:
    """A B of each block of a stack, with the axes of the kernel."""
    stack = tuple(range(stacked))
    dimensions = (((a.ndim - 1,), (stacked,)), (stack, stack))
    return jax.lax.dot_general(a, b, dimensions, precision=jax.lax.Precision.HIGHEST)


def _is_matrix(path: str, leaf: Any) -> bool:
    """Whether a leaf multiplies activations; an embedding is looked up or added."""
    return len(leaf.shape) - _stacked(path) >= 2 and not path.endswith(("bias", "embedding"))


def _stacked(path: str) -> int:
    """How many leading axes of a kernel count the blocks of a stack."""
    return int("/resblocks/" in path)


def _inputs(path: str, shape: tuple[int, ...]) -> int:
    """How many axes of a kernel, without those of a stack, are inputs: all but the last, unless it maps to heads."""
    return 1 if path.split("/")[-2] in _TO_HEADS else len(shape) - 1
