"""Weights of CLIP in and out: OpenAI's files, open_clip's, transformers' and our own; PyTorch is never needed."""

from clip_jax.weights.download import available_models
from clip_jax.weights.formats import WRITERS, architecture, head_classes, load_variables, save
from clip_jax.weights.huggingface_text import load_text

__all__ = ["WRITERS", "architecture", "available_models", "head_classes", "load_text", "load_variables", "save"]
