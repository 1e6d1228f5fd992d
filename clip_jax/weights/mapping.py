"""Which tensor of PyTorch is which of our parameters: one table, read in both directions.

Our parameter tree mirrors OpenAI's module names, so a few renaming rules and three layouts say everything. A file
format then only says how it spells OpenAI's names (a `Naming`): openai.py, open_clip.py and huggingface.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, variable_shapes
from clip_jax.models.text import TextTransformer

# Path in our variables -> OpenAI's name, with "{layer}" where our blocks are stacked. The packed `in_proj` of
# PyTorch's attention appears as q_proj, k_proj and v_proj here; a Naming says where these three lie.
_RENAMING = (
    (r"^(params|batch_stats)/", ""),
    (r"^text/", ""),
    (r"^token_embedding$", "token_embedding/weight"),
    (r"/resblocks/", "/resblocks/{layer}/"),
    (r"/layer(\d)_(\d+)/", r"/layer\1/\2/"),
    (r"/downsample_conv/", "/downsample/0/"),
    (r"/downsample_bn/", "/downsample/1/"),
    (r"/attn/query/", "/attn/q_proj/"),
    (r"/attn/key/", "/attn/k_proj/"),
    (r"/attn/value/", "/attn/v_proj/"),
    (r"/attn/out/", "/attn/out_proj/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/(mean|var)$", r"/running_\1"),
    (r"/", "."),
)
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Source:
    """Where a file keeps the tensor that OpenAI names otherwise.

    Attributes:
      key: its name in the file.
      part: 0, 1 or 2 for the query, key or value rows of a packed projection.
      transposed: the file holds the transpose.
    """

    key: str
    part: int | None = None
    transposed: bool = False


Naming = Callable[[str], Source]


@dataclass(frozen=True)
class Leaf:
    """One parameter of ours and its PyTorch counterpart, or counterparts if `stacked` over layers."""

    path: str
    shape: tuple[int, ...]
    name: str

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def names(self) -> list[str]:
        """OpenAI's names, in the order of the layers."""
        return [self.name.format(layer=i) for i in range(self.shape[0])] if self.stacked else [self.name]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Our shape of what one name stands for."""
        return self.shape[1:] if self.stacked else self.shape

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """A view of PyTorch's tensor in our layout."""
        match self._layout:
            case "conv":  # (out, in, height, width) -> (height, width, in, out)
                return tensor.transpose(2, 3, 1, 0)
            case "linear":  # (out, in) -> (in, out), either of them split into (heads, head_dim)
                return tensor.T.reshape(self.layer_shape)
        return tensor.reshape(self.layer_shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `from_torch`."""
        match self._layout:
            case "conv":
                return array.transpose(3, 2, 0, 1)
            case "linear":
                return array.reshape(self.torch_shape[::-1]).T
        return array.reshape(self.torch_shape)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """PyTorch's shape of what one name stands for."""
        shape = self.layer_shape
        match self._layout:
            case "conv":
                return (shape[3], shape[2], shape[0], shape[1])
            case "linear":
                inputs = 2 if "/attn/out/" in self.path else 1
                return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
        split_heads = self.path.endswith("/bias") and len(shape) == 2
        return (shape[0] * shape[1],) if split_heads else shape

    @property
    def _layout(self) -> str:
        if not self.path.endswith("/kernel"):
            return "same"
        return "conv" if re.search(r"conv\d?/kernel$", self.path) else "linear"


@lru_cache(maxsize=4)
def leaves(config: CLIPConfig) -> tuple[Leaf, ...]:
    """The table for a whole model; shapes only, nothing is allocated."""
    return _table(variable_shapes(config))


def text_leaves(text: TextTransformer) -> tuple[Leaf, ...]:
    """The table for a text tower alone, with the paths it has in a whole model."""
    tokens = jax.ShapeDtypeStruct((1, text.config.context_length), jnp.int32)
    abstract = jax.eval_shape(text.init, jax.random.key(0), tokens)
    return _table({"params": {"text": abstract["params"]}})


def _table(abstract: Any) -> tuple[Leaf, ...]:
    table = []
    for path, array in flatten_dict(nn.unbox(abstract), sep="/").items():
        name = path
        for pattern, replacement in _RENAMING:
            name = re.sub(pattern, replacement, name)
        table.append(Leaf(path, array.shape, name))
    return tuple(table)


def expected_shapes(table: Sequence[Leaf], naming: Naming) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape, of every tensor that a file of this model must hold."""
    shapes = {}
    for leaf in table:
        for name in leaf.names:
            source, shape = naming(name), leaf.torch_shape
            if source.part is not None:
                shape = (3 * shape[0], *shape[1:])
            shapes[source.key] = shape[::-1] if source.transposed else shape
    return shapes


def to_variables(tensors: Mapping[str, np.ndarray], table: Sequence[Leaf], naming: Naming, origin: str) -> Any:
    """Our variables, as float32 NumPy arrays, from the tensors of a file.

    Views of a file stay views until they are copied into their place. float64 is rounded, as PyTorch rounds it when it
    loads a state dict into a model in float32.

    Raises:
      UserError: tensors are missing, superfluous, of another shape or type, or not finite; the message lists them.
        `origin` names the file.
    """
    _check_fit(tensors, expected_shapes(table, naming), origin)
    variables, broken = {}, {}
    for leaf in table:
        array = np.empty(leaf.shape, np.float32)
        for layer, name in enumerate(leaf.names):
            target, source = array[layer] if leaf.stacked else array, naming(name)
            with np.errstate(over="ignore"):
                target[...] = leaf.from_torch(_take(tensors, source))
            if not (finite := np.isfinite(target)).all():
                broken[source.key] = broken.get(source.key, 0) + target.size - np.count_nonzero(finite)
        variables[leaf.path] = array
    if broken:
        first = min(broken)
        raise UserError(
            f"{origin} holds numbers that are not finite (NaN or infinity) in {len(broken)} tensors; {first} has "
            f"{broken[first]} of them among {tensors[first].size}"
        )
    return unflatten_dict(variables, sep="/")


def to_tensors(variables: Any, table: Sequence[Leaf], naming: Naming) -> dict[str, np.ndarray]:
    """Inverse of `to_variables`: float32 tensors by their names in the file, contiguous ones not guaranteed."""
    flat = flatten_dict(variables, sep="/")
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for leaf in table:
        array = np.asarray(flat[leaf.path], np.float32)
        for layer, name in enumerate(leaf.names):
            tensor, source = leaf.to_torch(array[layer] if leaf.stacked else array), naming(name)
            parts.setdefault(source.key, {})[source.part] = tensor.T if source.transposed else tensor
    return {
        key: pieces[None] if None in pieces else np.concatenate([pieces[0], pieces[1], pieces[2]])
        for key, pieces in parts.items()
    }


def _take(tensors: Mapping[str, np.ndarray], source: Source) -> np.ndarray:
    tensor = tensors[source.key]
    if source.part is not None:
        rows = tensor.shape[0] // 3
        tensor = tensor[source.part * rows : (source.part + 1) * rows]
    return tensor.T if source.transposed else tensor


def _check_fit(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], origin: str) -> None:
    missing = [f"{key} {shape}" for key, shape in expected.items() if key not in tensors]
    extra = [f"{key[:200]} {tensor.shape}" for key, tensor in tensors.items() if key not in expected]
    wrong = [
        f"{key} is {tensors[key].shape}, should be {shape}"
        for key, shape in expected.items()
        if key in tensors and not _same(tensors[key].shape, shape)
    ]
    types = [
        f"{key} is {tensors[key].dtype}, should be float32, float16 or bfloat16"
        for key in expected
        if key in tensors and tensors[key].dtype.name not in _FLOATS
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}{', …' if len(names) > _NAMES_SHOWN else ''}"
        for what, names in (
            ("missing", missing),
            ("not part of the model", extra),
            ("of the wrong shape", wrong),
            ("of a type that holds no weights", types),
        )
        if names
    ]
    if problems:
        raise UserError(f"{origin} does not hold this CLIP model; tensors {'; '.join(problems)}")


def _same(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    # The temperature is a scalar for OpenAI and a vector of one in some open_clip files.
    return found == shape or (shape == () and found == (1,))
