"""Folders of Hugging Face's `transformers.CLIPModel`: config.json and model.safetensors (or pytorch_model.bin)."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig
from clip_jax.models.config import ACTIVATIONS
from clip_jax.models.transformer import LAYER_NORM_EPSILON
from clip_jax.weights import mapping, tensor_file
from clip_jax.weights.files import appears_whole, read_json, write_json
from clip_jax.weights.mapping import Source

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# OpenAI's name -> transformers' name.
_RENAMING = (
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^(token_embedding\.weight)$", r"text_model.embeddings.\1"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # sic
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
_TRANSPOSED = ("text_projection", "visual.proj")

# What transformers assumes where config.json is silent (CLIPTextConfig, CLIPVisionConfig).
_SHARED_DEFAULTS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": LAYER_NORM_EPSILON}
_TEXT_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
_VISION_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
_LEGACY_EOS = 2  # transformers then takes the largest id, as OpenAI does


def naming(name: str) -> Source:
    """transformers keeps query, key and value apart, and the two final projections as Linear layers."""
    key = name
    for pattern, replacement in _RENAMING:
        key = re.sub(pattern, replacement, key)
    return Source(key, transposed=name in _TRANSPOSED)


def is_folder(path: Path) -> bool:
    """Whether `path` looks like a model folder of transformers."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in WEIGHT_FILES)


def read(folder: Path) -> tuple[CLIPConfig, Any]:
    """The model in a folder: (config, variables as float32 NumPy arrays).

    Raises:
      UserError: unreadable files, an architecture that is not this one, or tensors that do not fit.
    """
    config = config_from_json(read_json(folder / "config.json"), f"{folder}/config.json")
    if (folder / "preprocessor_config.json").is_file():
        config = _with_preprocessing(config, folder / "preprocessor_config.json")
    return config, mapping.to_variables(tensors(folder), mapping.leaves(config), naming, str(folder))


def _with_preprocessing(config: CLIPConfig, path: Path) -> CLIPConfig:
    values = read_json(path)
    try:
        return dataclasses.replace(config, **{k: tuple(values[k]) for k in ("image_mean", "image_std") if k in values})
    except (UserError, TypeError) as error:
        raise UserError(f"{path} is no preprocessing of CLIP's: {error}") from error


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of the folder's file, or of all files that its index names."""
    path = next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())
    shards = tensor_file.shards(path) if path.suffix == ".json" else [path.name]
    tensors = {k: v for shard in shards for k, v in tensor_file.read(folder / shard).tensors.items()}
    return {k: v for k, v in tensors.items() if not k.endswith(".position_ids")}


def config_from_json(values: Mapping[str, Any], origin: str) -> CLIPConfig:
    """CLIPConfig from the contents of a config.json.

    Raises:
      UserError: it describes another model, or one that this architecture cannot express; `origin` names the file.
    """
    try:
        return _config(values, origin)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{origin} is no configuration of CLIPModel ({type(error).__name__}: {error})") from error


def _config(values: Mapping[str, Any], origin: str) -> CLIPConfig:
    _check_only("model_type", values.get("model_type"), ("clip",), origin)
    # Files of transformers before 4.30 keep what was changed from the defaults in `..._config_dict`.
    text = values.get("text_config_dict") or values.get("text_config") or {}
    vision = _VISION_DEFAULTS | (values.get("vision_config_dict") or values.get("vision_config") or {})
    text_config, activation = text_from_json(text, origin)
    _check_only("vision layer_norm_eps", vision["layer_norm_eps"], (LAYER_NORM_EPSILON,), origin)
    _check_only("vision hidden_act", vision["hidden_act"], (activation,), origin)
    _check_only("num_channels", vision["num_channels"], (3,), origin)
    return CLIPConfig(
        embed_dim=values.get("projection_dim", 512),
        vision=VisionTransformerConfig(
            image_resolution=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_width=vision["intermediate_size"],
        ),
        text=text_config,
        activation=activation,
    )


def text_from_json(values: Mapping[str, Any], origin: str) -> tuple[TextConfig, str]:
    """(text tower, activation) from the settings of a CLIPTextConfig.

    Raises:
      UserError: this architecture cannot express it; `origin` names the file.
    """
    text = _TEXT_DEFAULTS | values
    _check_only("text layer_norm_eps", text["layer_norm_eps"], (LAYER_NORM_EPSILON,), origin)
    _check_only("text hidden_act", text["hidden_act"], ACTIVATIONS, origin)
    # transformers pools at the first `eos_token_id`, we at the largest id: the same if that ends the vocabulary.
    _check_only("text eos_token_id", text["eos_token_id"], (_LEGACY_EOS, text["vocab_size"] - 1), origin)
    config = TextConfig(
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        mlp_width=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
    )
    return config, text["hidden_act"]


def _check_only(what: str, found: Any, allowed: tuple, origin: str) -> None:
    if found not in allowed:
        raise UserError(f"{origin}: {what} is {found!r}, this architecture has {' or '.join(map(repr, allowed))}")


def write(folder: Path, config: CLIPConfig, variables: Any) -> None:
    """Write a folder that `transformers.CLIPModel.from_pretrained` loads, in float32.

    Raises:
      UserError: transformers' CLIP cannot express the model (ResNet, logit bias), or `folder` exists.
    """
    values = config_to_json(config)
    with appears_whole(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / "config.json", values)
        write_json(temporary / "preprocessor_config.json", _preprocessor_to_json(config))
        tensor_file.write_safetensors(
            temporary / WEIGHT_FILES[0], mapping.to_tensors(variables, mapping.leaves(config), naming)
        )


def config_to_json(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `config_from_json`.

    Raises:
      UserError: the image tower is a ResNet, or the logits have a bias.
    """
    vision, text = config.vision, config.text
    if config.logit_bias:
        raise UserError("transformers.CLIPModel has no logit_bias; write this model as open_clip")
    if isinstance(vision, ResNetConfig):
        raise UserError("transformers.CLIPModel has no ResNet image tower; write this model as openai or open_clip")
    shared = {
        "hidden_act": config.activation,
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "projection_dim": config.embed_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "text_config": shared
        | {
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
        },
        "vision_config": shared
        | {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_attention_heads": vision.heads,
            "num_hidden_layers": vision.layers,
            "image_size": vision.image_resolution,
            "patch_size": vision.patch_size,
            "num_channels": 3,
        },
    }


def _preprocessor_to_json(config: CLIPConfig) -> dict[str, Any]:
    resolution = config.vision.image_resolution
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resolution},
        "resample": 3,  # PIL's BICUBIC
        "do_center_crop": True,
        "crop_size": {"height": resolution, "width": resolution},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
