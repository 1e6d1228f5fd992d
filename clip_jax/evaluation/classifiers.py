"""Zero-shot classifiers that are kept on disk: ImageNet's takes 80,000 texts.

  CACHE/classifiers/MODEL/PROMPTS.npz    a unit vector for each class

MODEL is a digest of the weights and of what the model is (see `kept.py`); PROMPTS is one of the tokens of all prompts,
class by class: of class names, templates and tokenizer, whatever the data set is called.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.kept import Arrays, kept, model_digest, sha256
from clip_jax.evaluation.zero_shot import prompt_tokens, zero_shot, zero_shot_classifier


def kept_classifier(
    encoders: Encoders, variables: Variables, class_names: Sequence[str], templates: Sequence[str], bar: str = ""
) -> Float[np.ndarray, "classes embed_dim"]:
    """What `zero_shot_classifier` makes, from the cache if it has it. Training, whose weights change, does not use it.

    Raises:
      UserError: a prompt is longer than the model's context.
    """
    tokens = np.ascontiguousarray(prompt_tokens(encoders, class_names, templates))
    shape = (len(class_names), encoders.model.config.embed_dim)
    prompts = sha256(f"{tokens.dtype} {tokens.shape} {shape}".encode() + tokens.tobytes())

    def fits(arrays: Arrays) -> bool:
        return arrays["values"].shape == shape and bool(np.isfinite(arrays["values"]).all())

    def compute() -> Arrays:
        return {"values": zero_shot_classifier(encoders, variables, class_names, templates, bar)}

    return kept(f"classifiers/{model_digest(encoders, variables)}/{prompts}", fits, compute)["values"]


kept_zero_shot = functools.partial(zero_shot, make_classifier=kept_classifier)
