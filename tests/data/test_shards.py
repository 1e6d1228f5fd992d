import contextlib
import os
import tarfile
import time

import numpy as np
import pytest

from clip_jax.data import files, tar, tfrecord
from clip_jax.data.access import Access
from clip_jax.data.order import Windows
from clip_jax.data.pipeline import InputConfig, TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.shards import Shards
from clip_jax.data.sources import source_config
from clip_jax.data.targets import Texts
from clip_jax.errors import UserError
from clip_jax.processing import Augment, Preprocess
from clip_jax.processing.tokenizers import OpenAITokenizer
from tests.data.make_shards import add, caption, members, photo, write_tar, write_tfrecord

COUNT = 60
SHARDS = (range(0, 25), range(25, 26), range(26, 60))


def open_source(kind, path, **fields):
    return source_config(kind, {"path": str(path), **fields}).open(Access())


def batches_of(*sources, count=6, config=InputConfig(), **changes):  # noqa: B008
    mixture = Mixture(sources, (1.0,) * len(sources), 3, 16)
    reader = TrainReader(mixture, Preprocess(24), Texts(OpenAITokenizer(16)), Augment())
    with contextlib.closing(TrainBatches(reader, config, **changes)) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(batches, expected):
    for got, wanted in zip(batches, expected, strict=True):
        assert got.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_array_equal(got[key], wanted[key])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for number, indices in enumerate(SHARDS):
        write_tar(folder / f"{number:05}.tar", indices)
        write_tar(folder / f"{number:05}.tar.gz", indices, "w:gz", tarfile.PAX_FORMAT)
        write_tfrecord(folder / f"{number:05}.tfrecord", indices)
    return folder


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tfrecord"])
def test_every_sample_is_read_as_it_was_written(shards, kind, tmp_path):
    pattern = f"{shards}/{{00000..00002}}.{kind}"
    source = open_source(kind.partition(".")[0], pattern, index_dir=str(tmp_path))
    assert len(source) == COUNT and not source.damage
    for index in range(COUNT):
        example = source[index]
        assert example.image == photo(index)
        assert example.captions == (caption(index),)
        assert example.key == f"{index:08}"


def test_formats_threads_and_processes_give_the_same_batches(shards):
    windows = {"block": 4, "window": 3, "lanes": 2}
    expected = batches_of(open_source("tar", shards / "*.tar", **windows))
    assert len({image.tobytes() for batch in expected[:3] for image in batch["image"]}) == 3 * 16
    for kind in ("tar.gz", "tfrecord"):
        source = open_source(kind.partition(".")[0], f"{shards}/*.{kind}", **windows)
        assert_same(batches_of(source), expected)
    source = open_source("tar", shards / "*.tar", **windows)
    assert_same(batches_of(source, config=InputConfig(data_processes=3)), expected)
    halves = [batches_of(source, process_index=index, process_count=2) for index in range(2)]
    joined = [
        {key: np.concatenate([half[key] for half in pair]) for key in pair[0]} for pair in zip(*halves, strict=True)
    ]
    assert_same(joined, expected)
    assert_same(batches_of(source, count=2, start_step=4), expected[4:])


