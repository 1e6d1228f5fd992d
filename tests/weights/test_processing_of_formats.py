"""What open_clip's and OpenAI's formats can say of image processing and tokenizer, and what they refuse to lose."""

import dataclasses

import pytest

from clip_jax.errors import UserError
from clip_jax.models import OPENAI_MODELS
from clip_jax.weights import open_clip, openai

CONFIG = OPENAI_MODELS["ViT-B/32"]
CASED = dataclasses.replace(CONFIG.text, lowercase=False)


def test_open_clip_says_how_images_are_resized_and_whether_texts_keep_their_case():
    config = dataclasses.replace(CONFIG, text=CASED, image_interpolation="bilinear", image_resize="squash")
    values = open_clip.config_to_json(config)
    assert values["model_cfg"]["text_cfg"]["tokenizer_kwargs"] == {"clean": "whitespace"}
    assert values["preprocess_cfg"]["interpolation"] == "bilinear"
    assert values["preprocess_cfg"]["resize_mode"] == "squash"
    assert open_clip.config_from_json(values, "a file") == config


@pytest.mark.parametrize(
    "changes",
    [
        {"image_interpolation": "lanczos"},
        {"image_resize_to": 256},
        {"text": dataclasses.replace(CONFIG.text, tokenizer="BertTokenizer")},
    ],
    ids=str,
)
@pytest.mark.parametrize("check", [open_clip.config_to_json, openai.check_expressible])
def test_what_neither_can_say(check, changes):
    (value,) = (field for field in ("lanczos", "256", "BertTokenizer") if field in str(changes))
    with pytest.raises(UserError, match=value):
        check(dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_interpolation": "bilinear"}, "image_interpolation bicubic"),
        ({"image_resize": "squash"}, "image_resize shortest"),
        ({"text": CASED}, "lowercase True"),
    ],
    ids=str,
)
def test_what_openais_class_cannot_say(changes, message):
    openai.check_expressible(CONFIG)
    with pytest.raises(UserError, match=message):
        openai.check_expressible(dataclasses.replace(CONFIG, **changes))
