"""Records per second without decoding, an index of 100 million samples, and how far neighbours are mixed.

    python -m benchmarks.records [--records 20000] [--shards 10000]

Records of 30 KB in tar, TFRecord and array record files and in a folder, in the page cache: one at a time in random
order, in the order of blocks and windows, and from front to back. Then the start of a run over `--shards` shards of
10,000 samples each, whose files are empty but whose indexes are real. Then the distance, in the order of training,
between samples that are neighbours in a shard.
"""

import argparse
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.machine import cpu
from clip_jax.data import files, shards, tar, tfrecord
from clip_jax.data.order import Windows, sample_index, windowed_index
from clip_jax.data.shards import SPAN, Index, Shards

RECORD = 30_000  # bytes
WINDOWS = Windows(128, 128, 8)


def write(folder: Path, count: int) -> None:
    """The same records in each format."""
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter

    content = np.random.default_rng(0).integers(0, 256, RECORD, np.uint8).tobytes()
    (folder / "folder").mkdir()
    records = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1,uncompressed")
    with tarfile.open(folder / "a.tar", "w") as archive, tf.io.TFRecordWriter(str(folder / "a.tfrecord")) as writer:
        for index in range(count):
            name = folder / "folder" / f"{index:08}.jpg"
            name.write_bytes(content)
            archive.add(name, name.name)
            writer.write(content)
            records.write(content)
    records.close()


def readers(folder: Path) -> dict[str, Callable[[int], bytes]]:
    """How each format gives one record."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    names = sorted(os.listdir(folder / "folder"))
    return {
        "tar": Shards(str(folder / "a.tar"), tar.scan).read,
        "TFRecord": Shards(str(folder / "a.tfrecord"), tfrecord.scan).read,
        "array record": ArrayRecordDataSource([str(folder / "a.array_record")]).__getitem__,
        "folder": lambda index: files.read(str(folder / "folder" / names[index])),
    }


def reading(count: int) -> None:
    """Print the records per second of each format in each order."""
    order = np.arange(count)
    orders = {
        "random": sample_index(0, order, count),
        "by blocks": windowed_index(0, order, count, WINDOWS, 1024),
        "in sequence": order,
    }
    print(f"\n| records/s | {' | '.join(orders)} |\n|---|{'---|' * len(orders)}")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), count)
        for name, read in readers(Path(folder)).items():
            rates = []
            for index in range(count):  # once, so that the page cache has it
                read(index)
            for indices in orders.values():
                began = time.perf_counter()
                for index in indices.tolist():
                    read(index)
                rates.append(f"{count / (time.perf_counter() - began):,.0f}")
            print(f"| {name} | {' | '.join(rates)} |")


def starting(count: int) -> None:
    """Print what it takes to open many shards whose indexes are there, and to find samples in them."""
    samples = 10_000
    spans = np.zeros(samples, SPAN)
    spans["offset"], spans["size"] = np.arange(samples) * 32_768, RECORD
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = f"{folder}/{number:06}.tar"
            Path(path).touch()
            (file,) = files.find(path)
            files.write(f"{folder}/.clip_jax_index/{number:06}.tar.npz", shards._packed(Index(path, spans, ()), file))
        began = time.perf_counter()
        source = Shards(f"{folder}/*.tar", tar.scan)
        opened = time.perf_counter()
        for index in sample_index(0, np.arange(2_000), len(source)).tolist():
            source.where(index)
        found = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{len(source):,} samples in {count:,} shards: opened in {opened - began:.1f} s, a random sample found in "
        f"{(found - opened) / 2_000 * 1e3:.2f} ms; memory of the process at most {peak:.2f} GiB"
    )


def mixing() -> None:
    """Print the distance between neighbours for several windows."""
    size, batch_size = 2_000_000, 32_768
    print(
        f"\n| window | samples open | median distance | 1% are within | in batches of {batch_size:,} |\n{'|---' * 5}|"
    )
    for window in (8, 32, 128, 512):
        windows = Windows(128, window, 8)
        place = np.argsort(windowed_index(0, np.arange(size), size, windows, batch_size))
        distance = np.abs(np.diff(place))
        median, close = np.median(distance), np.quantile(distance, 0.01)
        print(f"| {window} | {128 * window * 8:,} | {median:,.0f} | {close:,.0f} | {median / batch_size:.1f} |")
    distance = np.abs(np.diff(np.argsort(sample_index(0, np.arange(size), size))))
    print(f"| block=1 | {size:,} | {np.median(distance):,.0f} | {np.quantile(distance, 0.01):,.0f} | all |")


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=10_000)
    flags = parser.parse_args()
    print(cpu())
    starting(flags.shards)
    reading(flags.records)
    mixing()


if __name__ == "__main__":
    main()
