"""Batches for training and for evaluation, read by a pool of threads a little ahead of their use.

A training batch is identified by its step alone: step s holds the positions from s * B to (s + 1) * B - 1 of the
global order (`clip_jax.data.order`), whatever the number of hosts. So there is no iterator state to save.
"""

import collections
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int

from clip_jax.data.damage import Damaged, counted, naming, of_example
from clip_jax.data.delivery import Batch, make_delivery
from clip_jax.data.example import Source, where
from clip_jax.data.reader import TrainReader
from clip_jax.errors import UserError
from clip_jax.options import option
from clip_jax.platform import usable_cores
from clip_jax.processing import Preprocess
from clip_jax.processing.images import open_image

logger = logging.getLogger(__name__)

_CHUNK = 32  # samples that one thread reads in one go, for evaluation
_BATCHES_AHEAD = 2
_FEW = 10  # damaged samples that no run stops for


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """How training data is read; nothing of it changes what undamaged data gives."""

    data_processes: int = option(
        0, "processes that read and decode on each host; 0 for threads of this one, enough for 2 to 4 cores", True
    )
    on_damage: str = option("stop", "stop at the first damaged sample, or skip it: another one takes its place", True)
    max_damaged: float = option(0.01, "the share of damaged samples at which a run that skips them stops", True)

    def __post_init__(self):
        if self.data_processes < 0:
            raise UserError(f"data_processes must be at least 0, got {self.data_processes}")
        if self.on_damage not in ("stop", "skip"):
            raise UserError(f"on_damage must be stop or skip, got {self.on_damage!r}")
        if not 0 <= self.max_damaged <= 1:
            raise UserError(f"max_damaged must be between 0 and 1, got {self.max_damaged}")


class TrainBatches:
    """The batches of steps start_step, start_step + 1, … without end, one host's share of them.

    Each is `image`, uint8 (batch_size / process_count, R, R, 3), and `text`, int32 (batch_size / process_count,
    context_length).

    Args:
      reader: what is read, and how.
      config: by whom, and what happens where it is damaged.
      start_step: the step to begin with, when resuming.
      process_index: this host.
      process_count: the number of hosts; each takes an equal, contiguous share of every batch.

    Attributes:
      waited: seconds that `next` has taken.
      skips: whether damage is skipped rather than an error.
      damage: the damaged samples and shards so far, counted by reason.

    Raises:
      UserError: the batch size does not divide by `process_count`; a source is damaged; later, a sample that cannot be
        read, or too many of them.
    """

    def __init__(
        self,
        reader: TrainReader,
        config: InputConfig = InputConfig(),
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        batch_size = reader.mixture.batch_size
        self._size, remainder = divmod(batch_size, process_count)
        if remainder or not self._size:
            raise UserError(f"batch_size {batch_size} does not divide by the number of hosts, {process_count}")
        self.skips = config.on_damage == "skip"
        reader = dataclasses.replace(reader, skip=self.skips)
        self.waited, self.damage = 0.0, _damage_of_sources(reader)
        if process_index:  # what every host finds when it opens the sources counts once
            self.damage.clear()
        self._next = batch_size * start_step + process_index * self._size
        self._batch_size, self._max_damaged = batch_size, config.max_damaged
        self._seen = self._replaced = 0
        self._delivery = make_delivery(reader, self._size, _BATCHES_AHEAD, config.data_processes)
        for _ in range(_BATCHES_AHEAD):
            self._start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        self._start()
        batch, damage = self._delivery.finish()
        self.waited += time.perf_counter() - began
        self.damage += damage
        self._seen, self._replaced = self._seen + self._size, self._replaced + damage.total()
        if self._replaced > max(_FEW, self._max_damaged * self._seen):
            raise UserError(
                f"{self._replaced} of {self._seen} samples are damaged, more than max_damaged={self._max_damaged}: "
                f"{counted(self.damage)}; look at them with --check_data"
            )
        return batch

    def close(self) -> None:
        """End the threads or processes."""
        self._delivery.close()

    def _start(self) -> None:
        self._delivery.start(np.arange(self._next, self._next + self._size))
        self._next += self._batch_size


def _damage_of_sources(reader: TrainReader) -> Counter[str]:
    """What the sources found when they were opened."""
    total = Counter()
    for source in reader.mixture.sources:
        found: tuple[Damaged, ...] = getattr(source, "damage", ())
        damage = Counter(item.reason for item in found)
        if found and not reader.skip:
            more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
            raise UserError(f"{found[0]}{more}: mend the data, or leave out what is damaged with on_damage=skip")
        if found:
            logger.warning("%s is damaged (%s), first in %s", source.name, counted(damage), found[0])
        total += damage
    return total


def evaluation_batches(
    source: Source, examples: Int[np.ndarray, "batches rows"], preprocess: Preprocess, several_of: int = 0
) -> Iterator[Batch]:
    """Examples of a data set, in batches.

    Args:
      source: the data set.
      examples: the number of the example in each row of each batch; -1 where it stays empty.
      preprocess: resizes and crops the images as at inference.
      several_of: the number of classes, if an image can belong to several.

    Returns:
      an iterator of `image`, uint8 (rows, R, R, 3), `label`, int32 (rows,), -1 where there is none, or bool
      (rows, several_of), and `captions`, a tuple of texts in each of (rows,) objects.
    """

    def read(numbers: np.ndarray) -> Batch:
        side = preprocess.image_resolution
        images = np.zeros((len(numbers), side, side, 3), np.uint8)
        labels = np.zeros((len(numbers), several_of), bool) if several_of else np.full(len(numbers), -1, np.int32)
        captions = np.full(len(numbers), None)
        for row in np.flatnonzero(numbers >= 0).tolist():
            index = int(numbers[row])
            with naming(where(source, index)):
                example = source[index]
                with of_example(example.key):
                    images[row] = preprocess.resize_and_crop(open_image(example.image))
                labels[row] = _several(example.label, several_of) if several_of else _single(example.label)
                captions[row] = example.captions
        return {"image": images, "label": labels, "captions": captions}

    return _prefetched(read, examples)


def _single(label: int | tuple[int, ...] | None) -> int:
    if isinstance(label, tuple):
        raise UserError(f"expected one class, got {len(label)}: the data set is judged by mean_average_precision")
    return -1 if label is None else label


def _several(label: int | tuple[int, ...] | None, classes: int) -> np.ndarray:
    """Whether an example belongs to each of the classes."""
    if not isinstance(label, tuple) or any(not 0 <= number < classes for number in label):
        raise UserError(f"expected any number of classes from 0 to {classes - 1}, got {label!r:.80}")
    return np.isin(np.arange(classes), label)


def _prefetched(read: Callable[[np.ndarray], Batch], shares: Iterable[np.ndarray]) -> Iterator[Batch]:
    """Apply `read` to each share, in chunks, on several threads, at most two batches ahead of the consumer."""
    pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="clip_jax-data")
    pending = collections.deque()
    try:
        for share in shares:
            cuts = range(_CHUNK, len(share), _CHUNK)
            pending.append([pool.submit(read, chunk) for chunk in np.split(share, cuts)])
            if len(pending) > _BATCHES_AHEAD:
                yield _join(pending.popleft())
        while pending:
            yield _join(pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _join(futures: list) -> Batch:
    chunks = [future.result() for future in futures]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
