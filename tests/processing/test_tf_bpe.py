"""The tokenizer as TensorFlow ops, against the Python tokenizer (which test_bpe.py compares with OpenAI's)."""
# ruff: noqa: RUF001

import html.entities
import random
import subprocess
import sys
import unicodedata
from itertools import pairwise

import ftfy.badness
import numpy as np
import pytest
import tensorflow as tf
from awkward_texts import awkward_texts

from clip_jax.errors import UserError
from clip_jax.models import TextConfig
from clip_jax.processing import bpe, plain_text, tokenize
from clip_jax.processing.tf_bpe import TfTokenizer

BATCH = 5_000
KINDS_OF_MOJIBAKE = [
    character
    for kind in ftfy.badness.MOJIBAKE_CATEGORIES.values()
    for character in map(chr, range(0x80, 0x2600))
    if ftfy.badness.re.fullmatch(f"[{kind}]", character)
]
MARKS = [chr(i) for i in range(0x10000) if unicodedata.combining(chr(i))]
ALPHABETS = {
    "mojibake": [*KINDS_OF_MOJIBAKE, *"ÂÃÃßœ×вЂ" * 4, *"aA .,?!\n\xa0" * 20],
    "marks": [
        *MARKS,
        *"aeoAかはαі" * 60,
        *map(chr, range(0x1100, 0x1200)),
        *"가각" * 30,
        *map(chr, range(0x900, 0xDF0)),
    ],
    "widths": [*map(chr, range(0xFF00, 0x10000)), *"ﬁﬂĳǅŉ\u3000‘’“”ʼ", *" aA1.éß¢" * 20],
    "ampersands": [*("&", "＆", ";", "；", "#", "x", "1", "<", " ", "\t") * 100, *html.entities.html5],
    "references": [*plain_text.references(), *"aA <&;é\n\0" * 80, *["amp;", "copy", "&amp"] * 60],
    "sigmas": [*"ΣσςΣΑαάΏaA1'·.:- \n", "\u0301", "\u00ad", "\u200d", "ʰ", "ª", "𝚺", "й"],
    "ASCII": [
        *map(chr, range(128)),
        *bpe._SPECIAL,
        *(f"'{end}" for end in ("s", "T", "re", "VE", "m", "ll", "D", "ſ")),
    ],
}


TEXTS = tf.TensorSpec([None], tf.string)


@pytest.fixture(scope="module")
def tokenizer():
    return TfTokenizer(77)


@pytest.fixture(scope="module")
def in_graph(tokenizer):
    return tf.function(lambda texts: tokenizer.in_graph(texts, truncate=True), input_signature=[TEXTS])


def as_bytes(texts) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def different(texts: list[str], tokenize_in_graph, **options) -> tuple[list[str], float]:
    """Plain texts with other tokens than in Python, and the share of plain texts."""
    wrong, plain_texts = [], 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        tokens, plain = (output.numpy() for output in tokenize_in_graph(tf.constant(as_bytes(batch))))
        chosen = [text for text, is_plain in zip(batch, plain, strict=True) if is_plain]
        unequal = (tokens[plain] != tokenize(chosen, truncate=True, **options)).any(axis=1)
        wrong += [text for text, is_wrong in zip(chosen, unequal, strict=True) if is_wrong]
        plain_texts += plain.sum()
    return wrong, plain_texts / len(texts)


