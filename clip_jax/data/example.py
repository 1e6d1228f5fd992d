"""What a data set is to the rest of the project: a sequence of examples that can be read in any order."""

import dataclasses
from typing import Protocol, runtime_checkable

from PIL import Image

from clip_jax.processing.images import open_image


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with what is known about it.

    Attributes:
      image: a file's content as stored, not yet looked into; or a picture, from sources that have no files.
      captions: texts that describe it; empty where the data set has only labels.
      label: the number of its class, or those of several (which may be none); None where nothing is known.
      key: what the data set calls it: a file's name, a key of a shard, a row. Empty where it has no name.
    """

    image: bytes | Image.Image
    captions: tuple[str, ...] = ()
    label: int | tuple[int, ...] | None = None
    key: str = ""


@runtime_checkable
class Source(Protocol):
    """A finite data set with random access, safe to read from several threads at once; pickled for other processes.

    A source may also have `where(index)` (words for the file and offset of an example), `windows` (how its examples are
    shuffled if not altogether) and `damage` (what it found broken when it was opened).

    Attributes:
      name: what messages call it.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class LabelledSource(Source, Protocol):
    """A source whose examples have labels.

    Attributes:
      class_names: the names of the classes, in the order of the labels.
    """

    class_names: tuple[str, ...]


def where(source: Source, index: int) -> str:
    """Where an example is, for messages: what the source says (`where`), or its number."""
    return source.where(index) if hasattr(source, "where") else f"{source.name}, example {index}"


class Cached:
    """A labelled source that keeps each example, decoded, after its first reading: for data that fits into memory."""

    def __init__(self, source: LabelledSource):
        self.name, self.class_names = source.name, source.class_names
        self._source = source
        self._examples: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        if index not in self._examples:
            example = self._source[index]
            self._examples[index] = dataclasses.replace(example, image=open_image(example.image))
        return self._examples[index]
