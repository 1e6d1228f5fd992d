"""The data sources that a configuration can name: one frozen class per kind, whose fields a configuration sets.

A new kind costs one class and its line in `SOURCES`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clip_jax.data import tables
from clip_jax.data.access import Access
from clip_jax.data.digits import Digits
from clip_jax.data.example import Cached, Source
from clip_jax.data.folder import open_folder
from clip_jax.errors import UserError
from clip_jax.options import from_dict, option


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What every kind of source has."""

    weight: float = option(1.0, "how often it is drawn from, relative to the others")

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise UserError(f"weight must be above 0, got {self.weight}")

    def open(self, access: Access) -> Source:
        """The data that the fields describe."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(SourceConfig):
    """Scenes of one coloured shape, rendered on first use."""

    split: str = option("train", "train, validation or held_out")

    def open(self, access: Access) -> Source:
        from clip_jax.data import shapes, tfds_source  # import TFDS

        return Cached(tfds_source.TfdsSource(shapes.prepared_builder(access.data_dir), self.split))


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(SourceConfig):
    """The handwritten digits that scikit-learn ships."""

    split: str = option("train", "train or test")

    def open(self, access: Access) -> Source:
        return Digits(self.split)


@dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """Images in a folder, with captions in text files beside them, or with one sub-folder for each class."""

    path: str = option(help="of the folder")
    templates: tuple[str, ...] = option((), "captions of class folders, as 'a photo of a {}.'; empty for text files")

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise UserError("path is empty; name the folder, as in --config.data.folder.path=PATH")

    def open(self, access: Access) -> Source:
        return open_folder(self.path, self.templates)


@dataclass(frozen=True, kw_only=True)
class TableConfig(SourceConfig):
    """What the sources of tables have."""

    path: str = option(help="of the files: braces, as in {00000..00099}, and * are expanded; gs:// and s3:// too")
    image_column: str = option("", "images, as bytes or paths; empty for the usual names, such as image and filepath")
    caption_column: str = option("", "text, or lists of texts; empty for caption, captions, text or title")
    label_column: str = option("", "classes, as text or whole numbers; empty for none")

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise UserError("path is empty; name the files, as in 'tables/*.parquet'")

    def columns(self) -> tables.Columns:
        """What is what."""
        return tables.Columns(self.image_column, self.caption_column, self.label_column)


@dataclass(frozen=True, kw_only=True)
class ParquetConfig(TableConfig):
    """Parquet files with captions, and with images or their paths."""

    def open(self, access: Access) -> Source:
        return tables.open_parquet(self.path, self.columns())


@dataclass(frozen=True, kw_only=True)
class CsvConfig(TableConfig):
    """CSV or TSV files with captions and the paths of images."""

    def open(self, access: Access) -> Source:
        return tables.open_csv(self.path, self.columns())


@dataclass(frozen=True, kw_only=True)
class TfdsConfig(SourceConfig):
    """A TensorFlow Datasets data set, prepared by TFDS where it is missing."""

    name: str = option(help="as TFDS spells it, such as coco_captions/2017")
    split: str = option("train", "one of its splits, or a slice of one, such as train[:90%]")
    data_dir: str = option("", "where it was prepared; empty for the run's data_dir")
    image_field: str = option("", "its field with the images; empty for the one called image")
    caption_field: str = option("", "its field with the captions; empty for the one called captions, caption or text")
    label_field: str = option("", "its field with the labels; empty for the one called label")

    def open(self, access: Access) -> Source:
        from clip_jax.data import tfds_builder, tfds_source  # import TFDS

        own = replace(access, data_dir=self.data_dir or access.data_dir)
        builder = tfds_builder.open_builder(self.name, own)
        return tfds_source.TfdsSource(builder, self.split, self.image_field, self.caption_field, self.label_field)


SOURCES: dict[str, type[SourceConfig]] = {
    "shapes": ShapesConfig,
    "digits": DigitsConfig,
    "folder": FolderConfig,
    "parquet": ParquetConfig,
    "csv": CsvConfig,
    "tfds": TfdsConfig,
}


def make_sources(config: Mapping[str, Any], access: Access = Access()) -> tuple[tuple[Source, ...], tuple[float, ...]]:
    """Build the sources that a training run mixes.

    Args:
      config: from the name of each source to its fields: `{"shapes": {"weight": 3.0}, "digits": {}}`.
      access: where TFDS keeps its data sets, and whether it may fetch missing ones.

    Returns:
      the sources and their weights.

    Raises:
      UserError: an unknown source or field, or data that is missing, empty or without captions.
    """
    if not config:
        raise UserError(f"data names no source: expected at least one of {', '.join(SOURCES)}")
    configs = {name: source_config(name, config[name]) for name in sorted(config)}  # the order decides the stream
    sources = {name: source.open(access) for name, source in configs.items()}
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
    kind = name
    if isinstance(values, Mapping):
        values = dict(values)
        kind = values.pop("kind", name)
    if kind not in list(SOURCES):
        raise UserError(f"unknown data source {kind!r}; known are {', '.join(SOURCES)}")
    return from_dict(SOURCES[kind], values, f"data.{name}")
