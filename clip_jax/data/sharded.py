"""`tar` and `tfrecord`: samples of shards as examples, read in blocks of neighbours."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

from clip_jax.data import files
from clip_jax.data.checked import decoded_captions
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.example import Example
from clip_jax.data.order import Windows
from clip_jax.data.shards import Shards

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


def _block_reader(shards: Shards, windows: Windows | None) -> "Shards | _LocalBlocks | _RemoteBlocks":
    """What reads single samples, by way of their blocks if they come in blocks."""
    if windows is None:
        return shards
    remote = any(files.is_remote(path) for path in shards.paths)
    return _RemoteBlocks(shards, windows) if remote else _LocalBlocks(shards, windows)


class _LocalBlocks:
    """Reads samples one at a time; tells the system to fetch the whole block when its first one is read."""

    def __init__(self, shards: Shards, windows: Windows):
        self._shards, self._block = shards, windows.block
        self._advised: OrderedDict[int, None] = OrderedDict()
        self._room = _open_blocks(windows)

    def read(self, index: int) -> bytes:
        block = index // self._block
        if block not in self._advised:
            self._advised[block] = None
            self._advise(block)
            while len(self._advised) > self._room:
                self._advised.popitem(last=False)
        return self._shards.read(index)

    def _advise(self, block: int) -> None:
        first, end = block * self._block, min((block + 1) * self._block, len(self._shards))
        for path, offset, size in self._shards.ranges(first, end):
            files.will_read(path, offset, size)


class _RemoteBlocks:
    """Fetches whole blocks, each by one request a shard, and keeps those that the windows in use need."""

    def __init__(self, shards: Shards, windows: Windows):
        self._shards, self._block, self._room = shards, windows.block, _open_blocks(windows)
        self._blocks: OrderedDict[int, Future] = OrderedDict()
        self._lock = Lock()

    def read(self, index: int) -> bytes:
        number, inside = divmod(index, self._block)
        with self._lock:
            future = self._blocks.get(number)
            is_first = future is None
            if is_first:
                future = self._blocks[number] = Future()
                while len(self._blocks) > self._room:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(number)
        if is_first:
            self._fetch(number, future)
        return self._shards.whole(index, future.result()[inside])

    def _fetch(self, number: int, future: Future) -> None:
        first = number * self._block
        try:
            future.set_result(self._shards.read_range(first, min(first + self._block, len(self._shards))))
        except BaseException as error:
            with self._lock:
                self._blocks.pop(number, None)
            future.set_exception(error)

    def __getstate__(self):  # for worker processes
        return self.__dict__ | {"_blocks": OrderedDict(), "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state | {"_lock": Lock()})


def _open_blocks(windows: Windows) -> int:
    """Blocks that may be in use at a time: of every lane its window, and some of the next."""
    return (windows.window + 2) * windows.lanes + 2 * (os.cpu_count() or 1)
