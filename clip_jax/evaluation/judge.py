"""How good a model is on a data set by one figure, whatever the set has: classes, or images with captions."""

import logging
from collections.abc import Sequence

from clip_jax.data.targets import class_name
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.head import classify_by_head, knows
from clip_jax.evaluation.linear_probe import LinearProbeResult
from clip_jax.evaluation.retrieval import RetrievalResult, zero_shot_retrieval
from clip_jax.evaluation.zero_shot import ZeroShotResult, check_prompts, zero_shot
from clip_jax.workdir import EVAL

logger = logging.getLogger(__name__)

RECALL = "image_retrieval_recall@1"  # what captioned images are judged by

Judged = ZeroShotResult | RetrievalResult


def judge(encoders: Encoders, variables: Variables, dataset: EvaluationSet) -> Judged:
    """Classify the images by the model's head where it can, else zero-shot; those without classes are retrieved.

    Raises:
      UserError: an image that cannot be read, or features that are not finite.
    """
    if knows(encoders.model.config.classes, dataset):
        task = classify_by_head
    else:
        task = zero_shot if dataset.class_names else zero_shot_retrieval
    return task(encoders, variables, dataset, progress=False)


def check_judge(encoders: Encoders, dataset: EvaluationSet) -> None:
    """Refuse, before anything is computed, what `judge` would refuse of the texts; the log says what a head does.

    Raises:
      UserError: a prompt is longer than the model's context, or there are neither classes nor captions.
    """
    if dataset.class_names:
        check_prompts(encoders, dataset)
        _log_classifier(encoders.model.config.classes, dataset)
    elif not dataset.source[0].captions:
        raise UserError(f"{dataset.name} has neither named classes nor captions")


def main_metric(result: Judged | LinearProbeResult) -> str:
    """The metric that a result is judged by."""
    metrics = result.metrics
    return next(name for name in (result.dataset.metric, f"lp_{result.dataset.metric}", RECALL) if name in metrics)


def key_of(result: Judged) -> str:
    """What the main metric of a result is called in metrics.jsonl."""
    return f"{EVAL}{result.dataset.name}/{main_metric(result)}"


def _log_classifier(classes: Sequence[str], dataset: EvaluationSet) -> None:
    """Say which classifier `judge` takes where the model has a head of some classes."""
    if not classes:
        return
    unknown = [name for name in dataset.class_names if class_name(name) not in classes]
    why = f", for the head does not know {unknown[0]!r}" if unknown else ""
    logger.info("%s is classified %s%s", dataset.name, "by the head" if knows(classes, dataset) else "zero-shot", why)
