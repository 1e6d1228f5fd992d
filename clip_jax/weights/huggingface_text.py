"""The text tower alone, from folders of transformers: what diffusion code took from `FlaxCLIPTextModel`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax.errors import UserError
from clip_jax.models import Execution
from clip_jax.models.text import TextTransformer
from clip_jax.weights import huggingface, mapping
from clip_jax.weights.files import read_json

_TEXT_NAMES = ("text_model.", "text_projection.")


def load_text(folder: str | Path, *, dtype: str = "float32") -> tuple[TextTransformer, Any]:
    """The text tower of a `CLIPModel`, `CLIPTextModel` or `CLIPTextModelWithProjection` folder: (model, variables).

      model, variables = load_text("stable-diffusion/text_encoder")
      output = model.apply(variables, tokens, method="outputs")
      output.hidden_states, output.last_hidden_state, output.pooled_output

    A folder of `CLIPTextModel` has no projection: then `text_features` equals `pooled_output`.

    Args:
      folder: holds config.json and the weights.
      dtype: what the model computes in, "float32" or "bfloat16"; its parameters are float32.

    Raises:
      UserError: unreadable files, an architecture that is not this one, or tensors that do not fit.
    """
    folder = Path(folder)
    if not huggingface.is_folder(folder):
        raise UserError(
            f"{folder} is no folder of transformers: expected config.json and {huggingface.WEIGHT_FILES[0]}"
        )
    config, activation = _config(folder)
    tensors = {k: v for k, v in huggingface.tensors(folder).items() if k.startswith(_TEXT_NAMES)}
    projection = tensors.setdefault("text_projection.weight", np.eye(config.width, dtype=np.float32))
    model = TextTransformer(config, projection.shape[0], activation, Execution(dtype=dtype))
    variables = mapping.to_variables(tensors, mapping.text_leaves(model), huggingface.naming, str(folder))
    return model, {"params": jax.tree.map(jax.numpy.asarray, variables["params"]["text"])}


def _config(folder: Path) -> tuple[Any, str]:
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") == huggingface.TEXT_MODEL_TYPE:
        try:
            return huggingface.text_from_json(values, str(path))
        except TypeError as error:
            raise UserError(f"{path} is no configuration of CLIPTextModel ({error})") from error
    whole = huggingface.config_from_json(values, str(path))
    return whole.text, whole.activation
