"""A model's own head: where it classifies, and how a fresh one starts from a model that has none.

Classes are told apart by their names (`class_name`), never by their numbers: a data set may order them otherwise, or
have only some of them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from clip_jax.data.example import Source
from clip_jax.data.folder import DEFAULT_TEMPLATES
from clip_jax.data.targets import class_name, class_names
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import SEVERAL_CLASSES, EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.examples import encode_examples
from clip_jax.evaluation.features import Features, concatenated
from clip_jax.evaluation.linear_probe import choose_strength, held_out_fifth
from clip_jax.evaluation.logistic import LogisticRegression
from clip_jax.evaluation.zero_shot import (
    ZeroShotResult,
    classify_examples,
    prompt_tokens,
    zero_shot_classifier,
)

TASK = "head_classification"  # CLIP_benchmark has no name for it


def knows(classes: Sequence[str], dataset: EvaluationSet) -> bool:
    """Whether a head of these classes can classify a data set: it has all classes of it."""
    names = set(map(class_name, dataset.class_names))
    return bool(names) and names <= set(classes) and dataset.metric != SEVERAL_CLASSES


def classify_by_head(
    encoders: Encoders, variables: Variables, dataset: EvaluationSet, progress: bool = True
) -> ZeroShotResult:
    """Classify every image of a data set among its classes by their rows of the model's head; the scores are logits.

    Raises:
      UserError: the head lacks one of the classes; otherwise as `zero_shot`.
    """
    classes = encoders.model.config.classes
    if not knows(classes, dataset):
        raise UserError(f"{dataset.name} has classes that the model's head does not have")
    numbers = {name: number for number, name in enumerate(classes)}
    rows = [numbers[class_name(name)] for name in dataset.class_names]
    classifier = _on_every_host(encoders, variables["params"]["classifier"])[rows]
    bar = dataset.name if progress else ""
    return dataclasses.replace(classify_examples(encoders, variables, dataset, classifier, bar), task=TASK)


def templates_for(
    classes: Sequence[str], sources: Sequence[Source], datasets: Sequence[EvaluationSet]
) -> tuple[str, ...]:
    """The sentences that a zero-shot head of these classes is made of.

    Those of the first training source that has some; else those of the first evaluation set with just these classes,
    so that the head begins as the zero-shot classifier which is evaluated; else the paper's.
    """
    same = [dataset for dataset in datasets if set(map(class_name, dataset.class_names)) == set(classes)]
    return next((owner.templates for owner in (*sources, *same) if getattr(owner, "templates", ())), DEFAULT_TEMPLATES)


def check_head_prompts(encoders: Encoders, templates: Sequence[str]) -> None:
    """Refuse, before anything is computed, what `zero_shot_head` would refuse.

    Raises:
      UserError: a prompt is longer than the model's context.
    """
    try:
        prompt_tokens(encoders, encoders.model.config.classes, templates)
    except ValueError as error:
        raise UserError(f"model.classes: {error}") from error


def zero_shot_head(
    encoders: Encoders, variables: Variables, templates: Sequence[str]
) -> Float[np.ndarray, "classes embed_dim"]:
    """The zero-shot classifier of the model's classes, times exp(logit_scale): what WiSE-FT starts from."""
    classifier = zero_shot_classifier(encoders, variables, encoders.model.config.classes, templates)
    return np.exp(np.asarray(variables["params"]["logit_scale"])) * classifier


def linear_probe_head(
    encoders: Encoders, variables: Variables, sources: Sequence[Source]
) -> Float[np.ndarray, "classes embed_dim"]:
    """A logistic regression on the normalised features of all training images: what LP-FT starts from.

    It has no bias, as a head has none (arXiv 2202.10054). Its regularisation is chosen on a fifth of each class.

    Raises:
      UserError: a class has no image, or an image cannot be read.
    """
    classes, partitioner = encoders.model.config.classes, encoders.partitioner
    features = concatenated([_features(encoders, variables, source) for source in sources])
    counts = np.bincount(features.labels[features.labels >= 0], minlength=len(classes))
    if not counts.all():
        raise UserError(
            f"head_from=linear_probe needs images of every class, but the training data has none of "
            f"{classes[int(counts.argmin())]!r}; leave it out of model.classes, or take head_from=zeroshot"
        )
    train, validation = held_out_fifth(features)
    if not len(validation):
        raise UserError("head_from=linear_probe needs at least 5 images of some class; take head_from=zeroshot")
    strength = choose_strength(train, validation, len(classes), partitioner, progress=False, bias=False)
    fitted = LogisticRegression(features.values, features.labels, len(classes), partitioner, bias=False).fit(strength)
    return fitted.weights.T


def _features(encoders: Encoders, variables: Variables, source: Source) -> Features:
    """A source's normalised image features, and the numbers of their classes in the model's order."""
    numbers = {name: number for number, name in enumerate(encoders.model.config.classes)}
    own = np.array([numbers[name] for name in class_names(source)])
    encoded = encode_examples(encoders.encode_images, variables, source, encoders.preprocess, source.name)
    return Features(encoded.features, np.where(encoded.labels < 0, -1, own[encoded.labels]))


def _on_every_host(
    encoders: Encoders, array: Float[Array | np.ndarray, "classes embed_dim"]
) -> Float[np.ndarray, "classes embed_dim"]:
    """A parameter that may be split over the mesh."""
    gather = encoders.partitioner.jit(_same, out_shardings=encoders.partitioner.replicated)
    return np.asarray(gather(array))


def _same(array: Array) -> Array:
    return array
