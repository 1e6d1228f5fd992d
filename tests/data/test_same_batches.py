"""The same thousand samples in every format give the same batches, bit for bit, by threads and by processes."""

import contextlib
import csv
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from clip_jax.data.access import Access
from clip_jax.data.order import Windows
from clip_jax.data.pipeline import InputConfig, TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.sources import source_config
from clip_jax.data.targets import Texts
from clip_jax.processing import Augment, Preprocess
from clip_jax.processing.tokenizers import OpenAITokenizer
from tests.data.make_shards import caption, photo, write_tar, write_tfrecord

COUNT, ROW_GROUP = 1000, 60
FORMATS = {
    "folder": ("folder", {"path": "{}/folder"}),
    "tar": ("tar", {"path": "{}/?.tar"}),
    "tar.gz": ("tar", {"path": "{}/?.tar.gz", "index_dir": "{}/cache"}),
    "tfrecord": ("tfrecord", {"path": "{}/{{0..2}}.tfrecord"}),
    "parquet with images": ("parquet", {"path": "{}/images.parquet"}),
    "parquet with paths": ("parquet", {"path": "{}/paths.parquet"}),
    "csv": ("csv", {"path": "{}/list.csv"}),
    "tsv": ("csv", {"path": "{}/list.tsv"}),
    "tfds array_record": ("tfds", {"name": "photos_in_array_record", "data_dir": "{}"}),
    "tfds tfrecord": ("tfds", {"name": "photos_in_tfrecord", "data_dir": "{}"}),
}


def write_tfds(folder, file_format):
    import tensorflow_datasets as tfds

    name = f"photos_in_{file_format}"
    place = folder / name / "1.0.0"
    place.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "caption": tfds.features.Text()})
    identity = tfds.core.dataset_info.DatasetIdentity(name, tfds.core.Version("1.0.0"), str(place), "tests")
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(builder=identity, features=features), 400, file_format=file_format
    )
    writer.initialize_splits(["train"])
    for index in range(COUNT):
        path = str(folder / "folder" / f"{index:08}.jpg")
        writer.add_examples({"train": [{"image": path, "caption": caption(index)}]})
    writer.close_all()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    (folder / "folder").mkdir()
    names = [f"folder/{index:08}.jpg" for index in range(COUNT)]
    for index, name in enumerate(names):
        (folder / name).write_bytes(photo(index))
        (folder / name).with_suffix(".txt").write_text(caption(index), encoding="utf-8")
    bounds = (0, 333, 334, COUNT)
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        write_tar(folder / f"{number}.tar", range(first, end))
        write_tar(folder / f"{number}.tar.gz", range(first, end), "w:gz")
        write_tfrecord(folder / f"{number}.tfrecord", range(first, end))
    texts = [caption(index) for index in range(COUNT)]
    for file, image, values in (
        ("images", "image", [photo(index) for index in range(COUNT)]),
        ("paths", "filepath", names),
    ):
        table = pa.table({image: values, "caption": texts})
        pyarrow.parquet.write_table(table, folder / f"{file}.parquet", row_group_size=ROW_GROUP)
    for file, separator in (("list.csv", ","), ("list.tsv", "\t")):
        with open(folder / file, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, delimiter=separator)
            writer.writerows([("filepath", "title"), *zip(names, texts, strict=True)])
    for file_format in ("array_record", "tfrecord"):
        write_tfds(folder, file_format)
    return folder


def batches_of(source, config=InputConfig(), count=4):  # noqa: B008
    reader = TrainReader(
        Mixture((source,), (1.0,), 11, 250),
        Preprocess(24),
        Texts(OpenAITokenizer(16)),
        Augment(crop="resized", flip=True),
    )
    with contextlib.closing(TrainBatches(reader, config)) as batches:
        return [next(batches) for _ in range(count)]


def open_format(name, folder, windows):
    kind, fields = FORMATS[name]
    source = source_config(kind, {key: value.format(folder) for key, value in fields.items()}).open(Access())
    source.windows = windows
    return source


def test_every_format_gives_the_same_batches(everything):
    windows = Windows(ROW_GROUP, 2, 2)
    expected = batches_of(open_format("folder", everything, windows))
    assert len({text.tobytes() for batch in expected for text in batch["text"]}) == COUNT
    for name in FORMATS:
        for batch, wanted in zip(batches_of(open_format(name, everything, windows)), expected, strict=True):
            np.testing.assert_array_equal(batch["image"], wanted["image"], name)
            np.testing.assert_array_equal(batch["text"], wanted["text"], name)


def test_every_format_is_read_by_processes(everything):
    windows = Windows(ROW_GROUP, 2, 2)
    expected = batches_of(open_format("folder", everything, windows), count=1)[0]
    for name in ("tar", "parquet with images", "tfds array_record"):
        source = open_format(name, everything, windows)
        (batch,) = batches_of(source, InputConfig(data_processes=2), count=1)
        np.testing.assert_array_equal(batch["image"], expected["image"], name)
        np.testing.assert_array_equal(batch["text"], expected["text"], name)
