"""The picture of few-shot classification: the paper's figure 6 for any data sets."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from clip_jax.evaluation.few_shot import FewShotResult
from clip_jax.reports.page import figure_url


def few_shot_curve(results: Sequence[FewShotResult]) -> str:
    """Accuracy against the number of training images of each class, a curve for each data set; zero-shot at 0.

    Returns:
      an address that holds the picture.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        spread = 100 * result.accuracies.std(axis=1, ddof=1)
        means = 100 * result.accuracies.mean(axis=1)
        curve = axes.errorbar(result.shots, means, spread, marker="o", capsize=3, label=result.dataset.name)
        axes.plot([0], [100 * result.zero_shot], marker="*", markersize=12, color=curve.lines[0].get_color())
        axes.axhline(100 * result.zero_shot, color=curve.lines[0].get_color(), linestyle=":", linewidth=1)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(sorted({0, *(shots for result in results for shots in result.shots)}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="training images of each class", ylabel="top-1 accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure_url(figure)
