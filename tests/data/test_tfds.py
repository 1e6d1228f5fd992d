"""TFDS data sets: opened, prepared where missing, read in each format that TFDS writes."""

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_jax import cli
from clip_jax.data.access import Access
from clip_jax.data.damage import Damaged
from clip_jax.data.sources import make_sources
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image

ROOT = Path(__file__).parents[2]


def open_tfds(fields, data_dir, offline=True):
    (source,), _ = make_sources({"tfds": fields}, Access(str(data_dir), offline))
    return source


def test_round_trip(photos_dir):
    source = open_tfds({"name": "tiny_photos"}, photos_dir)
    assert len(source) == 10
    shades = set()
    for index in range(10):
        example = source[index]
        shade = np.asarray(open_image(example.image))[0, 0, 0]
        shades.add(shade)
        assert example.captions == tuple(f"Caption {k} of photo {shade}: ä" for k in range(2))
        assert example.label == shade % 2
    assert shades == set(range(10))


def test_fields_can_be_named_and_splits_sliced(photos_dir):
    fields = {"name": "tiny_photos", "split": "train[:50%]", "caption_field": "title", "data_dir": photos_dir}
    source = open_tfds(fields, "/elsewhere")
    assert len(source) == 5
    assert source[0].captions[0].startswith("Photo ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "tiny_photos", "split": "dev"}, "no split 'dev'; it has train, test"),
        ({"name": "tiny_photos", "split": "train[:50"}, "no split 'train\\[:50'; it has train, test, and slices"),
        ({"name": "tiny_photos", "split": "train[20:30]"}, "no split 'train\\[20:30\\]'"),
        ({"name": "tiny_photos", "split": "train[0:0]"}, "no example in 'train\\[0:0\\]'"),
        ({"name": "tiny_photos", "split": "train[5:2]"}, "no example in 'train\\[5:2\\]'"),
        ({"name": "tiny_photos", "caption_field": "text"}, "Text field 'text'.*captions/text, image/filename, title"),
        ({"name": "tiny_photos", "label_field": "title"}, "no ClassLabel field 'title'"),
        ({"name": "tiny_photos", "slpit": "train"}, "data.tfds has no field 'slpit'; did you mean split"),
        ({"slpit": "train"}, "data.tfds has no field 'slpit'; did you mean split"),
        ({}, "data.tfds needs a value for name: as TFDS spells it"),
        (
            {"name": "tiny_photos:2.0.0"},
            "tiny_photos:2.0.0' is not prepared .* cannot be loaded at version 2.0.0, only",
        ),
        ({"name": "tiny_photos/large"}, "tiny_photos has no configuration 'large'; it has none"),
        ({"name": "tiny_confgs/green"}, "TFDS knows none of that name; the nearest are tiny_"),
        ({"name": "tiny_configs/grene"}, "no configuration 'grene'; the nearest are green"),
        ({"name": "kaggle:photos"}, "code from kaggle is not run here"),
        ({"name": "mnist/"}, "'mnist/' names no TFDS data set: expected NAME, NAME/CONFIGURATION"),
        ({"name": "../../etc"}, "names no TFDS data set"),
        ({"name": "mnist/data_dir=1"}, "names no TFDS data set"),
    ],
)
def test_mistakes_are_named(photos_dir, fields, message):
    with pytest.raises(UserError, match=message) as error:
        open_tfds(fields, photos_dir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("tiny_configs", "blue/1.0.0"),
        ("tiny_configs/green", "green/1.0.0"),
        ("tiny_configs/green:1.0.0", "green/1.0.0"),
    ],
)
def test_what_is_missing_is_prepared_once_and_said(tmp_path, caplog, capfd, name, version):
    from tests.tiny_photos import TinyConfigs

    assert TinyConfigs.name == "tiny_configs"
    with pytest.raises(UserError, match=f"{name} is not prepared in {tmp_path} and --offline fetches none"):
        open_tfds({"name": name}, tmp_path)
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.INFO, "clip_jax"):
        source = open_tfds({"name": name}, tmp_path, offline=False)
        again = open_tfds({"name": name}, tmp_path)
    place = tmp_path / "tiny_configs" / version
    said = f"TFDS prepares tiny_configs/{version} in {place}: it downloads an unknown number of GiB and takes"
    assert [message for message in caplog.messages if message.startswith(said)] == caplog.messages
    assert capfd.readouterr().out == ""
    assert source.name == again.name == f"tiny_configs/{version}/train"
    assert [again[i].image for i in range(3)] == [source[i].image for i in range(3)]
    assert source[0].captions[0].startswith(version.partition("/")[0])


