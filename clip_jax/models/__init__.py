"""The towers, and CLIP made of them; Flax Linen modules without state of their own."""

from clip_jax.models.clip import CLIP, abstract_inputs, class_logits, normalize, parameter_count, variable_shapes
from clip_jax.models.config import (
    OPENAI_MODELS,
    CLIPConfig,
    Execution,
    ResNetConfig,
    TextConfig,
    VisionTransformerConfig,
)

__all__ = [
    "CLIP",
    "OPENAI_MODELS",
    "CLIPConfig",
    "Execution",
    "ResNetConfig",
    "TextConfig",
    "VisionTransformerConfig",
    "abstract_inputs",
    "class_logits",
    "normalize",
    "parameter_count",
    "variable_shapes",
]
