"""Zero-shot classification: a classifier made of class names (paper section 3.1)."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import SEVERAL_CLASSES, EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.examples import encode_examples
from clip_jax.evaluation.metrics import check_finite, check_scores, classification_metrics
from clip_jax.evaluation.prompts import prompt
from clip_jax.models import normalize
from clip_jax.processing import Tokenizer

logger = logging.getLogger(__name__)

MOST_PROMPTS = 2**19  # class names times templates; ImageNet has 80,000


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores of every image of an evaluation set.

    Attributes:
      dataset: what was classified.
      scores: cosine similarities of images and classes; probabilities where an image can belong to several classes.
      labels: the true classes; or, of every class, whether an image belongs to it.
      task: as CLIP_benchmark calls it; another one where the classifier was not made of texts.
    """

    dataset: EvaluationSet
    scores: Float[np.ndarray, "n classes"]
    labels: Int[np.ndarray, "n"] | Bool[np.ndarray, "n classes"]
    task: str = "zeroshot_classification"

    def __post_init__(self):
        if self.labels.ndim == 1:
            check_scores(self.scores, self.labels, self.dataset.name)
        else:
            check_finite(self.scores, self.dataset.name)

    @property
    def metrics(self) -> dict[str, float]:
        """Top-1, top-5, mean per-class recall, and the data set's own metric."""
        return classification_metrics(self.scores, self.labels, self.dataset.metric)


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
    tokens = tokenizer([prompt(template, name) for name in class_names for template in templates])
    first_of: dict[bytes, int] = {}
    for number, own in enumerate(tokens.reshape(len(class_names), -1)):
        if (first := first_of.setdefault(own.tobytes(), number)) != number:
            alike = class_names[first], class_names[number]
            logger.warning("the classes %r and %r have the same prompts: zero-shot, no image is of the second", *alike)
    return tokens


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
    encoders: Encoders, variables: Variables, class_names: Sequence[str], templates: Sequence[str], bar: str = ""
) -> Float[np.ndarray, "classes embed_dim"]:
    """One unit vector per class: embed every prompt, normalise, average over the prompts, normalise again.

    Args:
      encoders: of the model.
      variables: its weights.
      class_names: to be put into the templates.
      templates: sentences.
      bar: what a progress bar says; "" shows none.

    Raises:
      UserError: a prompt is longer than the model's context.
    """
    features = encoders.encode_tokens(variables, prompt_tokens(encoders, class_names, templates), bar)
    means = features.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return np.asarray(normalize(jnp.asarray(means)))


MakeClassifier = Callable[
    [Encoders, Variables, Sequence[str], Sequence[str], str], Float[np.ndarray, "classes embed_dim"]
]


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
      progress: show bars.
      make_classifier: of class names and templates; one that keeps classifiers, say.

    Raises:
      UserError: a prompt that does not fit, an image that cannot be read, a missing label, scores that are not finite.
    """
    check_prompts(encoders, dataset)
    bar = f"{dataset.name}, prompts" if progress else ""
    classifier = make_classifier(encoders, variables, dataset.class_names, dataset.templates, bar)
    return classify_examples(encoders, variables, dataset, classifier, dataset.name if progress else "")


def classify_examples(
    encoders: Encoders,
    variables: Variables,
    dataset: EvaluationSet,
    classifier: Float[np.ndarray, "classes embed_dim"],
    bar: str = "",
) -> ZeroShotResult:
    """Score every image of a data set by the rows of a classifier, one for each of its classes.

    Raises:
      UserError: an image that cannot be read, a missing label, scores that are not finite.
    """
    several = len(dataset.class_names) if dataset.metric == SEVERAL_CLASSES else 0
    images = encode_examples(encoders.encode_images, variables, dataset.source, encoders.preprocess, bar, several)
    cosines, classes = images.features @ classifier.T, images.labels
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
    return dataclasses.replace(result, dataset=dataset, scores=result.scores[:, present], labels=labels)
