"""OpenAI's BPE as TensorFlow ops: the tokenizer inside `tf.data`, without Python's lock, and inside a SavedModel.

Most words are one piece, which a table knows. The merges of the others are carried out by SentencePiece
(https://github.com/google/sentencepiece, `bpe_model.cc`), of which tensorflow-text has the op. It merges the
neighbours whose joined string has the best score, where OpenAI's merges the pair of the best rank. With scores in the
order of the ids both do the same, because the vocabulary tokenizes the bytes of each of its pieces to that piece (a
test says so): the first time that SentencePiece joined a pair that is not among the merges, our merging of those
bytes alone would have been at that pair too, and would have ended there without the joined piece.

A byte is the character of the same number, as in Latin-1; a word ends with 0xFF, which UTF-8 never uses. It merges
with the byte before it before all else, since those pieces have the ids 256 to 511 and merges begin at 512.
"""

import os
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from clip_jax.errors import UserError
from clip_jax.models.config import TextConfig
from clip_jax.processing import bpe, plain_text
from clip_jax.processing.tokenizers import OpenAITokenizer

Texts = tf.Tensor | Sequence[str] | Sequence[bytes]

_END_OF_WORD = b"\xff"
_NORMAL, _UNKNOWN = 1, 2  # ModelProto.SentencePiece.Type of sentencepiece_model.proto


class TfTokenizer(tf.Module):
    """`OpenAITokenizer` on tensors of texts, with the same ids for every text.

    TensorFlow's ops alone tokenize plain texts (`plain_text`). For the other rows of a batch a call goes to Python and
    waits for its lock, so it needs this project at hand. `in_graph` and what `export` writes do not: they say instead
    which texts are plain.

    Attributes:
      context_length: ids of a row.
      vocab_size: all ids are below it.
    """

    vocab_size = bpe.VOCAB_SIZE

    def __init__(self, context_length: int = 77, lowercase: bool = True):
        super().__init__()
        if context_length < 2:
            raise UserError(f"expected a context_length of at least 2 (start and end), got {context_length}")
        self.context_length = context_length
        self._longest = bpe.READ_PER_TOKEN * context_length  # bytes of a plain text; longer ones Python may cut
        self._python = OpenAITokenizer(context_length, lowercase)
        self._whole_words = _table(_whole_words(), default=-1)
        self._merges = tf_text.SentencepieceTokenizer(_sentencepiece_model())
        cleaned = plain_text.cleaned_characters()
        self._to_cleaned = tf.constant(plain_text.cleaning_table(cleaned))
        self._to_final = tf.constant(plain_text.final_table(cleaned, lowercase))
        self._only_plain_characters = plain_text.only_characters(cleaned)
        self._has_mojibake = _anywhere(plain_text.mojibake())
        self._depends_on_neighbours = _anywhere(plain_text.depends_on_neighbours(cleaned, lowercase))
        self._references = _table(plain_text.references(), default="")
        self._word = plain_text.word()

    @classmethod
    def from_config(cls, config: TextConfig) -> "TfTokenizer":
        """The one that `config` describes."""
        return cls(config.context_length, config.lowercase)

    @tf.autograph.experimental.do_not_convert
    def __call__(self, texts: Texts, truncate: bool = False) -> tf.Tensor:
        """One row per text, equal to `OpenAITokenizer`'s; in a `tf.data.Dataset`, `map` it after `batch`.

        Args:
          texts: UTF-8 strings, (batch,). What is not UTF-8 is read as U+FFFD, surrogates in UTF-8's way as surrogates.
          truncate: cut texts that do not fit, keeping the end-of-text token last, instead of raising.

        Returns:
          int32, (batch, context_length).

        Raises:
          UserError: `texts` is not one batch of strings.
          tf.errors.InvalidArgumentError, or UserError where Python was asked: a text does not fit and `truncate` is
            false.
        """
        tokens, plain = self.in_graph(texts, truncate)
        return tf.cond(tf.reduce_all(plain), lambda: tokens, lambda: self._corrected(tokens, plain, texts, truncate))

    @tf.autograph.experimental.do_not_convert
    def in_graph(self, texts: Texts, truncate: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """The tokens without a call to Python, and for which texts they are right.

        Returns:
          tokens: int32, (batch, context_length). Approximate where a text is not plain: it is cleaned as if it were.
          plain: bool, (batch,).

        Raises:
          UserError, tf.errors.InvalidArgumentError: as a call; whether a text fits is known of plain texts only.
        """
        texts = tf.convert_to_tensor(texts)
        if texts.dtype != tf.string or texts.shape.rank != 1:
            raise UserError(f"expected a batch of strings, shape (batch,), got {texts.dtype.name} {texts.shape}")
        short = tf.strings.length(texts) <= self._longest
        texts = self._unescaped(tf.strings.substr(texts, 0, self._longest))
        points = tf.strings.unicode_decode(texts, "UTF-8")
        plain = short & self._is_plain(texts, _translate(points, self._to_cleaned))
        ids = self._ids(_translate(points, self._to_final))
        if not truncate:
            most = tf.reduce_max(tf.where(plain, ids.row_lengths(), 0)) + 2
            expected = f"expected texts of at most {self.context_length} tokens: shorten them or pass truncate=True"
            tf.debugging.Assert(most <= self.context_length, [expected, "got", most])
        ends = tf.ones([ids.nrows(), 1], tf.int32)
        rows = [bpe.START_OF_TEXT * ends, ids[:, : self.context_length - 2], bpe.END_OF_TEXT * ends]
        return tf.concat(rows, axis=1).to_tensor(shape=(None, self.context_length)), plain

    def export(self, path: str | os.PathLike, truncate: bool = False) -> None:
        """Write a SavedModel of `in_graph` for any process that imports `tensorflow_text`, without this project.

        Its signature takes `texts` and gives `tokens` and `plain`.
        """

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "texts")])
        def tokenize(texts):
            return dict(zip(("tokens", "plain"), self.in_graph(texts, truncate), strict=True))

        tf.saved_model.save(self, os.fspath(path), signatures=tokenize)

    def _unescaped(self, texts: tf.Tensor) -> tf.Tensor:
        """`texts` with one level of character references replaced."""
        pattern = plain_text.REFERENCE

        def replace() -> tf.Tensor:
            rows = tf.where(chosen)
            parts = tf_text.regex_split(tf.gather_nd(texts, rows), pattern, keep_delim_regex_pattern=pattern)
            values = self._references.lookup(parts.flat_values)
            parts = parts.with_flat_values(tf.where(values == "", parts.flat_values, values))
            return tf.tensor_scatter_nd_update(texts, rows, tf.strings.reduce_join(parts, axis=1))

        chosen = tf.strings.regex_full_match(texts, plain_text.WITH_REFERENCES)
        return tf.cond(tf.reduce_any(chosen), replace, lambda: texts)

    def _is_plain(self, texts: tf.Tensor, cleaned: tf.Tensor) -> tf.Tensor:
        return (
            tf.strings.regex_full_match(texts, self._only_plain_characters)
            & ~tf.strings.regex_full_match(texts, self._has_mojibake)
            & ~tf.strings.regex_full_match(cleaned, self._depends_on_neighbours)
        )

    def _ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        words = tf.strings.split(tf.strings.regex_replace(texts, self._word, r"\0 "))
        ids = self._whole_words.lookup(words.flat_values)
        others = ids < 0
        pieces = self._pieces_of(tf.boolean_mask(words.flat_values, others))
        # The ids of a word: its own one, or the next row of `pieces`.
        rows = tf.concat([tf.RaggedTensor.from_tensor(ids[:, tf.newaxis]), pieces], axis=0)
        row = tf.where(others, tf.size(ids) - 1 + tf.cumsum(tf.cast(others, tf.int32)), tf.range(tf.size(ids)))
        return words.with_flat_values(tf.gather(rows, row)).merge_dims(1, 2)

    def _pieces_of(self, words: tf.Tensor) -> tf.RaggedTensor:
        return self._merges.tokenize(tf.strings.unicode_transcode(words + _END_OF_WORD, "ISO-8859-1", "UTF-8"))

    def _corrected(self, tokens: tf.Tensor, plain: tf.Tensor, texts: Texts, truncate: bool) -> tf.Tensor:
        """`tokens` with the rows that are not plain from Python."""

        def tokenize(texts: np.ndarray) -> np.ndarray:
            return self._python(map(_decode, texts), truncate)

        rows = tf.where(~plain)
        right = tf.numpy_function(tokenize, [tf.gather_nd(texts, rows)], tf.int32)
        return tf.tensor_scatter_nd_update(tokens, rows, tf.ensure_shape(right, (None, self.context_length)))


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace")


