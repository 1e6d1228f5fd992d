"""Zero-shot classification: a classifier made of class names (paper section 3.1)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num
from tqdm import tqdm

from clip_jax.data.pipeline import evaluation_batches
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import SEVERAL_CLASSES, EvaluationSet
from clip_jax.evaluation.metrics import check_finite, check_scores, classification_metrics
from clip_jax.evaluation.prompts import prompt
from clip_jax.models import CLIP, normalize
from clip_jax.parallel import Partitioner
from clip_jax.precision import at_least_float32
from clip_jax.processing import Preprocess, Tokenizer, make_tokenizer

BATCH_SIZE = 256  # over all devices
MOST_PROMPTS = 2**19  # class names times templates; ImageNet has 80,000
Variables = Mapping[str, Any]
Encode = Callable[[Variables, Num[np.ndarray, "n ..."]], Float[np.ndarray, "n embed_dim"]]


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores of every image of an evaluation set.

    Attributes:
      dataset: what was classified.
      scores: cosine similarities of images and classes; probabilities where an image can belong to several classes.
      labels: the true classes; or, of every class, whether an image belongs to it.
    """

    dataset: EvaluationSet
    scores: Float[np.ndarray, "n classes"]
    labels: Int[np.ndarray, "n"] | Bool[np.ndarray, "n classes"]
    task: ClassVar[str] = "zeroshot_classification"  # as CLIP_benchmark calls it

    def __post_init__(self):
        if self.labels.ndim == 1:
            check_scores(self.scores, self.labels, self.dataset.name)
        else:
            check_finite(self.scores, self.dataset.name)

    @property
    def metrics(self) -> dict[str, float]:
        """Top-1, top-5, mean per-class recall, and the data set's own metric."""
        return classification_metrics(self.scores, self.labels, self.dataset.metric)


@dataclass(frozen=True)
class Encoders:
    """A model's two towers over a mesh: arrays in, features out as NumPy float32 on every host.

    Attributes:
      model: whose.
      partitioner: of the mesh.
      preprocess: the model's image preprocessing.
      tokenizer: of the model.
      encode_images: (variables, uint8 images (n, R, R, 3)) -> unit vectors.
      encode_tokens: (variables, int32 tokens (n, context_length)) -> unit vectors.
      probe_features: (variables, uint8 images (n, R, R, 3)) -> what a linear probe sees.
    """

    model: CLIP
    partitioner: Partitioner
    preprocess: Preprocess
    tokenizer: Tokenizer
    encode_images: Encode
    encode_tokens: Encode
    probe_features: Encode


def make_encoders(model: CLIP, partitioner: Partitioner) -> Encoders:
    """The encoders of a model, each compiled once."""
    config = model.config
    preprocess = Preprocess.from_config(config)

    def encode_images(variables: Variables, images: Array) -> Array:
        pixels = preprocess.normalize(images, model.execution.wide_dtype)
        return normalize(model.apply(variables, pixels, method=model.encode_image))

    def encode_tokens(variables: Variables, tokens: Array) -> Array:
        return normalize(model.apply(variables, tokens, method=model.encode_text))

    def probe_features(variables: Variables, images: Array) -> Array:
        pixels = preprocess.normalize(images, model.execution.wide_dtype)
        return at_least_float32(model.apply(variables, pixels, method=model.probe_features))

    return Encoders(
        model,
        partitioner,
        preprocess,
        make_tokenizer(config.text),
        _in_batches(encode_images, partitioner),
        _in_batches(encode_tokens, partitioner),
        _in_batches(probe_features, partitioner),
    )


def _in_batches(encode: Callable[[Variables, Array], Array], partitioner: Partitioner) -> Encode:
    """`encode`, jitted, for any number of rows: they are cut into batches, the last one filled up with zeros."""
    jitted = partitioner.jit(encode, out_shardings=partitioner.replicated)
    shards = partitioner.batch_shards

    def run(variables: Variables, rows: np.ndarray) -> np.ndarray:
        features = []
        wanted = min(BATCH_SIZE, 2 ** (len(rows) - 1).bit_length())  # few rows fill a smaller batch, of few sizes
        size = math.ceil(wanted / shards) * shards
        for start in range(0, len(rows), size):
            batch = np.zeros((size, *rows.shape[1:]), rows.dtype)
            filled = len(rows[start : start + size])
            batch[:filled] = rows[start : start + size]
            on_devices = jax.make_array_from_callback(batch.shape, partitioner.batch_sharding, batch.__getitem__)
            features.append(np.asarray(jitted(variables, on_devices))[:filled])
        return np.concatenate(features)

    return run


