"""A self-contained HTML page about a trained model: what it learned, what it sees, where it errs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from clip_jax.evaluation.few_shot import FewShotResult
from clip_jax.evaluation.linear_probe import LinearProbeResult
from clip_jax.evaluation.metrics import confusion_matrix
from clip_jax.evaluation.prompts import prompt
from clip_jax.evaluation.retrieval import RetrievalResult
from clip_jax.evaluation.zero_shot import ZeroShotResult
from clip_jax.processing.images import open_image
from clip_jax.reports.few_shot import few_shot_curve
from clip_jax.reports.page import figure_url, picture_url, write_page

SAMPLES = 12  # images shown with their prediction
MATRIX = 8  # images and texts in the similarity matrix
MOST_CLASSES = 100  # in a picture of the confusion matrix

AnyResult = ZeroShotResult | RetrievalResult | LinearProbeResult | FewShotResult


def write_report(
    path: str | Path,
    title: str,
    metrics: Sequence[Mapping[str, Any]],
    results: Sequence[AnyResult],
) -> None:
    """Write the page; pictures are inside it, so that the one file can be sent to anyone.

    Args:
      path: the HTML file; its folder is created.
      title: heading.
      metrics: the lines of metrics.jsonl; empty if the model was not trained here.
      results: one section each of zero-shot classification, one row each of retrieval and linear probes, and one
        picture of all few-shot curves.
    """
    classified = [result for result in results if isinstance(result, ZeroShotResult)]
    retrieved = [result for result in results if isinstance(result, RetrievalResult)]
    probed = [result for result in results if isinstance(result, LinearProbeResult)]
    few_shot = [result for result in results if isinstance(result, FewShotResult)]
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    write_page(
        path,
        "evaluation.html",
        title=title,
        loss_curve=_loss_curve(losses) if losses else None,
        metrics=_metric_names(classified),
        sections=[_section(result) for result in classified],
        retrieval_metrics=_metric_names(retrieved),
        retrieved=retrieved,
        probe_metrics=_metric_names(probed),
        probed=probed,
        few_shot_curve=few_shot_curve(few_shot) if few_shot else None,
    )


def _metric_names(results: Sequence[AnyResult]) -> list[str]:
    """The metrics that any of the results has, in the order of that which has most."""
    longest_first = sorted((list(result.metrics) for result in results), key=len, reverse=True)
    return list(dict.fromkeys(name for names in longest_first for name in names))


def _section(result: ZeroShotResult) -> dict[str, Any]:
    """What the template shows of one data set."""
    classes = len(result.dataset.class_names)
    single = result.labels.ndim == 1  # pictures with one class each
    return {
        "name": result.dataset.name,
        "images": len(result.labels),
        "classes": classes,
        "metrics": result.metrics,
        "samples": _samples(result) if single else [],
        "similarity": _similarity(result) if single else None,
        "confusion": _confusion(result) if single and classes <= MOST_CLASSES else None,
    }


def _samples(result: ZeroShotResult) -> list[dict[str, Any]]:
    """Some images with their true and predicted texts, mistakes first so that they are not hidden."""
    predictions = result.scores.argmax(axis=1)
    wrong = np.flatnonzero(predictions != result.labels)
    right = np.flatnonzero(predictions == result.labels)
    chosen = np.concatenate([_spread(wrong, SAMPLES // 3), _spread(right, SAMPLES)])[:SAMPLES]
    return [
        {
            "picture": _thumbnail(result, index),
            "prediction": _text(result, predictions[index]),
            "truth": _text(result, result.labels[index]),
            "right": predictions[index] == result.labels[index],
        }
        for index in chosen.tolist()
    ]


def _similarity(result: ZeroShotResult) -> dict[str, Any]:
    """One image for each of a few classes against the texts of these classes, as in OpenAI's notebook.

    Returns:
      the pictures, and for each text its row of (cosine similarity, the same scaled to [0, 1]).
    """
    labels = _spread(np.unique(result.labels), MATRIX)
    images = np.array([np.flatnonzero(result.labels == label)[0] for label in labels])
    values = result.scores[images][:, labels].T
    shares = (values - values.min()) / max(np.ptp(values), 1e-6)
    return {
        "pictures": [_thumbnail(result, index) for index in images.tolist()],
        "rows": [
            (_text(result, label), list(zip(*row, strict=True)))
            for label, *row in zip(labels, values.tolist(), shares.tolist(), strict=True)
        ],
    }


def _loss_curve(losses: Sequence[tuple[int, float]]) -> str:
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return figure_url(figure)


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


def _text(result: ZeroShotResult, label: int | np.integer) -> str:
    """The first prompt of a class."""
    return prompt(result.dataset.templates[0], result.dataset.class_names[label])


def _spread(indices: Int[np.ndarray, "n"], count: int) -> Int[np.ndarray, "m"]:
    """At most `count` of the indices, evenly over them."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]


def _thumbnail(result: ZeroShotResult, index: int) -> str:
    return picture_url(open_image(result.dataset.source[index].image))
