import itertools
import subprocess
import sys
import time
import unicodedata
from importlib import metadata

import numpy as np
import pytest
from awkward_texts import awkward_texts

from clip_jax.errors import UserError
from clip_jax.processing import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, bpe, decode, encode, tokenize


def different(texts, reference) -> list[str]:
    return [text for text in texts if encode(text) != reference.encode(text)]


def test_golden_ids():
    tokens = tokenize(["Hello World!", "hello world"])
    assert tokens.shape == (2, 77)
    assert tokens.dtype == np.int32
    assert tokens[0, :6].tolist() == [START_OF_TEXT, 3306, 1002, 256, END_OF_TEXT, 0]
    assert tokens[1, :5].tolist() == [START_OF_TEXT, 3306, 1002, END_OF_TEXT, 0]
    assert not tokens[:, 5:].any()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " \t\n two \n\n lines\r\n",
        "It's, we'RE they\u2019ve don'\u017f",
        "2024 3½ Ⅷ ٣",
        "Tom &amp;amp; Jerry &lt;3 &nbsp; &#128512; &EACUTE;",
        "a < b &amp;amp; c &amp;eacute; d",  # ftfy leaves entities alone when it sees a tag
        "\x00a\x07b\x1b[31mred\x1b[0m\tin\x1cASCII",
        "<|startoftext|>in the text<|ENDOFTEXT|> !<|endoftext|>",
        "<|\u017ftartoftext|> </w> a</w>b",
        "cafÃ© â€œquotesâ€\x9d",
        "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ 👍🏽",
        "ΣΊΣΥΦΟΣ İstanbul Straße ǅ ﬁne",
        "\x00a\x1b[31mred\x1b[0m \x1c \x85 \u2028 \ufeff \ud83d\ude00 \ud83d",
        "日本語のテキスト ｶﾀｶﾅ 한국어 ภาษาไทย عربى हिन्दी",
    ],
)
def test_awkward_text_equals_reference(text, reference):
    assert encode(text) == reference.encode(text)
    assert encode(text) == reference.encode(text), "the second time, from the cache"


def test_generated_texts_equal_reference(reference):
    assert different(awkward_texts(20_000, seed=1), reference) == []


@pytest.mark.slow
def test_many_generated_texts_equal_reference(reference):
    assert different(awkward_texts(200_000, seed=2), reference) == []


@pytest.mark.parametrize("assigned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_code_point_equals_reference(assigned, reference):
    points = map(chr, range(sys.maxunicode + 1))
    chosen = (point for point in points if (unicodedata.category(point) not in ("Cn", "Co")) == assigned)
    assert different(chosen, reference) == []


def test_the_result_is_not_the_cache():
    first = encode("dog")
    first.append(0)
    assert encode("dog") == first[:-1]


def test_vocabulary_is_whole_and_in_order_of_priority():
    vocabulary = bpe.vocabulary()
    assert len(vocabulary.pieces) == len(set(vocabulary.pieces)) == VOCAB_SIZE
    assert list(vocabulary.merges.values()) == list(range(512, START_OF_TEXT))
    # What the queue in _word_ids relies on.
    assert all(max(pair) < merged for pair, merged in vocabulary.merges.items())


def test_very_long_words_take_seconds_and_little_memory():
    word = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 100_000))
    before = bpe._cached_chunk_ids.cache_info()
    start = time.perf_counter()
    assert decode(encode(word)) == word + " "
    assert decode(encode("a" * 100_000)) == "a" * 100_000 + " "
    assert time.perf_counter() - start < 20
    assert bpe._cached_chunk_ids.cache_info() == before
    assert before.maxsize < 10**6


@pytest.mark.parametrize("text", ["Hello World!", "café 😀 's", "a</w>b", "<|endoftext|>", ""])
def test_decode_equals_reference(text, reference):
    ids = reference.encode(text)
    assert decode(ids) == reference.decode(ids)
    assert decode(tokenize(text)[0][1 : len(ids) + 1]) == reference.decode(ids)


