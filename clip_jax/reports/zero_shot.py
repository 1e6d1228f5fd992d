"""The part of the page about one data set, each of whose images has one class."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from clip_jax.evaluation.metrics import confusion_matrix, recall_per_class
from clip_jax.evaluation.zero_shot import ZeroShotResult
from clip_jax.reports.page import figure_url
from clip_jax.reports.samples import spread, text_of, thumbnail

SAMPLES = 12  # images shown with their prediction
MATRIX = 8  # images and texts in the similarity matrix
PAIRS = 8  # of classes that are confused
UNCERTAIN = 8  # images
MOST_CLASSES = 100  # in a picture of the confusion matrix

_BLOCK = 4096  # images whose scores are compared at a time


@dataclass(frozen=True)
class _Judged:
    """What the model says of each image.

    Attributes:
      result: the scores.
      first: the best class.
      second: the one after it.
      margins: how far apart their scores are.
    """

    result: ZeroShotResult
    first: Int[np.ndarray, "n"]
    second: Int[np.ndarray, "n"]
    margins: Float[np.ndarray, "n"]

    @property
    def right(self) -> np.ndarray:
        """Whether it is so."""
        return self.first == self.result.labels


def zero_shot_section(result: ZeroShotResult) -> dict[str, Any]:
    """What the template shows of one data set."""
    judged, classes = _judge(result), len(result.dataset.class_names)
    return {
        "samples": _samples(judged),
        "similarity": _similarity(result),
        "per_class": _per_class(judged),
        "pairs": _confused(judged),
        "uncertain": _uncertain(judged) if classes > 1 else [],
        "classes": classes,
        "confusion": _confusion(result) if classes <= MOST_CLASSES else None,
    }


def _judge(result: ZeroShotResult) -> _Judged:
    blocks = [_two_best(result.scores[start : start + _BLOCK]) for start in range(0, len(result.scores), _BLOCK)]
    return _Judged(result, *(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _two_best(scores: Float[np.ndarray, "n classes"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best class of each image, the second best, and the distance of their scores."""
    rows, first = np.arange(len(scores)), scores.argmax(axis=1)
    others = scores.copy()
    others[rows, first] = -np.inf
    second = others.argmax(axis=1)
    return first, second, scores[rows, first] - scores[rows, second]


def _samples(judged: _Judged) -> list[dict[str, Any]]:
    """Some images with their true and predicted texts, mistakes first so that they are not hidden."""
    dataset, labels = judged.result.dataset, judged.result.labels
    wrong, right = np.flatnonzero(~judged.right), np.flatnonzero(judged.right)
    chosen = np.concatenate([spread(wrong, SAMPLES // 3), spread(right, SAMPLES)])[:SAMPLES]
    return [
        {
            "picture": thumbnail(dataset, index),
            "prediction": text_of(dataset, judged.first[index]),
            "truth": text_of(dataset, labels[index]),
            "right": judged.right[index],
        }
        for index in chosen
    ]


def _similarity(result: ZeroShotResult) -> dict[str, Any]:
    """One image for each of a few classes against the texts of these classes, as in OpenAI's notebook.

    Returns:
      the pictures, and for each text its row of (cosine similarity, the same scaled to [0, 1]).
    """
    labels = spread(np.unique(result.labels), MATRIX)
    images = np.array([np.flatnonzero(result.labels == label)[0] for label in labels])
    values = result.scores[images][:, labels].T
    shares = (values - values.min()) / max(np.ptp(values), 1e-6)
    return {
        "pictures": [thumbnail(result.dataset, index) for index in images],
        "rows": [
            (text_of(result.dataset, label), list(zip(*row, strict=True)))
            for label, *row in zip(labels, values.tolist(), shares.tolist(), strict=True)
        ],
    }


def _per_class(judged: _Judged) -> list[dict[str, Any]]:
    """The accuracy of each class that occurs, the worst first, and what it is most often taken for instead."""
    names, labels = judged.result.dataset.class_names, judged.result.labels
    accuracies = recall_per_class(judged.result.scores, labels)
    images = np.bincount(labels, minlength=len(names))
    mistaken: dict[int, str] = {}
    for label, prediction, _ in _pairs(judged):
        mistaken.setdefault(label, names[prediction])
    order = np.argsort(accuracies, kind="stable")[: np.count_nonzero(images)]  # those that do not occur are NaN, last
    return [
        {
            "name": names[label],
            "images": int(images[label]),
            "value": float(accuracies[label]),
            "taken_for": mistaken.get(label, ""),
        }
        for label in order.tolist()
    ]


def _pairs(judged: _Judged) -> Iterator[tuple[int, int, int]]:
    """(class, what it was taken for, how often), the most frequent first."""
    classes = len(judged.result.dataset.class_names)
    mistakes = judged.result.labels.astype(np.int64) * classes + judged.first
    pairs, counts = np.unique(mistakes[~judged.right], return_counts=True)
    for number in np.argsort(-counts, kind="stable"):
        yield *divmod(int(pairs[number]), classes), int(counts[number])


def _confused(judged: _Judged) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most often: the surest mistake, and what the other class looks like."""
    dataset, labels = judged.result.dataset, judged.result.labels
    shown = []
    for (label, prediction, count), _ in zip(_pairs(judged), range(PAIRS), strict=False):
        mistake = _surest(judged, (labels == label) & (judged.first == prediction))
        example = _surest(judged, (labels == prediction) & judged.right)
        if example is None:
            example = _surest(judged, labels == prediction)
        shown.append(
            {
                "truth": dataset.class_names[label],
                "prediction": dataset.class_names[prediction],
                "count": count,
                "images": np.count_nonzero(labels == label),
                "picture": thumbnail(dataset, mistake),
                "example": "" if example is None else thumbnail(dataset, example),
            }
        )
    return shown


def _surest(judged: _Judged, among: np.ndarray) -> int | None:
    """Of some images, the one that the model is surest of; None of none."""
    indices = np.flatnonzero(among)
    return int(indices[judged.margins[indices].argmax()]) if indices.size else None


def _uncertain(judged: _Judged) -> list[dict[str, Any]]:
    """The images whose two best classes are nearest to each other."""
    result = judged.result
    return [
        {
            "picture": thumbnail(result.dataset, index),
            "best": [
                (result.dataset.class_names[label], float(result.scores[index, label]), label == result.labels[index])
                for label in (judged.first[index], judged.second[index])
            ],
            "truth": result.dataset.class_names[result.labels[index]],
        }
        for index in np.argsort(judged.margins, kind="stable")[:UNCERTAIN]
    ]


def _confusion(result: ZeroShotResult) -> str:
    """Rows are the classes that occur, columns those and whatever the model says."""
    counts = confusion_matrix(result.scores, result.labels)
    rows = np.flatnonzero(counts.sum(axis=1))
    columns = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    shares = counts[np.ix_(rows, columns)] / counts[rows].sum(axis=1, keepdims=True)
    names = result.dataset.class_names
    size = max(5.0, 0.22 * len(columns) + 2.5), max(3.0, 0.22 * len(rows) + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [names[k] for k in columns], rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(rows)), [names[k] for k in rows], fontsize=8, parse_math=False)
    figure.colorbar(picture, ax=axes, label="share of the class")
    return figure_url(figure)
