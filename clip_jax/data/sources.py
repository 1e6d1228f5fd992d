"""The data sources that a configuration can name: one frozen class a kind, whose fields are those of the configuration.

A new kind costs one class and its line in `SOURCES`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from clip_jax.data.digits import Digits
from clip_jax.data.example import Cached, Source
from clip_jax.data.folder import CaptionedFolder
from clip_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every kind of source has.

    Attributes:
      weight: how often it is drawn from, relative to the others.
    """

    weight: float = 1.0

    def open(self, data_dir: str) -> Source:
        """The data; `data_dir` is where TFDS keeps its data sets, "" its own default."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(SourceConfig):
    """Scenes of one coloured shape, rendered on first use.

    Attributes:
      split: train, validation or held_out.
    """

    split: str = "train"

    def open(self, data_dir: str) -> Source:
        from clip_jax.data import shapes, tfds_source  # import TFDS

        return Cached(tfds_source.TfdsSource(shapes.prepared_builder(data_dir), self.split))


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(SourceConfig):
    """The handwritten digits that scikit-learn ships.

    Attributes:
      split: train or test.
    """

    split: str = "train"

    def open(self, data_dir: str) -> Source:
        return Digits(self.split)


@dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """Images in a folder, each with its captions in a text file beside it.

    Attributes:
      path: the folder.
    """

    path: str

    def open(self, data_dir: str) -> Source:
        return CaptionedFolder(self.path)


@dataclass(frozen=True, kw_only=True)
class TfdsConfig(SourceConfig):
    """A TensorFlow Datasets data set that is prepared as array records.

    Attributes:
      name: as TFDS spells it, such as `coco_captions/2017`.
      split: one of its splits, or a slice of one, such as `train[:90%]`.
      data_dir: where it was prepared; "" is the run's data_dir.
      image_field: its field with the images; "" is the one called image.
      caption_field: its field with the captions; "" is the one called captions, caption or text.
      label_field: its field with the labels; "" is the one called label.
    """

    name: str
    split: str = "train"
    data_dir: str = ""
    image_field: str = ""
    caption_field: str = ""
    label_field: str = ""

    def open(self, data_dir: str) -> Source:
        from clip_jax.data import tfds_source  # imports TFDS

        builder = tfds_source.open_builder(self.name, self.data_dir or data_dir)
        return tfds_source.TfdsSource(builder, self.split, self.image_field, self.caption_field, self.label_field)


SOURCES: dict[str, type[SourceConfig]] = {
    "shapes": ShapesConfig,
    "digits": DigitsConfig,
    "folder": FolderConfig,
    "tfds": TfdsConfig,
}


def make_sources(config: Mapping[str, Any], data_dir: str = "") -> tuple[tuple[Source, ...], tuple[float, ...]]:
    """Build the sources that a training run mixes.

    Args:
      config: from the name of each source to its fields: `{"shapes": {"weight": 3.0}, "digits": {}}`.
      data_dir: where TFDS keeps its data sets; "" is TFDS's own default, which `TFDS_DATA_DIR` sets.

    Returns:
      the sources and their weights.

    Raises:
      UserError: an unknown source or field, or data that is missing, empty or without captions.
    """
    if not config:
        raise UserError(f"data names no source: expected at least one of {', '.join(SOURCES)}")
    configs = {name: source_config(name, values) for name, values in config.items()}
    sources = {name: source.open(data_dir) for name, source in configs.items()}
    for name, source in sources.items():
        if not source[0].captions:
            raise UserError(f"data.{name} has no captions to train on; name their field in caption_field")
    return tuple(sources.values()), tuple(source.weight for source in configs.values())


def source_config(name: str, values: Any) -> SourceConfig:
    """The checked fields of one source.

    Args:
      name: what the configuration calls it.
      values: its fields, and its `kind` unless that is its name.

    Raises:
      UserError: an unknown kind, or a field that is unknown, missing or of another type; the message names it.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"data.{name} must hold fields, like {{'weight': 1.0}}; got {values!r}")
    values = dict(values)
    kind = values.pop("kind", name)
    if kind not in SOURCES:
        raise UserError(f"unknown data source {kind!r}; known are {', '.join(SOURCES)}")
    known = {field.name: field for field in fields(SOURCES[kind])}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) or sorted(known)
            raise UserError(f"data.{name} has no field {key!r}; did you mean {', '.join(near)}?")
        wanted = known[key].type
        if wanted is float and isinstance(value, int):
            values[key] = float(value)
        elif not isinstance(value, wanted):
            raise UserError(f"data.{name}.{key} must be of type {wanted.__name__}, got {value!r}")
    for key, field in known.items():
        if field.default is MISSING and not values.get(key):
            raise UserError(f"data.{name} needs a {key}: give --config.data.{name}.{key}={key.upper()}")
    return SOURCES[kind](**values)
