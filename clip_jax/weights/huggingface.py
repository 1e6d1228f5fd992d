"""Folders of Hugging Face's `transformers.CLIPModel`: config.json and model.safetensors (or pytorch_model.bin)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig
from clip_jax.models.config import ACTIVATIONS
from clip_jax.models.transformer import LAYER_NORM_EPSILON
from clip_jax.processing import END_OF_TEXT, VOCAB_SIZE
from clip_jax.weights import fields, huggingface_processing, mapping, tensor_file
from clip_jax.weights.files import appears_whole, read_json, write_json
from clip_jax.weights.huggingface_processing import check_only
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

# Our field -> transformers' name, and what transformers takes where it is missing (CLIPTextConfig, CLIPVisionConfig).
_TEXT = {
    "width": ("hidden_size", 512),
    "heads": ("num_attention_heads", 8),
    "mlp_width": ("intermediate_size", 2048),
    "layers": ("num_hidden_layers", 12),
    "context_length": ("max_position_embeddings", 77),
    "vocab_size": ("vocab_size", 49408),
}
_VISION = {
    "image_resolution": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
    "layers": ("num_hidden_layers", 12),
}
TEXT_MODEL_TYPE = "clip_text_model"
VISION_MODEL_TYPE = "clip_vision_model"
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
      UserError: unreadable files, an architecture or image processing that is not ours, or tensors that do not fit.
    """
    config = config_from_json(read_json(folder / "config.json"), f"{folder}/config.json")
    config = huggingface_processing.read(folder, config)
    return config, mapping.to_variables(tensors(folder), mapping.leaves(config), naming, str(folder))


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
    kind = values.get("model_type")
    if kind in (TEXT_MODEL_TYPE, VISION_MODEL_TYPE):
        use = "; clip_jax.weights.load_text reads it" if kind == TEXT_MODEL_TYPE else ""
        raise UserError(f"{origin}: one tower of a CLIP model alone ({kind}){use}")
    check_only("model_type", kind, ("clip",), origin)
    # Files of transformers before 4.30 keep what was changed from the defaults in `..._config_dict`.
    text = values.get("text_config_dict") or values.get("text_config") or {}
    vision = values.get("vision_config_dict") or values.get("vision_config") or {}
    text_config, activation = text_from_json(text, origin)
    check_only("vision layer_norm_eps", vision.get("layer_norm_eps", LAYER_NORM_EPSILON), (LAYER_NORM_EPSILON,), origin)
    check_only("vision hidden_act", vision.get("hidden_act", "quick_gelu"), (activation,), origin)
    check_only("num_channels", vision.get("num_channels", 3), (3,), origin)
    return CLIPConfig(
        embed_dim=values.get("projection_dim", 512),
        vision=VisionTransformerConfig(**fields.from_json(_VISION, vision)),
        text=text_config,
        activation=activation,
    )


def text_from_json(values: Mapping[str, Any], origin: str) -> tuple[TextConfig, str]:
    """(text tower, activation) from the settings of a CLIPTextConfig.

    Raises:
      UserError: this architecture cannot express it; `origin` names the file.
    """
    text, activation = TextConfig(**fields.from_json(_TEXT, values)), values.get("hidden_act", "quick_gelu")
    check_only("text layer_norm_eps", values.get("layer_norm_eps", LAYER_NORM_EPSILON), (LAYER_NORM_EPSILON,), origin)
    check_only("text hidden_act", activation, ACTIVATIONS, origin)
    # transformers pools at the first `eos_token_id`, we at the largest id: the same if that ends the vocabulary.
    check_only("text eos_token_id", values.get("eos_token_id", END_OF_TEXT), (_LEGACY_EOS, text.vocab_size - 1), origin)
    return text, activation


def write(folder: Path, config: CLIPConfig, variables: Any) -> None:
    """Write a folder that `CLIPModel` and `pipeline` of transformers open, in float32, with processor and tokenizer.

    Raises:
      UserError: transformers' CLIP cannot express the model (ResNet, logit bias, ...), or `folder` exists.
    """
    values = config_to_json(config)
    with appears_whole(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / "config.json", values)
        huggingface_processing.write(temporary, config)
        named = mapping.to_tensors(variables, mapping.leaves(config), naming)
        tensor_file.write_safetensors(temporary / WEIGHT_FILES[0], named)


def config_to_json(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `config_from_json`.

    Raises:
      UserError: the image tower is a ResNet, the logits have a bias, texts keep their case, or ids come after OpenAI's.
    """
    text = config.text
    if config.logit_bias:
        raise UserError("transformers.CLIPModel has no logit_bias; write this model as open_clip")
    if isinstance(config.vision, ResNetConfig):
        raise UserError("transformers.CLIPModel has no ResNet image tower; write this model as openai or open_clip")
    if not text.lowercase:
        raise UserError("transformers' CLIPTokenizer lower-cases every text; write this model as open_clip")
    if text.tokenizer != "openai":
        raise UserError(f"transformers would take OpenAI's tokenizer for {text.tokenizer!r}; write this model as jax")
    if text.vocab_size > VOCAB_SIZE:
        raise UserError(f"transformers' CLIPModel takes id {text.vocab_size - 1} for end of text, not {END_OF_TEXT}")
    shared = {
        "hidden_act": config.activation,
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "projection_dim": config.embed_dim,
    }
    special = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "text_config": {"model_type": TEXT_MODEL_TYPE} | fields.to_json(_TEXT, text) | special | shared,
        "vision_config": {"model_type": VISION_MODEL_TYPE, "num_channels": 3}
        | fields.to_json(_VISION, config.vision)
        | shared,
    }
