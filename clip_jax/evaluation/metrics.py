"""What is reported of a classifier, from its scores."""

import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import UserError

Scores = Float[np.ndarray, "n classes"]
Labels = Int[np.ndarray, "n"]


def check_scores(scores: Scores, labels: Labels, name: str = "scores") -> None:
    """Refuse what every metric would silently misjudge.

    A comparison with NaN is false, so that a class whose score is NaN would count as the best of all.

    Args:
      scores: of every example and class.
      labels: the true classes.
      name: whose scores they are, for the message.

    Raises:
      UserError: a score is NaN or infinite, or a label is none of the classes.
    """
    bad = scores.size - np.count_nonzero(np.isfinite(scores))
    if bad:
        raise UserError(
            f"{name}: expected finite scores, but {bad:,} of {scores.size:,} are NaN or infinite: look for such "
            "numbers in the weights, or compute in float32"
        )
    strange = labels[(labels < 0) | (labels >= scores.shape[1])]
    if strange.size:
        raise UserError(
            f"{name}: expected labels from 0 to {scores.shape[1] - 1}, but {strange.size:,} of {labels.size:,} are not "
            f"({strange[0]} among them): the split may have no labels"
        )


def accuracy(scores: Scores, labels: Labels, k: int = 1) -> float:
    """Share of the examples whose class is among the k best scored; ties go to the lower class number."""
    check_scores(scores, labels)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    rank = (scores > own).sum(axis=1) + ((scores == own) & earlier).sum(axis=1)
    return float((rank < k).mean())


def mean_per_class_recall(scores: Scores, labels: Labels) -> float:
    """Top-1 accuracy of each class that occurs, averaged over these classes."""
    check_scores(scores, labels)
    correct = scores.argmax(axis=1) == labels
    return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))


def confusion_matrix(scores: Scores, labels: Labels) -> Int[np.ndarray, "c c"]:
    """Entry (i, j): how many examples of class i are taken for class j."""
    check_scores(scores, labels)
    classes = scores.shape[1]
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, scores.argmax(axis=1)), 1)
    return counts


def classification_metrics(scores: Scores, labels: Labels) -> dict[str, float]:
    """`acc1`, `acc5` (where there are at least 5 classes) and `mean_per_class_recall`, as CLIP_benchmark names them."""
    metrics = {"acc1": accuracy(scores, labels)}
    if scores.shape[1] >= 5:
        metrics["acc5"] = accuracy(scores, labels, k=5)
    return {**metrics, "mean_per_class_recall": mean_per_class_recall(scores, labels)}
