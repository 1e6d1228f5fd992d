"""What is reported of a classifier, from its scores. A new metric costs a function and its line in `METRICS`."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.errors import UserError

Scores = Float[np.ndarray, "n classes"]
Labels = Int[np.ndarray, "n"]
Targets = Bool[np.ndarray, "n classes"]  # of images that can belong to several classes

_BLOCK = 2**22  # scores that are compared at a time


def check_scores(scores: Scores, labels: Labels, name: str = "scores") -> None:
    """Refuse what every metric would silently misjudge.

    A comparison with NaN is false, so that a class whose score is NaN would count as the best of all.

    Args:
      scores: of every example and class.
      labels: the true classes.
      name: whose scores they are, for the message.

    Raises:
      UserError: there is no example, a score is NaN or infinite, or a label is none of the classes.
    """
    check_finite(scores, name)
    strange = labels[(labels < 0) | (labels >= scores.shape[1])]
    if strange.size:
        raise UserError(
            f"{name}: expected labels from 0 to {scores.shape[1] - 1}, but {strange.size:,} of {labels.size:,} are not "
            f"({strange[0]} among them): the split may have no labels"
        )


def check_finite(scores: Float[np.ndarray, "n m"], name: str) -> None:
    """Refuse an empty table, or one with numbers that are not finite.

    Raises:
      UserError: there is no row, or a number is NaN or infinite.
    """
    if not len(scores):
        raise UserError(f"{name}: expected at least one example, got none")
    bad = scores.size - sum(np.count_nonzero(np.isfinite(scores[rows])) for rows in _blocks(scores))
    if bad:
        raise UserError(
            f"{name}: expected finite scores, but {bad:,} of {scores.size:,} are NaN or infinite: look for such "
            "numbers in the weights, or compute in float32"
        )


def accuracy(scores: Scores, labels: Labels, k: int = 1) -> float:
    """Share of the examples whose class is among the k best scored; ties go to the lower class number.

    Raises:
      UserError: see `check_scores`; there are fewer than k classes.
    """
    check_scores(scores, labels)
    if scores.shape[1] < k:
        raise UserError(f"top-{k} accuracy needs at least {k} classes, got {scores.shape[1]}")
    hits = [np.count_nonzero(_places(scores[rows], labels[rows]) < k) for rows in _blocks(scores)]
    return float(sum(hits) / len(labels))


def mean_of_top1_and_top5(scores: Scores, labels: Labels) -> float:
    """What the paper reports of Kinetics700 (table 9), as that data set's own challenge does."""
    return (accuracy(scores, labels) + accuracy(scores, labels, k=5)) / 2


def recall_per_class(scores: Scores, labels: Labels) -> Float[np.ndarray, "classes"]:
    """Top-1 accuracy of each class; NaN of one that does not occur."""
    check_scores(scores, labels)
    correct = labels[scores.argmax(axis=1) == labels]
    totals, hits = (np.bincount(classes, minlength=scores.shape[1]) for classes in (labels, correct))
    return np.divide(hits, totals, out=np.full(len(totals), np.nan), where=totals > 0)


def mean_per_class_recall(scores: Scores, labels: Labels) -> float:
    """Top-1 accuracy of each class that occurs, averaged over these classes."""
    return float(np.nanmean(recall_per_class(scores, labels)))


def roc_auc(scores: Float[np.ndarray, "n 2"], labels: Labels) -> float:
    """Area under the ROC curve of two classes: how often an example of class 1 leans more to it than one of class 0.

    An example leans by the difference of its scores, which orders examples as the softmax does. Ties count half.

    Raises:
      UserError: see `check_scores`; a class has no example.
    """
    from sklearn.metrics import roc_auc_score  # a second of imports that only this metric pays

    check_scores(scores, labels)
    if len(np.unique(labels)) < 2:
        raise UserError(f"the area under the ROC curve needs examples of both classes, got class {labels[0]} only")
    wide = scores.astype(np.float64)
    return float(roc_auc_score(labels, wide[:, 1] - wide[:, 0]))