def test_the_sizes_that_tfds_knows_are_said(tmp_path, monkeypatch, caplog):
    from clip_jax.data import tfds_builder

    monkeypatch.setattr(tfds_builder, "prepare", lambda builder: 1 / 0)
    with caplog.at_level(logging.INFO, "clip_jax"), pytest.raises(ZeroDivisionError):
        open_tfds({"name": "cifar10"}, tmp_path, offline=False)
    assert "it downloads at most 0.16 GiB and takes an unknown number of GiB on disk" in caplog.text


def test_a_failure_of_tfds_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    from tests.tiny_photos import TinyConfigs

    def fails(*_):
        raise RuntimeError("the server\nis down")

    monkeypatch.setattr(TinyConfigs, "_generate_examples", fails)
    monkeypatch.setattr(TinyConfigs, "MANUAL_DOWNLOAD_INSTRUCTIONS", "put\n  photos.zip there")
    message = r"cannot prepare tiny_configs/blue/1\.0\.0 in .*: RuntimeError: .*the server is down.*; it needs files"
    with pytest.raises(UserError, match=message) as error:
        open_tfds({"name": "tiny_configs"}, tmp_path, offline=False)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if "1.0.0" in path.name]


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
    """Both write into folders of their own; the second to finish takes what the first one made."""
    import tensorflow_datasets as tfds

    from clip_jax.data import tfds_builder
    from tests.tiny_photos import TinyConfigs

    generate = TinyConfigs._generate_examples

    def meanwhile(self, count):
        monkeypatch.setattr(TinyConfigs, "_generate_examples", generate)
        other = tfds.builder("tiny_configs", data_dir=str(tmp_path), file_format="array_record")
        tfds_builder.prepare(other)
        yield from generate(self, count)

    monkeypatch.setattr(TinyConfigs, "_generate_examples", meanwhile)
    source = open_tfds({"name": "tiny_configs"}, tmp_path, offline=False)
    assert len(source) == 3 and all(source[index].captions for index in range(3))
    assert [path.name for path in (tmp_path / "tiny_configs/blue").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("name", ["tiny_photos", "tiny_configs/green:1.0.0"])
def test_the_command_of_a_message_runs_as_printed(tmp_path, name):
    data_dir = tmp_path / 'it\'s "a" $HOME folder'
    with pytest.raises(UserError) as error:
        open_tfds({"name": name}, data_dir)
    command = str(error.value).partition(" or run ")[2]
    # A process that knows the data sets of the tests, as another one knows those of TFDS.
    (tmp_path / "sitecustomize.py").write_text("import tests.tiny_photos")
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run(command, shell=True, check=True, env=environment, capture_output=True)
    assert open_tfds({"name": name}, data_dir)[0].captions


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """One data set as TFDS prepares it in each format, in several files."""
    import tensorflow_datasets as tfds

    from tests.tiny_photos import TinyPhotos

    folders = {name: tmp_path_factory.mktemp(name) for name in ("array_record", "tfrecord", "parquet")}
    for name, folder in folders.items():
        config = tfds.download.DownloadConfig(num_shards=3)
        TinyPhotos(data_dir=str(folder), file_format=name).download_and_prepare(download_config=config)
    return folders


@pytest.mark.parametrize(
    ("split", "size"),
    [("train", 10), ("test", 4), ("train[:50%]", 5), ("train[1:3]", 2), ("train[-4:-1]", 3), ("train+test", 14)],
)
def test_formats_and_slices_give_the_same_examples(formats, split, size):
    read = {name: open_tfds({"name": "tiny_photos", "split": split}, folder) for name, folder in formats.items()}
    examples = {name: [source[index] for index in range(len(source))] for name, source in read.items()}
    assert examples["tfrecord"] == examples["array_record"] == examples["parquet"]
    assert len(examples["tfrecord"]) == size
    assert all(source.damage == () for name, source in read.items())
    if split == "train+test":
        shades = [np.asarray(open_image(example.image))[0, 0, 0] for example in examples["tfrecord"]]
        assert sorted(shades[:10]) == list(range(10)) and sorted(shades[10:]) == list(range(4))


def test_tfds_default_format_needs_no_tensorflow_to_be_read(formats):
    program = f"""
import sys
from clip_jax.data.access import Access
from clip_jax.data.damage import Damaged
from clip_jax.data.sources import make_sources
for folder in {[str(folder) for folder in formats.values()]}:
    (source,), _ = make_sources({{"tfds": {{"name": "tiny_photos"}}}}, Access(folder, True))
    assert len(source) == 10 and source[9].captions
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_files_with_fewer_examples_than_tfds_wrote_are_noticed(formats, tmp_path):
    whole = open_tfds({"name": "tiny_photos"}, formats["tfrecord"])
    shutil.copytree(formats["tfrecord"], tmp_path, dirs_exist_ok=True)
    second = tmp_path / "tiny_photos/1.0.0/tiny_photos-train.tfrecord-00001-of-00003"
    content = bytearray(second.read_bytes())
    second.write_bytes(content[:-5])
    source = open_tfds({"name": "tiny_photos"}, tmp_path)
    assert [item.reason for item in source.damage] == ["cut", "cut"]
    assert re.search(r"00001-of-00003 holds 3 examples, where TFDS wrote 4", str(source.damage[1]))
    kept = [source[index] for index in range(len(source))]
    assert kept == [whole[index] for index in (0, 1, 2, 3, 4, 5, 7, 8, 9)]
    content[40] ^= 1
    second.write_bytes(content)
    source = open_tfds({"name": "tiny_photos"}, tmp_path)
    assert source.damage == ()
    with pytest.raises(Damaged, match=r"00001-of-00003, offset 0: .*checksum") as error:
        source[3]
    assert error.value.reason == "checksum"
    second.unlink()
    with pytest.raises(UserError, match="00001-of-00003 cannot be opened"):
        open_tfds({"name": "tiny_photos"}, tmp_path)


def test_another_format_says_how_to_prepare(photos_dir, tmp_path):
    shutil.copytree(photos_dir, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "tiny_photos/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "riegeli"))
    message = (
        "tiny_photos/1.0.0 is prepared as riegeli, expected one of array_record, tfrecord, parquet: delete "
        f"{tmp_path}/tiny_photos/1.0.0 and run python -c 'import tensorflow_datasets as tfds; tfds.builder("
        f'"tiny_photos:1.0.0", file_format="array_record", data_dir="{tmp_path}").download_and_prepare()\''
    )
    with pytest.raises(UserError) as error:
        open_tfds({"name": "tiny_photos"}, tmp_path)
    assert str(error.value) == message


def test_a_source_travels_to_other_processes(formats):
    for folder in formats.values():
        source = open_tfds({"name": "tiny_photos", "split": "train[3:7]"}, folder)
        copy = pickle.loads(pickle.dumps(source))
        assert [copy[index] for index in range(4)] == [source[index] for index in range(4)]


def test_offline_is_a_flag_of_the_scripts_and_an_option_of_a_run():
    import argparse

    for argv, expected in ((["--offline"], True), ([], False), (["--config.offline=true"], True)):
        flags, config = cli.parse(argparse.ArgumentParser(), ["--config", "demo", *argv])
        assert config.access == Access("", expected)
        assert flags.offline == ("--offline" in argv)
