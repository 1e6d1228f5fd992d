"""Images and texts into the arrays that the towers read."""

from clip_jax.processing.augment import Augment
from clip_jax.processing.bpe import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, decode, encode, tokenize
from clip_jax.processing.images import Preprocess
from clip_jax.processing.tokenizers import Tokenizer, make_tokenizer

__all__ = [
    "END_OF_TEXT",
    "START_OF_TEXT",
    "VOCAB_SIZE",
    "Augment",
    "Preprocess",
    "Tokenizer",
    "decode",
    "encode",
    "make_tokenizer",
    "tokenize",
]
