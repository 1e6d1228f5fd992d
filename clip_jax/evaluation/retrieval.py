"""Zero-shot retrieval: of images by their captions, and of captions by their images (paper, table 13)."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from clip_jax.data.damage import NO_CAPTION, Damaged
from clip_jax.data.example import where
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.metrics import check_finite
from clip_jax.evaluation.ranks import retrieval_metrics
from clip_jax.evaluation.zero_shot import BATCH_SIZE, Encoders, Variables


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
    image_features, captions = _encode_images(encoders, variables, dataset, progress)
    texts = [text for own in captions for text in own]
    text_features = _encode_texts(encoders, variables, dataset, texts, progress)
    counts = [len(own) for own in captions]
    return RetrievalResult(dataset, image_features, text_features, np.repeat(np.arange(len(counts)), counts))


def _encode_images(
    encoders: Encoders, variables: Variables, dataset: EvaluationSet, progress: bool
) -> tuple[Float[np.ndarray, "images embed_dim"], list[tuple[str, ...]]]:
    """The features of all images, and their captions."""
    features, captions = [], []
    batches = evaluation_batches(dataset.source, BATCH_SIZE, encoders.preprocess)
    total = math.ceil(len(dataset.source) / BATCH_SIZE)
    for batch in tqdm(batches, desc=f"{dataset.name}, images", total=total, unit="batch", disable=not progress):
        for own in batch["captions"][batch["mask"]]:
            if not own:
                raise Damaged("caption", f"{where(dataset.source, len(captions))}: {NO_CAPTION}")
            captions.append(own)
        features.append(encoders.encode_images(variables, batch["image"])[batch["mask"]])
    return np.concatenate(features), captions


def _encode_texts(
    encoders: Encoders, variables: Variables, dataset: EvaluationSet, texts: Sequence[str], progress: bool
) -> Float[np.ndarray, "texts embed_dim"]:
    """The features of all captions."""
    starts = range(0, len(texts), BATCH_SIZE)
    return np.concatenate(
        [
            encoders.encode_tokens(variables, encoders.tokenizer(texts[start : start + BATCH_SIZE], truncate=True))
            for start in tqdm(starts, desc=f"{dataset.name}, captions", unit="batch", disable=not progress)
        ]
    )
