import dataclasses
import json

import pytest

from clip_jax.errors import UserError
from clip_jax.models import OPENAI_MODELS, CLIPConfig, Execution, ResNetConfig, TextConfig, VisionTransformerConfig
from tests import tiny


@pytest.mark.parametrize(
    "config",
    [*OPENAI_MODELS.values(), tiny.VIT, tiny.RESNET],
    ids=lambda config: f"{config.embed_dim}-{config.vision.width}",
)
def test_a_config_survives_json(config):
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def with_text(**changes):
    values = tiny.VIT.to_dict()
    return CLIPConfig.from_dict({**values, "text": {**values["text"], **changes}})


def test_a_description_of_an_older_version_opens():
    """Written before image_interpolation, image_resize, image_resize_to, tokenizer and lowercase existed."""
    values = tiny.VIT.to_dict()
    for field in ("image_interpolation", "image_resize", "image_resize_to"):
        del values[field]
    for field in ("tokenizer", "lowercase"):
        del values["text"][field]
    assert CLIPConfig.from_dict(values) == tiny.VIT


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionTransformerConfig(225, 32, 768, 12, 12, 3072), "multiple of patch_size"),
        (lambda: VisionTransformerConfig(224, 32, 770, 12, 12, 3072), "multiple of vision heads"),
        (lambda: ResNetConfig(224, 64, (3, 4, 6, 0), 32), "at least 1"),
        (lambda: ResNetConfig(200, 64, (3, 4, 6, 3), 32), "multiple of the total stride"),
        (lambda: TextConfig(width=512, heads=8, mlp_width=0), "mlp_width must be at least 1"),
        (lambda: dataclasses.replace(tiny.VIT, activation="relu"), "one of quick_gelu, gelu"),
        (lambda: CLIPConfig.from_dict({"embed_dim": 4}), "needs a value for vision: the image tower"),
        (lambda: CLIPConfig.from_dict({**tiny.VIT.to_dict(), "colour": 1}), "colour"),
        (lambda: dataclasses.replace(tiny.VIT, image_interpolation="linear"), "image_interpolation must be one of"),
        (lambda: dataclasses.replace(tiny.VIT, image_resize="longest"), "image_resize must be one of shortest, squash"),
        (lambda: dataclasses.replace(tiny.VIT, image_resize_to=31), "at least the image_resolution, 32, got 31"),
        (lambda: CLIPConfig.from_dict({**tiny.VIT.to_dict(), "image_resize_to": 40.5}), "image_resize_to"),
        (lambda: with_text(tokenizer=["openai"]), "tokenizer"),
        (lambda: with_text(lowercase="no"), "lowercase"),
        (lambda: Execution(dtype="float16"), "one of float32, bfloat16"),
        (lambda: Execution(dtype="float64"), "JAX_ENABLE_X64=1"),
        (lambda: Execution(attention="cudnn"), "bfloat16 only"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
