"""Zero-shot retrieval: of images by their captions, and of captions by their images (paper, table 13)."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from clip_jax.data.damage import NO_CAPTION, Damaged
from clip_jax.data.example import Example, Source, where
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.examples import encode_examples
from clip_jax.evaluation.metrics import check_finite
from clip_jax.evaluation.ranks import retrieval_metrics


@dataclass(frozen=True)
class RetrievalResult:
    """Features of all images and captions of an evaluation set.

    Attributes:
      dataset: what was retrieved from.
      image_features: unit vectors.
      text_features: unit vectors.
      image_of_text: the number of the image that each caption describes.
    """

    dataset: EvaluationSet
    image_features: Float[np.ndarray, "images embed_dim"]
    text_features: Float[np.ndarray, "texts embed_dim"]
    image_of_text: Int[np.ndarray, "texts"]
    task: ClassVar[str] = "zeroshot_retrieval"  # as CLIP_benchmark calls it

    def __post_init__(self):
        check_finite(self.image_features, f"{self.dataset.name}, features of images")
        check_finite(self.text_features, f"{self.dataset.name}, features of captions")

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """Recall at 1, 5 and 10 and the median rank, both ways."""
        return retrieval_metrics(self.image_features, self.text_features, self.image_of_text)


def zero_shot_retrieval(
    encoders: Encoders, variables: Variables, dataset: EvaluationSet, progress: bool = True
) -> RetrievalResult:
    """Encode every image and every caption of `dataset`.

    Args:
      encoders: of the model.
      variables: its weights.
      dataset: images with one caption or several each; captions that are too long are truncated, as in training.
      progress: show bars.

    Raises:
      UserError: an image that cannot be read or has no caption, features that are not finite.
    """
    bar = f"{dataset.name}, images" if progress else ""
    captioned = _Captioned(dataset.source)
    images = encode_examples(encoders.encode_images, variables, captioned, encoders.preprocess, bar)
    texts = [text for own in images.captions for text in own]
    tokens = encoders.tokenizer(texts, truncate=True)
    text_features = encoders.encode_tokens(variables, tokens, f"{dataset.name}, captions" if progress else "")
    counts = [len(own) for own in images.captions]
    return RetrievalResult(dataset, images.features, text_features, np.repeat(np.arange(len(counts)), counts))


class _Captioned:
    """A source whose examples must have captions."""

    def __init__(self, source: Source):
        self._source, self.name = source, source.name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        if not example.captions:
            raise Damaged("caption", NO_CAPTION)
        return example

    def where(self, index: int) -> str:
        return where(self._source, index)
