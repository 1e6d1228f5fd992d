import dataclasses
import functools
from html.parser import HTMLParser

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.data.sources import EvaluationSet
from clip_jax.errors import UserError
from clip_jax.evaluation.zero_shot import Encoders, zero_shot, zero_shot_classifier
from clip_jax.models import CLIP, CLIPConfig, TextConfig
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.processing import tokenize
from clip_jax.reports.zero_shot import write_report
from tests import tiny

CONFIG = CLIPConfig(32, tiny.VIT.vision, TextConfig(32, 2, 64, 1, context_length=16))
CLASSES = ("cat", "dog & <bone>", "bird")
TEMPLATES = ("a {}", "a photo of a {}.")


class Pictures:
    """Random images of three classes."""

    name = "pictures"

    def __len__(self):
        return 10

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        return Example(Image.fromarray(pixels), label=index % 3)


@functools.cache
def variables():
    images, tokens = np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 16), np.int32)
    return nn.unbox(jax.jit(CLIP(CONFIG).init)(jax.random.key(0), images, tokens))


def encoders(devices):
    return Encoders(CLIP(CONFIG), make_partitioner(MeshConfig(), jax.devices()[:devices]))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_classifier_averages_unit_vectors():
    model = CLIP(CONFIG)
    expected = []
    for name in CLASSES:
        tokens = tokenize([template.format(name) for template in TEMPLATES], context_length=16)
        features = np.asarray(model.apply(variables(), tokens, method=model.encode_text), np.float64)
        expected.append(unit(unit(features).mean(axis=0)))
    got = zero_shot_classifier(encoders(1), variables(), CLASSES, TEMPLATES)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_every_image_is_scored_once_and_in_order(devices):
    dataset, model = EvaluationSet("pictures", Pictures(), CLASSES), CLIP(CONFIG)
    result = zero_shot(encoders(devices), variables(), dataset, progress=False)
    np.testing.assert_array_equal(result.labels, np.arange(10) % 3)
    preprocess = encoders(1).preprocess
    images = np.stack([preprocess(Pictures()[index].image) for index in range(10)])
    features = unit(np.asarray(model.apply(variables(), images, method=model.encode_image)))
    classifier = zero_shot_classifier(encoders(1), variables(), CLASSES, result.templates)
    np.testing.assert_allclose(result.scores, features @ classifier.T, atol=1e-5)


def test_texts_go_through_the_models_own_tokenizer():
    cased = CLIP(dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, lowercase=False)))
    texts = ["A DOG", "a dog"]
    tokens = tokenize(texts, 16, lowercase=False)
    expected = unit(np.asarray(cased.apply(variables(), tokens, method=cased.encode_text)))
    partitioner = make_partitioner(MeshConfig(), jax.devices()[:1])
    got = Encoders(cased, partitioner).texts(variables(), texts)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got[0] - got[1]).max() > 0.1


def test_a_class_name_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="tokens"):
        zero_shot_classifier(encoders(1), variables(), ["word " * 30], TEMPLATES)


def test_the_report_is_one_file_without_outside_references(tmp_path):
    result = zero_shot(encoders(1), variables(), EvaluationSet("pictures", Pictures(), CLASSES), progress=False)
    path = tmp_path / "new" / "report.html"
    write_report(path, "A <title>", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], [result])

    class Page(HTMLParser):
        sources, text = [], []

        def handle_starttag(self, tag, attributes):
            self.sources += [value for key, value in attributes if key in ("src", "href")]

        def handle_data(self, data):
            self.text.append(data)

    page = Page()
    page.feed(path.read_text())
    wrong = int((result.scores.argmax(axis=1) != result.labels).sum())
    samples = min(wrong, 4) + 10 - wrong  # a third of the twelve places at most are for mistakes
    assert len(page.sources) == samples + 3  # and loss curve, similarity, confusion
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    text = " ".join(page.text)
    assert "A <title>" in text and "dog & <bone>" in text
    assert f"{result.metrics['acc1']:.2%}" in text
