"""A page with several models side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clip_jax.evaluation.comparison import Comparison, Line
from clip_jax.evaluation.rows import difference, shown
from clip_jax.reports.page import figure_url, write_page

MOST_BARS = 100  # data sets in a picture


def write_comparison(path: str | Path, comparison: Comparison) -> None:
    """Write the page; its folder is created."""
    write_page(
        path,
        "comparison.html",
        title=f"clip_jax: {', '.join(comparison.models)}",
        models=comparison.models,
        in_paper=comparison.in_paper(),
        rows=[_row(line, comparison.in_paper()) for line in comparison.lines],
        notes=comparison.notes,
        pictures=[
            (model, picture)
            for number, model in enumerate(comparison.models[1:])
            if (picture := _differences(comparison, number))
        ],
    )


def _row(line: Line, in_paper: list[int]) -> dict[str, Any]:
    known = [value for value in line.values if value is not None]
    best = _better(line.metric, known) if len(known) > 1 else None
    return {
        "dataset": line.dataset,
        "task": line.task.replace("_", " "),
        "metric": line.metric.replace("_", " "),
        "values": [(shown(line.metric, value), value is not None and value == best) for value in line.values],
        "differences": [(difference(line.metric, by), _verdict(line.metric, by)) for by in line.differences()],
        "paper": [shown(line.metric, line.paper[number]) for number in in_paper],
    }


def _better(metric: str, values: Sequence[float]) -> float | None:
    """The best of some values; of what is neither good nor bad, None."""
    if "strength" in metric or "std" in metric:
        return None
    return min(values) if "rank" in metric else max(values)


def _verdict(metric: str, by: float | None) -> str:
    """A difference as the page colours it."""
    best = _better(metric, (by, 0.0)) if by else None
    return "" if best is None else "right" if best == by else "wrong"


def _differences(comparison: Comparison, number: int) -> str:
    """By how much a model is better than the first in each data set's own metric, as the paper's figure 5; or nothing.

    Args:
      comparison: of models.
      number: of the model, without the first.
    """
    lines = [line for line in comparison.lines if line.is_main and line.differences()[number] is not None]
    lines = sorted(lines, key=lambda line: line.differences()[number])[-MOST_BARS:]
    if not lines:
        return ""
    values = 100 * np.array([line.differences()[number] for line in lines])
    figure = Figure(figsize=(8, 0.28 * len(lines) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(lines)), values, color=["#14713d" if value >= 0 else "#b3261e" for value in values])
    axes.bar_label(bars, [f"{value:+.1f}" for value in values], padding=3, fontsize=8)
    labels = [f"{line.dataset}, {line.metric}" for line in lines]
    axes.set_yticks(range(len(lines)), labels, fontsize=8, parse_math=False)
    axes.axvline(0, color="#222", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("difference in percentage points")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure_url(figure)
