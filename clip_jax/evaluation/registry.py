"""The evaluation sets that are known by name: `registry.toml` as objects."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from clip_jax.data.folder import DEFAULT_TEMPLATES
from clip_jax.errors import UserError
from clip_jax.evaluation.metrics import METRICS
from clip_jax.options import from_dict

_TABLES = tomllib.loads(files(__package__).joinpath("registry.toml").read_text(encoding="utf-8"))
_PREFIXES = {"linear_probe": "lp_"}  # of the metrics of a task


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

    def __post_init__(self):
        if self.metric not in METRICS:
            raise UserError(f"metric must be one of {', '.join(METRICS)}; got {self.metric!r}")
        if self.classes < 0 or self.prompts < 0:
            raise UserError(f"expected counts from 0, got {self.classes} classes and {self.prompts} prompts")


def read(tables: Mapping[str, Any], origin: str = "registry.toml") -> dict[str, Entry]:
    """The entries of the tables of `sets`, by name.

    Raises:
      UserError: a field that there is not, or a value of another type or that cannot be.
    """
    return {name: from_dict(Entry, values, f"{origin}, set {name}") for name, values in tables.items()}


EVALUATION_SETS: dict[str, Entry] = read(_TABLES["sets"])
SUITES: dict[str, tuple[str, ...]] = {name: tuple(sets) for name, sets in _TABLES["suites"].items()}
_IN_ORDER = (*SUITES["paper27"], *SUITES["imagenet_robustness"])


def paper_values(model: str, name: str, task: str) -> dict[str, float]:
    """What the paper reports of an official model on a data set.

    Args:
      model: its official name.
      name: of the data set.
      task: as results call it, such as `zeroshot_classification`.

    Returns:
      the values by metric, as shares of 1; empty where the paper has none.
    """
    own = _TABLES["paper"].get(task, {}).get(model, {})
    values = own if isinstance(own, dict) else dict(zip(_IN_ORDER, own, strict=False))
    if name not in values:
        return {}
    found = values[name]
    if not isinstance(found, dict):  # a single number is of what the set is judged by
        found = {f"{_PREFIXES.get(task, '')}{EVALUATION_SETS[name].metric}": found}
    return {metric: round(value / 100, 4) for metric, value in found.items()}


def known_name(name: str) -> str:
    """A data set by its name here, whatever CLIP_benchmark calls it: `wds/vtab/pets` is `pets`."""
    listed = {entry.wds: known for known, entry in EVALUATION_SETS.items() if entry.wds}
    return listed.get(name.removeprefix("wds/"), name)


def official_name(model: str, pretrained: str) -> str:
    """An official model by its name, where CLIP_benchmark calls it as open_clip does: `ViT-L/14@336px`."""
    if pretrained != "openai":
        return model
    names = {name.replace("/", "-").replace("@336px", "-336"): name for name in _TABLES["paper"]["linear_probe"]}
    return names.get(model.removesuffix("-quickgelu"), model)
