"""The data sets that a configuration can name, for training and for evaluation."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from clip_jax.data.digits import CLASS_NAMES as DIGIT_NAMES
from clip_jax.data.digits import Digits
from clip_jax.data.example import Cached, Source
from clip_jax.data.folder import CaptionedFolder, LabelledFolder
from clip_jax.errors import UserError

_DEFAULT_EVALUATION_SPLITS = ("test", "validation")


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Labelled images and the names of their classes, in the order of the labels."""

    name: str
    source: Source
    class_names: tuple[str, ...]


def make_sources(
    config: Mapping[str, Mapping[str, Any]], data_dir: str = ""
) -> tuple[tuple[Source, ...], tuple[float, ...]]:
    """Builds the sources that a training run mixes.

    Args:
        config: From the name of each source to its fields: `{"shapes": {"weight": 3.0}, "digits": {}}`. Every
            source has a `weight` (default 1) and a `kind` (default: its name). `folder` also has `path`; `tfds`
            has `name`, `split`, `data_dir`, `image_field`, `caption_field` and `label_field`.
        data_dir: Where TFDS keeps its data sets; "" is TFDS's own default, which `TFDS_DATA_DIR` sets.

    Returns:
        The sources and their weights.

    Raises:
        UserError: An unknown source or field, or data that is missing, empty or without captions.
    """
    if not config:
        raise UserError(f"data names no source: expected at least one of {', '.join(_TRAINING_SOURCES)}")
    sources = tuple(_make_source(name, dict(fields), data_dir) for name, fields in config.items())
    return sources, tuple(float(fields.get("weight", 1.0)) for fields in config.values())


def evaluation_set(name: str, data_dir: str = "") -> EvaluationSet:
    """Builds a labelled data set to judge a model on.

    Args:
        name: `shapes` (the pairs never trained on), `shapes_seen` (new images of the others), `digits` (the test
            split), a folder with one sub-folder for each class, or a TFDS data set: NAME or NAME/SPLIT.
        data_dir: Where TFDS keeps its data sets; "" is TFDS's own default, which `TFDS_DATA_DIR` sets.

    Raises:
        UserError: There is no such data set, or it has no labels.
    """
    if name == "digits":
        return EvaluationSet(name, Digits("test"), DIGIT_NAMES)
    if name in ("shapes", "shapes_seen"):
        from clip_jax.data.shapes import CLASS_NAMES  # imports TFDS

        return EvaluationSet(name, _shapes(data_dir, "held_out" if name == "shapes" else "validation"), CLASS_NAMES)
    if os.path.isdir(name) or name.startswith((".", os.sep)):
        source = LabelledFolder(name)
        return EvaluationSet(name, source, source.class_names)
    return _tfds_evaluation_set(name, data_dir)


def _tfds_evaluation_set(name: str, data_dir: str) -> EvaluationSet:
    from clip_jax.data import tfds_source  # imports TFDS

    try:
        builder, split = tfds_source.open_builder(name, data_dir), ""
    except UserError:
        prefix, slash, split = name.rpartition("/")
        if not slash:
            raise
        builder = tfds_source.open_builder(prefix, data_dir)
    if not split:
        split = next((known for known in _DEFAULT_EVALUATION_SPLITS if known in builder.info.splits), "test")
    source = tfds_source.TfdsSource(builder, split)
    if not source.class_names:
        raise UserError(f"{source.name} has no field called label: zero-shot evaluation needs one")
    return EvaluationSet(name, source, source.class_names)


def _make_source(name: str, fields: dict[str, Any], data_dir: str) -> Source:
    kind = fields.pop("kind", name)
    fields.pop("weight", None)
    if kind not in _TRAINING_SOURCES:
        raise UserError(f"unknown data source {kind!r}; known are {', '.join(_TRAINING_SOURCES)}")
    make = _TRAINING_SOURCES[kind]
    try:
        inspect.signature(make).bind(data_dir, **fields)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(make).parameters)[1:]) or "none but weight"
        raise UserError(f"data source {name!r}: {error}; its fields: {known}") from error
    source = make(data_dir, **fields)
    if not source[0].captions:
        raise UserError(f"data source {name!r} has no captions to train on; name their field in caption_field")
    return source


def _shapes(data_dir: str, split: str = "train") -> Source:
    from clip_jax.data import shapes, tfds_source  # import TFDS

    return Cached(tfds_source.TfdsSource(shapes.prepared_builder(data_dir), split))


def _digits(_data_dir: str, split: str = "train") -> Source:
    return Digits(split)


def _folder(_data_dir: str, path: str) -> Source:
    return CaptionedFolder(path)


def _tfds(
    default_data_dir: str,
    name: str,
    split: str = "train",
    data_dir: str = "",
    image_field: str = "",
    caption_field: str = "",
    label_field: str = "",
) -> Source:
    from clip_jax.data import tfds_source  # imports TFDS

    builder = tfds_source.open_builder(name, data_dir or default_data_dir)
    return tfds_source.TfdsSource(builder, split, image_field, caption_field, label_field)


# What each kind takes from the configuration is what its function takes after the default data_dir.
_TRAINING_SOURCES: Mapping[str, Callable[..., Source]] = {
    "shapes": _shapes,
    "digits": _digits,
    "folder": _folder,
    "tfds": _tfds,
}
