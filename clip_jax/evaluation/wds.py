"""The layout of the `clip-benchmark/wds_*` collection, as far as retrieval needs it.

`SPLIT/0.tar`, `SPLIT/1.tar`, … with their number in `SPLIT/nshards.txt`; `dataset_type.txt` beside the splits says
`retrieval`, and each sample's `txt` holds its captions, one a line.
"""

import dataclasses
import glob
import os

from clip_jax.data.access import Access
from clip_jax.data.checked import decoded_captions, read_file
from clip_jax.data.example import Example, Source, where
from clip_jax.data.sources import TarConfig
from clip_jax.errors import UserError

_SHARDS = "nshards.txt"


def open_retrieval(path: str) -> Source | None:
    """A split of a retrieval set.

    Args:
      path: of the data set, for its test split, or of a split.

    Returns:
      images with several captions each; None if the folder has not got this layout, or is none of retrieval.

    Raises:
      UserError: a shard is missing, or a file cannot be read.
    """
    split = next((folder for folder in (path, os.path.join(path, "test")) if _has(folder, _SHARDS)), None)
    root = os.path.dirname(os.path.abspath(split)) if split else ""
    if not split or not _has(root, "dataset_type.txt") or _read(root, "dataset_type.txt") != "retrieval":
        return None
    shards, expected = glob.glob(os.path.join(glob.escape(split), "*.tar")), _read(split, _SHARDS)
    if str(len(shards)) != expected:
        raise UserError(f"{split} should hold {expected} shards, as its {_SHARDS} says, but has {len(shards)}")
    return CaptionLines(TarConfig(path=os.path.join(glob.escape(split), "*.tar")).open(Access()))


class CaptionLines:
    """A source in which each line of a caption is a caption."""

    def __init__(self, source: Source):
        self.name, self.damage = source.name, getattr(source, "damage", ())
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        lines = [line for caption in example.captions for line in caption.splitlines()]
        return dataclasses.replace(example, captions=decoded_captions(lines))

    def where(self, index: int) -> str:
        """Where the source has an example."""
        return where(self._source, index)


def _has(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _read(folder: str, name: str) -> str:
    """The one line of a small file."""
    return next(iter(decoded_captions([read_file(os.path.join(folder, name), "unreadable")])), "")
