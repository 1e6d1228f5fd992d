"""CLIP in JAX and Flax: OpenAI's models, their weights, and the training of new ones."""

from pathlib import Path
from typing import Any

from clip_jax.models import CLIP, CLIPConfig, Execution
from clip_jax.processing import Preprocess, make_tokenizer, tokenize
from clip_jax.weights import available_models

__all__ = ["CLIP", "CLIPConfig", "Preprocess", "available_models", "load", "make_tokenizer", "tokenize"]


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    download_root: str | Path | None = None,
    activation: str | None = None,
    model_config: str | Path | None = None,
) -> tuple[CLIP, Any, Preprocess]:
    """A trained model: (model, variables, preprocess).

      model, variables, preprocess = clip_jax.load("ViT-B/32")
      logits_per_image, logits_per_text = model.apply(variables, preprocess(image)[None], clip_jax.tokenize(["a dog"]))

    `tokenize` is right for OpenAI's models and all that share their tokenizer and its 77 tokens;
    `make_tokenizer(model.config.text)` is the one that any model's description names.

    Args:
      name_or_path: one of `available_models()`, which is downloaded; a `.pt`, `.bin` or `.safetensors` file; a folder
        of transformers or of open_clip; a name on the Hugging Face hub, "ORG/NAME" or "hf-hub:ORG/NAME"; a model
        folder; or a training workdir (its newest step), `WORKDIR@best`, or one step's folder, each with `@ema` after it
        for the moving average of the weights.
      dtype: what the model computes in, "float32" or "bfloat16"; its parameters are float32.
      download_root: where official files are kept, instead of $CLIP_JAX_CACHE or ~/.cache/clip_jax.
      activation: "quick_gelu" or "gelu", for a bare file of weights that does not say which.
      model_config: one of open_clip's `model_configs/NAME.json`, for a bare file that does not show what the model is.

    Returns:
      The module, its variables on the default device, and the function from a PIL image to its input.

    Raises:
      UserError: there is no such model, its file is damaged, or it is not a CLIP of this architecture.
    """
    import jax

    from clip_jax.weights import load_variables

    config, variables = load_variables(
        name_or_path, download_root=download_root, activation=activation, model_config=model_config
    )
    model = CLIP(config, Execution(dtype=dtype))
    return model, jax.tree.map(jax.numpy.asarray, variables), Preprocess.from_config(config)
