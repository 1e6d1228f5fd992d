"""Byte-level BPE with OpenAI's 49,408 entries, equal to `clip/simple_tokenizer.py` on every text.

A text is cleaned and cut at spaces into chunks, a chunk by a pattern into words, a word into its UTF-8 bytes;
the bytes are merged pairwise in the order of the vocabulary file. Ids are arranged so that a merge needs no
rank of its own: 0-255 are the bytes, 256-511 the same bytes at the end of a word, then one id per merge in
order of priority, then the two special ids.
"""

import gzip
import hashlib
import heapq
import html
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import metadata
from itertools import pairwise
from typing import NamedTuple, SupportsIndex

import ftfy
import numpy as np
import regex
from jaxtyping import Int32

from clip_jax.errors import UserError

VOCAB_SIZE = 49_408
START_OF_TEXT = 49_406
END_OF_TEXT = 49_407

_SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
_MERGES = VOCAB_SIZE - 2 * 256 - len(_SPECIAL)
_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"

# IGNORECASE matters even after lower(): the long s of "'ſ" still matches "'s".
_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# Characters that are read of a text that may be truncated, for each token of its row: eight times the longest piece of
# the vocabulary. Captions of megabytes occur, and would take minutes and gigabytes.
READ_PER_TOKEN = 256

_CACHED_CHUNKS = 2**16
_CACHED_CHUNK_LENGTH = 64  # longer chunks hardly repeat, and would let hostile text fill the memory


class Vocabulary(NamedTuple):
    """The tables of the tokenizer.

    Attributes:
      byte_ids: 256 bytes; entry b is the id of byte b inside a word (at a word's end: that id plus 256).
      merges: (left id, right id) -> id of the merged pair; the smallest id is merged first.
      pieces: the bytes of each id, with a literal `</w>` at the end of a word.
      names: the same as the vocabulary file spells it, a visible character for each byte.
    """

    byte_ids: bytes
    merges: dict[tuple[int, int], int]
    pieces: list[bytes]
    names: list[str]


def tokenize(
    texts: str | Iterable[str], context_length: int = 77, truncate: bool = False, lowercase: bool = True
) -> Int32[np.ndarray, "batch context_length"]:
    """Make the text tower's input of texts, as OpenAI's `clip.tokenize` does.

    Args:
      texts: one text or several.
      context_length: the number of tokens of a row, start and end of text included; OpenAI's models use 77.
      truncate: cut texts that do not fit, keeping the end-of-text token last, instead of raising. Then only the first
        256 characters per token of the row are read. They give the row of the whole text if an eighth of them are words
        that end there, and if ftfy, which judges whole lines, finds nothing to mend in the line that is cut off.
      lowercase: as in `encode`.

    Returns:
      int32, one row per text: start of text, the text's ids, end of text, then zeros.

    Raises:
      UserError: a text does not fit and `truncate` is false, or no text can fit into `context_length`.
    """
    if context_length < 2:
        raise UserError(f"expected a context_length of at least 2 (start and end), got {context_length}")
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        if truncate:
            text = text[: READ_PER_TOKEN * context_length]
        ids = [START_OF_TEXT, *encode(text, lowercase), END_OF_TEXT]
        if len(ids) > context_length:
            if not truncate:
                shown = text if len(text) <= 60 else text[:60] + "..."
                raise UserError(
                    f"expected texts of at most {context_length} tokens, got {len(ids)} in {shown!r}: "
                    "shorten the text or pass truncate=True"
                )
            ids[context_length - 1 :] = [END_OF_TEXT]
        row[: len(ids)] = ids
    return tokens


def encode(text: str, lowercase: bool = True) -> list[int]:
    """The ids of a text, cleaned, without start and end of text (`SimpleTokenizer.encode`).

    Without `lowercase`, letters keep their case (open_clip's `clean="whitespace"`).
    """
    text = _clean(text).lower() if lowercase else _clean(text)
    ids = []
    for chunk in text.split(" "):  # no word of the pattern reaches over a space
        ids += _cached_chunk_ids(chunk) if len(chunk) <= _CACHED_CHUNK_LENGTH else _chunk_ids(chunk)
    return ids


