"""Images per second and core of the training input, against a loader of open_clip's kind, tf.data and bare Pillow.

    python -m benchmarks.input [--sizes 341x256 512x384 1024x768] [--count 600] [--rounds 3]

Each contestant reads the same JPEGs with their captions from this machine's disk, and gives crops of 224 pixels as in
the paper (the shorter side resized, a square from anywhere), and tokens. The loader is a small script around
`webdataset` (pip install --no-deps webdataset), Pillow, PyTorch and OpenAI's tokenizer; tf.data reads TFRecords with
TensorFlow's own decoder and resizing, and this project's tokenizer in the graph. Every contestant has a process of its
own on one core and takes turns with the others; what counts is the CPU time of all its threads, so that a busy machine
changes little, in the median of the rounds. `raw` decodes and resizes with Pillow, images in memory, in the fastest way
found.
"""

import argparse
import cProfile
import io
import json
import os
import pstats
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import cpu
from benchmarks.tokenizer import captions, reference_module

RESOLUTION, BATCH, WARM = 224, 64, 64
PILLOW = ("'decode' of 'ImagingDecoder'", "'resize' of 'ImagingCore'")
CONTESTANTS = ("raw", "tar", "tfrecord", "tfds", "folder", "webdataset", "tf.data")


def photo(width: int, height: int, generator: np.random.Generator) -> bytes:
    """A JPEG of quality 90 with edges, textures and noise, about as large as a photograph of its size."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 5, height))
    waves = np.stack([np.sin(x * a + y * b) for a, b in generator.uniform(-3, 3, (3, 2))], axis=-1)
    edges = (np.sin(9 * x + waves[..., 0]) > 0.3)[..., None] * generator.uniform(-40, 40, 3)
    pixels = 128 + 70 * waves + edges + generator.normal(0, 9, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(folder: Path, size: str, count: int) -> None:
    """The same samples as a folder, a tar shard, TFRecords and a TFDS data set of array records."""
    import tarfile

    import tensorflow as tf
    import tensorflow_datasets as tfds

    width, height = map(int, size.split("x"))
    generator, texts = np.random.default_rng(0), captions(count, random.Random(0))
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)), "text": tfds.features.Text()}
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        "bench", tfds.core.Version("1.0.0"), str(folder / "bench/1.0.0"), "benchmarks"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    (folder / "folder").mkdir()
    (folder / "bench" / "1.0.0").mkdir(parents=True)
    records = tfds.core.SequentialWriter(info, count, file_format="array_record")
    records.initialize_splits(["train"])
    with tarfile.open(folder / "a.tar", "w") as archive, tf.io.TFRecordWriter(str(folder / "a.tfrecord")) as writer:
        for index, text in enumerate(texts):
            image, key = photo(width, height, generator), f"{index:08}"
            for extension, content in (("jpg", image), ("txt", text.encode())):
                (folder / "folder" / f"{key}.{extension}").write_bytes(content)
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            values = {"key": key.encode(), "jpg": image, "txt": text.encode()}
            feature = {
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for name, value in values.items()
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
            records.add_examples({"train": [{"image": io.BytesIO(image), "text": text}]})
    records.close_all()


def ours(kind: str, folder: Path) -> Iterator[int]:
    """This project's pipeline on one of its formats."""
    from clip_jax.data.pipeline import TrainBatches

    for batch in TrainBatches(make_reader(kind, folder)):
        yield len(batch["image"])


def make_reader(kind: str, folder: Path) -> Any:
    """What reads one of this project's formats."""
    from clip_jax.data.access import Access
    from clip_jax.data.reader import Mixture, TrainReader
    from clip_jax.data.sources import make_sources
    from clip_jax.data.targets import Texts
    from clip_jax.processing import Augment, Preprocess
    from clip_jax.processing.tokenizers import OpenAITokenizer

    fields = {
        "tar": {"path": str(folder / "a.tar")},
        "tfrecord": {"path": str(folder / "a.tfrecord")},
        "folder": {"path": str(folder / "folder")},
        "tfds": {"name": "bench"},
    }[kind]
    mixture = Mixture(*make_sources({kind: fields}, Access(str(folder))), 0, BATCH)
    return TrainReader(mixture, Preprocess(RESOLUTION), Texts(OpenAITokenizer()), Augment())


def outside_pillow(folder: Path, count: int) -> float:
    """Seconds of a sample that are neither Pillow's decoding nor its resizing, which alone leave Python's lock."""
    reader = make_reader("tar", folder)
    positions = np.arange(count)
    images = np.empty((count, RESOLUTION, RESOLUTION, 3), np.uint8)
    texts = np.empty((count, *reader.target.shape), np.int32)
    wholes, pillows = [], []
    for _ in range(5):  # the fastest of each, because both vary more than they differ
        began = time.process_time()
        reader.read(positions, images, texts)
        wholes.append(time.process_time() - began)
        profile = cProfile.Profile(time.process_time)
        profile.runcall(reader.read, positions, images, texts)
        stats = pstats.Stats(profile).stats
        pillows.append(sum(row[2] for (_, _, name), row in stats.items() if any(own in name for own in PILLOW)))
    return (min(wholes) - min(pillows)) / count


