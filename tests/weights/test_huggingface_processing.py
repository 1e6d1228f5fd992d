"""Image processor and tokenizer of Hugging Face folders, against transformers itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageFilter
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import clip_jax
from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, TextConfig, VisionTransformerConfig
from clip_jax.processing import END_OF_TEXT, Preprocess, bpe, make_tokenizer
from clip_jax.weights import load_variables, save
from tests.weights.conftest import random_variables

# 49,408 entries, as OpenAI's tokenizer needs them, and nothing else that takes time.
CONFIG = CLIPConfig(16, VisionTransformerConfig(32, 8, 32, 2, 2, 48), TextConfig(32, 2, 48, 2, context_length=40))
LABELS = ["a Cat", "two dogs", "CAFÉ", "a photo of the number 2024 on a wall"]
MEAN, STD = [0.5, 0.25, 0.75], [0.2, 0.4, 0.3]

# What OpenAI's clean-up changes beyond white space and case (ftfy, HTML entities) transformers leaves as it is.
AWKWARD = [
    "",
    " \n\t ",
    "It's, we'RE they'VE",
    "2024 3½ Ⅷ ٣ !!!???...",
    "a photo of a cat.\n\ttwo   spaces\u3000wide",
    "café NAÏVE cafe\u0301 Straße",
    "👩‍👩‍👧‍👦 1️⃣ 👍🏽",
    "日本語のテキスト 한국어 ภาษาไทย عربى हिन्दी",
    "a</w>b </w> <|end|>",
    "@user #tag http://a.b/c?d=e",
    "x" * 300,
]


def photographs():
    """Smooth colours, edges and noise; wider than high, higher than wide, square, small and grey."""
    rng = np.random.default_rng(0)
    images = []
    for width, height in ((150, 98), (70, 140), (64, 64), (20, 26)):
        image = Image.fromarray(rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image.paste((250, 20, 90), (width // 5, height // 4, width // 2, height // 2))
        images.append(image.filter(ImageFilter.GaussianBlur(1)))
    return [*images, images[0].convert("L")]


@pytest.fixture(scope="module")
def model():
    variables = random_variables(CONFIG)
    variables = jax.tree.map(lambda x: x if x.ndim < 2 else x * (x.size / x.shape[-1]) ** -0.5 * 2, variables)
    variables["params"]["logit_scale"] = np.float32(3).reshape(())
    return CONFIG, variables


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """A folder written here."""
    path = tmp_path_factory.mktemp("written") / "model"
    save(path, *model, "huggingface")
    return path


def saved_elsewhere(path, written, layout="processor_config.json", tokenizer=None, **settings):
    """The folder as transformers saves it: its own model, image processor and tokenizer."""
    CLIPModel.from_pretrained(written).save_pretrained(path)
    processor = CLIPImageProcessorPil(**{"size": 32, "crop_size": 32} | settings)
    tokenizer = tokenizer or CLIPTokenizer.from_pretrained(written)
    if layout == "processor_config.json":
        CLIPProcessor(processor, tokenizer).save_pretrained(path)
    else:  # what transformers 4 does
        processor.save_pretrained(path)
        tokenizer.save_pretrained(path)
    assert [file.name for file in path.glob("*processor_config.json")] == [layout]
    return processor


def ours(folder, images, texts):
    model, variables, preprocess = clip_jax.load(folder)
    tokens = make_tokenizer(model.config.text)(texts)
    pixels = np.stack([preprocess(image) for image in images])
    return pixels, np.asarray(jax.jit(model.apply)(variables, pixels, tokens)[0])


@pytest.mark.parametrize("layout", ["processor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, {}),
        (
            {"size": 48, "resample": 2, "image_mean": MEAN, "image_std": STD},
            {"resize_to": 48, "interpolation": "bilinear", "mean": tuple(MEAN), "std": tuple(STD)},
        ),
        ({"size": {"height": 32, "width": 32}, "resample": 1}, {"resize": "squash", "interpolation": "lanczos"}),
        (
            {"size": {"height": 40, "width": 40}, "resample": 0, "do_normalize": False},
            {"resize": "squash", "resize_to": 40, "interpolation": "nearest", "mean": (0.0,) * 3, "std": (1.0,) * 3},
        ),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, {"resize": "squash"}),
    ],
)
def test_pixels_equal_those_of_transformers(written, tmp_path, layout, settings, changed):
    processor = saved_elsewhere(tmp_path, written, layout, **settings)
    preprocess = Preprocess.from_config(load_variables(tmp_path)[0])
    assert preprocess == dataclasses.replace(Preprocess(32), **changed)
    for image in photographs():
        bytes_only = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(preprocess.resize_and_crop(image), bytes_only.transpose(1, 2, 0))
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(preprocess(image), expected, rtol=0, atol=2e-6)


def test_a_folder_of_transformers_5_gives_its_features(written, tmp_path):
    """The case that passed unnoticed: bilinear, resized to 48, cropped to 32, in processor_config.json."""
    saved_elsewhere(tmp_path, written, size=48, resample=2, image_mean=MEAN, image_std=STD)
    processor = CLIPProcessor.from_pretrained(tmp_path, backend="pil")
    inputs = processor(text=LABELS, images=photographs(), return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(tmp_path).eval()(**inputs).logits_per_image.numpy()
    np.testing.assert_allclose(ours(tmp_path, photographs(), LABELS)[1], expected, rtol=0, atol=1e-3)


def test_pipeline_of_transformers_gives_our_predictions(model, tmp_path):
    config = dataclasses.replace(model[0], image_interpolation="bilinear", image_resize_to=40, image_std=tuple(STD))
    save(tmp_path / "model", config, model[1], "huggingface")
    classify = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path / "model"))
    _, logits = ours(tmp_path / "model", photographs(), [f"This is a photo of {label}." for label in LABELS])
    expected = np.asarray(jax.nn.softmax(logits, axis=-1))
    assert expected.max(axis=1).min() > 0.3 and expected.min() < 0.2, "neither uniform nor all the same"
    for image, row in zip(photographs(), expected, strict=True):
        scores = {answer["label"]: answer["score"] for answer in classify(image, candidate_labels=LABELS)}
        np.testing.assert_allclose([scores[label] for label in LABELS], row, rtol=0, atol=1e-4)


def test_the_tokenizer_that_is_written_gives_our_ids(written):
    vocabulary = json.loads((written / "vocab.json").read_text())
    assert len(vocabulary) == 49408 and vocabulary["<|endoftext|>"] == END_OF_TEXT
    tokenizer = AutoTokenizer.from_pretrained(written)
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 40)
    tokenize = make_tokenizer(CONFIG.text)
    for text in AWKWARD:
        expected = tokenize(text, truncate=True)[0]
        row = tokenizer(text, truncation=True)["input_ids"]
        assert row == expected[: len(row)].tolist(), text
        # OpenAI pads with 0, transformers with the end of text: no model looks behind the first of these.
        assert not expected[len(row) :].any() and row.index(END_OF_TEXT) == len(row) - 1


def test_round_trip_of_every_field_of_the_description(model, tmp_path):
    config = dataclasses.replace(
        model[0],
        image_interpolation="box",
        image_resize="squash",
        image_resize_to=37,
        image_mean=tuple(MEAN),
        image_std=tuple(STD),
    )
    save(tmp_path / "m", config, model[1], "huggingface")
    assert load_variables(tmp_path / "m")[0] == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 32, "longest_edge": 60}}, "size is .*longest_edge"),
        ({"size": {"height": 32, "width": 40}}, "size is .*40"),
        ({"size": 28}, "size is 28, smaller than the 32 pixels"),
        ({"size": "32"}, "size is '32'"),
        ({"crop_size": 28}, "crop_size is 28"),
        ({"crop_size": {"height": 32, "width": 28}}, "crop_size is .*28"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"resample": 9}, "resample is 9"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"do_pad": True}, "do_pad is True"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type is 'ViTImageProcessor'"),
        ({"image_mean": 3}, "preprocessor_config.json"),
        ({"image_mean": [1, 2]}, "image_mean"),
        ({"image_std": ["a", "b", "c"]}, "image_std"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_image_processing_that_cannot_be_expressed(written, tmp_path, settings, message, nested):
    link(written, tmp_path)
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text()) | settings
    file.unlink()
    if nested:
        file = tmp_path / "processor_config.json"
        values = {"image_processor": values, "processor_class": "CLIPProcessor"}
        message = message.replace("preprocessor_config", "processor_config")
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        load_variables(tmp_path)
    assert file.name in str(error.value)


def test_image_processors_of_early_versions(written, tmp_path):
    """The file of openai/clip-vit-base-patch32, for another resolution."""
    link(written, tmp_path)
    values = {
        "crop_size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 32,
    }
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert load_variables(tmp_path)[0] == CONFIG


def test_a_folder_without_processor_and_tokenizer_is_openais(written, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(written / name)
    assert load_variables(tmp_path)[0] == CONFIG


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("tokenizer_config.json", lambda values: values | {"tokenizer_class": "BertTokenizer"}, "BertTokenizer"),
        ("vocab.json", lambda values: {key: values[key] for key in list(values)[:100]}, "CLIPTokenizer of 100 entries"),
        ("vocab.json", lambda values: values | {"!": 1, '"': 0}, "CLIPTokenizer of 49408 entries"),
    ],
)
def test_another_tokenizer_is_named_and_not_used(written, tmp_path, name, change, kind):
    link(written, tmp_path)
    values = json.loads((written / name).read_text())
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(json.dumps(change(values)))
    config, variables = load_variables(tmp_path)
    assert config.text.tokenizer == kind
    with pytest.raises(UserError, match=f"tokenizer is '{kind}'"):
        make_tokenizer(config.text)
    with pytest.raises(UserError, match="transformers would take OpenAI's tokenizer for"):
        save(tmp_path / "again", config, variables, "huggingface")


def test_the_vocabulary_of_transformers_5_lies_in_another_file(written, tmp_path):
    names = ["<|startoftext|>", "<|endoftext|>"]
    small = CLIPTokenizer(vocab={name: i for i, name in enumerate([*bpe.vocabulary().names[:50], *names])}, merges=[])
    saved_elsewhere(tmp_path / "small", written, tokenizer=small)
    saved_elsewhere(tmp_path / "openai", written)
    assert not (tmp_path / "openai" / "vocab.json").exists()
    assert load_variables(tmp_path / "openai")[0] == CONFIG
    assert load_variables(tmp_path / "small")[0].text.tokenizer == "CLIPTokenizer of 52 entries"


def test_case_that_transformers_would_not_keep(model, written, tmp_path):
    link(written, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "do_lower_case": false}')
    assert CLIPTokenizer.from_pretrained(tmp_path)("A")["input_ids"] == [49406, 320, 49407], "the setting has no effect"
    with pytest.raises(UserError, match=r"tokenizer_config\.json: do_lower_case is False"):
        load_variables(tmp_path)
    cased = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, lowercase=False))
    with pytest.raises(UserError, match="lower-cases every text"):
        save(tmp_path / "cased", cased, model[1], "huggingface")


def test_ids_after_openais_end_of_text(tmp_path):
    longer = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=49410))
    with pytest.raises(UserError, match="takes id 49409 for end of text, not 49407"):
        save(tmp_path / "m", longer, {}, "huggingface")


def test_a_text_tower_alone_names_its_loader(written, tmp_path):
    transformers.CLIPTextModel.from_pretrained(written).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="load_text"):
        clip_jax.load(tmp_path)


def link(source, target):
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
