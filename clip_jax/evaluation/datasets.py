"""The data sets that a model can be judged on. A new one costs an entry in `EVALUATION_SETS`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from clip_jax.data.access import Access
from clip_jax.data.example import Source
from clip_jax.data.folder import DEFAULT_TEMPLATES, LabelledFolder
from clip_jax.data.sources import SOURCES, source_config
from clip_jax.errors import UserError
from clip_jax.evaluation import wds

_USUAL_SPLITS = ("test", "validation")
_WORDNET_ID = re.compile(r"n\d{8}")  # what ImageNet's classes are called in TFDS


@dataclass(frozen=True)
class EvaluationSet:
    """Images with labels, and the words that make a classifier; or images with captions, for retrieval.

    Attributes:
      name: what results call it.
      source: the images.
      class_names: in the order of the labels; empty where there are none.
      templates: sentences around a class name, whose embeddings are averaged (paper section 3.1.4).
      metric: what it is usually judged by, of `evaluation.metrics.METRICS`.
    """

    name: str
    source: Source
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    metric: str = "acc1"


@dataclass(frozen=True)
class Entry:
    """What the project knows of an evaluation set.

    Attributes:
      source: its kind and fields, as in the `data` of a configuration.
      templates: see `EvaluationSet`.
      class_names: in place of the source's own.
      metric: see `EvaluationSet`.
    """

    source: Mapping[str, Any]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    class_names: tuple[str, ...] = ()
    metric: str = "acc1"


_SHAPES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "there is {}", "a drawing of {}")
_DIGITS = ("a photo of the digit {}", "a handwritten {}", "the number {}", "a picture of the number {}")

EVALUATION_SETS: dict[str, Entry] = {
    "shapes": Entry({"kind": "shapes", "split": "held_out"}, _SHAPES),  # the pairs never trained on
    "shapes_seen": Entry({"kind": "shapes", "split": "validation"}, _SHAPES),  # new images of the others
    "digits": Entry({"kind": "digits", "split": "test"}, _DIGITS),
}


def accepted_names() -> str:
    """What `evaluation_set` opens, in words."""
    return (
        f"one of {', '.join(EVALUATION_SETS)}, a folder with one sub-folder for each class, KIND:PATH as in "
        f"tar:shards/*.tar (KIND of {', '.join(_kinds_with_path())}), a retrieval set of the clip-benchmark/wds_* "
        "collection (its folder), or a TFDS data set (NAME or NAME/SPLIT)"
    )


def evaluation_set(name: str, access: Access = Access()) -> EvaluationSet:
    """Open a data set to judge a model on.

    Args:
      name: one of `EVALUATION_SETS`; a folder with one sub-folder for each class; KIND:PATH, the source of that kind in
        a configuration's `data`, with captions; the folder of a retrieval set (`wds.open_retrieval`); or a TFDS data
        set: NAME (its test split, or else its validation split) or NAME/SPLIT.
      access: where TFDS keeps its data sets, and whether it may fetch missing ones.

    Raises:
      UserError: there is no such data set, or a part of it is damaged.
    """
    entry = EVALUATION_SETS.get(name)
    if entry is not None:
        source = source_config(name, entry.source).open(access)
        class_names = entry.class_names or source.class_names
        return EvaluationSet(name, source, class_names, entry.templates, entry.metric)
    source = _open(name, access)
    if damage := getattr(source, "damage", ()):  # without its part of the data, the score would be another one
        raise UserError(f"{name} is damaged, {len(damage)} times; first: {damage[0]}")
    return EvaluationSet(name, source, getattr(source, "class_names", ()))


def _open(name: str, access: Access) -> Source:
    kind, _, path = name.partition(":")
    if kind in _kinds_with_path():
        return source_config(kind, {"path": path}).open(access)
    if not (os.path.isdir(name) or name.startswith((".", os.sep))):
        return _open_tfds(name, access)
    return wds.open_retrieval(name) or LabelledFolder(name)


def _kinds_with_path() -> list[str]:
    return [kind for kind, config in SOURCES.items() if any(field.name == "path" for field in fields(config))]


def _open_tfds(name: str, access: Access) -> Source:
    """NAME or NAME/SPLIT, where NAME may hold slashes itself."""
    from clip_jax.data import tfds_builder, tfds_source  # import TFDS

    prefix, _, split = name.rpartition("/")
    try:
        builder = tfds_builder.open_builder(name, access)
        split = next((usual for usual in _USUAL_SPLITS if usual in builder.info.splits), _USUAL_SPLITS[0])
    except tfds_builder.UnknownDataSet:
        try:
            builder = tfds_builder.open_builder(prefix or name, access)
        except tfds_builder.UnknownDataSet as error:
            raise UserError(f"unknown evaluation set {name!r}: expected {accepted_names()}; {error}") from error
    source = tfds_source.TfdsSource(builder, split)
    if source.class_names and all(_WORDNET_ID.fullmatch(name) for name in source.class_names):
        raise UserError(
            f"the classes of {source.name} are called {source.class_names[0]} and so on, which no caption says; "
            "it needs an entry with class_names in EVALUATION_SETS"
        )
    return source