def raw(folder: Path) -> Iterator[int]:
    """Decoding and resizing with Pillow, and nothing else."""
    images = [path.read_bytes() for path in sorted((folder / "folder").glob("*.jpg"))]
    while True:
        for content in images:
            image = Image.open(io.BytesIO(content))
            image.draft(None, (round(1.5 * RESOLUTION), round(1.5 * RESOLUTION)))
            side = min(image.size)
            np.asarray(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC, box=(0, 0, side, side)))
            yield 1


def webdataset(folder: Path) -> Iterator[int]:
    """open_clip's way, with torchvision's arithmetic written out."""
    import torch
    import webdataset as wds

    tokenizer, draw = reference_module().SimpleTokenizer(), random.Random(0)
    start, end = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    mean, std = (
        torch.tensor([0.4815, 0.4578, 0.4082])[:, None, None],
        torch.tensor([0.2686, 0.2613, 0.2758])[:, None, None],
    )

    def transform(image: Image.Image) -> torch.Tensor:
        size = tuple(RESOLUTION * side // min(image.size) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (draw.randint(0, side - RESOLUTION) for side in size)
        image = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(mean).div_(std)

    def tokenize(text: str) -> torch.Tensor:
        ids = [start, *tokenizer.encode(text), end]
        row = torch.zeros(77, dtype=torch.long)
        row[: len(ids)] = torch.tensor(ids)
        return row

    dataset = (
        wds.WebDataset(str(folder / "a.tar"), shardshuffle=False)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, tokenize)
        .batched(BATCH)
    )
    torch.set_num_threads(1)
    while True:
        for images, _ in dataset:
            yield len(images)


def tf_data(folder: Path) -> Iterator[int]:
    """tf.data over TFRecords, with the tokenizer in the graph."""
    import tensorflow as tf

    from clip_jax.processing.tf_bpe import TfTokenizer

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tokenizer = TfTokenizer(77)
    strings = {name: tf.io.FixedLenFeature([], tf.string) for name in ("jpg", "txt")}

    def transform(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        sample = tf.io.parse_single_example(record, strings)
        height, width = tf.unstack(tf.io.extract_jpeg_shape(sample["jpg"])[:2])
        side = tf.minimum(height, width)
        top, left = (tf.random.uniform([], 0, length - side + 1, tf.int32) for length in (height, width))
        image = tf.io.decode_and_crop_jpeg(sample["jpg"], tf.stack([top, left, side, side]), channels=3)
        image = tf.image.resize(image, (RESOLUTION, RESOLUTION), "bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8), sample["txt"]

    dataset = tf.data.TFRecordDataset(str(folder / "a.tfrecord")).repeat().shuffle(1000).map(transform).batch(BATCH)
    dataset = dataset.map(lambda images, texts: (images, tokenizer(texts)))
    for images, _ in dataset:
        yield len(images)


def measure(contestant: str, folder: Path, count: int) -> float:
    """Images per second of CPU time on one core, after some to warm up."""
    if hasattr(os, "sched_setaffinity"):  # two threads of one core, which many machines count as two, slow each other
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kinds: dict[str, Callable[[Path], Iterator[int]]] = {"raw": raw, "webdataset": webdataset, "tf.data": tf_data}
    batches = kinds[contestant](folder) if contestant in kinds else ours(contestant, folder)
    warm = 0
    while warm < WARM:
        warm += next(batches)
    done, began = 0, _cpu_seconds()
    while done < count:
        done += next(batches)
    return done / (_cpu_seconds() - began)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print a table, a row per contestant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["341x256", "512x384", "1024x768"])
    parser.add_argument("--count", type=int, default=600, help="images that each contestant reads in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS)
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "FOLDER"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(flags.one[0], Path(flags.one[1]), flags.count)))
        return
    print(f"{cpu()}\n\n| | {' | '.join(flags.sizes)} |\n|---|{'---|' * len(flags.sizes)}")
    rates: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in flags.sizes:
            Path(folder, size).mkdir()
            write(Path(folder, size), size, flags.count)
        locked = [f"{1e3 * outside_pillow(Path(folder, size), flags.count):.2f}" for size in flags.sizes]
        for _ in range(flags.rounds):
            for contestant in flags.contestants:
                for size in flags.sizes:
                    one = ["--one", contestant, f"{folder}/{size}", "--count", str(flags.count)]
                    command = [sys.executable, "-m", "benchmarks.input", *one]
                    result = subprocess.run(command, check=True, capture_output=True, text=True)
                    rates.setdefault((contestant, size), []).append(float(result.stdout.splitlines()[-1]))
    for contestant in flags.contestants:
        values = [f"{statistics.median(rates[contestant, size]):,.0f}" for size in flags.sizes]
        print(f"| {contestant} | {' | '.join(values)} |")
    print(f"\nmilliseconds of a sample of tar, outside of Pillow's decoding and resizing: {', '.join(locked)}")


if __name__ == "__main__":
    main()
