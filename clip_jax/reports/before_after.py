"""A page about a fine-tuning: four models in one table, how accuracy and loss went, and which pictures changed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import softmax

from clip_jax.evaluation.before_after import Outcome, cells
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.head import TASK
from clip_jax.evaluation.judge import key_of
from clip_jax.evaluation.ranks import own_ranks
from clip_jax.evaluation.retrieval import RetrievalResult
from clip_jax.evaluation.zero_shot import ZeroShotResult
from clip_jax.reports.page import figure_url, write_page
from clip_jax.reports.samples import spread, thumbnail
from clip_jax.workdir import EVAL, HELD_OUT

SHOWN = 18  # pictures that changed for the better, and as many that changed for the worse


def write_before_after(
    path: epath.PathLike, title: str, metrics: Sequence[Mapping[str, Any]], outcome: Outcome
) -> None:
    """Write the page; pictures are inside it, so that the one file can be sent to anyone.

    Args:
      path: the HTML file; its folder is created.
      title: heading.
      metrics: the lines of metrics.jsonl.
      outcome: of the run.
    """
    heading, *lines = cells(outcome)
    write_page(
        path,
        "before_after.html",
        title=title,
        heading=heading,
        lines=lines,
        curves=_curves(metrics, [key_of(result) for result in outcome.before]),
        sections=list(_sections(outcome)),
        held_out=outcome.held_out,
        has_probe=any(outcome.probes),
        split=HELD_OUT,
    )


def _sections(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """What the template shows of each data set whose images have one class or captions."""
    for before, after in zip(outcome.before, outcome.after, strict=True):
        if isinstance(before, RetrievalResult):
            yield _found(before, after)
        elif before.labels.ndim == 1:
            yield _classified(before, after, outcome.scales)


def _classified(before: ZeroShotResult, after: ZeroShotResult, scales: tuple[float, float]) -> dict[str, Any]:
    names, labels = before.dataset.class_names, before.labels
    scales = (1.0, 1.0) if before.task == TASK else scales  # the scores of a head are logits already
    results = zip((before, after), scales, strict=True)
    probabilities = [softmax(scale * result.scores.astype(np.float64), axis=1) for result, scale in results]
    best = [values.argmax(axis=1) for values in probabilities]

    def words(when: int, index: int) -> str:
        prediction = best[when][index]
        return f"{names[prediction]} {100 * probabilities[when][index, prediction]:.0f}%"

    right = [predictions == labels for predictions in best]
    return _section(before.dataset, right, words, lambda index: names[labels[index]])


def _found(before: RetrievalResult, after: RetrievalResult) -> dict[str, Any]:
    """Of each image the first caption is what looks for it."""
    numbers = np.arange(len(before.image_features))
    first = np.searchsorted(before.image_of_text, numbers)
    ranks = [
        own_ranks(result.text_features[first], result.image_features, numbers, numbers) for result in (before, after)
    ]

    def caption(index: int) -> str:
        return before.dataset.source[index].captions[0]

    right = [own == 0 for own in ranks]
    return _section(before.dataset, right, lambda when, index: f"rank {ranks[when][index] + 1:,}", caption)


def _section(
    dataset: EvaluationSet,
    right: Sequence[Bool[np.ndarray, "n"]],
    words: Callable[[int, int], str],
    truth: Callable[[int], str],
) -> dict[str, Any]:
    """What the template shows of a data set.

    Args:
      dataset: has the pictures.
      right: before and after, whether the model is right about each image.
      words: (0 before or 1 after, image) -> what the model says of it.
      truth: image -> what it should say.
    """
    before, after = right

    def pictures(among: Bool[np.ndarray, "n"]) -> list[dict[str, str]]:
        return [
            {
                "picture": thumbnail(dataset, index),
                "truth": truth(index),
                "before": words(0, index),
                "after": words(1, index),
            }
            for index in spread(np.flatnonzero(among), SHOWN).tolist()
        ]

    better, worse = ~before & after, before & ~after
    return {
        "name": dataset.name,
        "images": len(before),
        "trained": len(dataset.train()) if dataset.train else 0,
        "better": int(better.sum()),
        "worse": int(worse.sum()),
        "right": int((before & after).sum()),
        "wrong": int((~before & ~after).sum()),
        "by_caption": not dataset.class_names,
        "changed": [("From wrong to right", pictures(better)), ("From right to wrong", pictures(worse))],
    }


def _curves(metrics: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """What the model is judged by, and the loss, against the step; an address that holds the picture."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    judged, losses = figure.subplots(1, 2)
    for key in keys:
        points = [(line["step"], 100 * line[key]) for line in metrics if key in line]
        judged.plot(*zip(*points, strict=True), marker=".", label=key.removeprefix(EVAL))
    losses.plot(*zip(*((line["step"], line["loss"]) for line in metrics if "loss" in line), strict=True), linewidth=1.2)
    judged.set(xlabel="step", ylabel="%", title="on images that training does not see")
    losses.set(xlabel="step", title="training loss")
    for axes in (judged, losses):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for text in judged.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure_url(figure)
