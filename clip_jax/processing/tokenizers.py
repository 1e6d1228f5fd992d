"""The tokenizers that models are trained with, behind one protocol, and the one that a model's description names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from clip_jax.errors import UserError
from clip_jax.models.config import TextConfig
from clip_jax.processing import bpe


@runtime_checkable
class Tokenizer(Protocol):
    """From texts to the rows of ids that a text tower reads; hashable, since results are cached.

    Attributes:
      context_length: ids of a row.
      vocab_size: all ids are below it.
    """

    context_length: int
    vocab_size: int

    def __call__(
        self, texts: str | Iterable[str], truncate: bool = False
    ) -> Int32[np.ndarray, "batch {self.context_length}"]:
        """One row per text.

        Raises:
          UserError: a text does not fit and `truncate` is false.
        """
        ...


@dataclass(frozen=True)
class OpenAITokenizer:
    """OpenAI's byte-level BPE (`tokenize`)."""

    context_length: int = 77
    lowercase: bool = True
    vocab_size: ClassVar[int] = bpe.VOCAB_SIZE

    @classmethod
    def from_config(cls, config: TextConfig) -> "OpenAITokenizer":
        """The one that `config` describes."""
        return cls(config.context_length, config.lowercase)

    def __call__(
        self, texts: str | Iterable[str], truncate: bool = False
    ) -> Int32[np.ndarray, "batch {self.context_length}"]:
        return bpe.tokenize(texts, self.context_length, truncate, self.lowercase)


TOKENIZERS: Mapping[str, Callable[[TextConfig], Tokenizer]] = MappingProxyType({"openai": OpenAITokenizer.from_config})


def make_tokenizer(config: TextConfig) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
      UserError: its kind is not in `TOKENIZERS`, or it has more ids than the text tower.
    """
    if config.tokenizer not in TOKENIZERS:
        raise UserError(
            f"this model's tokenizer is {config.tokenizer!r}, expected one of {', '.join(TOKENIZERS)}: "
            "make its token ids elsewhere and pass them to encode_text"
        )
    tokenizer = TOKENIZERS[config.tokenizer](config)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} ids, but this model's vocab_size is "
            f"{config.vocab_size}: make its token ids elsewhere and pass them to encode_text"
        )
    return tokenizer
