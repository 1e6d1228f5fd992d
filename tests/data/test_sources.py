import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_jax import cli
from clip_jax.data.digits import Digits
from clip_jax.data.folder import LabelledFolder
from clip_jax.data.sources import make_sources
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image


def solid(value, size=(6, 5)):
    return Image.new("RGB", size, (value, value, value))


def make_one(fields, data_dir=""):
    (source,), _ = make_sources({fields.get("kind", "tfds"): fields}, data_dir)
    return source


def test_tfds_round_trip(photos_dir):
    source = make_one({"name": "tiny_photos"}, photos_dir)
    assert len(source) == 10
    shades = set()
    for index in range(10):
        example = source[index]
        shade = np.asarray(open_image(example.image))[0, 0, 0]
        shades.add(shade)
        assert example.captions == tuple(f"Caption {k} of photo {shade}: ä" for k in range(2))
        assert example.label == shade % 2
    assert shades == set(range(10))


def test_tfds_fields_can_be_named_and_splits_sliced(photos_dir):
    fields = {"name": "tiny_photos", "split": "train[:50%]", "caption_field": "title", "data_dir": photos_dir}
    source = make_one(fields, "/elsewhere")
    assert len(source) == 5
    assert source[0].captions[0].startswith("Photo ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "no_such_photos"}, "not prepared in .*download_and_prepare"),
        ({"name": "tiny_photos", "split": "dev"}, "no split 'dev'; it has train, test"),
        ({"name": "tiny_photos", "caption_field": "text"}, "Text field 'text'.*captions/text, image/filename, title"),
        ({"name": "tiny_photos", "label_field": "title"}, "no ClassLabel field 'title'"),
        ({"name": "tiny_photos", "slpit": "train"}, "data.tfds has no field 'slpit'; did you mean split"),
        ({"slpit": "train"}, "data.tfds has no field 'slpit'; did you mean split"),
        ({}, "data.tfds needs a value for name: as TFDS spells it"),
    ],
)
def test_tfds_mistakes_are_named(photos_dir, fields, message):
    with pytest.raises(UserError, match=message):
        make_one(fields, photos_dir)


def test_tfds_in_another_format_says_how_to_prepare(photos_dir, tmp_path):
    shutil.copytree(photos_dir, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "tiny_photos/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"tfrecord, expected array_record: delete .* and run python -c"):
        make_one({"name": "tiny_photos"}, str(tmp_path))


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


def test_captioned_folder(tmp_path):
    (tmp_path / "more").mkdir()
    for name, captions in (("b.png", "two\n\n zwei \n"), ("more/a.JPG", "one"), ("c.webp", "three")):
        solid(50).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(captions)
    source = make_one({"kind": "folder", "path": str(tmp_path)})
    assert [source[index].captions for index in range(len(source))] == [("two", "zwei"), ("three",), ("one",)]
    assert open_image(source[0].image).size == (6, 5)


def test_labelled_folder(tmp_path):
    for value, name in enumerate(("tabby_cat/1.png", "dog/x/2.png", "dog/3.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        solid(value).save(tmp_path / name)
    solid(9).save(tmp_path / "stray.png")
    (tmp_path / "empty").mkdir()
    source = LabelledFolder(str(tmp_path))
    assert source.class_names == ("dog", "tabby cat")
    assert sorted((e.label, np.asarray(open_image(e.image))[0, 0, 0]) for e in map(source.__getitem__, range(3))) == [
        (0, 1),
        (0, 2),
        (1, 0),
    ]


def test_what_other_systems_leave_behind_stops_no_run(tmp_path):
    photos = tmp_path / "photos"
    (photos / "x.jpg").mkdir(parents=True)
    (photos / ".cache").mkdir()
    solid(7).save(photos / "a.JPG")
    (photos / "a.TXT").write_text("seven")
    (photos / "._a.JPG").write_bytes(b"\x00\x05\x16\x07")  # the resource fork that macOS adds
    solid(8).save(photos / ".cache" / "thumbnail.png")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    source = make_one({"kind": "folder", "path": str(photos)})
    assert [source[index].captions for index in range(len(source))] == [("seven",)]
    labelled = LabelledFolder(str(tmp_path))
    assert labelled.class_names == ("photos",)
    assert [open_image(labelled[index].image).size for index in range(len(labelled))] == [(6, 5)]


def test_folder_mistakes_are_named(tmp_path):
    folder = {"kind": "folder", "path": str(tmp_path / "none")}
    with pytest.raises(UserError, match="none is not a folder"):
        make_one(folder)
    with pytest.raises(UserError, match="none is not a folder"):
        LabelledFolder(str(tmp_path / "none"))
    folder["path"] = str(tmp_path)
    with pytest.raises(UserError, match="holds no image"):
        make_one(folder)
    solid(0).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"1 of 1 images have no caption file: .*a.png needs a.txt"):
        make_one(folder)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"a.txt is empty"):
        make_one(folder)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8 text \(byte 3\)"):
        make_one(folder)
    with pytest.raises(UserError, match="no class sub-folders"):
        LabelledFolder(str(tmp_path))


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
from clip_jax.data.pipeline import TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.sources import make_sources
from clip_jax.processing import Augment, Preprocess
from clip_jax.processing.tokenizers import OpenAITokenizer
def batch(config):
    sources, weights = make_sources(config, {data_dir!r})
    processing = {{"preprocess": Preprocess(8), "tokenizer": OpenAITokenizer(), "augment": Augment()}}
    next(TrainBatches(TrainReader(Mixture(sources, weights, 0, 2), **processing)))
batch({{"digits": {{}}, "folder": {{"path": {str(tmp_path)!r}}}}})
assert "tensorflow_datasets" not in sys.modules
batch({{"shapes": {{}}}})
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
