"""What an evaluation reports: a row for each data set and task, in CLIP_benchmark's format, as files and as a table."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from etils import epath

from clip_jax.data.checked import read_file
from clip_jax.errors import UserError
from clip_jax.evaluation.registry import known_name, official_name, paper_values
from clip_jax.options import from_dict

if TYPE_CHECKING:
    from clip_jax.evaluation.tasks import Result

MISSING = "-"
_NO_SHARES = ("median_rank", "strength")  # parts of the names of what is no share of 1
_MOST_LETTERS = 1000  # of a name in a file


@dataclass(frozen=True)
class Row:
    """What a model achieves on a data set.

    Attributes:
      dataset: its name.
      model: its name.
      task: as CLIP_benchmark calls it.
      metrics: finite values, by the names of CLIP_benchmark where it has them.
      pretrained: where the weights are from.
      language: of the texts.
      main_metric: the one that the data set is judged by; empty if it has none.
      classes: how many; 0 where there are none.
      templates: how many; 0 where there are none.
    """

    dataset: str
    model: str
    task: str
    metrics: Mapping[str, float]
    pretrained: str = ""
    language: str = "en"
    main_metric: str = ""
    classes: int = 0
    templates: int = 0

    def __post_init__(self):
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise UserError(f"{self.dataset}, {self.task}: expected a finite {name}, got {value}")

    @property
    def paper(self) -> dict[str, float]:
        """The paper's values by metric, if it has any."""
        if self.language != "en":
            return {}
        return paper_values(official_name(self.model, self.pretrained), known_name(self.dataset), self.task)

    def to_dict(self) -> dict[str, Any]:
        """One object of the list that CLIP_benchmark's tools read; for a classifier, what it was made of as well."""
        names = ("dataset", "model", "pretrained", "task", "language", "metrics")
        classifier = ("main_metric", "classes", "templates") if self.main_metric else ()
        return {name: getattr(self, name) for name in (*names, *classifier)}


def row_of(result: "Result", model: str, pretrained: str) -> Row:
    """The row of a result.

    Raises:
      UserError: a metric is not finite.
    """
    dataset, metrics = result.dataset, result.metrics
    main_metric = next((name for name in (dataset.metric, f"lp_{dataset.metric}") if name in metrics), "")
    counts = (len(dataset.class_names), len(dataset.templates)) if main_metric else ()
    return Row(dataset.name, model, result.task, metrics, pretrained, "en", main_metric, *counts)


def write_rows(path: epath.PathLike, rows: Sequence[Row]) -> None:
    """Write a table with a column for each metric, if the file's name ends in .csv; else a JSON list."""
    path, objects = epath.Path(path), [row.to_dict() for row in rows]
    if path.suffix.lower() != ".csv":
        path.write_text(json.dumps(objects, indent=2, allow_nan=False) + "\n")
        return
    flat = [{**row, **row["metrics"]} for row in objects]
    names = dict.fromkeys([*Row.__dataclass_fields__, *(name for row in flat for name in row)])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [name for name in names if name != "metrics"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    path.write_bytes(text.getvalue().encode())


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON file, as `evaluate.py` or CLIP_benchmark wrote it: a list or a single object.

    Other keys are ignored, and so are metrics that are no numbers.

    Raises:
      UserError: the file cannot be read, is no such file, or has a number that is not finite.
    """
    try:
        content = json.loads(read_file(str(path), "unreadable"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from error
        raise UserError(f"{path} is no JSON ({error}); expected what evaluate.py --output FILE.json writes") from error
    objects = content if isinstance(content, list) else [content]
    if not objects:
        raise UserError(f"{path} has no results")
    return [_read(values, f"{path}, result {number}") for number, values in enumerate(objects, 1)]


def table(rows: Sequence[Row]) -> str:
    """Every metric of every row on a line, with the paper's value and the difference where the paper has one."""
    lines = [("data set", "task", "metric", "measured", "paper", "difference")]
    for row in rows:
        paper = row.paper
        for name, value in row.metrics.items():
            compared = (shown(name, paper[name]), difference(name, value - paper[name])) if name in paper else ("", "")
            lines.append((row.dataset, row.task, name, shown(name, value), *compared))
    return aligned(lines, texts=3)


def aligned(lines: Sequence[Sequence[str]], texts: int) -> str:
    """Cells in columns: the first `texts` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = [str.ljust if column < texts else str.rjust for column in range(len(widths))]
    padded = ([just(cell, width) for just, cell, width in zip(justify, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def shown(metric: str, value: float | None) -> str:
    """A value of a metric in four digits; of none, a dash."""
    return MISSING if value is None else f"{value:.4f}" if is_share(metric) else f"{value:.4g}"


def difference(metric: str, value: float | None) -> str:
    """A difference between two values of a metric, with its sign; of none, a dash."""
    return MISSING if value is None else f"{value:+.4f}" if is_share(metric) else f"{value:+.4g}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share of 1, which people read in percent."""
    return not any(part in metric for part in _NO_SHARES)


def _read(values: Any, origin: str) -> Row:
    if isinstance(values, Mapping):
        values = {name: value for name, value in values.items() if name in Row.__dataclass_fields__}
        if isinstance(values.get("metrics"), Mapping):
            numbers = {name: value for name, value in values["metrics"].items() if type(value) in (int, float)}
            values = {**values, "metrics": numbers}
    row = from_dict(Row, values, origin)
    for name in (row.dataset, row.model, row.pretrained, row.task, row.language, row.main_metric, *row.metrics):
        if len(name) > _MOST_LETTERS or not name.isprintable():
            raise UserError(f"{origin}: expected names of at most {_MOST_LETTERS} printable letters, got {name!r:.60}")
    return row


def _refuse(constant: str) -> NoReturn:
    raise UserError(f"expected strict JSON with finite numbers, got {constant}: leave out what does not exist")
