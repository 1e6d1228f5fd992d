"""A self-contained HTML page about a trained model: what it learned, what it sees, where it errs."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from clip_jax.evaluation.metrics import confusion_matrix
from clip_jax.evaluation.zero_shot import ZeroShotResult

SAMPLES = 12  # images shown with their prediction
MATRIX = 8  # images and captions in the similarity matrix
THUMBNAIL = 96  # pixels

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { font-weight: 600 } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }
img { max-width: 100%; height: auto } table { border-collapse: collapse }
td, th { padding: .2rem .9rem .2rem 0; text-align: left }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem }
.samples figure { margin: 0 } .samples img { width: ${thumbnail}px; image-rendering: pixelated }
figcaption { font-size: .85rem } .right { color: #14713d } .wrong { color: #b3261e }
</style></head><body><h1>$title</h1>
$body
</body></html>
""")


def write_report(
    path: str | Path, title: str, metrics: Sequence[Mapping[str, Any]], results: Sequence[ZeroShotResult]
) -> None:
    """Write the page; pictures are inside it, so that the one file can be sent to anyone.

    Args:
      path: the HTML file; its folder is created.
      title: heading.
      metrics: the lines of metrics.jsonl; empty if the model was not trained here.
      results: one section each.
    """
    sections = [_summary(results)]
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    if losses:
        sections.append(f"<h2>Training loss</h2>{_inline(_loss_curve(losses))}")
    sections += [_section(result) for result in results]
    page = _PAGE.substitute(title=html.escape(title), body="\n".join(sections), thumbnail=THUMBNAIL)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _summary(results: Sequence[ZeroShotResult]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(result.dataset.name)}</td><td>{len(result.labels):,}</td>"
        f"<td>{len(result.dataset.class_names)}</td><td>{result.metrics['acc1']:.2%}</td>"
        f"<td>{result.metrics.get('acc5', float('nan')):.2%}</td>"
        f"<td>{result.metrics['mean_per_class_recall']:.2%}</td></tr>"
        for result in results
    ).replace("nan%", "-")
    return (
        "<p>Zero-shot: each image goes to the class whose name, written into a few sentences, lies nearest to it.</p>"
        "<table><tr><th>data set</th><th>images</th><th>classes</th><th>top-1</th><th>top-5</th>"
        f"<th>mean per class</th></tr>{rows}</table>"
    )


def _section(result: ZeroShotResult) -> str:
    return (
        f"<h2>{html.escape(result.dataset.name)}</h2>"
        f"<h3>What it sees</h3>{_samples(result)}"
        f"<h3>Images and texts</h3><p>Cosine similarity of each picture and each caption.</p>"
        f"{_inline(_similarity_figure(result))}"
        f"<h3>Confusion</h3><p>Rows: what it is. Columns: what the model says.</p>"
        f"{_inline(_confusion_figure(result))}"
    )


def _samples(result: ZeroShotResult) -> str:
    """Some images with their true and predicted captions, mistakes first so that they are not hidden."""
    predictions = result.scores.argmax(axis=1)
    wrong = np.flatnonzero(predictions != result.labels)
    right = np.flatnonzero(predictions == result.labels)
    chosen = np.concatenate([_spread(wrong, SAMPLES // 3), _spread(right, SAMPLES)])[:SAMPLES]
    figures = []
    for index in chosen.tolist():
        kind = "right" if predictions[index] == result.labels[index] else "wrong"
        figures.append(
            f'<figure><img src="{_data_url(_thumbnail(result, index))}" alt="">'
            f'<figcaption><span class="{kind}">{html.escape(_caption(result, predictions[index]))}</span><br>'
            f"true: {html.escape(_caption(result, result.labels[index]))}</figcaption></figure>"
        )
    return f'<div class="samples">{"".join(figures)}</div>'


def _caption(result: ZeroShotResult, label: int | np.integer) -> str:
    return result.templates[0].format(result.dataset.class_names[label])


def _spread(indices: Int[np.ndarray, "n"], count: int) -> Int[np.ndarray, "m"]:
    """At most `count` of the indices, evenly over them."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]


def _thumbnail(result: ZeroShotResult, index: int) -> Image.Image:
    image = result.dataset.source[index].image.convert("RGB")
    scale = THUMBNAIL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _loss_curve(losses: Sequence[tuple[int, float]]) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _confusion_figure(result: ZeroShotResult) -> Figure:
    counts = confusion_matrix(result.scores, result.labels)
    present = np.unique(result.labels)
    shares = counts[present] / counts[present].sum(axis=1, keepdims=True)
    names = result.dataset.class_names
    height = max(3.0, 0.22 * len(present) + 1.5)
    figure = Figure(figsize=(max(5.0, 0.17 * len(names) + 2.0), height), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(present)), [names[label] for label in present], fontsize=7)
    figure.colorbar(picture, ax=axes, label="share of the class")
    return figure


def _similarity_figure(result: ZeroShotResult) -> Figure:
    """One image for each of a few classes against the captions of these classes, as in OpenAI's notebook."""
    labels = _spread(np.unique(result.labels), MATRIX)
    images = np.array([np.flatnonzero(result.labels == label)[0] for label in labels])
    similarity: Float[np.ndarray, "texts images"] = result.scores[images][:, labels].T
    count = len(labels)
    figure = Figure(figsize=(0.95 * count + 2.6, 0.62 * count + 1.6), layout="constrained")
    top, axes = figure.subplots(2, 1, height_ratios=(1, 0.62 * count), sharex=True)
    for column, index in enumerate(images.tolist()):
        top.imshow(_thumbnail(result, index), extent=(column - 0.4, column + 0.4, 0, 0.8))
    top.set(xlim=(-0.5, count - 0.5), ylim=(0, 0.8), aspect="auto")
    top.axis("off")
    axes.imshow(similarity, cmap="Blues", aspect="auto")
    axes.set_yticks(range(count), [_caption(result, label) for label in labels], fontsize=9)
    axes.set_xticks([])
    middle = (similarity.min() + similarity.max()) / 2
    for (row, column), value in np.ndenumerate(similarity):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > middle else "black")
    return figure


def _inline(figure: Figure) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return f'<img src="{_encoded(buffer.getvalue())}" alt="">'


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _encoded(buffer.getvalue())


def _encoded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
