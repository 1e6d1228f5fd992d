"""What a model is (CLIPConfig, saved with its weights) and how it runs (Execution, chosen per run)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from clip_jax import options
from clip_jax.errors import UserError
from clip_jax.options import option
from clip_jax.precision import wide_dtype

ACTIVATIONS = ("quick_gelu", "gelu")
REMAT_POLICIES = ("none", "full", "dots", "attention")
ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers
RESIZES = ("shortest", "squash")

# Larger numbers come from damaged files, and are refused before anything of that size is built.
LARGEST_SIZE = 2**20
MOST_LAYERS = 1000

# Pixel statistics of OpenAI's training set: the `_transform` of the reference implementation (clip/clip.py).
OPENAI_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionTransformerConfig:
    """The ViT image tower."""

    TYPE: ClassVar[str] = "vit"

    image_resolution: int = option(help="side of its square images, pixels")
    patch_size: int = option(help="side of a patch, pixels")
    width: int = option(help="features of a token")
    layers: int = option(help="number of blocks")
    heads: int = option(help="attention heads")
    mlp_width: int = option(help="hidden features of an MLP")

    def __post_init__(self):
        _check_positive(self)
        _check_divides("image_resolution", self.image_resolution, "patch_size", self.patch_size)
        _check_divides("vision width", self.width, "vision heads", self.heads)

    @property
    def tokens(self) -> int:
        """Sequence length: one token per patch, and the class token."""
        return (self.image_resolution // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class ResNetConfig:
    """The ModifiedResNet image tower."""

    TYPE: ClassVar[str] = "resnet"

    image_resolution: int = option(help="side of its square images, pixels")
    width: int = option(help="channels of the first stage; the last has 32 times as many")
    layers: tuple[int, int, int, int] = option(help="blocks of each stage")
    heads: int = option(help="heads of the attention pool")

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        _check_positive(self)
        if len(self.layers) != 4:
            raise UserError(f"a ModifiedResNet has 4 stages, but layers={self.layers} names {len(self.layers)}")
        _check_divides("image_resolution", self.image_resolution, "the total stride", 32)
        _check_divides("the stem's width", self.width, "2", 2)
        _check_divides("the attention pool's width", self.output_width, "vision heads", self.heads)

    @property
    def output_width(self) -> int:
        """Channels after the last stage: the first stage has `width`, each doubles it, expansion 4."""
        return self.width * 32

    @property
    def tokens(self) -> int:
        """Sequence length of the attention pool: one token per cell of the last feature map, and their mean."""
        return (self.image_resolution // 32) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """The causal text Transformer, and the tokenizer that it was trained with."""

    width: int = option(help="features of a token")
    heads: int = option(help="attention heads")
    mlp_width: int = option(help="hidden features of an MLP")
    layers: int = option(12, "number of blocks")
    context_length: int = option(77, "tokens of a text, start and end included")
    vocab_size: int = option(49408, "rows of the token embedding")
    tokenizer: str = option("openai", "openai; with another kind only token ids can be encoded")
    lowercase: bool = option(True, "whether the tokenizer lower-cases texts first, as OpenAI's does")

    def __post_init__(self):
        _check_positive(self)
        if self.context_length < 3:
            raise UserError(f"context_length must be at least 3 (start, a word, end), got {self.context_length}")
        _check_divides("text width", self.width, "text heads", self.heads)
        if not isinstance(self.tokenizer, str) or not isinstance(self.lowercase, bool):
            raise UserError(
                f"tokenizer must be a name and lowercase true or false, got {self.tokenizer!r} and {self.lowercase!r}"
            )


@dataclass(frozen=True)
class CLIPConfig:
    """Everything that decides what a CLIP model computes; it travels with the weights.

    The activation and the image processing belong to it, because weights trained with one and run with another
    lose accuracy without any error.
    """

    embed_dim: int = option(help="features of both towers, which are compared")
    vision: VisionTransformerConfig | ResNetConfig = option(help="the image tower")
    text: TextConfig = option(help="the text tower")
    activation: str = option("quick_gelu", f"of the MLPs: {' or '.join(ACTIVATIONS)}")
    logit_bias: bool = option(False, "whether logits have a learned bias, as SigLIP's loss wants it (arXiv 2303.15343)")
    image_mean: tuple[float, float, float] = option(OPENAI_IMAGE_MEAN, "per channel, subtracted from pixels in [0, 1]")
    image_std: tuple[float, float, float] = option(OPENAI_IMAGE_STD, "per channel, by which they are divided then")
    image_interpolation: str = option("bicubic", f"how images are resized: {', '.join(INTERPOLATIONS)}")
    image_resize: str = option("shortest", "shortest: the shorter side, squash: both; then the centre square is taken")
    image_resize_to: int = option(0, "length that these sides get, pixels; 0 for the side of the square")
    classes: tuple[str, ...] = option((), "names of the classes of its classification head; empty for none")

    def __post_init__(self):
        object.__setattr__(self, "image_mean", tuple(self.image_mean))
        object.__setattr__(self, "image_std", tuple(self.image_std))
        object.__setattr__(self, "classes", tuple(self.classes))
        _check_size("embed_dim", self.embed_dim, self.embed_dim, LARGEST_SIZE)
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                raise UserError(f"{name} must be three numbers, one per colour, got {values!r}")
        if not min(self.image_std) > 0:
            raise UserError(f"image_std must be above 0, got {self.image_std!r}")
        _check_classes(self.classes)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("image_interpolation", self.image_interpolation, INTERPOLATIONS)
        _check_choice("image_resize", self.image_resize, RESIZES)
        if self.image_resize_to != 0:
            _check_size("image_resize_to", self.image_resize_to, self.image_resize_to, LARGEST_SIZE)
            if self.image_resize_to < self.vision.image_resolution:
                raise UserError(
                    f"image_resize_to must be 0 or at least the image_resolution, {self.vision.image_resolution}, "
                    f"got {self.image_resize_to}"
                )
            if self.image_resize_to == self.vision.image_resolution:
                object.__setattr__(self, "image_resize_to", 0)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON-able values; `from_dict` is its inverse."""
        return options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """Inverse of `to_dict`.

        Raises:
          UserError: a field is missing, unknown or has an impossible value.
        """
        return options.from_dict(cls, values, "the model's configuration")

    @classmethod
    def named(cls, name: str) -> "CLIPConfig":
        """One of OpenAI's models.

        Raises:
          UserError: there is none of that name.
        """
        if name not in OPENAI_MODELS:
            raise UserError(f"unknown model {name!r}; expected its fields, or one of {', '.join(OPENAI_MODELS)}")
        return OPENAI_MODELS[name]


