"""Images and texts into the arrays that the towers read."""

from clip_jax.processing.bpe import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, decode, encode, tokenize

__all__ = ["END_OF_TEXT", "START_OF_TEXT", "VOCAB_SIZE", "decode", "encode", "tokenize"]