def prompt_tokens(
    encoders: Encoders, class_names: Sequence[str], templates: Sequence[str]
) -> Int[np.ndarray, "prompts context_length"]:
    """The tokens of every template with every class name, class by class.

    Raises:
      UserError: a prompt is longer than the model's context.
    """
    return _prompt_tokens(encoders.tokenizer, tuple(class_names), tuple(templates))


@functools.lru_cache(maxsize=32)  # they are checked first and used later, and by every evaluation of a training run
def _prompt_tokens(
    tokenizer: Tokenizer, class_names: tuple[str, ...], templates: tuple[str, ...]
) -> Int[np.ndarray, "prompts context_length"]:
    return tokenizer([prompt(template, name) for name in class_names for template in templates])


def check_prompts(encoders: Encoders, dataset: EvaluationSet) -> None:
    """Refuse, before anything is computed, what `zero_shot` would refuse in the middle of it.

    Raises:
      UserError: the classes have no names, or a prompt is longer than the model's context.
    """
    if not dataset.class_names:
        raise UserError(f"{dataset.name} has no named classes, which zero-shot classification needs")
    if (count := len(dataset.class_names) * len(dataset.templates)) > MOST_PROMPTS:
        raise UserError(f"{dataset.name} has {count:,} prompts, expected at most {MOST_PROMPTS:,}: leave out templates")
    try:
        prompt_tokens(encoders, dataset.class_names, dataset.templates)
    except ValueError as error:
        raise UserError(f"{dataset.name}: {error}") from error


def zero_shot_classifier(
    encoders: Encoders, variables: Variables, class_names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "classes embed_dim"]:
    """One unit vector per class: embed every prompt, normalise, average over the prompts, normalise again.

    Raises:
      UserError: a prompt is longer than the model's context.
    """
    features = encoders.encode_tokens(variables, prompt_tokens(encoders, class_names, templates))
    means = features.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return np.asarray(normalize(jnp.asarray(means)))


MakeClassifier = Callable[[Encoders, Variables, Sequence[str], Sequence[str]], Float[np.ndarray, "classes embed_dim"]]


def zero_shot(
    encoders: Encoders,
    variables: Variables,
    dataset: EvaluationSet,
    progress: bool = True,
    make_classifier: MakeClassifier = zero_shot_classifier,
) -> ZeroShotResult:
    """Classify every image of `dataset` among its classes.

    Args:
      encoders: of the model.
      variables: its weights.
      dataset: labelled images, class names and templates.
      progress: show a bar.
      make_classifier: of class names and templates; one that keeps classifiers, say.

    Raises:
      UserError: a prompt that does not fit, an image that cannot be read, a missing label, scores that are not finite.
    """
    check_prompts(encoders, dataset)
    classifier = make_classifier(encoders, variables, dataset.class_names, dataset.templates)
    several = len(dataset.class_names) if dataset.metric == SEVERAL_CLASSES else 0
    scores, labels = [], []
    batches = evaluation_batches(dataset.source, BATCH_SIZE, encoders.preprocess, several)
    total = math.ceil(len(dataset.source) / BATCH_SIZE)
    for batch in tqdm(batches, desc=dataset.name, total=total, unit="batch", disable=not progress):
        scores.append((encoders.encode_images(variables, batch["image"]) @ classifier.T)[batch["mask"]])
        labels.append(batch["label"][batch["mask"]])
    cosines, classes = np.concatenate(scores), np.concatenate(labels)
    if several:  # images are compared within a class: by probabilities (github.com/openai/CLIP/issues/153)
        scale = np.exp(np.asarray(variables["params"]["logit_scale"]))
        return ZeroShotResult(dataset, np.asarray(jax.nn.softmax(scale * cosines, axis=-1)), classes)
    return _of_occurring(ZeroShotResult(dataset, cosines, classes))


def _of_occurring(result: ZeroShotResult) -> ZeroShotResult:
    """The result among the classes that have images, where the data set says that not all do."""
    expected = result.dataset.occurring
    if not expected:
        return result
    present, labels = np.unique(result.labels, return_inverse=True)
    if len(present) != expected:
        raise UserError(
            f"{result.dataset.name}: expected images of {expected} classes, got images of {len(present)}: "
            "is the split whole?"
        )
    names = tuple(result.dataset.class_names[number] for number in present.tolist())
    dataset = dataclasses.replace(result.dataset, class_names=names, occurring=0)
    return ZeroShotResult(dataset, result.scores[:, present], labels)
