"""Where a prepared data set goes, and what it is called."""

import os
import re
from dataclasses import dataclass

from clip_jax.data.sources import SourceConfig

VERSION = "1.0.0"


@dataclass(frozen=True)
class Destination:
    """Where a data set goes.

    Attributes:
      data_dir: TFDS's word for the folder of all data sets.
      name: of the data set.
      split: the one that it has.
    """

    data_dir: str
    name: str
    split: str

    @property
    def folder(self) -> str:
        """Of the data set."""
        return os.path.join(self.data_dir, self.name)

    @property
    def finished(self) -> str:
        """The folder that appears when all is done."""
        return os.path.join(self.folder, VERSION)

    @property
    def unfinished(self) -> str:
        """The folder in which the work is done; TFDS takes no notice of it."""
        return os.path.join(self.folder, f"incomplete.{VERSION}")


def default_name(kind: str, config: SourceConfig) -> str:
    """What a source is called: its file or, if that is a pattern, its folder; for the others, their kind or name."""
    path = getattr(config, "path", "")
    if path:
        parts = [part for part in path.rstrip("/").split("/") if not re.search(r"[*?{\[]", part)]
        called = os.path.basename(os.path.abspath("/".join(parts) or "."))
        called = called.partition(".")[0]
    else:
        called = f"my_{getattr(config, 'name', kind).partition('/')[0].partition(':')[0]}"
    name = re.sub(r"\W+", "_", called.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"data_{name}"


def is_taken(name: str) -> bool:
    """Whether a data set that TFDS itself knows has this name, and would be opened in place of ours."""
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls(name)
    except ValueError:  # DatasetNotFoundError
        return False
    return True
