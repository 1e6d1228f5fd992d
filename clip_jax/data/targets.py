"""What training reads of an example besides its image: a caption as tokens, or the number of its class."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from clip_jax.data.damage import NO_CAPTION, Damaged
from clip_jax.data.example import Example, Source
from clip_jax.errors import UserError
from clip_jax.processing import Tokenizer

_CACHED_TEXTS = 2**16  # all captions of the embedded data sets
_LONGEST_CACHED = 1000  # characters; texts of megabytes would fill the memory


@runtime_checkable
class Target(Protocol):
    """Turns an example into an array of a batch.

    Attributes:
      name: of the array.
      shape: of one example's part of it, int32.
    """

    name: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]: ...

    def check_source(self, source: Source) -> None:
        """Refuse a source whose examples cannot have a target.

        Raises:
          UserError: the message goes on from the name of the source.
        """
        ...

    def words(self, source: Source, example: Example) -> tuple[str, ...]:
        """What the example can be called, of which training draws one.

        Raises:
          Damaged: there is nothing.
        """
        ...

    def numbers(self, word: str) -> Int32[np.ndarray, "*shape"]:
        """What stands in the batch for one of `words`."""
        ...


@dataclass(frozen=True)
class Texts:
    """Captions; longer ones than the tokenizer's context are truncated."""

    tokenizer: Tokenizer
    name: ClassVar[str] = "text"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tokenizer.context_length,)

    @staticmethod
    def check_source(source: Source) -> None:
        """See `Target`."""
        if not source[0].captions:
            raise UserError("has no captions to train on; name their field in caption_field")

    def words(self, source: Source, example: Example) -> tuple[str, ...]:
        """See `Target`."""
        if not example.captions:
            raise Damaged("caption", NO_CAPTION)
        return example.captions

    def numbers(self, word: str) -> Int32[np.ndarray, "context_length"]:
        """See `Target`."""
        tokenize = _cached_tokens if len(word) <= _LONGEST_CACHED else _cached_tokens.__wrapped__
        return tokenize(self.tokenizer, word)


@dataclass(frozen=True)
class Labels:
    """Classes, which sources number each in its own way: they are told apart by their names.

    Attributes:
      classes: their names, in the order of the numbers that stand in a batch.
    """

    classes: tuple[str, ...]
    name: ClassVar[str] = "label"
    shape: ClassVar[tuple[int, ...]] = ()

    def check_source(self, source: Source) -> None:
        """See `Target`."""
        unknown = [name for name in class_names(source) if name not in self._numbers]
        if unknown:
            raise UserError(
                f"has {len(unknown)} classes that model.classes does not name, such as {unknown[0]!r}: name them "
                "there, or leave model.classes empty to take those of the data"
            )
        if isinstance(source[0].label, tuple):
            raise UserError("has images of several classes each, but a head learns one")

    def words(self, source: Source, example: Example) -> tuple[str, ...]:
        """See `Target`."""
        label, names = example.label, source.class_names
        if label is None or isinstance(label, tuple) or not 0 <= label < len(names):
            raise Damaged("label", f"expected the number of one of {len(names)} classes, got {label!r:.80}")
        return (class_name(names[label]),)

    def numbers(self, word: str) -> Int32[np.ndarray, ""]:
        """See `Target`."""
        return np.array(self._numbers[word], np.int32)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}


def class_name(label: str) -> str:
    """What a data set's class is called everywhere: `aquarium_fish` is aquarium fish."""
    return label.replace("_", " ")


def class_names(source: Source) -> tuple[str, ...]:
    """The names of a source's classes, in the order of its labels.

    Raises:
      UserError: it has none, or two of the same; the message goes on from its name.
    """
    names = tuple(map(class_name, getattr(source, "class_names", ())))
    if not names:
        raise UserError("has no named classes to train on: the loss cross_entropy needs them")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"has two classes of the name {twice!r}")
    return names


def classes_of(sources: Sequence[Source]) -> tuple[str, ...]:
    """The classes of all sources, each once, in the order in which they come."""
    return tuple(dict.fromkeys(name for source in sources for name in class_names(source)))


@functools.lru_cache(_CACHED_TEXTS)
def _cached_tokens(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, "context_length"]:
    return tokenizer([text], truncate=True)[0]
