"""The two stages of a preparation, for one range of samples each: its hashes, and its shard.

Whoever calls them, and how often, a range gives the same files, and a file has its name only when it is whole.
"""

import io
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from clip_jax.data import files
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.example import Example, where
from clip_jax.data.preparation.duplicates import HASH, duplicates, image_hash
from clip_jax.data.preparation.job import Job
from clip_jax.data.preparation.samples import MOST_CLASSES, Dropped, prepare
from clip_jax.errors import UserError

PART = ".part"  # what files that are not whole end in

_DUPLICATES = "duplicates.npy"
_SHOWN = 8  # samples that a report shows of each reason


@dataclass
class Summary:
    """What became of a range of samples, or of several.

    Attributes:
      kept: samples in the shard.
      bytes: of their records.
      file_size: of the shard.
      classes: one more than the largest label.
      left_out: samples that are not in the shard, by reason.
      shown: (index, reason, key, message) of some of them.
    """

    kept: int = 0
    bytes: int = 0
    file_size: int = 0
    classes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    shown: list[tuple[int, str, str, str]] = field(default_factory=list)

    def leave_out(self, reason: str, *about: Any) -> None:
        """Count a sample, and keep `about` (its index, key and a message) if few have this reason."""
        self.left_out[reason] += 1
        if self.left_out[reason] <= _SHOWN:
            index, key, message = about
            self.shown.append((index, reason, key, message))

    def add(self, other: "Summary") -> None:
        """Count the samples of a later range too."""
        self.kept, self.bytes = self.kept + other.kept, self.bytes + other.bytes
        self.file_size, self.classes = self.file_size + other.file_size, max(self.classes, other.classes)
        room = Counter({reason: max(0, _SHOWN - count) for reason, count in self.left_out.items()})
        for sample in other.shown:
            reason = sample[1]
            if room.setdefault(reason, _SHOWN) > 0:
                room[reason] -= 1
                self.shown.append(sample)
        self.left_out.update(other.left_out)


@runtime_checkable
class Stage(Protocol):
    """Work that is done range by range."""

    name: str

    def is_done(self, job: Job, number: int) -> bool:
        """Whether the files of a range are there."""

    def run(self, job: Job, number: int, tick: Callable[[], None]) -> None:
        """Make the files of a range; `tick` is called after each sample.

        Raises:
          UserError: they cannot be written, or the source cannot be opened.
        """


class HashStage:
    """The hashes of a range's images."""

    name = "hashes"

    def is_done(self, job: Job, number: int) -> bool:
        """See `Stage`."""
        return os.path.exists(job.path(self.name, number, "npy"))

    def run(self, job: Job, number: int, tick: Callable[[], None]) -> None:
        """See `Stage`."""
        samples = job.range(number)
        hashes = np.zeros(len(samples), HASH)
        for row, index in enumerate(samples):
            try:
                with naming(where(job.source, index)):
                    hashes[row] = image_hash(job.source[index], job.shape, job.options)
            except (Damaged, Dropped):
                pass  # the next stage says why
            tick()
        _save(job.path(self.name, number, "npy"), hashes)


class ShardStage:
    """The shard of a range, and the summary of what it holds and what it does not."""

    name = "shards"

    def is_done(self, job: Job, number: int) -> bool:
        """See `Stage`."""
        try:
            return os.path.getsize(job.path(self.name, number, "array_record")) == summary(job, number).file_size
        except FileNotFoundError:
            return False

    def run(self, job: Job, number: int, tick: Callable[[], None]) -> None:
        """See `Stage`."""
        result = Summary()
        path = job.path(self.name, number, "array_record")
        with whole_file(path) as part:
            _write_records(part, _records(job, number, result, tick))
            result.file_size = os.path.getsize(part)
        with whole_file(job.path(self.name, number, "json")) as part, open(part, "w", encoding="utf-8") as file:
            json.dump(vars(result), file)


def summary(job: Job, number: int) -> Summary:
    """What became of a range whose shard is done.

    Raises:
      FileNotFoundError: it is not.
    """
    values = json.loads(files.read(job.path(ShardStage.name, number, "json")))
    return Summary(**{**values, "left_out": Counter(values["left_out"]), "shown": [tuple(s) for s in values["shown"]]})


def total(summaries: Iterable[Summary]) -> Summary:
    """What became of all ranges, given in their order."""
    result = Summary()
    for one in summaries:
        result.add(one)
    return result


def decide_duplicates(job: Job) -> None:
    """Write which samples are duplicates, for the second stage, from the hashes of all ranges."""
    hashes = [np.load(job.path(HashStage.name, number, "npy")) for number in range(job.shards)]
    distance = job.options.dedup_distance if job.options.dedup == "perceptual" else 0
    _save(os.path.join(job.folder, _DUPLICATES), duplicates(np.concatenate(hashes), distance))


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """A path to write to; what is written there gets the name `path` at the end.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    part = f"{path}.{uuid.uuid4().hex}{PART}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)


def _records(job: Job, number: int, result: Summary, tick: Callable[[], None]) -> Iterator[bytes]:
    """The records of a range; `result` gets what is known of each sample."""
    serialize = _serializer(job)
    earlier = _earlier(job, number)
    for index, repeats in zip(job.range(number), earlier, strict=True):
        key = ""
        try:
            with naming(where(job.source, index)):
                example = job.source[index]
                key = example.key.encode(errors="backslashreplace").decode()
                if repeats >= 0:
                    raise Dropped("duplicate", f"it has the image of sample {repeats}")
                example = prepare(example, job.shape, job.options)
        except (Damaged, Dropped) as error:
            result.leave_out(error.reason, index, key, str(error))
        else:
            record = serialize(example)
            result.kept, result.bytes = result.kept + 1, result.bytes + len(record)
            result.classes = max(result.classes, 1 + (-1 if example.label is None else example.label))
            yield record
        tick()


def _earlier(job: Job, number: int) -> Shaped[np.ndarray, "n"]:
    """For each sample of a range the one that it repeats, or -1."""
    samples = job.range(number)
    if job.options.dedup == "none":
        return np.full(len(samples), -1)
    return np.load(os.path.join(job.folder, _DUPLICATES), mmap_mode="r")[samples.start : samples.stop]


def _serializer(job: Job) -> Callable[[Example], bytes]:
    """Writes samples as TFDS does."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    from clip_jax.data.preparation.features import make_features  # imports TFDS

    features = make_features(job.shape, MOST_CLASSES)
    serializer = ExampleSerializer(features.get_serialized_info())

    def serialize(example: Example) -> bytes:
        values = {"image": io.BytesIO(example.image), "captions": list(example.captions), "key": example.key}
        label = {} if example.label is None else {"label": example.label}
        proto = serializer.get_tf_example(features.encode_example(values | label))
        return proto.SerializeToString(deterministic=True)  # else the order of fields differs between processes

    return serialize


def _write_records(path: str, records: Iterator[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with _writing(path):
        writer = ArrayRecordWriter(path, "group_size:1")  # one record a chunk, for random access
    for record in records:
        with _writing(path):
            writer.write(record)
    with _writing(path):
        writer.close()


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that array_record raises
        raise UserError(f"cannot write {path}: {error}") from error


def _save(path: str, array: np.ndarray) -> None:
    with whole_file(path) as part, open(part, "wb") as file:
        np.save(file, array, allow_pickle=False)