def test_decode_of_every_id_equals_reference(reference):
    assert [decode([i]) for i in range(VOCAB_SIZE)] == [reference.decode([i]) for i in range(VOCAB_SIZE)]


@pytest.mark.parametrize("unknown", [-1, VOCAB_SIZE])
def test_decode_refuses_unknown_ids(unknown):
    with pytest.raises(UserError, match=f"0 to 49407, got {unknown}"):
        decode([3306, unknown])


def test_text_that_just_fits():
    tokens = tokenize("dog " * 75)
    assert tokens[0, -1] == END_OF_TEXT
    assert (tokens[0, 1:-1] == encode("dog")[0]).all()


def test_text_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"at most 77 tokens, got 78 in 'dog dog.*\.\.\.'.*truncate=True") as caught:
        tokenize(["short", "dog " * 76])
    assert len(str(caught.value)) < 200
    assert isinstance(caught.value, ValueError)


def test_truncate_keeps_end_of_text_last():
    tokens = tokenize(["dog " * 100, "dog"], context_length=5, truncate=True)
    dog = encode("dog")[0]
    assert tokens.tolist() == [
        [START_OF_TEXT, dog, dog, dog, END_OF_TEXT],
        [START_OF_TEXT, dog, END_OF_TEXT, 0, 0],
    ]


def test_truncating_reads_little_and_changes_no_row(monkeypatch):
    read, clean = [], bpe._clean
    lines = awkward_texts(6_000, seed=3)
    texts = ["\n".join(itertools.islice(lines, 60)) for _ in range(100)]
    texts += [" " * (7 * 128) + "dog " * 100, "<|endoftext|>" * 300, "a" * 700 + " " + "b" * 2000, "& &amp; < " * 300]
    assert min(map(len, texts)) > 4 * 256
    whole = [encode(text) for text in texts]
    monkeypatch.setattr(bpe, "_clean", lambda text: read.append(len(text)) or clean(text))
    rows = tokenize(texts, context_length=4, truncate=True)
    assert rows.tolist() == [[START_OF_TEXT, *ids[:2], END_OF_TEXT] for ids in whole]
    assert set(read) == {4 * 256}


def test_the_limit_of_what_is_read_outlasts_the_longest_pieces():
    assert (
        8 * max(len(piece.removesuffix(b"</w>").decode(errors="ignore")) for piece in bpe.vocabulary().pieces[:-2])
        <= 256
    )


@pytest.mark.parametrize("text", ["é" * 5_000_000, "dog" * 2_000_000, " " * 5_000_000, "&amp;" * 1_000_000])
def test_hostile_megabytes_are_left_unread(text, monkeypatch):
    clean = bpe._clean

    def limited(text):
        assert len(text) <= 77 * 256
        return clean(text)

    monkeypatch.setattr(bpe, "_clean", limited)
    row = tokenize(text, truncate=True)[0]
    assert row[0] == START_OF_TEXT and END_OF_TEXT in row


def test_no_texts_and_no_room():
    assert tokenize([]).shape == (0, 77)
    assert tokenize(["", ""], context_length=2).tolist() == [[START_OF_TEXT, END_OF_TEXT]] * 2
    with pytest.raises(UserError, match=r"at least 2 .* got 1"):
        tokenize("", context_length=1)


def test_missing_vocabulary(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UserError, match="pip install openai-clip"):
        bpe.vocabulary.__wrapped__()


def test_foreign_vocabulary(monkeypatch, tmp_path):
    class Distribution:
        def locate_file(self, path):
            return tmp_path / "vocabulary.gz"

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    with pytest.raises(UserError, match="pip install openai-clip"):
        bpe.vocabulary.__wrapped__()
    (tmp_path / "vocabulary.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"vocabulary\.gz with sha256 924691.*reinstall openai-clip"):
        bpe.vocabulary.__wrapped__()


def test_needs_neither_torch_nor_tensorflow():
    code = (
        "import sys; from clip_jax.processing import tokenize; tokenize('a dog');"
        "assert not {'torch', 'tensorflow', 'clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