def _anywhere(pattern: str) -> str:
    return f"(?s:.*)(?:{pattern})(?s:.*)"


def _translate(points: tf.RaggedTensor, table: tf.Tensor) -> tf.Tensor:
    end = tf.size(table)
    translated = tf.gather(table, tf.minimum(points.flat_values, end - 1))
    translated = tf.where(points.flat_values < end, translated, points.flat_values)
    return tf.strings.unicode_encode(points.with_flat_values(translated), "UTF-8")


def _table(entries: Mapping[str | bytes, str | int], default: str | int) -> tf.lookup.StaticHashTable:
    values = tf.constant([*entries.values()])  # int32 or string
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([*entries], values), default)


def _whole_words() -> dict[bytes, int]:
    """The words that are one piece, and their ids."""
    pieces = bpe.vocabulary().pieces
    ends = {piece.removesuffix(b"</w>"): i for i, piece in enumerate(pieces) if piece.endswith(b"</w>")}
    return ends | {pieces[i]: i for i in (bpe.START_OF_TEXT, bpe.END_OF_TEXT)}


def _sentencepiece_model() -> bytes:
    """The merges as a serialized `sentencepiece.ModelProto`, with one more piece, which the format demands."""
    pieces = []
    for i, piece in enumerate(bpe.vocabulary().pieces[: bpe.START_OF_TEXT]):
        name = piece.removesuffix(b"</w>") + _END_OF_WORD * piece.endswith(b"</w>")
        pieces.append(_piece(name.decode("latin-1"), -i, _NORMAL))
    pieces.append(_piece("<unk>", 0, _UNKNOWN))
    trainer = _field(2, b"\x18\x02")  # model_type = 3: BPE
    normalizer = _field(3, _field(1, b"identity") + b"\x18\0\x20\0\x28\0")  # spaces = 3, 4, 5: no changes
    return b"".join([*pieces, trainer, normalizer])


def _piece(name: str, score: int, kind: int) -> bytes:
    return _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))


def _field(number: int, content: bytes) -> bytes:
    """A short string or message in protobuf's wire format (https://protobuf.dev/programming-guides/encoding)."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content
