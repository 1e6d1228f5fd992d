import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_jax import cli
from clip_jax.data.digits import Digits
from clip_jax.data.sources import make_sources
from clip_jax.errors import UserError


def solid(value, size=(6, 5)):
    return Image.new("RGB", size, (value, value, value))


def test_digits_split_is_fixed_and_stratified():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1442, 355)
    for digits, share in ((train, 0.8), (test, 0.2)):
        labels = [digits[index].label for index in range(len(digits))]
        assert (np.abs(np.bincount(labels) - 179.7 * share) < 5).all()
    pixels = [[digits[index].image.tobytes() for index in range(len(digits))] for digits in (train, test)]
    assert not set(pixels[0]) & set(pixels[1])
    assert train.class_names[7] == "seven"


def test_digits_images_are_scikit_learns():
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    train = Digits("train")
    for index, original in ((0, 0), (40, np.flatnonzero(labels == 3)[0])):
        example = next(train[k] for k in range(index, 1442) if train[k].label == labels[original])
        small = np.asarray(example.image.resize((8, 8), Image.Resampling.BOX), float)[:, :, 0]
        assert np.corrcoef(small.ravel(), grey[original])[0, 1] > (0.97 if index == 0 else 0.3)


def test_digits_captions_name_the_digit():
    example = next(example for example in map(Digits("train").__getitem__, range(1442)) if example.label == 3)
    assert "a photo of the digit three" in example.captions
    assert "a handwritten 3" in example.captions
    assert all("three" in caption or "3" in caption for caption in example.captions)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no source"),
        ({"shaeps": {}}, "unknown data source 'shaeps'; known are shapes, digits, folder, "),
        ({"digits": {"split": "validation"}}, "train and test, got 'validation'"),
        ({"digits": {"wieght": 2.0}}, "data.digits has no field 'wieght'; did you mean weight"),
        ({"digits": {"weight": "much"}}, "data.digits: weight must be of type float, like 0.1; got 'much'"),
        ({"digits": {"weight": -1.0}}, "data.digits: weight must be above 0, got -1.0"),
        ({"digits": 3}, "data.digits must hold the fields weight, split; got 3"),
        ({"folder": {"path": ""}}, "data.folder: path is empty; name the folder, as in --config.data.folder.path=PATH"),
        ({"mine": {"kind": "folder"}}, "data.mine needs a value for path"),
        ({"mine": {"kind": ["folder"]}}, "unknown data source"),
    ],
)
def test_configuration_mistakes_are_named(config, message):
    with pytest.raises(UserError, match=message):
        make_sources(config)


def test_a_config_whose_folder_was_forgotten_does_not_scan_the_current_one():
    with pytest.raises(UserError, match=r"--config\.data\.folder\.path"):
        make_sources(cli.load_config("vit_b32").data)


def test_weights_and_kinds():
    config = {"mine": {"kind": "digits", "weight": 3}, "digits": {}}
    sources, weights = make_sources(config)
    assert weights == (1.0, 3.0)  # by name: their order decides the stream, and a mapping has none
    assert [source.name for source in sources] == ["digits/train", "digits/train"]


def test_digits_folders_and_shapes_need_no_tensorflow(tmp_path, data_dir):
    solid(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("black")
    program = f"""
import sys
from clip_jax.data.access import Access
from clip_jax.data.pipeline import TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.sources import make_sources
from clip_jax.data.targets import Texts
from clip_jax.processing import Augment, Preprocess
from clip_jax.processing.tokenizers import OpenAITokenizer
def batch(config):
    sources, weights = make_sources(config, Access({data_dir!r}))
    processing = {{"preprocess": Preprocess(8), "target": Texts(OpenAITokenizer()), "augment": Augment()}}
    next(TrainBatches(TrainReader(Mixture(sources, weights, 0, 2), **processing)))
batch({{"digits": {{}}, "folder": {{"path": {str(tmp_path)!r}}}}})
assert "tensorflow_datasets" not in sys.modules
batch({{"shapes": {{}}}})
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
