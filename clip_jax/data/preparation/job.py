"""What a preparation makes: which source, what becomes of its samples, and which range of them each shard holds."""

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

from clip_jax.data.access import Access
from clip_jax.data.damage import Damaged
from clip_jax.data.example import Source
from clip_jax.data.sources import SourceConfig
from clip_jax.errors import UserError
from clip_jax.options import kept_values, option

_PROBED = 100  # samples that are tried until one can be read


@dataclass(frozen=True)
class Options:
    """What becomes of the samples. A side is always the shorter side of an image: the one that training resizes."""

    max_side: int = option(0, "shrink images whose shorter side has more pixels than this; 0 shrinks none")
    quality: int = option(
        0, "store every image as JPEG of this quality, 1 to 100; 0 for files as they are, 95 if shrunk"
    )
    min_side: int = option(0, "leave out images whose shorter side has fewer pixels than this")
    max_aspect: float = option(0.0, "leave out images more elongated than this, such as 3; 0 keeps all")
    min_caption: int = option(0, "leave out captions of fewer characters, and samples that have no other")
    max_caption: int = option(0, "leave out captions of more characters, and samples that have no other; 0 keeps all")
    dedup: str = option(
        "none", "leave out repeated images, the first stays: none, exact (equal files), perceptual (look alike)"
    )
    dedup_distance: int = option(
        3, "perceptual: how many of a hash's 64 bits may differ; 0 finds copies that were resized"
    )
    samples_per_shard: int = option(2048, "samples of the source that one file holds, less those that are left out")
    max_damaged: float = option(0.01, "the share of damaged samples, of more than 10, at which preparation stops", True)

    def __post_init__(self):
        for name in ("max_side", "min_side", "max_aspect", "min_caption", "max_caption"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.quality <= 100:
            raise UserError(f"quality must be between 1 and 100, or 0 for files as they are; got {self.quality}")
        if 0 < self.max_side < self.min_side:
            raise UserError(f"min_side must not be above max_side, got {self.min_side} and {self.max_side}")
        if 0 < self.max_aspect < 1:
            raise UserError(f"max_aspect is longer side / shorter side, at least 1; got {self.max_aspect}")
        if self.dedup not in ("none", "exact", "perceptual"):
            raise UserError(f"dedup must be none, exact or perceptual, got {self.dedup!r}")
        if not 0 <= self.dedup_distance <= 15:
            raise UserError(f"dedup_distance must be between 0 and 15, got {self.dedup_distance}")
        if self.samples_per_shard < 1:
            raise UserError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")
        if not 0 <= self.max_damaged <= 1:
            raise UserError(f"max_damaged must be between 0 and 1, got {self.max_damaged}")


@dataclass(frozen=True)
class Shape:
    """What the samples of a source have in common.

    Attributes:
      samples: how many there are.
      captions: whether they have captions.
      labels: whether they have labels.
      class_names: of the labels; empty where they are only numbers.
    """

    samples: int
    captions: bool
    labels: bool
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One preparation, as it is sent to whoever works at it.

    Attributes:
      kind: of the source, its name in `SOURCES`.
      config: the source's fields.
      options: what becomes of the samples.
      shape: what the samples have in common.
      folder: where the work is done, which every worker sees.
    """

    kind: str
    config: SourceConfig
    options: Options
    shape: Shape
    folder: str

    @property
    def source(self) -> Source:
        """The data; every process opens it once."""
        source = _opened(self.config)
        if len(source) != self.shape.samples:
            raise UserError(f"{source.name} had {self.shape.samples} samples and has {len(source)} now: begin again")
        return source

    @property
    def shards(self) -> int:
        """The number of ranges, and so of shards."""
        return math.ceil(self.shape.samples / self.options.samples_per_shard)

    def range(self, number: int) -> range:
        """The samples of a shard."""
        size = self.options.samples_per_shard
        return range(number * size, min((number + 1) * size, self.shape.samples))

    def path(self, stage: str, number: int, suffix: str) -> str:
        """The file of a range."""
        return os.path.join(self.folder, stage, f"{number:05}.{suffix}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain values by name."""
        return {
            "source": self.kind,
            **kept_values(self.config, "source."),
            **kept_values(self.options),
            "samples": self.shape.samples,
        }


def make_job(kind: str, config: SourceConfig, options: Options, folder: str) -> Job:
    """Open a source and describe what is made of it.

    Raises:
      UserError: the source cannot be opened, or none of its first samples can be read.
    """
    source = _opened(config)
    for index in range(min(len(source), _PROBED)):
        try:
            example = source[index]
            break
        except (Damaged, OSError) as error:
            first_error = error
    else:
        raise UserError(f"none of the first {_PROBED} samples of {source.name} can be read: {first_error}")
    class_names = tuple(getattr(source, "class_names", ()))
    labels = bool(class_names) or example.label is not None
    if not example.captions and not labels:
        raise UserError(
            f"{source.name} has neither captions nor labels; name their field, as in --source.caption_field=F"
        )
    return Job(kind, config, options, Shape(len(source), bool(example.captions), labels, class_names), folder)


@functools.lru_cache(1)
def _opened(config: SourceConfig) -> Source:
    return config.open(Access())