def test_every_piece_is_what_its_bytes_are_merged_to():
    """Then SentencePiece's merging is OpenAI's (see `tf_bpe`)."""
    byte_ids, merges, pieces, _ = bpe.vocabulary()
    for number, piece in enumerate(pieces[: bpe.START_OF_TEXT]):
        ids = [*piece.removesuffix(b"</w>").translate(byte_ids)]
        ids[-1] += 256 * piece.endswith(b"</w>")
        while len(ids) > 1:
            merged, left = min((merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merges)
            ids[left : left + 2] = [merged]
        assert ids == [number]


def test_generated_texts_equal_the_python_tokenizer(in_graph):
    wrong, plain = different([*awkward_texts(10_000, seed=4)], in_graph)
    assert wrong == []
    assert plain > 0.3


@pytest.mark.parametrize("kind", ALPHABETS)
def test_texts_at_the_edge_of_what_is_plain_equal_the_python_tokenizer(kind, in_graph):
    rng = random.Random(kind)
    texts = ["".join(rng.choices(ALPHABETS[kind], k=rng.randint(1, 7))) for _ in range(5_000)]
    wrong, plain = different(texts, in_graph)
    assert wrong == []
    assert 0.1 < plain < 0.95


@pytest.mark.parametrize("assigned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_code_point_equals_the_python_tokenizer(assigned, in_graph):
    points = map(chr, range(sys.maxunicode + 1))
    texts = [point for point in points if (unicodedata.category(point) not in ("Cn", "Co")) == assigned]
    wrong, plain = different(texts, in_graph)
    assert wrong == []
    assert not assigned or plain > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
def test_many_generated_texts_equal_the_python_tokenizer(lowercase):
    tokenizer = TfTokenizer(77, lowercase)
    in_graph = tf.function(lambda texts: tokenizer.in_graph(texts, truncate=True), input_signature=[TEXTS])
    wrong, plain = different([*awkward_texts(200_000, seed=2)], in_graph, lowercase=lowercase)
    assert wrong == []
    assert plain > 0.3


@pytest.fixture(scope="module")
def cased():
    return TfTokenizer.from_config(TextConfig(width=8, heads=1, mlp_width=8, context_length=5, lowercase=False))


def test_case_is_kept_where_the_model_says_so(cased):
    texts = ["A Dog", "a dog", "It'S", *awkward_texts(500, seed=5)]
    expected = tokenize(texts, 5, truncate=True, lowercase=False)
    assert (expected[0] != expected[1]).any()
    np.testing.assert_array_equal(cased(as_bytes(texts), truncate=True), expected)
    assert cased.in_graph(texts[:3], truncate=True)[1].numpy().all()


ORDINARY = [
    "a photo of a dog",
    "It’s “New York, NY” — №1 & more…",
    "the bride & groom, R&B, AT&T #1",
    "Zürich, créée à Noël — cœur, Ærø, naïve",
    "Привет, мир! Σάββατο  Ελλάδα",
    "東京タワー、日本！ 서울 ＡＢＣ１２３",
    "भारत สวัสดี مرحبا שלום",
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ 👍🏽 ❤️",
    "<|endoftext|> <|STARTOFTEXT|> </w>",
    "Tom &amp; Jerry&#39;s caf&eacute;&#x27;&nbsp;&lt;3 &unknown &#; &bne;",
    "",
    " \n\t ",
]
NOT_PLAIN = [
    "Tom &amp;amp; Jerry",
    "a < b &amp; c",
    "caf&eacute &EACUTE; &notit &#00033;",
    "cafÃ© â€œquotesâ€\x9d",
    "DOGS\nÃ la mode",
    "cafe\u0301",
    "ﬁne",
    "İstanbul",
    "ΣΊΣΥΦΟΣ",
    "\x00bell\x07 \x1b[31mred",
    "\ud83d\ude00 \ud83d",
    "dog " * 30_000,
]


def test_ordinary_texts_of_many_languages_are_plain_and_right(tokenizer):
    tokens, plain = tokenizer.in_graph(ORDINARY)
    assert plain.numpy().all()
    np.testing.assert_array_equal(tokens, tokenize(ORDINARY))


def test_other_texts_go_to_python(tokenizer):
    texts = [*NOT_PLAIN, *ORDINARY]
    assert tokenizer.in_graph(as_bytes(texts), truncate=True)[1].numpy().tolist() == (
        [False] * len(NOT_PLAIN) + [True] * len(ORDINARY)
    )
    tokens = tokenizer(as_bytes(texts), truncate=True)
    assert tokens.dtype == tf.int32 and tokens.shape == (len(texts), 77)
    np.testing.assert_array_equal(tokens, tokenize(texts, truncate=True))


def test_bytes_that_are_not_utf8(tokenizer):
    texts = [b"caf\xe9 \xff\xc3", b"\xed\xa0 \xf4\x90\x80\x80"]
    assert not tokenizer.in_graph(texts)[1].numpy().any()
    np.testing.assert_array_equal(tokenizer(texts), tokenize([text.decode("utf-8", "replace") for text in texts]))


def test_python_is_called_for_no_plain_text(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(tokenizer, "_python", lambda texts, truncate: seen.extend(texts) or tokenize(seen))
    for batch, expected in ((ORDINARY, []), (["a dog", "&amp;lt;"], ["&amp;lt;"])):
        for output in tf.data.Dataset.from_tensors(batch).map(tokenizer):
            np.testing.assert_array_equal(output, tokenize(batch))
        assert seen == expected


def test_in_a_dataset(tokenizer):
    texts = [*NOT_PLAIN, *ORDINARY, *awkward_texts(300, seed=6)]
    dataset = tf.data.Dataset.from_tensor_slices(as_bytes(texts)).batch(32)
    dataset = dataset.map(lambda texts: tokenizer(texts, truncate=True), num_parallel_calls=2)
    assert dataset.element_spec == tf.TensorSpec([None, 77], tf.int32)
    np.testing.assert_array_equal(np.concatenate([*dataset.as_numpy_iterator()]), tokenize(texts, truncate=True))


def test_truncation(cased):
    texts = ["dog " * 100, "dog", "dog &amp;amp; " * 50, "dog dog dog", "a" * 200_000, "dog" + " " * 5 * 256 + "dog"]
    np.testing.assert_array_equal(cased(texts, truncate=True), tokenize(texts, 5, truncate=True))
    for text in (texts[1], texts[3], texts[5]):
        np.testing.assert_array_equal(cased([text]), tokenize(text, 5))
    assert cased(tf.constant([], tf.string)).shape == (0, 5)


@pytest.mark.parametrize("text", ["dog " * 4, "&amp;amp; " * 4])
def test_text_that_does_not_fit_is_refused(text, cased):
    dataset = tf.data.Dataset.from_tensors([text]).map(cased)
    for tokenize_it in (lambda: cased([text]), lambda: next(iter(dataset))):
        with pytest.raises((UserError, tf.errors.InvalidArgumentError), match="at most 5 tokens"):
            tokenize_it()


def test_what_is_no_batch_of_texts_is_refused(tokenizer):
    for texts in ("a dog", [["a dog"]], [1]):
        texts = tf.constant(texts)
        with pytest.raises(UserError, match=r"expected a batch of strings, shape \(batch,\), got"):
            tokenizer(texts)
    with pytest.raises(UserError, match="at least 2"):
        TfTokenizer(1)


ANSWER = """
import importlib.util, sys
import numpy, tensorflow as tf, tensorflow_text

answer = tf.saved_model.load(sys.argv[1]).signatures["serving_default"](texts=tf.constant(sys.argv[3:]))
numpy.savez(sys.argv[2], **{name: value.numpy() for name, value in answer.items()})
assert importlib.util.find_spec("clip_jax") is None and not {"clip_jax", "ftfy", "regex"} & set(sys.modules)
"""


def test_a_saved_model_answers_without_this_project(tokenizer, tmp_path):
    tokenizer.export(tmp_path / "exported", truncate=True)
    texts = [*ORDINARY, "dog " * 100, "Tom &amp;amp; Jerry"]
    command = [sys.executable, "-I", "-c", ANSWER, str(tmp_path / "exported"), str(tmp_path / "answer.npz"), *texts]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    with np.load(tmp_path / "answer.npz") as answer:
        assert answer["plain"].tolist() == [True] * (len(texts) - 1) + [False]
        np.testing.assert_array_equal(answer["tokens"][:-1], tokenize(texts[:-1], truncate=True))
        assert answer["tokens"].shape == (len(texts), 77) and answer["tokens"].dtype == np.int32
