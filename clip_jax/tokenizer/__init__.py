"""OpenAI's byte-level BPE tokenizer: text in, the integers that the text tower reads out."""

from clip_jax.tokenizer.bpe import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, decode, encode, tokenize

__all__ = ["END_OF_TEXT", "START_OF_TEXT", "VOCAB_SIZE", "decode", "encode", "tokenize"]
