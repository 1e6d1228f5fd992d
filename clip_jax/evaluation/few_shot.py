"""Few-shot classification: the linear probe of k examples of each class, beside zero-shot (paper figure 6)."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from clip_jax.errors import UserError
from clip_jax.evaluation.classifiers import kept_zero_shot
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.encoders import Encoders, Variables
from clip_jax.evaluation.features import Features
from clip_jax.evaluation.linear_probe import Splits, choose_strength, extract_splits, rank_in_class
from clip_jax.evaluation.logistic import LogisticRegression
from clip_jax.evaluation.metrics import accuracy
from clip_jax.parallel import Partitioner

logger = logging.getLogger(__name__)

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class FewShotResult:
    """Top-1 accuracies.

    Attributes:
      dataset: what was classified.
      shots: examples of each class that were trained on.
      accuracies: of each number of shots, for each of `SEEDS`.
      strengths: the regularisation of each number of shots.
      zero_shot: the accuracy of the classifier that saw none.
    """

    dataset: EvaluationSet
    shots: tuple[int, ...]
    accuracies: Float[np.ndarray, "shots seeds"]
    strengths: tuple[float, ...]
    zero_shot: float

    task: ClassVar[str] = "few_shot"

    @property
    def metrics(self) -> dict[str, float]:
        """Zero-shot's `acc1`, and of K shots the mean over the seeds, their standard deviation and λ."""
        metrics = {"acc1": self.zero_shot}
        for shots, accuracies, strength in zip(self.shots, self.accuracies, self.strengths, strict=True):
            metrics[f"lp_acc1@{shots}"] = float(accuracies.mean())
            metrics[f"lp_acc1_std@{shots}"] = float(accuracies.std(ddof=1))
            metrics[f"lp_strength@{shots}"] = strength
        return metrics


def few_shot(encoders: Encoders, variables: Variables, dataset: EvaluationSet, progress: bool = True) -> FewShotResult:
    """Extract a data set's features, fit classifiers to a few of them, and classify zero-shot beside.

    Args:
      encoders: of the model.
      variables: its weights.
      dataset: with a training split.
      progress: show bars.

    Raises:
      UserError: see `extract_splits`, `zero_shot.zero_shot` and `fit_shots`.
    """
    splits = extract_splits(encoders, variables, dataset, progress)
    zero = kept_zero_shot(encoders, variables, dataset, progress).metrics["acc1"]
    return fit_shots(splits, zero, encoders.partitioner, progress)


def fit_shots(splits: Splits, zero_shot: float, partitioner: Partitioner, progress: bool = True) -> FewShotResult:
    """Fit to k examples of each class, k from `SHOTS`, drawn by each of `SEEDS`, and judge on the test split.

    The examples of fewer shots are among those of more. The regularisation of a number of shots is chosen once, for
    the first seed, on the whole validation split. Numbers of which a class has too few examples are left out.

    Args:
      splits: features.
      zero_shot: the accuracy to compare with.
      partitioner: of the mesh.
      progress: show a bar.

    Raises:
      UserError: a class has no example to train on; otherwise as `LogisticRegression`.
    """
    classes = len(splits.dataset.class_names)
    shots = _possible_shots(splits, classes)
    accuracies, strengths = np.zeros((len(shots), len(SEEDS))), []
    for row, count in enumerate(tqdm(shots, desc=f"{splits.dataset.name} few-shot", disable=not progress)):
        few = draw(splits.train, count, SEEDS[0])
        strengths.append(choose_strength(few, splits.validation, classes, partitioner, progress=False))
        for column, seed in enumerate(SEEDS):
            few = draw(splits.train, count, seed)
            classifier = LogisticRegression(few.values, few.labels, classes, partitioner).fit(strengths[-1])
            accuracies[row, column] = accuracy(classifier.scores(splits.test.values), splits.test.labels)
    return FewShotResult(splits.dataset, shots, accuracies, tuple(strengths), zero_shot)


def draw(train: Features, shots: int, seed: int) -> Features:
    """So many examples of each class."""
    return train[rank_in_class(train.labels, seed) < shots]


def _possible_shots(splits: Splits, classes: int) -> tuple[int, ...]:
    labels = splits.train.labels
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    rarest = int(counts.argmin())
    shots = tuple(count for count in SHOTS if count <= counts[rarest])
    name, class_name = splits.dataset.name, splits.dataset.class_names[rarest]
    if not shots:
        raise UserError(f"{name}: expected examples of every class to train on, got none of {class_name!r}")
    if shots != SHOTS:
        logger.warning("%s: %d shots at most, for so many examples has %r", name, shots[-1], class_name)
    return shots
