"""OpenAI's files (`clip/clip.py`, `clip/model.py`), and every bare state dict that uses OpenAI's names.

The architecture follows from the tensors' shapes, as in `build_model`. The activation does not: a TorchScript archive
names the class of it, and a state dict holding OpenAI's three size buffers is OpenAI's; for others it must be told.
What else shapes do not show is taken to be as in OpenAI's models, unless something in the file speaks against it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig
from clip_jax.models.config import OPENAI_IMAGE_MEAN, OPENAI_IMAGE_STD
from clip_jax.weights import mapping, tensor_file
from clip_jax.weights.archive_writer import write_state_dict
from clip_jax.weights.files import appears_whole
from clip_jax.weights.mapping import Source
from clip_jax.weights.tensor_file import TensorFile

HEAD_WIDTH = 64
OPENAI_VOCABULARY = 49408
SIZE_BUFFERS = ("input_resolution", "context_length", "vocab_size")
_IGNORED = re.compile(r"(.*\.)?(num_batches_tracked|attn_mask|position_ids)|" + "|".join(SIZE_BUFFERS))
_PACKED = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")
_FIRST_TENSOR = "visual.conv1.weight"  # of every model of this architecture
# Names that betray another architecture, or another library's file.
_FOREIGN = (
    (r"\bvisual\.trunk\.", "an image tower of timm (SigLIP's, ConvNeXt and others), which clip_jax does not have"),
    (r"\btext\.transformer\.(embeddings|encoder)\.", "a text tower of transformers, which clip_jax does not have"),
    (r"\btext_decoder\.", "CoCa's text decoder, which clip_jax does not have"),
    (r"\b(vision|text)_model\.", "transformers' names, which need its config.json beside them"),
)
_ACTIVATION_CLASSES = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
# open_clip's larger ViTs (H, g, G) have other heads than 64 wide, which no tensor shows.
_LARGEST_SURE_WIDTH = 1024


def naming(name: str) -> Source:
    """Query, key and value projections of a block are the rows of one `in_proj` tensor."""
    packed = _PACKED.fullmatch(name)
    return Source(f"{packed[1]}in_proj_{packed[3]}", "qkv".index(packed[2])) if packed else Source(name)


def plain_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by OpenAI's names, without buffers that hold no weights.

    What modules around the model put before every name goes (`module.`, `_orig_mod.`, Lightning's `model.` or `clip.`),
    and so does the `text.` of open_clip's custom text towers.
    """
    prefix = next((name for name in tensors if name.endswith("." + _FIRST_TENSOR)), "").removesuffix(_FIRST_TENSOR)
    unwrapped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if "text.token_embedding.weight" in unwrapped:
        unwrapped = {name.removeprefix("text."): tensor for name, tensor in unwrapped.items()}
    return {name: tensor for name, tensor in unwrapped.items() if not _IGNORED.fullmatch(name)}


def read(path: str | Path, activation: str | None = None) -> tuple[CLIPConfig, Any]:
    """The model in a TorchScript archive or state dict: (config, variables as float32 NumPy arrays).

    Args:
      path: the file.
      activation: "quick_gelu" or "gelu", for a file that does not say which.

    Raises:
      UserError: not a readable file, not a CLIP model of this architecture, or its activation is unknown.
    """
    file = tensor_file.read(path)
    tensors, stated, origin = plain_tensors(file.tensors), stated_activation(file), str(file.path)
    _check_names(tensors, origin)
    if stated is None:
        _check_like_openai(tensors, origin)
    config = infer_config(tensors, _agreed_activation(stated, activation, origin), origin)
    return config, mapping.to_variables(tensors, mapping.leaves(config), naming, origin)


def _check_names(tensors: Mapping[str, np.ndarray], origin: str) -> None:
    for pattern, what in _FOREIGN:
        if any(re.search(pattern, name) for name in tensors):
            raise UserError(f"{origin} holds {what}")


def _check_like_openai(tensors: Mapping[str, np.ndarray], origin: str) -> None:
    """What shapes do not show is taken to be as in OpenAI's models; refuse a file where something speaks against it.

    Raises:
      UserError: the vocabulary or a width is one that no model of OpenAI's has.
    """
    vocabulary, text = _shape(tensors, "token_embedding.weight", 2, origin)
    image = _shape(tensors, _FIRST_TENSOR, 4, origin)[0] if "visual.proj" in tensors else HEAD_WIDTH
    signs = (
        (vocabulary != OPENAI_VOCABULARY, f"a vocabulary of {vocabulary:,}, not OpenAI's {OPENAI_VOCABULARY:,}"),
        (text % HEAD_WIDTH, f"a text tower {text} wide, not a multiple of {HEAD_WIDTH}, the width of OpenAI's heads"),
        (
            image % HEAD_WIDTH,
            f"an image tower {image} wide, not a multiple of {HEAD_WIDTH}, the width of OpenAI's heads",
        ),
        (
            image > _LARGEST_SURE_WIDTH,
            f"an image tower {image} wide, whose heads may be wider than OpenAI's {HEAD_WIDTH}",
        ),
    )
    for found, sign in signs:
        if found:
            raise UserError(
                f"{origin} has {sign}; say what the model is with --model_config FILE (open_clip's "
                "model_configs/NAME.json of it), or put its open_clip_config.json beside it"
            )


