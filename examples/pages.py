"""Run the notebooks and write what came out as pages, docs/examples/NAME.md with PNGs beside them: `make examples`.

The notebooks are kept without outputs. Their cells are plain Python, and run here as Jupyter would run them, one after
the other in one namespace, a last expression shown, figures shown where a cell leaves them open.
"""

import ast
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "examples"
PARAMETERS = "parameters"  # the tag of the cell whose values may be replaced, as papermill has it


@dataclass(frozen=True)
class Output:
    """What a cell showed: its text, and its figures."""

    text: str = ""
    figures: tuple[Image.Image, ...] = ()


@dataclass
class Run:
    """A notebook that has been run: its namespace, and the output of each code cell."""

    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    outputs: list[Output] = field(default_factory=list)


def notebooks() -> list[Path]:
    """The examples, in their order."""
    return sorted(Path(__file__).parent.glob("*.ipynb"))


def cells(notebook: Path) -> Iterator[tuple[str, str, list[str]]]:
    """The kind ("markdown" or "code"), text and tags of each cell."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        yield cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])


def execute(notebook: Path, parameters: Mapping[str, Any] | None = None) -> Run:
    """Run a notebook from top to bottom.

    Args:
      notebook: its file.
      parameters: values that replace those of the cell tagged "parameters".
    """
    run = Run()
    for kind, source, tags in cells(notebook):
        if kind == "code":
            run.outputs.append(_execute_cell(source, run.namespace, f"{notebook.name}, cell {len(run.outputs) + 1}"))
            if PARAMETERS in tags:
                run.namespace.update(parameters or {})
    return run


def _execute_cell(source: str, namespace: dict[str, Any], name: str) -> Output:
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(compile(tree, name, "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), name, "eval"), namespace) if last else None
        if value is not None:
            print(repr(value))
    figures = tuple(_drawn(plt.figure(number)) for number in plt.get_fignums())
    plt.close("all")
    return Output(text.getvalue(), figures)


def _drawn(figure: matplotlib.figure.Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, bbox_inches="tight")  # as in Jupyter
    return Image.open(file).convert("RGB")


def write_page(notebook: Path, run: Run, folder: Path = PAGES) -> None:
    """Write a notebook that has been run as Markdown, its figures as PNGs with a palette."""
    parts = [f"<!-- `make examples` wrote this from examples/{notebook.name}: edit the notebook. -->"]
    outputs, figures = iter(run.outputs), 0
    for kind, source, _ in cells(notebook):
        parts.append(as_markdown(kind, source))
        output = next(outputs) if kind == "code" else Output()
        if output.text:
            parts.append(f"```text\n{_without_home(output.text).rstrip()}\n```")
        for figure in output.figures:
            figures += 1
            name = f"{notebook.stem}_{figures}.png"
            figure.quantize(256).save(folder / name, optimize=True)
            parts.append(f"![]({name})")
    parts.append(f"[This page as a notebook](../../examples/{notebook.name}) · [all examples](README.md)")
    (folder / f"{notebook.stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def as_markdown(kind: str, source: str) -> str:
    """A cell as it stands in a page, from where other pages and notebooks have other addresses."""
    if kind == "code":
        return f"```python\n{source}\n```"
    return source.replace("](../docs/", "](../").replace("](../README", "](../../README").replace(".ipynb)", ".md)")


def _without_home(text: str) -> str:
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def main(names: list[str]) -> None:
    """Run a notebook and write its page; without a name all of them, each in a process of its own as in Jupyter."""
    matplotlib.use("agg")
    PAGES.mkdir(exist_ok=True)
    for name in names:
        notebook = Path(__file__).parent / f"{name}.ipynb"
        print(notebook.name, flush=True)
        write_page(notebook, execute(notebook))
    for notebook in () if names else notebooks():
        subprocess.run([sys.executable, "-m", "examples.pages", notebook.stem], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
