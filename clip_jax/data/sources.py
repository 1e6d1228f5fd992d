"""The data sources that a configuration can name: one frozen class per kind, whose fields a configuration sets.

A new kind costs one class and its line in `SOURCES`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from clip_jax.data import files, tables, tar, tfrecord
from clip_jax.data.access import Access
from clip_jax.data.damage import Damaged
from clip_jax.data.digits import Digits
from clip_jax.data.example import Cached, Source
from clip_jax.data.folder import images_of, open_divided, open_folder
from clip_jax.data.held_out import Division
from clip_jax.data.order import Windows
from clip_jax.data.sharded import Fields, ShardedSource
from clip_jax.data.shards import Shards
from clip_jax.data.targets import Texts
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
    templates: tuple[str, ...] | str = option(
        (), "captions of class folders, with commas between, as 'a photo of a {}.'; empty for text files"
    )
    held_out: float = option(
        0.0, "share of each class's images to hold out of training and judge by; their names decide which"
    )

    def __post_init__(self):
        super().__post_init__()
        _check_path(self.path, "the folder, as in --config.data.folder.path=PATH")
        if isinstance(self.templates, str):  # of an override, which knows no types of a source's fields
            object.__setattr__(self, "templates", tuple(filter(None, self.templates.split(","))))
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be at least 0 and below 1, got {self.held_out}")

    def open(self, access: Access) -> Source:
        return self.divided()[0] if self.held_out else open_folder(self.path, self.templates)

    def divided(self) -> tuple[Source, Source, Division]:
        """What to train on, what is held out, and how the folder was divided."""
        return open_divided(self.path, self.templates, self.held_out)

    def trained(self) -> Collection[str]:
        """Paths of the images to train on."""
        return self.divided()[2].train if self.held_out else images_of(self.path)

    def parts(self) -> dict[str, list[str]]:
        """The images of both parts, by their paths below the folder."""
        return self.divided()[2].paths_below(self.path)


@dataclass(frozen=True, kw_only=True)
class TableConfig(SourceConfig):
    """What the sources of tables have."""

    path: str = option(help="of the files: braces, as in {00000..00099}, and * are expanded; gs:// and s3:// too")
    image_column: str = option("", "images, as bytes or paths; empty for the usual names, such as image and filepath")
    caption_column: str = option("", "text, or lists of texts; empty for caption, captions, text or title")
    label_column: str = option("", "classes, as text or whole numbers; empty for none")

    def __post_init__(self):
        super().__post_init__()
        _check_path(self.path, "the files, as in 'tables/*.parquet'")

    def columns(self) -> tables.Columns:
        """What is what."""
        return tables.Columns(self.image_column, self.caption_column, self.label_column)


@dataclass(frozen=True, kw_only=True)
class ParquetConfig(TableConfig):
    """Parquet files with captions, and with images or their paths."""

    window: int = option(4, "row groups whose rows are mixed; window * lanes row groups are in memory at a time")
    lanes: int = option(8, "parts of a batch that read row groups of their own; best a multiple of the number of hosts")

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "window", "lanes")

    def open(self, access: Access) -> Source:
        return tables.open_parquet(self.path, self.columns(), self.window, self.lanes)


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


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(SourceConfig):
    """What the sources of shards have."""

    path: str = option(help="of the shards: braces, as in {00000..00099}, and * are expanded; gs:// and s3:// too")
    image_field: str = option("", "the image of a sample; empty for the usual names, such as jpg, png, image")
    caption_field: str = option("", "its caption; empty for txt, caption or text")
    label_field: str = option("", "its label; empty for cls or label")
    block: int = option(128, "neighbouring samples that are read together; 1 mixes all samples and reads them singly")
    window: int = option(128, "blocks whose samples are mixed; block * window * lanes samples are open at a time")
    lanes: int = option(8, "parts of a batch that read blocks of their own; best a multiple of the number of hosts")
    index_dir: str = option("", "where indexes are kept; empty for beside the shards, or the cache", may_change=True)

    def __post_init__(self):
        super().__post_init__()
        _check_path(self.path, "the shards, as in 'shards/{00000..00099}.tar'")
        _check_positive(self, "block", "window", "lanes")

    def open_shards(self, data_format: Any) -> Source:
        """The samples of shards in the format of a module, `tar` or `tfrecord`."""
        shards = Shards(files.find(self.path), data_format.scan, self.index_dir)
        fields = Fields(self.image_field, self.caption_field, self.label_field)
        windows = None if self.block == 1 else Windows(self.block, self.window, self.lanes)
        return ShardedSource(shards, data_format.parse, fields, windows, self.path)


@dataclass(frozen=True, kw_only=True)
class TarConfig(ShardsConfig):
    """Tar shards in the WebDataset layout, as img2dataset writes them, plain or gzip."""

    def open(self, access: Access) -> Source:
        return self.open_shards(tar)


@dataclass(frozen=True, kw_only=True)
class TfrecordConfig(ShardsConfig):
    """TFRecord shards of tf.train.Example, as img2dataset writes them."""

    def open(self, access: Access) -> Source:
        return self.open_shards(tfrecord)


def _check_path(path: str, what: str) -> None:
    if not path:
        raise UserError(f"path is empty; name {what}")


def _check_positive(config: SourceConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}")


SOURCES: dict[str, type[SourceConfig]] = {
    "shapes": ShapesConfig,
    "digits": DigitsConfig,
    "folder": FolderConfig,
    "tar": TarConfig,
    "tfrecord": TfrecordConfig,
    "parquet": ParquetConfig,
    "csv": CsvConfig,
    "tfds": TfdsConfig,
}


def make_sources(
    config: Mapping[str, Any],
    access: Access = Access(),
    check_source: Callable[[Source], Any] = Texts.check_source,
) -> tuple[tuple[Source, ...], tuple[float, ...]]:
    """Build the sources that a training run mixes.

    Args:
      config: from the name of each source to its fields: `{"shapes": {"weight": 3.0}, "digits": {}}`.
      access: where TFDS keeps its data sets, and whether it may fetch missing ones.
      check_source: that of a `Target`; refuses a source without what training reads, by default captions.

    Returns:
      the sources and their weights.

    Raises:
      UserError: an unknown source or field, or data that is missing, empty or refused by `check_source`.
    """
    if not config:
        raise UserError(f"data names no source: expected at least one of {', '.join(SOURCES)}")
    configs = {name: source_config(name, config[name]) for name in sorted(config)}  # the order decides the stream
    sources = {name: source.open(access) for name, source in configs.items()}
    for name, source in sources.items():
        try:
            check_source(source)
        except Damaged:  # the first example, which says nothing of the others
            continue
        except UserError as error:
            raise UserError(f"data.{name} {error}") from error
    return tuple(sources.values()), tuple(source.weight for source in configs.values())


def held_out_of(config: Mapping[str, Any]) -> dict[str, FolderConfig]:
    """The sources that hold a part of their images out of training, by name."""
    configs = {name: source_config(name, config[name]) for name in sorted(config)}
    return {name: source for name, source in configs.items() if isinstance(source, FolderConfig) and source.held_out}


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
