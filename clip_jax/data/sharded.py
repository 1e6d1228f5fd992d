"""`tar` and `tfrecord`: samples of shards as examples, read in blocks of neighbours."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clip_jax.data import files
from clip_jax.data.checked import decoded_captions
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.example import Example
from clip_jax.data.kept import Kept
from clip_jax.data.order import Windows
from clip_jax.data.shards import Shards, whole
from clip_jax.platform import usable_cores

Parse = Callable[[bytes], tuple[str, Mapping[str, Any]]]  # a sample's bytes to its key and its fields

# What is taken where a configuration names no field: members of WebDataset, features of img2dataset.
_IMAGES = ("jpg", "jpeg", "png", "webp", "image", "gif", "bmp", "tif", "tiff", "img", "image/encoded")
_CAPTIONS = ("txt", "caption", "text", "captions")
_LABELS = ("cls", "label")


@dataclass(frozen=True)
class Fields:
    """Which fields of a sample are its image, captions and label; "" takes the usual name.

    A field is a member by its extension, a feature by its name, or an entry of the sample's `json` member.
    """

    image: str = ""
    caption: str = ""
    label: str = ""


class ShardedSource:
    """Samples of shards.

    Args:
      shards: the bytes of each sample.
      parse: takes a sample apart: `tar.parse` or `tfrecord.parse`.
      fields: what is what in a sample.
      windows: how its samples are shuffled; None mixes all of them, and reads each by itself.
      name: what messages call it.
    """

    def __init__(self, shards: Shards, parse: Parse, fields: Fields, windows: Windows | None, name: str):
        self.name, self.windows, self.damage = name, windows, shards.damage
        self._shards, self._parse, self._fields = shards, parse, fields
        self._reader = _block_reader(shards, windows)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Example:
        return _example(*self._parse(self._reader.read(index)), self._fields)

    def where(self, index: int) -> str:
        """The shard that an example is in, and the offset there."""
        path, offset, _ = self._shards.where(index)
        return f"{path}, offset {offset}"


def _example(key: str, sample: Mapping[str, Any], fields: Fields) -> Example:
    with naming(f"key {key!r}"):
        sample = _with_json(sample, fields)
        image = _first(sample, fields.image, _IMAGES)
        if not isinstance(image, bytes) or not image:
            raise Damaged("image", f"expected an image, got the fields {', '.join(sample)}")
        captions = _first(sample, fields.caption, _CAPTIONS)
        label = _first(sample, fields.label, _LABELS)
        return Example(image, _captions(captions), None if label is None else _label(label), key)


def _first(sample: Mapping[str, Any], wanted: str, usual: tuple[str, ...]) -> Any:
    """The field that is wanted, or the first of the usual ones that there is."""
    return next((sample[name] for name in ((wanted,) if wanted else usual) if name in sample), None)


def _with_json(sample: Mapping[str, Any], fields: Fields) -> Mapping[str, Any]:
    """The sample with the entries of its `json` member, if what is wanted is not there without them."""
    wanted = (fields.image, fields.caption, fields.label)
    if not isinstance(sample.get("json"), bytes) or not any(name and name not in sample for name in wanted):
        return sample
    try:
        entries = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise Damaged("caption", f"its json is damaged: {error}") from error
    return {**entries, **sample} if isinstance(entries, dict) else sample


def _captions(value: Any) -> tuple[str, ...]:
    """One caption, or a list of them, as text; none where there is nothing to read."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return decoded_captions(text if isinstance(text, bytes | str) else str(text) for text in values)


def _label(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, tuple):
        return value
    value = value[0] if isinstance(value, list) and value else value
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise Damaged("unreadable", f"expected a whole number as label, got {value!r:.40}") from error


def _block_reader(shards: Shards, windows: Windows | None) -> "Shards | _Blocks":
    """What reads single samples, by way of their blocks if they come in blocks."""
    if windows is None:
        return shards
    remote = any(files.is_remote(path) for path in shards.paths)
    return (_RemoteBlocks if remote else _LocalBlocks)(shards, windows)


class _Blocks:
    """Does what is to be done once for each block; of as many blocks as the windows in use have."""

    def __init__(self, shards: Shards, windows: Windows):
        self._shards, self._block = shards, windows.block
        # Of every lane its window, and some of the next.
        in_use = (windows.window + 2) * windows.lanes + 2 * usable_cores()
        self._blocks = Kept(self._begin, in_use, _one)

    def _begin(self, number: int) -> list[bytes] | None:
        first = number * self._block
        return self._begin_range(first, min(first + self._block, len(self._shards)))


class _LocalBlocks(_Blocks):
    """Reads samples one at a time; tells the system to fetch the whole block when its first one is read."""

    def read(self, index: int) -> bytes:
        self._blocks[index // self._block]
        return self._shards.read(index)

    def _begin_range(self, first: int, end: int) -> None:
        for path, offset, size in self._shards.ranges(first, end):
            files.will_read(path, offset, size)


class _RemoteBlocks(_Blocks):
    """Fetches whole blocks, each by one request a shard."""

    def read(self, index: int) -> bytes:
        number, inside = divmod(index, self._block)
        return whole(self._blocks[number][inside], self._shards.where(index)[2])

    def _begin_range(self, first: int, end: int) -> list[bytes]:
        return self._shards.read_range(first, end)


def _one(block: object) -> int:
    return 1
