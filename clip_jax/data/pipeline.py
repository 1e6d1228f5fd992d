"""Batches for training and for evaluation, read by a pool of threads a little ahead of their use.

A training batch is identified by its step alone: step s holds the positions from s * B to (s + 1) * B - 1 of the
global order (`clip_jax.data.order`), whatever the number of hosts. So there is no iterator state to save.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from clip_jax.data.example import Example, Source
from clip_jax.data.order import mixture_index, sample_generator, sample_index
from clip_jax.errors import UserError
from clip_jax.processing import Augment, Preprocess, Tokenizer
from clip_jax.processing.images import open_image

Batch = dict[str, np.ndarray]

_CHUNK = 32  # samples that one thread reads in one go
_BATCHES_AHEAD = 2
_CACHED_TEXTS = 2**16  # all captions of the embedded data sets


def train_batches(
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    augment: Augment,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The batches of steps start_step, start_step + 1, … without end, this host's share of them.

    Args:
      sources: the data sets to mix; each example needs a caption.
      weights: their relative weights.
      seed: fixes the order, the crops and the choice among several captions.
      batch_size: of all hosts together.
      preprocess: the model's.
      tokenizer: the model's; longer captions are truncated.
      augment: crops the images, and whatever else varies them.
      start_step: the step to begin with, when resuming.
      process_index: this host.
      process_count: the number of hosts; each takes an equal, contiguous share of every batch.

    Returns:
      an iterator of `image`, uint8 (batch_size / process_count, R, R, 3), and `text`, int32
      (batch_size / process_count, context_length). Closing it ends its threads.

    Raises:
      UserError: `batch_size` does not divide by `process_count`; later, an example that cannot be read.
    """
    local_size, remainder = divmod(batch_size, process_count)
    if remainder or not local_size:
        raise UserError(f"batch_size {batch_size} does not divide by the number of hosts, {process_count}")
    reader = _TrainReader(tuple(sources), tuple(weights), seed, preprocess, tokenizer, augment)
    first = np.int64(batch_size) * start_step + process_index * local_size
    shares = (np.arange(start, start + local_size) for start in itertools.count(first, batch_size))
    return _prefetched(reader.read, shares)


def evaluation_batches(source: Source, batch_size: int, preprocess: Preprocess) -> Iterator[Batch]:
    """A data set once through, in its order, in batches of one size.

    Args:
      source: the data set.
      batch_size: the size of every batch; the last one is filled up.
      preprocess: resizes and crops the images as at inference.

    Returns:
      an iterator of `image`, uint8 (batch_size, R, R, 3), `label`, int32 (batch_size,), -1 where there is
      none, and `mask`, bool (batch_size,), False for what fills up the last batch.
    """
    indices = np.arange(math.ceil(len(source) / batch_size) * batch_size)

    def read(indices: np.ndarray) -> Batch:
        side = preprocess.image_resolution
        images = np.zeros((len(indices), side, side, 3), np.uint8)
        labels = np.full(len(indices), -1, np.int32)
        for row, index in enumerate(indices[indices < len(source)].tolist()):
            with _naming(source, index):
                example = source[index]
                images[row] = preprocess.resize_and_crop(open_image(example.image))
                labels[row] = -1 if example.label is None else example.label
        return {"image": images, "label": labels, "mask": indices < len(source)}

    return _prefetched(read, indices.reshape(-1, batch_size))


@dataclasses.dataclass(frozen=True)
class _TrainReader:
    """Positions of the global order in, pixels and tokens out: a pure function of these fields."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    seed: int
    preprocess: Preprocess
    tokenizer: Tokenizer
    augment: Augment

    def read(self, positions: Int64[np.ndarray, "n"]) -> Batch:
        source_numbers, indices = self._locate(positions)
        samples = [
            self._sample(position, self.sources[number], index)
            for position, number, index in zip(
                positions.tolist(), source_numbers.tolist(), indices.tolist(), strict=True
            )
        ]
        images, texts = zip(*samples, strict=True)
        return {"image": np.stack(images), "text": np.stack(texts)}

    def _locate(self, positions: Int64[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Which source each position reads, and which of its examples."""
        source_numbers, inside = mixture_index(positions, self.weights)
        indices = np.empty_like(positions)
        for number in np.unique(source_numbers):
            here = source_numbers == number
            indices[here] = sample_index(self.seed, inside[here], len(self.sources[number]))
        return source_numbers, indices

    def _sample(
        self, position: int, source: Source, index: int
    ) -> tuple[UInt8[np.ndarray, "side side 3"], Int32[np.ndarray, "context_length"]]:
        generator = sample_generator(self.seed, position)
        with _naming(source, index):
            example = source[index]
            image = self.augment(example.image, generator, self.preprocess)
            return image, _tokens(self.tokenizer, _choose_caption(example, generator))


@functools.lru_cache(_CACHED_TEXTS)
def _tokens(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, "context_length"]:
    return tokenizer([text], truncate=True)[0]


def _choose_caption(example: Example, generator: np.random.Generator) -> str:
    if not example.captions:
        raise UserError("expected at least one caption, got none")
    return example.captions[generator.integers(len(example.captions))]


@contextlib.contextmanager
def _naming(source: Source, index: int) -> Iterator[None]:
    """Say which example an error comes from."""
    try:
        yield
    except (UserError, OSError) as error:
        raise UserError(f"{source.name}, example {index}: {error}") from error
    except Exception as error:
        error.add_note(f"while reading example {index} of {source.name}")
        raise


def _prefetched(read: Callable[[np.ndarray], Batch], shares: Iterable[np.ndarray]) -> Iterator[Batch]:
    """Apply `read` to each share, in chunks, on several threads, at most two batches ahead of the consumer."""
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="clip_jax-data")
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
