"""open_clip's models: open_clip_config.json beside a file of weights with OpenAI's names.

A file alone, without its configuration, is read by openai.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig
from clip_jax.weights import archive, mapping, openai
from clip_jax.weights.archive import read_json
from clip_jax.weights.archive_writer import appears_whole, write_json, write_safetensors

CONFIG_FILE = "open_clip_config.json"
# The names open_clip gives and looks for in a local folder or a hub repository.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

_MODEL_FIELDS = {"embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "vision_cfg", "text_cfg"}
_VISION_FIELDS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_TEXT_FIELDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_CASED = {"clean": "whitespace"}
_HARMLESS = {  # settings with one value that means what this architecture does
    "custom_text": (True, False),
    "pool_type": ("tok", "argmax"),
    "final_ln_after_pool": (False,),
    "no_ln_pre": (False,),
    "proj_type": ("linear",),
    "pos_embed_type": ("learnable",),
    "hf_tokenizer_name": ("",),
    "tokenizer_kwargs": ({}, {"clean": "lower"}, _CASED),
}
_PREPROCESSING = {  # open_clip's field -> ours; its transforms know no other values
    "interpolation": ("image_interpolation", ("bicubic", "bilinear")),
    "resize_mode": ("image_resize", ("shortest", "squash")),
}


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder of open_clip's with a configuration."""
    return (path / CONFIG_FILE).is_file()


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder.

    Raises:
      UserError: there is none of open_clip's names.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has {CONFIG_FILE} but none of {', '.join(WEIGHT_FILES)}")
    return found


def read(path: Path) -> tuple[CLIPConfig, Any]:
    """The model in a file with its configuration beside it: (config, variables as float32 NumPy arrays).

    Raises:
      UserError: unreadable files, an architecture that is not this one, or tensors that do not fit.
    """
    config = config_from_json(read_json(path.parent / CONFIG_FILE), f"{path.parent}/{CONFIG_FILE}")
    tensors = openai.plain_tensors(archive.read(path).tensors)
    return config, mapping.to_variables(tensors, mapping.leaves(config), openai.naming, str(path))


def config_from_json(values: Mapping[str, Any], origin: str) -> CLIPConfig:
    """CLIPConfig from the contents of an open_clip_config.json.

    Raises:
      UserError: a field is missing, or asks for what this architecture does not have; `origin` names the file.
    """
    try:
        model = values["model_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        _check_fields(model, _MODEL_FIELDS, f"{origin}: model_cfg")
        _check_fields(vision, _VISION_FIELDS, f"{origin}: vision_cfg")
        _check_fields(text, _TEXT_FIELDS, f"{origin}: text_cfg")
        config = CLIPConfig(
            embed_dim=model["embed_dim"],
            vision=_vision_config(vision),
            text=TextConfig(
                width=text["width"],
                heads=text["heads"],
                mlp_width=_mlp_width(text),
                layers=text["layers"],
                context_length=text.get("context_length", 77),
                vocab_size=text.get("vocab_size", 49408),
                lowercase=text.get("tokenizer_kwargs") != _CASED,
            ),
            activation="quick_gelu" if model.get("quick_gelu") else "gelu",
            logit_bias=model.get("init_logit_bias") is not None,
        )
        return _with_preprocessing(config, values.get("preprocess_cfg", {}), origin)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{origin} is no configuration of open_clip ({type(error).__name__}: {error})") from error


def _vision_config(vision: Mapping[str, Any]) -> VisionTransformerConfig | ResNetConfig:
    width, head_width, resolution = vision["width"], vision.get("head_width", 64), vision.get("image_size", 224)
    if isinstance(vision["layers"], list):
        return ResNetConfig(resolution, width, tuple(vision["layers"]), heads=width * 32 // head_width)
    return VisionTransformerConfig(
        image_resolution=resolution,
        patch_size=vision["patch_size"],
        width=width,
        layers=vision["layers"],
        heads=width // head_width,
        mlp_width=_mlp_width(vision),
    )


def _mlp_width(tower: Mapping[str, Any]) -> int:
    return int(tower["width"] * float(tower.get("mlp_ratio", 4)))  # cut, not rounded, as open_clip does


def _ratio(tower: VisionTransformerConfig | TextConfig) -> float:
    """The ratio from which `_mlp_width` gets the width back: the quotient, or the next number above it."""
    ratio = tower.mlp_width / tower.width
    return ratio if int(tower.width * ratio) == tower.mlp_width else math.nextafter(ratio, math.inf)


def _check_fields(values: Mapping[str, Any], known: set[str], origin: str) -> None:
    for name, value in values.items():
        if name not in known and value is not None and value not in _HARMLESS.get(name, (False,)):
            raise UserError(f"{origin} sets {name}={value!r}, which this architecture does not have")


def _with_preprocessing(config: CLIPConfig, values: Mapping[str, Any], origin: str) -> CLIPConfig:
    if values.get("mode", "RGB") != "RGB":
        raise UserError(f"{origin}: preprocess_cfg has mode {values['mode']!r}, expected 'RGB'")
    fields = {f"image_{name}": tuple(values[name]) for name in ("mean", "std") if name in values}
    for name, (ours, choices) in _PREPROCESSING.items():
        fields[ours] = values.get(name, choices[0])
        if fields[ours] not in choices:
            raise UserError(f"{origin}: preprocess_cfg has {name} {fields[ours]!r}, expected {' or '.join(choices)}")
    return dataclasses.replace(config, **fields)


def write(folder: Path, config: CLIPConfig, variables: Any) -> None:
    """Write a folder that open_clip loads as `local-dir:FOLDER`, in float32.

    Raises:
      UserError: open_clip cannot express the image processing or the tokenizer, or `folder` exists.
    """
    values = config_to_json(config)
    with appears_whole(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG_FILE, values)
        write_safetensors(temporary / WEIGHT_FILES[0], openai.state_dict(config, variables))


def config_to_json(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `config_from_json`."""
    vision, text = config.vision, config.text
    trunk = vision.output_width if isinstance(vision, ResNetConfig) else vision.width
    vision_values = {
        "image_size": vision.image_resolution,
        "layers": vision.layers,
        "width": vision.width,
        "head_width": trunk // vision.heads,
    }
    if isinstance(vision, VisionTransformerConfig):
        vision_values |= {"patch_size": vision.patch_size, "mlp_ratio": _ratio(vision)}
    for ours, allowed in (*_PREPROCESSING.values(), ("image_resize_to", (0,))):
        if getattr(config, ours) not in allowed:
            raise UserError(
                f"open_clip has no {ours} {getattr(config, ours)!r}; write this model as huggingface or jax"
            )
    if text.tokenizer != "openai":
        raise UserError(f"open_clip would use OpenAI's tokenizer, not {text.tokenizer!r}; write this model as jax")
    bias = {"init_logit_bias": -10} if config.logit_bias else {}
    return {
        "model_cfg": bias
        | {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": vision_values,
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "mlp_ratio": _ratio(text),
            }
            | ({} if text.lowercase else {"tokenizer_kwargs": _CASED}),
        },
        "preprocess_cfg": {"mode": "RGB", "mean": list(config.image_mean), "std": list(config.image_std)}
        | {theirs: getattr(config, ours) for theirs, (ours, _) in _PREPROCESSING.items()},
    }
