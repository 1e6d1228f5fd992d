"""The part of the page about one data set whose images can belong to several classes, as VOC2007's do."""

from typing import Any

import numpy as np

from clip_jax.evaluation.metrics import precision_per_class
from clip_jax.evaluation.zero_shot import ZeroShotResult
from clip_jax.reports.samples import spread, thumbnail

SAMPLES = 12  # images shown with their classes
WORST = 8  # classes shown with their worst mistakes
BEST = 3  # classes that the model says of an image


def several_classes_section(result: ZeroShotResult) -> dict[str, Any]:
    """What the template shows of one data set."""
    precisions = precision_per_class(result.scores, result.labels)
    order = np.argsort(precisions, kind="stable")[: np.count_nonzero(~np.isnan(precisions))]  # NaN comes last
    names, images = result.dataset.class_names, result.labels.sum(axis=0)
    return {
        "samples": _samples(result),
        "per_class": [
            {"name": names[label], "images": int(images[label]), "value": float(precisions[label]), "taken_for": ""}
            for label in order
        ],
        "worst": [_mistakes(result, label) for label in order[:WORST].tolist()],
    }


def _samples(result: ZeroShotResult) -> list[dict[str, Any]]:
    """Some images with their classes and the best scored ones, those whose best one is wrong first."""
    right = result.labels[np.arange(len(result.labels)), result.scores.argmax(axis=1)]
    wrong, right = np.flatnonzero(~right), np.flatnonzero(right)
    chosen = np.concatenate([spread(wrong, SAMPLES // 3), spread(right, SAMPLES)])[:SAMPLES]
    names = result.dataset.class_names
    return [
        {
            "picture": thumbnail(result.dataset, index),
            "best": [
                (names[label], float(result.scores[index, label]), bool(result.labels[index, label]))
                for label in np.argsort(-result.scores[index], kind="stable")[:BEST]
            ],
            "truth": ", ".join(names[label] for label in np.flatnonzero(result.labels[index])) or "none of them",
        }
        for index in chosen
    ]


def _mistakes(result: ZeroShotResult, label: int) -> dict[str, Any]:
    """Of one class, the image that is ranked highest without it, and the one that is ranked lowest with it."""
    shows = result.labels[:, label]
    order = np.argsort(-result.scores[:, label], kind="stable")
    ranks = {"alarm": np.flatnonzero(~shows[order])[:1], "miss": np.flatnonzero(shows[order])[-1:]}
    return {
        "name": result.dataset.class_names[label],
        **{
            kind: {"picture": thumbnail(result.dataset, order[rank[0]]), "rank": int(rank[0]) + 1}
            if rank.size
            else None
            for kind, rank in ranks.items()
        },
    }
