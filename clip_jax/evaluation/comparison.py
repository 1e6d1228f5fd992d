"""Several models side by side, from the files that evaluations wrote."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clip_jax.errors import UserError
from clip_jax.evaluation.registry import EVALUATION_SETS, known_name
from clip_jax.evaluation.rows import Row, aligned, difference, read_rows, shown

_Key = tuple[str, str, str]  # data set, task, language
_Model = tuple[str, str, str]  # its name, where the weights are from, the file if that tells it from another


@dataclass(frozen=True)
class Line:
    """A metric of all models; None where a model has no value, and where the paper has none.

    Attributes:
      dataset: its name, and the language if it is not English.
      task: as CLIP_benchmark calls it.
      metric: its name.
      is_main: whether the data set is judged by it.
      values: of each model.
      paper: the paper's, of each model.
    """

    dataset: str
    task: str
    metric: str
    is_main: bool
    values: tuple[float | None, ...]
    paper: tuple[float | None, ...]

    def differences(self) -> tuple[float | None, ...]:
        """Of each model but the first, to the first."""
        first, *others = self.values
        return tuple(None if None in (first, value) else value - first for value in others)


@dataclass(frozen=True)
class Comparison:
    """Models and what they achieve.

    Attributes:
      models: what tells them apart.
      lines: in the order of the files.
      notes: what makes values hard to compare, in words.
    """

    models: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def in_paper(self) -> list[int]:
        """The numbers of the models of which the paper has a value on some line."""
        return [
            number for number in range(len(self.models)) if any(line.paper[number] is not None for line in self.lines)
        ]


def compare(paths: Sequence[str]) -> Comparison:
    """Match rows by data set, task and language.

    Those of a model can be in several files; where two files have the same row of a model, they are compared.

    Args:
      paths: JSON files that `evaluate.py` or CLIP_benchmark wrote.

    Raises:
      UserError: a file cannot be read, is named twice or has the same row twice; or there is nothing to compare.
    """
    models = _models(paths)
    if len(models) < 2:
        raise UserError(f"expected results of at least two models, got only of {_titles(models)[0]}")
    keys = list(dict.fromkeys(key for rows in models.values() for key in rows))
    if all(sum(key in rows for rows in models.values()) < 2 for key in keys):
        raise UserError(f"no data set and task of {', '.join(_titles(models))} is the same: nothing to compare")
    titles, lines, notes = _titles(models), [], []
    for key in keys:
        rows = [rows.get(key) for rows in models.values()]
        lines += _lines(key, rows)
        notes += _notes(key, rows, titles)
    return Comparison(tuple(titles), tuple(lines), tuple(notes))


def table(comparison: Comparison) -> str:
    """A line for each metric: each model's value, its difference to the first model's, and the paper's value."""
    first, *others = comparison.models
    in_paper = comparison.in_paper()
    differ = [heading for title in others for heading in (title, "difference")]
    papers = [f"paper, {comparison.models[number]}" for number in in_paper]
    lines = [["data set", "task", "metric", first, *differ, *papers]]
    for line in comparison.lines:
        pairs = zip(line.values[1:], line.differences(), strict=True)
        cells = [cell for value, by in pairs for cell in (shown(line.metric, value), difference(line.metric, by))]
        papers = [shown(line.metric, line.paper[number]) for number in in_paper]
        lines.append([line.dataset, line.task, line.metric, shown(line.metric, line.values[0]), *cells, *papers])
    return aligned(lines, texts=3)


def _models(paths: Sequence[str]) -> dict[_Model, dict[_Key, Row]]:
    """The rows of each model, in the order of the files; of one that has the same row in two files, apart."""
    files = {path: _by_key(path) for path in paths}
    if len(files) < len(paths):
        raise UserError(f"{next(path for path in paths if paths.count(path) > 1)} is named twice")
    owners: dict[tuple, list[str]] = {}
    for path, rows in files.items():
        for row in rows:
            owners.setdefault(row, []).append(path)
    again = {(model, pretrained) for (model, pretrained, _), found in owners.items() if len(found) > 1}
    models: dict[_Model, dict[_Key, Row]] = {}
    for path, rows in files.items():
        for (model, pretrained, key), row in rows.items():
            apart = path if (model, pretrained) in again else ""
            models.setdefault((model, pretrained, apart), {})[key] = row
    return models


def _by_key(path: str) -> dict[tuple[str, str, _Key], Row]:
    rows: dict[tuple[str, str, _Key], Row] = {}
    for row in read_rows(path):
        key = (row.model, row.pretrained, (known_name(row.dataset), row.task, row.language))
        if key in rows:
            raise UserError(f"{path} has {row.dataset}, {row.task} of {row.model} ({row.pretrained}) twice")
        rows[key] = row
    return rows


def _titles(models: Iterable[_Model]) -> list[str]:
    """The names of the models; if several have the same, with the file, or with where the weights are from."""
    names = [model for model, _, _ in models]
    return [
        model if names.count(model) == 1 else f"{model} ({path or pretrained})" for model, pretrained, path in models
    ]


def _lines(key: _Key, rows: Sequence[Row | None]) -> list[Line]:
    name, task, language = key
    metrics = dict.fromkeys(metric for row in rows if row for metric in row.metrics)
    papers = [row.paper if row else {} for row in rows]
    usual = EVALUATION_SETS[name].metric if name in EVALUATION_SETS else "acc1"
    candidates = [*(row.main_metric for row in rows if row), usual, f"lp_{usual}"]
    main = next((metric for metric in candidates if metric in metrics), "")
    return [
        Line(
            name if language == "en" else f"{name} ({language})",
            task,
            metric,
            metric == main,
            tuple(row.metrics.get(metric) if row else None for row in rows),
            tuple(paper.get(metric) for paper in papers),
        )
        for metric in metrics
    ]


def _notes(key: _Key, rows: Sequence[Row | None], titles: Sequence[str]) -> list[str]:
    """What differs between the rows of one data set but their values."""
    known = [(title, row) for title, row in zip(titles, rows, strict=True) if row]
    notes = []
    for what in ("main_metric", "classes", "templates"):
        values = {title: getattr(row, what) for title, row in known if getattr(row, what)}
        if len(set(values.values())) > 1:
            notes.append(f"{key[0]}, {key[1]}: {what} differs: " + ", ".join(f"{v} of {t}" for t, v in values.items()))
    for title, row in known:
        if lacking := [metric for _, other in known for metric in other.metrics if metric not in row.metrics]:
            notes.append(f"{key[0]}, {key[1]}: {title} has no {', '.join(dict.fromkeys(lacking))}")
    return notes
