"""Parameters by patterns of their paths, and by their layer.

A path names a leaf: `visual/transformer/resblocks/mlp/c_fc/kernel`. Patterns are a shell's: `visual/*` is all of the
image tower, `*/positional_embedding` the embeddings of both.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.errors import UserError

# What stands before the blocks of a tower, by the first name below it.
_BEFORE_BLOCKS = {"class_embedding", "positional_embedding", "token_embedding", "ln_pre"} | {
    f"{kind}{number}" for kind in ("conv", "bn") for number in (1, 2, 3)
}
_RESNET_STAGES = 4


def path_of(keys: tuple) -> str:
    """The path of a leaf, from the keys that jax gives for it."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_box(leaf: Any) -> bool:
    """Whether a leaf carries its logical axis names, as in a fresh init; to be taken as a leaf all the same."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches one of the patterns."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def paths_of(params: Any) -> list[str]:
    """The paths of all leaves."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)]


def check_patterns(patterns: Iterable[str], paths: Collection[str], option: str, which: str) -> None:
    """See that each pattern matches a parameter.

    Args:
      patterns: as the option `option` has them, which the message names.
      paths: those that they are meant for.
      option: dotted, of the configuration.
      which: what the message calls what is at one of `paths`.

    Raises:
      UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = " or ".join(difflib.get_close_matches(pattern, paths, n=2, cutoff=0.0))
            raise UserError(f"{option}: the pattern {pattern!r} matches no {which}, such as {near}")


def split(params: Mapping[str, Any], frozen: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the parameters that are trained, those that match the patterns `frozen`); `merge` is the inverse."""
    flat = flatten_dict(params, sep="/")
    fixed = {path: leaf for path, leaf in flat.items() if matches(path, frozen)}
    trained = {path: leaf for path, leaf in flat.items() if path not in fixed}
    return unflatten_dict(trained, sep="/"), unflatten_dict(fixed, sep="/")


def merge(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """One tree of parameters from the two that `split` gives."""
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)})


def product_of_matching(path: str, factors: Mapping[str, float]) -> float:
    """The product of the factors of all patterns that match a path, so that their order does not matter."""
    return float(np.prod([factor for pattern, factor in factors.items() if fnmatchcase(path, pattern)]))


def layer_factors(params: Any, decay: float) -> Any:
    """`decay` to the power of each parameter's layers below the top of its tower.

    Layers are counted as in BEiT's and FT-CLIP's code (arXiv 2106.08254, 2212.06138): what comes after the blocks is
    the top one, the last block is one below it, what comes before the first block is lowest. A ResNet's blocks are its
    four stages.

    Args:
      params: of a CLIP.
      decay: of the learning rate from one layer to the next below.

    Returns:
      A tree like `params` of numbers and, for stacked blocks, of float64 arrays (layers, 1, ..., 1).

    Raises:
      UserError: a tower's blocks are missing, so that nobody can count them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    depths = {keys[0].key: leaf.shape[0] for keys, leaf in leaves if "resblocks" in path_of(keys)}

    def factor(keys: tuple, leaf: Any) -> Any:
        tower, _, rest = path_of(keys).partition("/")
        name = rest.partition("/")[0]
        if name == "transformer":
            below = np.arange(depths[tower], 0, -1).reshape(-1, *[1] * (leaf.ndim - 1))
            return float(decay) ** below
        if name.startswith("layer"):
            return decay ** (_RESNET_STAGES + 1 - int(name[len("layer")]))
        if name not in _BEFORE_BLOCKS:
            return 1.0
        is_resnet = any(keys[0].key == tower and "layer4" in path_of(keys) for keys, _ in leaves)
        if tower not in depths and not is_resnet:
            raise UserError(
                f"optimizer.layer_decay counts the blocks of a tower, but those of {tower} are frozen and {rest} is "
                "not; freeze it too, or set layer_decay to 1"
            )
        return decay ** (depths.get(tower, _RESNET_STAGES) + 1)

    return jax.tree_util.tree_map_with_path(factor, params)
