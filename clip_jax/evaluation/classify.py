"""Which of some labels fits an image: the example of the reference repository's README, for any labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from clip_jax.data.example import Example
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.examples import encode_examples
from clip_jax.evaluation.metrics import check_finite
from clip_jax.processing.images import open_image


@dataclass(frozen=True)
class Classification:
    """How well labels fit images.

    Attributes:
      images: their paths.
      labels: texts.
      probabilities: of each label for each image. Of a model with a softmax loss they sum to 1 over the labels; of one
        with a sigmoid loss each label has its own.
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    probabilities: Float[np.ndarray, "images labels"]

    def best(self, image: int, count: int = 5) -> list[tuple[str, float]]:
        """The most probable labels of an image, with their probabilities."""
        order = np.argsort(-self.probabilities[image], kind="stable")[:count]
        return [(self.labels[label], float(self.probabilities[image, label])) for label in order]


def classify(
    encoders: Encoders, variables: Variables, images: Sequence[str], labels: Sequence[str], progress: bool = True
) -> Classification:
    """Compare images with labels.

    Args:
      encoders: of the model.
      variables: its weights.
      images: paths.
      labels: texts, taken as they are.
      progress: show a bar.

    Raises:
      UserError: an image cannot be read, a label is too long, or features are not finite.
    """
    text_features = encoders.encode_tokens(variables, encoders.tokenizer(list(labels)))
    bar = "images" if progress else ""
    encoded = encode_examples(encoders.encode_images, variables, _Files(images), encoders.preprocess, bar)
    params = variables["params"]
    logits = np.exp(np.float64(params["logit_scale"])) * (encoded.features.astype(np.float64) @ text_features.T)
    check_finite(logits, "logits")
    if encoders.model.config.logit_bias:
        probabilities = 1 / (1 + np.exp(-(logits + np.float64(params["logit_bias"]))))
    else:
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
    return Classification(tuple(images), tuple(labels), probabilities)


class _Files:
    """Images in files, as a source."""

    name = "--images"

    def __init__(self, paths: Sequence[str]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        return Example(open_image(self._paths[index]))


def check_labels(labels: Sequence[str]) -> None:
    """Refuse labels that cannot be told apart.

    Raises:
      UserError: there are fewer than two, or one comes twice.
    """
    if len(labels) < 2:
        raise UserError(f"expected at least two labels, as in --labels 'a cup,not a cup'; got {list(labels)}")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"the label {twice!r} comes twice; name each once")
