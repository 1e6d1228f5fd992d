import dataclasses

import numpy as np
import pytest
from awkward_texts import awkward_texts

from clip_jax.errors import UserError
from clip_jax.models import TextConfig
from clip_jax.processing import encode, make_tokenizer, tokenize, tokenizers

TEXT = TextConfig(width=8, heads=1, mlp_width=8, context_length=12)


def test_openai_is_the_default_and_equals_tokenize():
    tokenizer = make_tokenizer(TEXT)
    texts = ["A Dog", "caf\u00e9 " * 20]
    assert (tokenizer.context_length, tokenizer.vocab_size) == (12, 49408)
    np.testing.assert_array_equal(tokenizer(texts, truncate=True), tokenize(texts, 12, truncate=True))
    with pytest.raises(UserError, match="at most 12 tokens"):
        tokenizer(texts)


def test_case_is_kept_where_the_model_says_so():
    cased = make_tokenizer(dataclasses.replace(TEXT, lowercase=False))
    assert not np.array_equal(cased("A Dog"), tokenize("A Dog", 12))
    np.testing.assert_array_equal(cased("a dog"), tokenize("a dog", 12))


def test_cased_texts_equal_the_reference_without_its_lower_casing(reference, reference_module):
    """open_clip's `clean="whitespace"`: OpenAI's `SimpleTokenizer.encode`, its `.lower()` left out."""

    def expected(text):
        cleaned = reference_module.whitespace_clean(reference_module.basic_clean(text))
        words = reference_module.re.findall(reference.pat, cleaned)
        pieces = ["".join(reference.byte_encoder[b] for b in word.encode("utf-8")) for word in words]
        return [reference.encoder[piece] for word in pieces for piece in reference.bpe(word).split(" ")]

    texts = ["It'S McDonald's HELLO", "<|EndOfText|> <|endoftext|>", *awkward_texts(2000, seed=3)]
    assert [text for text in texts if encode(text, lowercase=False) != expected(text)] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "BertTokenizer"}, "'BertTokenizer', expected one of openai"),
        ({"vocab_size": 49407}, "has 49408 ids, but this model's vocab_size is 49407"),
    ],
)
def test_tokenizers_that_do_not_belong_to_the_model(changes, message):
    with pytest.raises(UserError, match=message):
        make_tokenizer(dataclasses.replace(TEXT, **changes))


def test_another_kind_is_one_entry_of_the_registry(monkeypatch):
    class Letters:
        vocab_size = 128

        def __init__(self, config):
            self.context_length = config.context_length

        def __call__(self, texts, truncate=False):
            return np.int32([[*map(ord, text.ljust(self.context_length, "\0"))] for text in texts])

    monkeypatch.setattr(tokenizers, "TOKENIZERS", {"letters": Letters})
    tokenizer = make_tokenizer(dataclasses.replace(TEXT, tokenizer="letters", vocab_size=128))
    assert tokenizer(["ab"]).tolist() == [[97, 98] + [0] * 10]
