"""The layout of the collection `clip-benchmark/wds_*`: tar shards of a split, class names and templates beside them.

`SPLIT/0.tar`, `SPLIT/1.tar`, … with their number in `SPLIT/nshards.txt`; `classnames.txt`, in the order of the labels;
`zeroshot_classification_templates.txt`; and `dataset_type.txt`: `classification` (also without the file), `multilabel`
or `retrieval`. A sample is an image with its label in `cls`, one number for each class in `npy`, or captions in `txt`,
one a line. Folders may be in buckets.
"""

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_jax.data import files, tar
from clip_jax.data.checked import decoded_captions
from clip_jax.data.damage import Damaged
from clip_jax.data.example import Example
from clip_jax.data.sharded import Fields, ShardedSource
from clip_jax.data.shards import Shards
from clip_jax.errors import UserError

TYPES = ("classification", "multilabel", "retrieval")
SHARD_COUNT = "nshards.txt"
TEXT_FILES = ("dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt")

_MAX_SHARDS = 100_000
_MAX_TEXT = 2**22  # bytes of a list of names
_MAX_LINE = 2_000  # characters
_MAX_CLASSES = 2**17


class WdsSource:
    """A split of a data set in this layout.

    Args:
      path: of the data set.
      split: the folder of its shards.

    Attributes:
      name: what messages call it.
      type: one of `TYPES`.
      class_names: in the order of the labels; empty where there is no such file.
      templates: sentences with `{c}` for a class name; empty where there is no such file.
      damage: what is wrong with the shards.

    Raises:
      UserError: the folder does not have this layout, or a part of it is missing.
    """

    def __init__(self, path: str, split: str = "test"):
        self.name = f"{path}, {split}"
        self.type = (_lines(path, "dataset_type.txt") or TYPES[:1])[0]
        if self.type not in TYPES:
            raise UserError(f"{path}/dataset_type.txt says {self.type!r}: expected one of {', '.join(TYPES)}")
        self.class_names = _lines(path, "classnames.txt")
        self.templates = _lines(path, "zeroshot_classification_templates.txt")
        found = _shards(files.join(path, split))
        shards = Shards(found, tar.scan)
        self._samples = ShardedSource(shards, _PARSERS[self.type], Fields(), None, self.name)
        self.damage = shards.damage

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Example:
        return self._samples[index]

    def where(self, index: int) -> str:
        """The shard that an example is in, and the offset there."""
        return self._samples.where(index)


def is_wds(path: str, split: str = "test", whole: bool = False) -> bool:
    """Whether a folder has a split in this layout; `whole`: with all its shards."""
    folder = files.join(path, split)
    if _text(files.join(folder, SHARD_COUNT)) is None:
        return False
    try:
        return not whole or bool(_shards(folder))
    except UserError:
        return False


def _shards(folder: str) -> list[files.File]:
    return [files.one(files.join(folder, f"{number}.tar")) for number in range(_shard_count(folder))]


def _shard_count(folder: str) -> int:
    text = _text(files.join(folder, SHARD_COUNT))
    if text is None:
        raise UserError(f"{folder} has no {SHARD_COUNT}, which says how many shards there are")
    if not text.strip().isdecimal() or not 0 < int(text) <= _MAX_SHARDS:
        raise UserError(f"{folder}/{SHARD_COUNT}: expected a number from 1 to {_MAX_SHARDS:,}, got {text[:40]!r}")
    return int(text)


def _lines(path: str, name: str) -> tuple[str, ...]:
    """The lines of a small file, in their places; none where it is missing."""
    text = _text(files.join(path, name))
    lines = tuple(line.strip() for line in (text or "").rstrip().splitlines())
    if any(len(line) > _MAX_LINE for line in lines):
        raise UserError(
            f"{path}/{name} has a line of over {_MAX_LINE:,} characters: expected a list of names or sentences"
        )
    return lines


def _text(path: str) -> str | None:
    try:
        content = files.read(path, 0, _MAX_TEXT + 1)
    except OSError:
        return None
    if len(content) > _MAX_TEXT:
        raise UserError(f"{path} has over {_MAX_TEXT:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _parse_classes(content: bytes) -> tuple[str, Mapping[str, Any]]:
    key, sample = tar.parse(content)
    return key, {**sample, "cls": classes_of(sample.get("npy", b""))}


def _parse_captions(content: bytes) -> tuple[str, Mapping[str, Any]]:
    key, sample = tar.parse(content)
    return key, {**sample, "txt": list(decoded_captions(sample.get("txt", b"").splitlines()))}


_PARSERS: dict[str, Callable[[bytes], tuple[str, Mapping[str, Any]]]] = {
    "classification": tar.parse,
    "multilabel": _parse_classes,
    "retrieval": _parse_captions,
}


def classes_of(content: bytes) -> tuple[int, ...]:
    """The classes whose number is above 0 in a `.npy` file with one number for each class.

    The header says how large the array is; nothing is allocated by it, and pickles are not read.

    Raises:
      Damaged: it is no such file.
    """
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception as error:  # numpy's parser of the header raises many kinds
        raise Damaged("unreadable", f"its npy is damaged: {error!s:.200}") from error
    if dtype.kind not in "biuf" or len(shape) != 1 or shape[0] > _MAX_CLASSES:
        raise Damaged("unreadable", f"its npy has shape {shape} of {dtype}: expected one number for each class")
    body = content[stream.tell() :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise Damaged("cut", f"its npy claims {math.prod(shape)} numbers and has {len(body)} bytes")
    return tuple(np.flatnonzero(np.frombuffer(body, dtype) > 0).tolist())
