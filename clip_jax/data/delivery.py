"""Who reads a host's part of each batch: threads of this process, or processes of their own, a little ahead of its use.

Python's lock lets one thread at a time run what is not decoding: a host with many cores needs processes. Each of them
reads the same rows of every batch, and so its own blocks of the shards.
"""

import functools
import os
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.shared_memory import SharedMemory
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from clip_jax.data.processes import process_pool
from clip_jax.data.reader import TrainReader
from clip_jax.errors import UserError
from clip_jax.platform import usable_cores

Batch = dict[str, np.ndarray]

_CHUNK = 32  # samples that are read in one go


@runtime_checkable
class Delivery(Protocol):
    """Reads batches in the order in which they were asked for."""

    def start(self, positions: Int64[np.ndarray, "n"]) -> None:
        """Begin to read the samples of these positions."""

    def finish(self) -> tuple[Batch, Counter[str]]:
        """The oldest batch that was begun, and the damaged samples that were replaced in it."""

    def close(self) -> None:
        """End the threads or processes."""


def make_delivery(reader: TrainReader, batch_size: int, ahead: int, processes: int) -> Delivery:
    """Threads, or so many processes, that read at most `ahead` + 1 batches of `batch_size` at a time."""
    return Processes(reader, batch_size, ahead, processes) if processes else Threads(reader)


class Threads:
    """As many threads as cores, which write into the arrays of the batch."""

    def __init__(self, reader: TrainReader):
        self._reader = reader
        self._pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="clip_jax-data")
        self._pending: list[tuple[Batch, list[Future]]] = []

    def start(self, positions: Int64[np.ndarray, "n"]) -> None:
        """See `Delivery`."""
        batch = _empty(self._reader, len(positions))
        futures = [
            self._pool.submit(self._reader.read, positions[rows], *_rows(self._reader, batch, rows))
            for rows in _chunks(0, len(positions))
        ]
        self._pending.append((batch, futures))

    def finish(self) -> tuple[Batch, Counter[str]]:
        """See `Delivery`."""
        batch, futures = self._pending.pop(0)
        return batch, _total(futures)

    def close(self) -> None:
        """See `Delivery`."""
        self._pool.shutdown(cancel_futures=True)


class Processes:
    """Processes that write into memory which they share with this one."""

    def __init__(self, reader: TrainReader, batch_size: int, ahead: int, processes: int):
        self._reader, self._batch_size = reader, batch_size
        self._workers = [process_pool(1, _begin, reader, batch_size) for _ in range(min(processes, batch_size))]
        self._free = _shared_memory(sum(array.nbytes for array in _empty(reader, batch_size).values()), ahead + 1)
        self._all = list(self._free)
        self._pending: list[tuple[SharedMemory, list[Future]]] = []

    def start(self, positions: Int64[np.ndarray, "n"]) -> None:
        """See `Delivery`."""
        memory, futures = self._free.pop(), []
        bounds = np.linspace(0, len(positions), len(self._workers) + 1).astype(int).tolist()
        for worker, first, end in zip(self._workers, bounds, bounds[1:], strict=False):
            futures += [worker.submit(_read, memory.name, rows, positions[rows]) for rows in _chunks(first, end)]
        self._pending.append((memory, futures))

    def finish(self) -> tuple[Batch, Counter[str]]:
        """See `Delivery`."""
        memory, futures = self._pending.pop(0)
        try:
            damage = _total(futures)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that reads data has died: what it said stands above; if it said nothing, memory was "
                "probably short: use fewer (data_processes)"
            ) from error
        # A copy, because the devices may still read from it when the memory is in use again.
        batch = {key: array.copy() for key, array in _views(self._reader, memory, self._batch_size).items()}
        self._free.append(memory)
        return batch, damage

    def close(self) -> None:
        """See `Delivery`."""
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)
        for memory in self._all:
            memory.close()
            memory.unlink()


def _shared_memory(size: int, count: int) -> list[SharedMemory]:
    """So many pieces of memory; a place without room for them would end the process with a bus error later."""
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < size * count:
        raise UserError(
            f"batches in shared memory need {size * count / 2**20:.0f} MiB in /dev/shm, which has not as much: enlarge "
            "it (docker run --shm-size), or read with threads (data_processes=0)"
        )
    return [SharedMemory(create=True, size=size) for _ in range(count)]


def _total(futures: Sequence[Future]) -> Counter[str]:
    return sum((future.result() for future in futures), Counter())


def _chunks(first: int, end: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, end)) for start in range(first, end, _CHUNK)]


def _empty(reader: TrainReader, size: int) -> Batch:
    target = reader.target
    return {"image": reader.empty_images(size), target.name: np.empty((size, *target.shape), np.int32)}


def _rows(reader: TrainReader, batch: Batch, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of a batch's images and targets."""
    return batch["image"][rows], batch[reader.target.name][rows]


def _views(reader: TrainReader, memory: SharedMemory, size: int) -> Batch:
    """A batch that lies in shared memory: targets first, whose numbers must be aligned."""
    target = np.ndarray((size, *reader.target.shape), np.int32, memory.buf)
    return {"image": reader.empty_images(size, memory.buf, target.nbytes), reader.target.name: target}


_reader: TrainReader  # of a worker process
_batch_size: int


def _begin(reader: TrainReader, batch_size: int) -> None:
    """Set a worker process up."""
    global _reader, _batch_size
    # A scheduler may send it to all processes of a job; the parent needs us until it has saved, and then ends us.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _reader, _batch_size = reader, batch_size


def _read(memory_name: str, rows: slice, positions: Int64[np.ndarray, "n"]) -> Counter[str]:
    """Read some rows of a batch, in a worker process."""
    batch = _views(_reader, _attached(memory_name), _batch_size)
    return _reader.read(positions, *_rows(_reader, batch, rows))


@functools.cache
def _attached(memory_name: str) -> SharedMemory:
    return SharedMemory(memory_name)
