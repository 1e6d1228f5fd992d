"""A self-contained HTML page about a model: what it learned, what it sees, where it errs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from clip_jax.evaluation.few_shot import FewShotResult
from clip_jax.evaluation.head import TASK as HEAD
from clip_jax.evaluation.linear_probe import LinearProbeResult
from clip_jax.evaluation.retrieval import RetrievalResult
from clip_jax.evaluation.zero_shot import ZeroShotResult
from clip_jax.reports.few_shot import few_shot_curve
from clip_jax.reports.page import figure_url, write_page
from clip_jax.reports.retrieval import retrieval_section
from clip_jax.reports.several_classes import several_classes_section
from clip_jax.reports.zero_shot import zero_shot_section

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
      results: a row each; of zero-shot classification and retrieval, a section each; and one picture of all few-shot
        curves.
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
        retrieval_sections=[retrieval_section(result) for result in retrieved],
        probe_metrics=_metric_names(probed),
        probed=probed,
        few_shot_curve=few_shot_curve(few_shot) if few_shot else None,
    )


def _section(result: ZeroShotResult) -> dict[str, Any]:
    several = result.labels.ndim == 2
    return {
        "name": result.dataset.name,
        "by_head": result.task == HEAD,
        "images": len(result.labels),
        "classes": len(result.dataset.class_names),
        "metrics": result.metrics,
        "several": several,
        **(several_classes_section(result) if several else zero_shot_section(result)),
    }


def _metric_names(results: Sequence[AnyResult]) -> list[str]:
    """The metrics that any of the results has, in the order of that which has most."""
    longest_first = sorted((list(result.metrics) for result in results), key=len, reverse=True)
    return list(dict.fromkeys(name for names in longest_first for name in names))


def _loss_curve(losses: Sequence[tuple[int, float]]) -> str:
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return figure_url(figure)