def test_lanes_read_their_own_blocks(shards):
    source = open_source("tar", shards / "*.tar", block=2, window=2, lanes=4)
    mixture = Mixture((source,), (1.0,), 0, 16)
    _, indices = mixture.locate(np.arange(48))  # three windows of 16 samples, with a whole window of each lane
    lanes = indices.reshape(3, 4, 4)
    for window in lanes:
        blocks = [set((lane // 2).tolist()) for lane in window]
        assert sum(len(lane) for lane in blocks) == len(set.union(*blocks)) == 8


def test_without_blocks_all_samples_are_mixed(shards):
    source = open_source("tar", shards / "*.tar", block=1)
    assert source.windows is None
    assert source[41].key == "00000041"


def test_fields_are_found_or_named(shards):
    source = open_source("tar", shards / "00000.tar", caption_field="alt")
    assert source[3].captions == ("other words for 3",)
    source = open_source("tar", shards / "00000.tar", label_field="width", caption_field="txt")
    assert source[3].label == 40
    with pytest.raises(UserError, match=r"key '00000000': expected an image, got the fields "):
        open_source("tar", shards / "00000.tar", image_field="png")[0]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, tar_format):
    long = "ordner/" * 30 + "größe.2024"
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as archive:
        for stem in (long, "b"):
            for extension, data in members(5).items():
                add(archive, f"{stem}.{extension}", data)
    source = open_source("tar", tmp_path / "a.tar")
    # The extension begins at the first dot, as in WebDataset; so the first sample's members are called 2024.jpg, ...
    assert len(source) == 2 and not source.damage
    assert source[1].key == "b"
    with pytest.raises(UserError, match=r"key 'ordner/.*größe': expected an image, got the fields 2024.jpg, 2024.txt"):
        source[0]


def test_an_index_is_made_once_and_again_when_its_shard_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_tar(path, range(3))
    scans = []

    def counting(read, size):
        scans.append(size)
        return tar.scan(read, size)

    for _ in range(2):
        assert len(Shards(files.find(str(path)), counting)) == 3
    assert len(scans) == 1 and os.listdir(tmp_path / ".clip_jax_index") == ["a.tar.npz"]
    time.sleep(0.01)
    write_tar(path, range(10, 15))
    assert len(open_source("tar", path)) == 5
    assert open_source("tar", path)[4].captions == (caption(14),)
    index = tmp_path / ".clip_jax_index" / "a.tar.npz"
    for damaged in (index.read_bytes()[:100], b"", b"PK\x03\x04" + bytes(200)):
        index.write_bytes(damaged)
        assert len(open_source("tar", path)) == 5


def test_an_index_goes_to_the_cache_where_the_shards_folder_cannot_be_written(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", range(3))
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    write = files.write

    def refuse(path, content):
        if ".clip_jax_index" in path:
            raise PermissionError(13, "Permission denied")
        write(path, content)

    monkeypatch.setattr(files, "write", refuse)
    assert len(open_source("tar", tmp_path / "a.tar")) == 3
    assert len(list((tmp_path / "cache" / "index").rglob("a.tar.npz"))) == 1
    assert not (tmp_path / ".clip_jax_index").exists()


def test_many_shards_are_indexed_by_processes(tmp_path):
    for number in range(12):
        write_tar(tmp_path / f"{number:03}.tar", [number], content=lambda index: {"jpg": b"j", "txt": b"t"})
    shards = Shards(files.find(f"{tmp_path}/{{000..011}}.tar"), tar.scan)
    assert len(shards) == 12
    assert [tar.parse(shards.read(index))[0] for index in range(12)] == [f"{index:08}" for index in range(12)]


def test_samples_come_in_ranges_over_shards(shards):
    source = Shards(files.find(str(shards / "*.tfrecord")), tfrecord.scan)
    assert source.read_range(20, 40) == [source.read(index) for index in range(20, 40)]
    assert len(list(source.ranges(20, 40))) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "nowhere/*.tar"}, "no file matches nowhere"),
        ({"path": "nowhere/{000..001}.tar"}, "nowhere/000.tar cannot be opened: No such file"),
        ({"path": "nowhere/{000..001.tar"}, "expected braces such as"),
        ({"path": "here://x/a.tar"}, "here://x: Protocol not known: here"),
        ({"path": "a.tar", "block": 0}, "block must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        source_config("tar", fields).open(Access())


def test_windows_are_those_of_the_configuration(shards):
    source = open_source("tar", shards / "*.tar", block=4, window=3, lanes=2)
    assert source.windows == Windows(4, 3, 2)
    assert open_source("tar", shards / "*.tar").windows == Windows(128, 128, 8)