def decode(ids: Iterable[SupportsIndex]) -> str:
    """The text of some ids, a space after each word, special tokens spelt (`SimpleTokenizer.decode`).

    Raises:
      UserError: an id is outside the vocabulary.
    """
    ids = list(ids)
    if unknown := [i for i in ids if not 0 <= i < VOCAB_SIZE]:
        raise UserError(f"expected token ids from 0 to {VOCAB_SIZE - 1}, got {unknown[0]}")
    pieces = vocabulary().pieces
    # Replaced in the text, as the reference does: a "</w>" that the text itself spells becomes a space too.
    return b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace").replace("</w>", " ")


@cache
def vocabulary() -> Vocabulary:
    """The vocabulary file of the installed `openai-clip` package, read once.

    Raises:
      UserError: the package or its file is missing, or the file is not OpenAI's.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    by_id = bytes(printable + rest)
    # The file spells a byte as one visible character: itself if printable, else the next one from U+0100.
    spelling = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    ids = {name: i for i, name in enumerate(spelling + [character + "</w>" for character in spelling])}
    pieces = [bytes([byte]) for byte in by_id] + [bytes([byte]) + b"</w>" for byte in by_id]
    merges = {}
    for line in _vocabulary_file().decode().split("\n")[1 : _MERGES + 1]:
        left, right = line.split()
        pair = ids[left], ids[right]
        merges[pair] = ids[left + right] = len(pieces)
        pieces.append(pieces[pair[0]] + pieces[pair[1]])
    pieces += [name.encode() for name in _SPECIAL]
    return Vocabulary(bytes(by_id.index(byte) for byte in range(256)), merges, pieces, [*ids, *_SPECIAL])


def _vocabulary_file() -> bytes:
    # Found through the distribution's metadata, because importing the package `clip` needs torch.
    try:
        path = metadata.distribution("openai-clip").locate_file("clip/bpe_simple_vocab_16e6.txt.gz")
        packed = path.read_bytes()
    except (metadata.PackageNotFoundError, OSError) as error:
        raise UserError(
            f"expected the vocabulary of the package openai-clip, got: {error}; pip install openai-clip"
        ) from error
    digest = hashlib.sha256(packed).hexdigest()
    if digest != _VOCAB_SHA256:
        raise UserError(f"expected {path} with sha256 {_VOCAB_SHA256}, got {digest}: reinstall openai-clip")
    return gzip.decompress(packed)


def _clean(text: str) -> str:
    # The reference also collapses whitespace, which is invisible in the result: no word of the pattern holds any.
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # nothing in it that ftfy or unescape would change
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _chunk_ids(chunk: str) -> list[int]:
    ids = []
    for word in _WORD.findall(chunk):
        ids += [_SPECIAL[word]] if word in _SPECIAL else _word_ids(word)
    return ids


_cached_chunk_ids = lru_cache(_CACHED_CHUNKS)(_chunk_ids)


def _word_ids(word: str) -> list[int]:
    """Merge the bytes of a word, best pair first and leftmost first, in O(n log n).

    Each merged id comes from one pair only and is greater than both ids of the pair: queue order is final.
    """
    byte_ids, merges, *_ = vocabulary()
    ids = [*word.encode().translate(byte_ids), -1]  # -1 is in no pair: the end, later also what merged away
    end = len(ids) - 1
    ids[end - 1] += 256
    before, after = [*range(-1, end)], [*range(1, end + 1), end]
    queue = [(merges[pair], left) for left, pair in enumerate(pairwise(ids)) if pair in merges]
    heapq.heapify(queue)
    while queue:
        merged, left = heapq.heappop(queue)
        right = after[left]
        if merges.get((ids[left], ids[right])) != merged:
            continue  # one of the two has been merged with another neighbour since
        ids[left], ids[right] = merged, -1
        after[left] = after[right]
        before[after[left]] = left
        for i in (before[left], left):
            pair = ids[i], ids[after[i]]
            if pair in merges:
                heapq.heappush(queue, (merges[pair], i))
    return [i for i in ids if i >= 0]
