"""A page about the models between two others: WiSE-FT's picture, and a table."""

from etils import epath
from matplotlib.figure import Figure

from clip_jax.evaluation.alpha_curve import AlphaCurve, cells
from clip_jax.reports.page import figure_url, write_page


def write_alpha_curve(path: epath.PathLike, title: str, curve: AlphaCurve) -> None:
    """Write the page; its folder is created."""
    heading, *lines = cells(curve)
    write_page(path, "alpha_curve.html", title=title, heading=heading, lines=lines, picture=_picture(curve))


def _picture(curve: AlphaCurve) -> str:
    """The target against the mean of the references, a point for each alpha; beside it, all against alpha."""
    values = 100 * curve.values
    several = values.shape[1] > 1
    figure = Figure(figsize=(10 if several else 5, 4), layout="constrained")
    *planes, lines = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    for name, column in zip(curve.names, values.T, strict=True):
        lines.plot(curve.alphas, column, marker=".", label=name)
    lines.set(xlabel="alpha", ylabel="%")
    for plane in planes:
        references = values[:, 1:].mean(axis=1)
        plane.plot(references, values[:, 0], marker="o")
        for number in (0, len(curve.alphas) // 2, len(curve.alphas) - 1):
            point, beside = (references[number], values[number, 0]), {"xytext": (5, -10), "textcoords": "offset points"}
            plane.annotate(f"alpha {curve.alphas[number]:g}", point, fontsize=8, **beside)
        plane.set_xlabel(
            f"{curve.names[1] if values.shape[1] == 2 else 'mean of the references'} (%)", parse_math=False
        )
        plane.set_ylabel(f"{curve.names[0]} (%)", parse_math=False)
    for axes in (*planes, lines):
        axes.spines[["top", "right"]].set_visible(False)
    for text in lines.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure_url(figure)