def stated_activation(file: TensorFile) -> str | None:
    """The activation that the file itself names, or None."""
    names = {cls for module, cls in file.classes.items() if module.endswith("mlp.gelu")}
    if len(names) == 1:
        return _ACTIVATION_CLASSES.get(names.pop())
    return "quick_gelu" if not names and all(name in file.tensors for name in SIZE_BUFFERS) else None


def _agreed_activation(stated: str | None, asked: str | None, origin: str) -> str:
    if stated and asked and stated != asked:
        raise UserError(f"{origin} was made with {stated}, not {asked}; leave the activation out")
    if not (stated or asked):
        raise UserError(
            f"{origin} does not say its activation; give --activation quick_gelu (OpenAI's weights and open_clip's "
            "-quickgelu models), --activation gelu (open_clip's others), or the model's --model_config"
        )
    return stated or asked


def infer_config(tensors: Mapping[str, np.ndarray], activation: str, origin: str) -> CLIPConfig:
    """The architecture from shapes, as `build_model` infers it; heads are 64 wide.

    Raises:
      UserError: no CLIP model has these tensors; `origin` names the file.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        return _shape(tensors, name, dimensions, origin)

    def grid(name: str) -> int:
        positions = shape(name, 2)[0]
        side = math.isqrt(max(positions - 1, 0))
        if side**2 + 1 != positions:
            raise UserError(f"{origin}: {name} has {positions} positions, which are no square grid and a class token")
        return side

    width = shape("ln_final.weight", 1)[0]
    text = TextConfig(
        width=width,
        heads=width // HEAD_WIDTH,
        mlp_width=shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        layers=_count(tensors, r"transformer\.resblocks\.(\d+)\."),
        context_length=shape("positional_embedding", 2)[0],
        vocab_size=shape("token_embedding.weight", 2)[0],
    )
    if "visual.proj" in tensors:
        width, _, _, patch = shape("visual.conv1.weight", 4)
        vision = VisionTransformerConfig(
            image_resolution=patch * grid("visual.positional_embedding"),
            patch_size=patch,
            width=width,
            layers=_count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
            heads=width // HEAD_WIDTH,
            mlp_width=shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        )
    else:
        width = shape("visual.layer1.0.conv1.weight", 4)[0]
        vision = ResNetConfig(
            image_resolution=32 * grid("visual.attnpool.positional_embedding"),
            width=width,
            layers=tuple(_count(tensors, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),
            heads=width * 32 // HEAD_WIDTH,
        )
    return CLIPConfig(shape("text_projection", 2)[1], vision, text, activation, logit_bias="logit_bias" in tensors)


def _shape(tensors: Mapping[str, np.ndarray], name: str, dimensions: int, origin: str) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim != dimensions:
        found = str(tensors[name].shape) if name in tensors else f"{len(tensors)} others"
        raise UserError(
            f"{origin} holds no CLIP model: expected {name} of {dimensions} axes, found {found}; "
            "transformers' and open_clip's files need their configuration beside them"
        )
    return tensors[name].shape


def _count(tensors: Mapping[str, np.ndarray], pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def check_expressible(config: CLIPConfig) -> None:
    """OpenAI's class has one activation, one head width, one MLP ratio and one preprocessing.

    Raises:
      UserError: the model differs in one of them.
    """
    vision, text = config.vision, config.text
    trunk = vision.output_width if isinstance(vision, ResNetConfig) else vision.width
    wanted = {
        "activation": (config.activation, "quick_gelu"),
        "logit_bias": (config.logit_bias, False),
        "vision heads": (vision.heads, trunk // HEAD_WIDTH),
        "text heads": (text.heads, text.width // HEAD_WIDTH),
        "text mlp_width": (text.mlp_width, 4 * text.width),
        "vision mlp_width": (getattr(vision, "mlp_width", 4 * trunk), 4 * trunk),
        "image_mean": (config.image_mean, OPENAI_IMAGE_MEAN),
        "image_std": (config.image_std, OPENAI_IMAGE_STD),
        "image_interpolation": (config.image_interpolation, "bicubic"),
        "image_resize": (config.image_resize, "shortest"),
        "image_resize_to": (config.image_resize_to, 0),
        "tokenizer": (text.tokenizer, "openai"),
        "lowercase": (text.lowercase, True),
    }
    for what, (found, only) in wanted.items():
        if found != only:
            raise UserError(f"OpenAI's class knows only {what} {only}, this model has {found}; use another format")


def write(path: Path, config: CLIPConfig, variables: Any) -> None:
    """Write a float32 state dict that `clip.model.build_model(torch.load(path))` accepts.

    Raises:
      UserError: OpenAI's class cannot express the model, or `path` exists.
    """
    check_expressible(config)
    sizes = (config.vision.image_resolution, config.text.context_length, config.text.vocab_size)
    tensors = state_dict(config, variables)
    tensors |= {name: np.array(size, np.int64) for name, size in zip(SIZE_BUFFERS, sizes, strict=True)}
    with appears_whole(path) as temporary:
        write_state_dict(temporary, tensors)


def state_dict(config: CLIPConfig, variables: Any) -> dict[str, np.ndarray]:
    """The tensors of PyTorch's `model.state_dict()`, with the step counters of its BatchNorms (zero)."""
    tensors = mapping.to_tensors(variables, mapping.leaves(config), naming)
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith("running_mean")]
    return tensors | {f"{norm}num_batches_tracked": np.array(0, np.int64) for norm in norms}