def mean_average_precision(scores: Scores, targets: Targets) -> float:
    """11-point interpolated average precision of each class that occurs, averaged over these: VOC2007's own metric.

    Raises:
      UserError: there is no image, a score is not finite, or no image shows any class.
    """
    precisions = precision_per_class(scores, targets)
    if np.isnan(precisions).all():
        raise UserError("mean average precision needs an image that shows one of the classes, got none")
    return float(np.nanmean(precisions))


def precision_per_class(scores: Scores, targets: Targets) -> Float[np.ndarray, "classes"]:
    """11-point interpolated average precision of each class; NaN of one that does not occur.

    Args:
      scores: images are ordered by them within a class, so that it matters how those of different images compare: the
        paper's are probabilities, the softmax of the logits over the classes (github.com/openai/CLIP/issues/153).
      targets: whether an image shows a class.

    Raises:
      UserError: there is no image, or a score is not finite.
    """
    check_finite(scores, "scores")
    precisions = np.full(targets.shape[1], np.nan)
    for number in np.flatnonzero(targets.any(axis=0)):
        precisions[number] = _average_precision(scores[:, number], targets[:, number])
    return precisions


def confusion_matrix(scores: Scores, labels: Labels) -> Int[np.ndarray, "c c"]:
    """Entry (i, j): how many examples of class i are taken for class j."""
    check_scores(scores, labels)
    classes = scores.shape[1]
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, scores.argmax(axis=1)), 1)
    return counts


METRICS: Mapping[str, Callable[[Scores, Labels | Targets], float]] = MappingProxyType(
    {
        "acc1": accuracy,
        "acc5": functools.partial(accuracy, k=5),
        "mean_per_class_recall": mean_per_class_recall,
        "mean_average_precision": mean_average_precision,
        "roc_auc": roc_auc,
        "mean_acc1_acc5": mean_of_top1_and_top5,
    }
)  # by the names of CLIP_benchmark, where it has them


def classification_metrics(scores: Scores, labels: Labels | Targets, metric: str = "acc1") -> dict[str, float]:
    """What CLIP_benchmark reports, under its names, and the metric that a data set is usually judged by.

    Args:
      scores: of every example and class.
      labels: the true classes, or several for each example.
      metric: one of `METRICS`.

    Returns:
      `acc1`, `acc5` where there are at least 5 classes, and `mean_per_class_recall`; or, with several classes for each
      example, `mean_average_precision`; and `metric`.
    """
    usual = ("acc1", "acc5", "mean_per_class_recall") if labels.ndim == 1 else ("mean_average_precision",)
    names = [name for name in usual if name != "acc5" or scores.shape[1] >= 5]
    return {name: METRICS[name](scores, labels) for name in dict.fromkeys([*names, metric])}


def _blocks(scores: Float[np.ndarray, "n m"]) -> list[slice]:
    """Rows that are looked at together, so that what is computed of them stays small."""
    rows = max(1, _BLOCK // max(1, scores.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(scores), rows)]


def _places(scores: Scores, labels: Labels) -> Int[np.ndarray, "n"]:
    """How many classes come before the true one."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    lower = np.arange(scores.shape[1])[None] < labels[:, None]
    return np.count_nonzero((scores > own) | ((scores == own) & lower), axis=1)


def _average_precision(scores: Float[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]) -> float:
    """The mean, over the recalls 0, 0.1, … 1, of the best precision at this recall or a higher one.

    Precision and recall are those of the thresholds: images with equal scores are found together, so that their order
    does not matter. Recalls are compared as whole numbers, which rounding does not touch.
    """
    order = np.argsort(-scores)
    thresholds = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each run of ties
    found = np.cumsum(positive[order])[thresholds]
    best = np.maximum.accumulate((found / (thresholds + 1))[::-1])[::-1]
    return float(best[np.searchsorted(10 * found, np.arange(11) * found[-1])].mean())
