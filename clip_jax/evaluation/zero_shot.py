"""Zero-shot classification: a classifier made of class names (paper section 3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from clip_jax.data.pipeline import evaluation_batches
from clip_jax.data.sources import EvaluationSet
from clip_jax.evaluation.metrics import classification_metrics
from clip_jax.evaluation.prompts import fill, templates_for
from clip_jax.models import CLIP, normalize
from clip_jax.parallel import Partitioner
from clip_jax.processing import tokenize
from clip_jax.processing.images import Preprocess

BATCH_SIZE = 256


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores of every image of an evaluation set.

    Attributes:
      dataset: what was classified.
      templates: the prompts around its class names.
      scores: cosine similarities of images and classes.
      labels: the true classes.
    """

    dataset: EvaluationSet
    templates: tuple[str, ...]
    scores: Float[np.ndarray, "n classes"]
    labels: Int[np.ndarray, "n"]

    @property
    def metrics(self) -> dict[str, float]:
        """Top-1, top-5 and mean per-class recall."""
        return classification_metrics(self.scores, self.labels)


@dataclass(frozen=True)
class Encoders:
    """A model's two encoders, jitted over a mesh; features come back normalised, as NumPy float32, on every host.

    Batches are filled up to one size, so that each encoder is compiled once.
    """

    model: CLIP
    partitioner: Partitioner
    _jitted: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def preprocess(self) -> Preprocess:
        """The model's image preprocessing."""
        config = self.model.config
        return Preprocess(config.vision.image_resolution, config.image_mean, config.image_std)

    def images(self, variables: Mapping[str, Any], images: np.ndarray) -> Float[np.ndarray, "n embed_dim"]:
        """Features of uint8 images (n, R, R, 3)."""
        return self._run("images", self._encode_images, variables, images)

    def texts(self, variables: Mapping[str, Any], texts: Sequence[str]) -> Float[np.ndarray, "n embed_dim"]:
        """Features of texts.

        Raises:
          UserError: a text is longer than the model's context.
        """
        tokens = tokenize(list(texts), self.model.config.text.context_length)
        return self._run("texts", self._encode_texts, variables, tokens)

    def _encode_images(self, variables: Any, images: Array) -> Array:
        pixels = self.preprocess.normalize(images, self.model.execution.wide_dtype)
        return normalize(self.model.apply(variables, pixels, method=self.model.encode_image))

    def _encode_texts(self, variables: Any, tokens: Array) -> Array:
        return normalize(self.model.apply(variables, tokens, method=self.model.encode_text))

    def _run(self, name: str, encode: Any, variables: Any, inputs: np.ndarray) -> np.ndarray:
        if name not in self._jitted:
            self._jitted[name] = self.partitioner.jit(encode, out_shardings=self.partitioner.replicated)
        shards = self.partitioner.batch_shards
        size = -(-BATCH_SIZE // shards) * shards
        features = []
        for start in range(0, len(inputs), size):
            piece = inputs[start : start + size]
            padded = np.zeros((size, *inputs.shape[1:]), inputs.dtype)
            padded[: len(piece)] = piece
            batch = jax.make_array_from_callback(padded.shape, self.partitioner.batch_sharding, partial(_rows, padded))
            features.append(np.asarray(self._jitted[name](variables, batch))[: len(piece)])
        return np.concatenate(features)


def _rows(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return array[index]


def zero_shot_classifier(
    encoders: Encoders, variables: Mapping[str, Any], class_names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "classes embed_dim"]:
    """One unit vector a class: embed every prompt, normalise, average over the prompts, normalise again."""
    prompts = [prompt for name in class_names for prompt in fill(templates, name)]
    features = encoders.texts(variables, prompts).reshape(len(class_names), len(templates), -1)
    return np.asarray(normalize(jnp.asarray(features.mean(axis=1))))


def zero_shot(
    encoders: Encoders, variables: Mapping[str, Any], dataset: EvaluationSet, progress: bool = True
) -> ZeroShotResult:
    """Classify every image of `dataset` among its classes.

    Args:
      encoders: of the model.
      variables: its weights.
      dataset: labelled images and class names.
      progress: show a bar.
    """
    templates = templates_for(dataset.name)
    classifier = zero_shot_classifier(encoders, variables, dataset.class_names, templates)
    scores, labels = [], []
    batches = evaluation_batches(dataset.source, BATCH_SIZE, encoders.preprocess)
    total = -(-len(dataset.source) // BATCH_SIZE)
    for batch in tqdm(batches, desc=dataset.name, total=total, unit="batch", disable=not progress):
        scores.append((encoders.images(variables, batch["image"]) @ classifier.T)[batch["mask"]])
        labels.append(batch["label"][batch["mask"]])
    return ZeroShotResult(dataset, templates, np.concatenate(scores), np.concatenate(labels))
