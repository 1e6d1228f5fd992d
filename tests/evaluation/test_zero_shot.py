import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import EvaluationSet, evaluation_set
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.registry import EVALUATION_SETS, Entry
from clip_jax.evaluation.zero_shot import ZeroShotResult, prompt_tokens, zero_shot, zero_shot_classifier
from clip_jax.models import CLIP, CLIPConfig, TextConfig
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.processing import tokenize
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


PICTURES = EvaluationSet("pictures", Pictures(), CLASSES, TEMPLATES)


@functools.cache
def variables():
    images, tokens = np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 16), np.int32)
    return nn.unbox(jax.jit(CLIP(CONFIG).init)(jax.random.key(0), images, tokens))


@functools.cache
def encoders(devices):
    return make_encoders(CLIP(CONFIG), make_partitioner(MeshConfig(), jax.devices()[:devices]))


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
    model = CLIP(CONFIG)
    result = zero_shot(encoders(devices), variables(), PICTURES, progress=False)
    np.testing.assert_array_equal(result.labels, np.arange(10) % 3)
    preprocess = encoders(1).preprocess
    images = np.stack([preprocess(Pictures()[index].image) for index in range(10)])
    features = unit(np.asarray(model.apply(variables(), images, method=model.encode_image)))
    classifier = zero_shot_classifier(encoders(1), variables(), CLASSES, TEMPLATES)
    np.testing.assert_allclose(result.scores, features @ classifier.T, atol=1e-5)


def test_texts_go_through_the_models_own_tokenizer():
    cased = CLIP(dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, lowercase=False)))
    texts = ["A DOG", "a dog"]
    tokens = tokenize(texts, 16, lowercase=False)
    expected = unit(np.asarray(cased.apply(variables(), tokens, method=cased.encode_text)))
    own = make_encoders(cased, make_partitioner(MeshConfig(), jax.devices()[:1]))
    got = own.encode_tokens(variables(), own.tokenizer(texts))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got[0] - got[1]).max() > 0.1


def test_a_class_name_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="tokens"):
        zero_shot_classifier(encoders(1), variables(), ["word " * 30], TEMPLATES)


def test_classes_that_the_model_reads_alike_are_named(caplog):
    prompt_tokens(encoders(1), ("Cups", "a dog", "cups"), TEMPLATES)
    assert "the classes 'Cups' and 'cups' have the same prompts: zero-shot, no image is of the second" in caplog.text
    assert len(caplog.records) == 1


def test_more_prompts_than_anybody_has_are_refused():
    dataset = EvaluationSet("pictures", Pictures(), ("cat",) * 2**10, ("a {}",) * (2**9 + 1))
    with pytest.raises(UserError, match="pictures has 525,312 prompts, expected at most 524,288"):
        zero_shot(encoders(1), variables(), dataset, progress=False)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_weights_that_are_nan_score_nothing(tower):
    params = variables()["params"]
    broken = {**params, tower: jax.tree.map(lambda x: np.full_like(x, np.nan), params[tower])}
    with pytest.raises(UserError, match="pictures: expected finite scores, but 30 of 30 are NaN"):
        zero_shot(encoders(1), {**variables(), "params": broken}, PICTURES, progress=False)


def test_an_image_without_a_label_is_an_error():
    class Unlabelled(Pictures):
        def __getitem__(self, index):
            return Example(super().__getitem__(index).image, label=None if index == 4 else 0)

    dataset = EvaluationSet("pictures", Unlabelled(), CLASSES)
    with pytest.raises(UserError, match="pictures: expected labels from 0 to 2, but 1 of 10 are not"):
        zero_shot(encoders(1), variables(), dataset, progress=False)


def test_a_data_set_is_judged_by_its_own_metric():
    scores = np.eye(6, dtype=np.float32)[[0, 1, 2, 3]]
    dataset = dataclasses.replace(PICTURES, class_names=tuple("abcdef"), metric="mean_acc1_acc5")
    assert ZeroShotResult(dataset, scores, np.array([0, 1, 0, 5])).metrics == {
        "acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": 0.5, "mean_acc1_acc5": 0.625,
    }  # fmt: skip


