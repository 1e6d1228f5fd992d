"""open_clip's models: a file of weights with OpenAI's names, and open_clip's configuration of it.

The configuration is the open_clip_config.json beside the file, or one of open_clip's `model_configs/NAME.json` that the
user names. A file alone, without its configuration, is read by openai.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig
from clip_jax.weights import fields, mapping, openai, tensor_file
from clip_jax.weights.files import appears_whole, read_json, write_json

CONFIG_FILE = "open_clip_config.json"
# The names open_clip gives and looks for in a local folder or a hub repository.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

# Our field -> open_clip's, and what open_clip takes where it is missing (CLIPVisionCfg, CLIPTextCfg). The MLP's width
# and the image tower's heads are spelled otherwise: as a ratio, and as the width of one head.
_RESNET = {"image_resolution": ("image_size", 224), "width": ("width", 768), "layers": ("layers", 12)}
_VIT = _RESNET | {"patch_size": ("patch_size", 16)}
_TEXT = {
    "context_length": ("context_length", 77),
    "vocab_size": ("vocab_size", 49408),
    "width": ("width", 512),
    "heads": ("heads", 8),
    "layers": ("layers", 12),
}
_MODEL_FIELDS = {"embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "vision_cfg", "text_cfg"}
_VISION_FIELDS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_CASED = {"clean": "whitespace"}
_HARMLESS = {  # settings with one value that means what this architecture does
    "custom_text": (True, False),
    "output_dict": (True, False),
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
    """Whether `path` is a folder of open_clip's: its configuration and a file of weights."""
    return (path / CONFIG_FILE).is_file() and any((path / name).is_file() for name in WEIGHT_FILES)


def weights_file(folder: Path) -> Path:
    """The file of weights in such a folder."""
    return next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())


def read(path: Path, config_file: Path | None = None, activation: str | None = None) -> tuple[CLIPConfig, Any]:
    """The model in a file, as its configuration says: (config, variables as float32 NumPy arrays).

    Args:
      path: the file of weights.
      config_file: open_clip's JSON file of the model, if it is not the open_clip_config.json beside the weights.
      activation: what the user says it is, if anything.

    Raises:
      UserError: unreadable files, an architecture that is not this one, tensors that do not fit, or another activation.
    """
    config_file = config_file or path.parent / CONFIG_FILE
    config, file = config_from_json(read_json(config_file), str(config_file)), tensor_file.read(path)
    for said in (openai.stated_activation(file), activation):
        if said not in (None, config.activation):
            raise UserError(f"{config_file} says {config.activation} for {path}, which was made with {said}")
    tensors = openai.plain_tensors(file.tensors)
    return config, mapping.to_variables(tensors, mapping.leaves(config), openai.naming, str(path))


def config_from_json(values: Mapping[str, Any], origin: str) -> CLIPConfig:
    """CLIPConfig from the contents of an open_clip_config.json, or of what it has as `model_cfg`.

    Raises:
      UserError: a field is missing, or asks for what this architecture does not have; `origin` names the file.
    """
    try:
        model = values.get("model_cfg", values)
        vision, text = model["vision_cfg"], model["text_cfg"]
        _check_fields(model, _MODEL_FIELDS, f"{origin}: model_cfg")
        _check_fields(vision, _VISION_FIELDS, f"{origin}: vision_cfg")
        _check_fields(text, {*_TEXT, "mlp_ratio"}, f"{origin}: text_cfg")
        lowercase = text.get("tokenizer_kwargs") != _CASED
        config = CLIPConfig(
            embed_dim=model["embed_dim"],
            vision=_vision_config(vision),
            text=_with_mlp(TextConfig, fields.from_json(_TEXT, text) | {"lowercase": lowercase}, text),
            activation="quick_gelu" if model.get("quick_gelu") else "gelu",
            logit_bias=model.get("init_logit_bias") is not None,
        )
        return _with_preprocessing(config, values.get("preprocess_cfg", {}), origin)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{origin} is no configuration of open_clip ({type(error).__name__}: {error})") from error


def _vision_config(vision: Mapping[str, Any]) -> VisionTransformerConfig | ResNetConfig:
    head_width = vision.get("head_width", 64)
    if isinstance(vision.get("layers"), list):
        tower = fields.from_json(_RESNET, vision | {"layers": tuple(vision["layers"])})
        return ResNetConfig(**tower, heads=tower["width"] * 32 // head_width)
    tower = fields.from_json(_VIT, vision)
    return _with_mlp(VisionTransformerConfig, tower | {"heads": tower["width"] // head_width}, vision)


def _with_mlp(tower: type, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    # The width is cut, not rounded, as open_clip does.
    return tower(**arguments, mlp_width=int(arguments["width"] * float(values.get("mlp_ratio", 4))))


def _ratio(tower: VisionTransformerConfig | TextConfig) -> float:
    """The ratio from which `_with_mlp` gets the width back: the quotient, or the next number above it."""
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
        tensor_file.write_safetensors(temporary / WEIGHT_FILES[0], openai.state_dict(config, variables))


def config_to_json(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `config_from_json`.

    Raises:
      UserError: open_clip has no name for how this model resizes images or tokenizes texts.
    """
    _check_expressible(config)
    text = fields.to_json(_TEXT, config.text) | {"mlp_ratio": _ratio(config.text)}
    case = {} if config.text.lowercase else {"tokenizer_kwargs": _CASED}
    bias = {"init_logit_bias": -10} if config.logit_bias else {}
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": _vision_to_json(config.vision),
            "text_cfg": text | case,
        }
        | bias,
        "preprocess_cfg": {"mode": "RGB", "mean": list(config.image_mean), "std": list(config.image_std)}
        | {theirs: getattr(config, ours) for theirs, (ours, _) in _PREPROCESSING.items()},
    }


def _vision_to_json(vision: VisionTransformerConfig | ResNetConfig) -> dict[str, Any]:
    if isinstance(vision, ResNetConfig):
        return fields.to_json(_RESNET, vision) | {"head_width": vision.output_width // vision.heads}
    return fields.to_json(_VIT, vision) | {"head_width": vision.width // vision.heads, "mlp_ratio": _ratio(vision)}


def _check_expressible(config: CLIPConfig) -> None:
    for ours, allowed in (*_PREPROCESSING.values(), ("image_resize_to", (0,))):
        found = getattr(config, ours)
        if found not in allowed:
            raise UserError(f"open_clip has no {ours} {found!r}; write this model as huggingface or jax")
    if config.text.tokenizer != "openai":
        raise UserError(
            f"open_clip would use OpenAI's tokenizer, not {config.text.tokenizer!r}; write this model as jax"
        )
