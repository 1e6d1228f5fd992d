"""Zero-shot classification: a classifier made of class names (paper section 3.1)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num
from tqdm import tqdm

from clip_jax.data.pipeline import evaluation_batches
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.metrics import check_scores, classification_metrics
from clip_jax.models import CLIP, normalize
from clip_jax.parallel import Partitioner
from clip_jax.processing import Preprocess, Tokenizer, make_tokenizer

BATCH_SIZE = 256  # over all devices
Variables = Mapping[str, Any]
Encode = Callable[[Variables, Num[np.ndarray, "n ..."]], Float[np.ndarray, "n embed_dim"]]


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores of every image of an evaluation set.

    Attributes:
      dataset: what was classified.
      scores: cosine similarities of images and classes.
      labels: the true classes.
    """

    dataset: EvaluationSet
    scores: Float[np.ndarray, "n classes"]
    labels: Int[np.ndarray, "n"]
    task: ClassVar[str] = "zeroshot_classification"  # as CLIP_benchmark calls it

    def __post_init__(self):
        check_scores(self.scores, self.labels, self.dataset.name)

    @property
    def metrics(self) -> dict[str, float]:
        """Top-1, top-5, mean per-class recall, and the data set's own metric."""
        return classification_metrics(self.scores, self.labels, self.dataset.metric)


@dataclass(frozen=True)
class Encoders:
    """A model's two towers over a mesh: arrays in, unit vectors out as NumPy float32 on every host.

    Attributes:
      preprocess: the model's image preprocessing.
      tokenizer: of the model.
      encode_images: (variables, uint8 images (n, R, R, 3)) -> features.
      encode_tokens: (variables, int32 tokens (n, context_length)) -> features.
    """

    preprocess: Preprocess
    tokenizer: Tokenizer
    encode_images: Encode
    encode_tokens: Encode


def make_encoders(model: CLIP, partitioner: Partitioner) -> Encoders:
    """The encoders of a model, each compiled once."""
    config = model.config
    preprocess = Preprocess.from_config(config)

    def encode_images(variables: Variables, images: Array) -> Array:
        pixels = preprocess.normalize(images, model.execution.wide_dtype)
        return normalize(model.apply(variables, pixels, method=model.encode_image))

    def encode_tokens(variables: Variables, tokens: Array) -> Array:
        return normalize(model.apply(variables, tokens, method=model.encode_text))

    return Encoders(
        preprocess,
        make_tokenizer(config.text),
        _in_batches(encode_images, partitioner),
        _in_batches(encode_tokens, partitioner),
    )


def _in_batches(encode: Callable[[Variables, Array], Array], partitioner: Partitioner) -> Encode:
    """`encode`, jitted, for any number of rows: they are cut into batches, the last one filled up with zeros."""
    jitted = partitioner.jit(encode, out_shardings=partitioner.replicated)
    size = math.ceil(BATCH_SIZE / partitioner.batch_shards) * partitioner.batch_shards

    def run(variables: Variables, rows: np.ndarray) -> np.ndarray:
        features = []
        for start in range(0, len(rows), size):
            batch = np.zeros((size, *rows.shape[1:]), rows.dtype)
            filled = len(rows[start : start + size])
            batch[:filled] = rows[start : start + size]
            on_devices = jax.make_array_from_callback(batch.shape, partitioner.batch_sharding, batch.__getitem__)
            features.append(np.asarray(jitted(variables, on_devices))[:filled])
        return np.concatenate(features)

    return run


def zero_shot_classifier(
    encoders: Encoders, variables: Variables, class_names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "classes embed_dim"]:
    """One unit vector per class: embed every prompt, normalise, average over the prompts, normalise again.

    Raises:
      UserError: a prompt is longer than the model's context.
    """
    prompts = [template.format(name) for name in class_names for template in templates]
    features = encoders.encode_tokens(variables, encoders.tokenizer(prompts))
    means = features.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return np.asarray(normalize(jnp.asarray(means)))


def zero_shot(
    encoders: Encoders, variables: Variables, dataset: EvaluationSet, progress: bool = True
) -> ZeroShotResult:
    """Classify every image of `dataset` among its classes.

    Args:
      encoders: of the model.
      variables: its weights.
      dataset: labelled images, class names and templates.
      progress: show a bar.

    Raises:
      UserError: a prompt that does not fit, an image that cannot be read, a missing label, scores that are not finite.
    """
    classifier = zero_shot_classifier(encoders, variables, dataset.class_names, dataset.templates)
    scores, labels = [], []
    batches = evaluation_batches(dataset.source, BATCH_SIZE, encoders.preprocess)
    total = math.ceil(len(dataset.source) / BATCH_SIZE)
    for batch in tqdm(batches, desc=dataset.name, total=total, unit="batch", disable=not progress):
        scores.append((encoders.encode_images(variables, batch["image"]) @ classifier.T)[batch["mask"]])
        labels.append(batch["label"][batch["mask"]])
    return ZeroShotResult(dataset, np.concatenate(scores), np.concatenate(labels))