@dataclass(frozen=True)
class Execution:
    """How a model runs; none of this changes its parameters, and only `dtype` changes its numbers noticeably."""

    dtype: str = option(
        "float32",
        "compute type: float32 or bfloat16, while parameters, statistics and losses stay float32; float64 for proofs",
    )
    remat: str = option(
        "none",
        "what the backward pass recomputes: none; attention (both keep gathered parameters); dots: all but products "
        "with weights; full: all but the input of each iteration of the layer loop, or of each ResNet block",
        may_change=True,
    )
    unroll: int = option(1, "Transformer blocks in one iteration of the layer loop, at most", may_change=True)
    attention: str = option("xla", "xla, or cudnn (fused; NVIDIA GPUs in bfloat16)", may_change=True)
    block_tokens: int = option(
        0,
        "tokens (whole examples) that a block works on at a time per device; 0 for all; a few thousand stay in a TPU's "
        "fast memory",
        may_change=True,
    )

    def __post_init__(self):
        _check_choice("dtype", self.dtype, ("float32", "bfloat16", "float64"))
        if self.dtype == "float64" and not jax.config.jax_enable_x64:
            raise UserError(
                'dtype="float64" needs 64-bit types, which JAX has switched off; set the environment variable '
                'JAX_ENABLE_X64=1, or compute in "float32"'
            )
        _check_choice("remat", self.remat, REMAT_POLICIES)
        _check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)
        if self.unroll < 1:
            raise UserError(f"unroll must be at least 1, got {self.unroll}")
        if self.block_tokens < 0:
            raise UserError(f"block_tokens must be 0 (all) or more, got {self.block_tokens}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise UserError(
                'attention="cudnn" computes in bfloat16 only; set dtype to "bfloat16" or attention to "xla"'
            )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as jax.numpy knows it."""
        return jnp.dtype(self.dtype)

    @property
    def wide_dtype(self) -> jnp.dtype:
        """The type of what must not be rounded: at least float32."""
        return wide_dtype(self.dtype)


def _check_positive(config: Any) -> None:
    for field in dataclasses.fields(config):
        if field.type in (str, bool):
            continue
        value = getattr(config, field.name)
        largest = MOST_LAYERS if field.name == "layers" else LARGEST_SIZE
        for number in value if isinstance(value, tuple) else (value,):
            _check_size(f"{type(config).__name__}.{field.name}", number, value, largest)


def _check_size(what: str, number: Any, value: Any, largest: int) -> None:
    if type(number) is not int or not 1 <= number <= largest:
        raise UserError(f"{what} must be at least 1 and at most {largest}, got {value!r}")


def _check_divides(what: str, number: int, by_what: str, divisor: int) -> None:
    if number % divisor:
        raise UserError(f"{what} must be a multiple of {by_what}, got {number} and {divisor}")


def _check_classes(classes: tuple[str, ...]) -> None:
    if any(not isinstance(name, str) or not name for name in classes) or len(classes) == 1:
        raise UserError(f"classes must be at least two names, got {classes!r:.200}")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"classes must have a name each, but {twice!r} is there more than once")


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{what} must be one of {', '.join(choices)}; got {value!r}")


def _vit(embed_dim: int, resolution: int, patch: int, width: int, layers: int, text_width: int) -> CLIPConfig:
    vision = VisionTransformerConfig(resolution, patch, width, layers, heads=width // 64, mlp_width=4 * width)
    return CLIPConfig(embed_dim, vision, _text(text_width))


def _resnet(embed_dim: int, resolution: int, width: int, layers: tuple, text_width: int) -> CLIPConfig:
    vision = ResNetConfig(resolution, width, layers, heads=width * 32 // 64)
    return CLIPConfig(embed_dim, vision, _text(text_width))


def _text(width: int) -> TextConfig:
    return TextConfig(width=width, heads=width // 64, mlp_width=4 * width)


# The nine released models, in OpenAI's spelling and order (clip/clip.py, model-card.md; paper tables 19 and 20).
OPENAI_MODELS: Mapping[str, CLIPConfig] = MappingProxyType(
    {
        "RN50": _resnet(1024, 224, 64, (3, 4, 6, 3), 512),
        "RN101": _resnet(512, 224, 64, (3, 4, 23, 3), 512),
        "RN50x4": _resnet(640, 288, 80, (4, 6, 10, 6), 640),
        "RN50x16": _resnet(768, 384, 96, (6, 8, 18, 8), 768),
        "RN50x64": _resnet(1024, 448, 128, (3, 15, 36, 10), 1024),
        "ViT-B/32": _vit(512, 224, 32, 768, 12, 512),
        "ViT-B/16": _vit(512, 224, 16, 768, 12, 512),
        "ViT-L/14": _vit(768, 224, 14, 1024, 24, 768),
        "ViT-L/14@336px": _vit(768, 336, 14, 1024, 24, 768),
    }
)
