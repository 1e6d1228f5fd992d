"""The evaluation sets that are known by name: `registry.toml` as objects."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from clip_jax.data.folder import DEFAULT_TEMPLATES

_TABLES = tomllib.loads(files(__package__).joinpath("registry.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Entry:
    """What the project knows of an evaluation set.

    Attributes:
      source: its kind and fields, as in the `data` of a configuration, if it can be opened in one way only.
      templates: sentences around a class name, in which braces with commas are alternatives; or the name of the list
        in `en_zeroshot_classification_templates.json` of the `clip-benchmark` distribution.
      class_names: what the prompts call the classes; or the name of the list in its `en_classnames.json`. Without
        them, the labels themselves, made readable.
      metric: what it is judged by, one of `evaluation.metrics.METRICS`.
      classes: how many there are; 0 for as many as the source says, which may be none.
      prompts: how many templates there are; 0 where nobody has counted.
      wds: its name in the collection `clip-benchmark/wds_*`.
      tfds: its name, split and other fields in TFDS, as in the `data` of a configuration.
      train: kind and fields of the training split, for linear probes, where it is not simply the split of that name.
      renamed: (label, name, reason) of each label that the prompts call otherwise.
      obtain: where it comes from and what folders to make of it, if nobody distributes it.
    """

    source: Mapping[str, Any] = field(default_factory=dict)
    templates: tuple[str, ...] | str = DEFAULT_TEMPLATES
    class_names: tuple[str, ...] | str = ()
    metric: str = "acc1"
    classes: int = 0
    prompts: int = 0
    wds: str = ""
    tfds: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str, str], ...] = ()
    obtain: str = ""


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


EVALUATION_SETS: dict[str, Entry] = {
    name: Entry(**{key: _frozen(value) for key, value in values.items()}) for name, values in _TABLES["sets"].items()
}
SUITES: dict[str, tuple[str, ...]] = {name: tuple(sets) for name, sets in _TABLES["suites"].items()}


def paper_value(model: str, name: str) -> float | None:
    """The paper's zero-shot result of an official model (table 11), as a share of 1; None where it has none."""
    values = dict(zip(SUITES["paper27"], _TABLES["paper"].get(model, ()), strict=False))
    return round(values[name] / 100, 4) if name in values else None