def test_an_evaluation_set_costs_one_entry(monkeypatch):
    names = ("nought", *map(str, range(1, 10)))
    entry = Entry({"kind": "digits", "split": "test"}, templates=("the digit {}",), class_names=names)
    monkeypatch.setitem(EVALUATION_SETS, "numerals", entry)
    result = zero_shot(encoders(8), variables(), evaluation_set("numerals"), progress=False)
    assert (result.dataset.class_names, result.scores.shape) == (names, (355, 10))
    classifier = zero_shot_classifier(encoders(8), variables(), names, ("the digit {}",))
    image = encoders(8).preprocess.resize_and_crop(result.dataset.source[0].image)
    np.testing.assert_allclose(
        result.scores[:1], encoders(8).encode_images(variables(), image[None]) @ classifier.T, atol=1e-6
    )


def test_the_rules_of_the_config_reach_the_towers(monkeypatch):
    constrain, seen = nn.with_logical_constraint, set()

    def spy(x, axes):
        seen.add(dict(nn.get_logical_axis_rules())["mlp"])
        return constrain(x, axes)

    monkeypatch.setattr(nn, "with_logical_constraint", spy)
    images = tiny.images(CONFIG, 3)
    features = {}
    for rule in ("tensor", None):
        seen.clear()
        partitioner = make_partitioner(MeshConfig(tensor=2, rules={"mlp": rule, "batch": "data"}))
        features[rule] = make_encoders(CLIP(CONFIG), partitioner).encode_images(variables(), images)
        assert seen == {rule}
    np.testing.assert_allclose(features[None], features["tensor"], atol=1e-6)


class ManyClasses(Pictures):
    """Each picture belongs to some of three classes, one to none."""

    def __getitem__(self, index):
        classes = tuple(number for number in range(3) if index >> number & 1)
        return dataclasses.replace(super().__getitem__(index), label=classes)


def test_pictures_of_several_classes_are_ranked_by_probabilities():
    dataset = EvaluationSet("pictures", ManyClasses(), CLASSES, TEMPLATES, metric="mean_average_precision")
    result = zero_shot(encoders(1), variables(), dataset, progress=False)
    cosines = zero_shot(encoders(1), variables(), PICTURES, progress=False).scores.astype(np.float64)
    logits = np.exp(float(variables()["params"]["logit_scale"])) * cosines
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(result.scores, shares / shares.sum(axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(result.labels, np.arange(10)[:, None] >> np.arange(3) & 1)
    assert list(result.metrics) == ["mean_average_precision"]
    for labels in (Pictures(), ManyClasses()):
        wrong = dataclasses.replace(dataset, source=labels, class_names=CLASSES[:2])
        with pytest.raises(UserError, match="expected any number of classes from 0 to 1, got"):
            zero_shot(encoders(1), variables(), wrong, progress=False)
    with pytest.raises(UserError, match="expected one class, got"):
        zero_shot(encoders(1), variables(), dataclasses.replace(dataset, metric="acc1"), progress=False)


def test_classes_without_images_do_not_count_where_the_set_says_so():
    names = ("wolf", "cat", "dog & <bone>", "tree", "bird")

    class Sparse(Pictures):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), label=(1, 2, 4)[index % 3])

    dataset = EvaluationSet("pictures", Sparse(), names, TEMPLATES, occurring=3)
    expected = zero_shot(encoders(1), variables(), PICTURES, progress=False)
    result = zero_shot(encoders(1), variables(), dataset, progress=False)
    assert result.dataset.class_names == CLASSES and result.metrics == expected.metrics
    np.testing.assert_array_equal(result.labels, expected.labels)
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-6)
    with pytest.raises(UserError, match="expected images of 4 classes, got images of 3: is the split whole"):
        zero_shot(encoders(1), variables(), dataclasses.replace(dataset, occurring=4), progress=False)
