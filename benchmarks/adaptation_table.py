"""The tables and the picture of `benchmarks.adaptation`, from the results that it kept."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.machine import cpu

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "new": "new digits, of 5",
    "old": "old digits, of 5",
    "shapes": "shapes, of 64",
    "all ten": "all digits, of 10",
}
_COUNTED = ("new", "old", "shapes")
_SECONDS = "seconds"

Seeds = Sequence[Mapping]  # what each seed gave: variant of the model -> column -> accuracy


def kept_of(folder: Path, name: str, seeds: Sequence[int]) -> Seeds:
    """The results of a method that are there."""
    files = [folder / f"{name}-{seed}.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def score(accuracies: Mapping[str, float]) -> float:
    """What a rate is chosen by: the mean of the accuracies on new digits, on old ones and on shapes."""
    return float(np.mean([accuracies[name] for name in _COUNTED]))


def shown(values: Sequence[float]) -> str:
    """Percent: the mean, and the range if there are several; nothing of none."""
    if not values:
        return ""
    mean, low, high = (100 * function(values) for function in (np.mean, min, max))
    return f"{mean:.1f}" + (f" ({low:.1f}-{high:.1f})" if len(values) > 1 else "")


def shown_seconds(values: Sequence[float]) -> str:
    """The fewest, where the programs had been compiled before."""
    return f"{min(values):.0f}" if values else ""


def rows(name: str, seeds: Seeds) -> list[str]:
    """The lines of a method: after its last step, and then of its variants."""
    lines = []
    for variant in (key for key in seeds[0] if key != _SECONDS):
        accuracies = [seed[variant] for seed in seeds]
        cells = [shown([each[column] for each in accuracies if column in each]) for column in COLUMNS]
        seconds = shown_seconds([seed[_SECONDS] for seed in seeds if _SECONDS in seed and not variant])
        cells = [f"· {variant}" if variant else name, *cells, shown([score(each) for each in accuracies]), seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(kept: Mapping[str, Seeds]) -> list[str]:
    """Of all methods that have results."""
    head = ["method", *COLUMNS.values(), "mean of the first three", "CPU seconds"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return lines + [line for name, seeds in kept.items() if seeds for line in rows(name, seeds)]


def draw(kept: Mapping[str, Seeds], file: Path) -> None:
    """What was learned against what was kept: of each method a line from before over WiSE-FT to its last step."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="accuracy on new digits", ylabel="mean of those on old digits and on shapes")
    present = {name: seeds for name, seeds in kept.items() if seeds}
    before = _point(present.pop("zero-shot"), "")
    axes.plot(*before, "k*", markersize=14, linestyle="none", label="zero-shot")
    for number, (name, seeds) in enumerate(present.items()):
        points = [_point(seeds, variant) for variant in ("", "WiSE-FT") if variant in seeds[0]]
        style = {"color": f"C{number % 10}", "marker": "os^D"[number // 10], "linestyle": "none"}
        axes.plot(*zip(*points, before, strict=True), color="lightgray", linewidth=0.8, zorder=0)
        axes.plot(*points[0], **style, label=name)
        for point in points[1:]:
            axes.plot(*point, **style, markerfacecolor="white")
    axes.set_title("filled: after the last step; hollow: WiSE-FT, alpha 0.5; means over the seeds", fontsize="medium")
    figure.legend(loc="outside right upper", fontsize="small")
    FigureCanvasAgg(figure).print_png(str(file))


def _point(seeds: Seeds, variant: str) -> tuple[float, float]:
    learned, old, shapes = (np.mean([seed[variant][column] for seed in seeds]) for column in _COUNTED)
    return float(learned), float((old + shapes) / 2)


def write(main: Mapping[str, Seeds], grid: Mapping[str, Seeds]) -> None:
    """Write the page and its picture.

    Args:
      main: the results of each method, in order.
      grid: those of the grid's methods at each rate, on one seed.
    """
    count = max(map(len, main.values()), default=0)
    lines = [
        "# What was learned, and what was forgotten",
        "",
        f"`python -m benchmarks.adaptation`, {count} seeds; the rates by `python -m benchmarks.adaptation --grid`. "
        f"{cpu()}; jax {jax.__version__}.",
        "",
        "Percent, the mean over the seeds and their range. [docs/fine-tuning.md](../../docs/fine-tuning.md) says what",
        "was done and what it shows.",
        "",
        *table(main),
        "",
        "![what was learned against what was kept](adaptation.png)",
        "",
        "The grid on seed 0, after the last step:",
        "",
        *table({name: [{"": seed[""]} for seed in seeds] for name, seeds in grid.items()}),
    ]
    (RESULTS / "adaptation.md").write_text("\n".join(lines) + "\n")
    draw(main, RESULTS / "adaptation.png")
