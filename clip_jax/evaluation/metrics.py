"""What is reported of a classifier, from its scores."""

import numpy as np
from jaxtyping import Float, Int


def accuracy(scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], k: int = 1) -> float:
    """Share of the examples whose class is among the k best scored; ties go to the lower class number."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    rank = (scores > own).sum(axis=1) + ((scores == own) & earlier).sum(axis=1)
    return float((rank < k).mean())


def mean_per_class_recall(scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]) -> float:
    """Top-1 accuracy of each class that occurs, averaged over these classes."""
    correct = scores.argmax(axis=1) == labels
    return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))


def confusion_matrix(scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]) -> Int[np.ndarray, "c c"]:
    """Entry (i, j): how many examples of class i are taken for class j."""
    classes = scores.shape[1]
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, scores.argmax(axis=1)), 1)
    return counts


def classification_metrics(scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]) -> dict[str, float]:
    """`acc1`, `acc5` (where there are at least 5 classes) and `mean_per_class_recall`, as CLIP_benchmark names them."""
    metrics = {"acc1": accuracy(scores, labels)}
    if scores.shape[1] >= 5:
        metrics["acc5"] = accuracy(scores, labels, k=5)
    return {**metrics, "mean_per_class_recall": mean_per_class_recall(scores, labels)}
