"""Which examples each process reads, and in which row of which batch they are.

Every process reads one stretch of neighbouring examples, as shards and row groups want it; the stretches are as long as
the processes have devices. Each device gets the same number of rows in every batch, whatever the number of devices and
hosts, so that what it computes does not depend on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from clip_jax.parallel import Partitioner

# Rows that a device encodes at a time. They keep a matrix unit busy (64 images are 3,264 tokens of ViT-B/32, and
# training takes 128 for a v5e chip), and the largest model's activations fit: about 3 GiB for the stem of RN50x64.
ROWS_PER_DEVICE = 64


@dataclass(frozen=True)
class Division:
    """What `divide` makes.

    Attributes:
      examples: the number of the example in each row of each batch; -1 in rows that only fill it up.
      own: the pieces of a batch that this process has a device for, ascending.
    """

    examples: Int[np.ndarray, "batches pieces rows"]
    own: tuple[int, ...]

    @property
    def own_examples(self) -> Int[np.ndarray, "batches own_rows"]:
        """The part of `examples` that this process reads."""
        return self.examples[:, self.own].reshape(len(self.examples), -1)


def divide_evenly(count: int, partitioner: Partitioner) -> Division:
    """So many examples for all processes, to each as many as its devices take."""
    pieces = [len(pieces) for pieces in readers(partitioner).values()]
    bounds = np.cumsum([0, *pieces]) * count // sum(pieces)
    return divide(np.diff(bounds).tolist(), rows_per_device(count), partitioner)


def divide(lengths: Sequence[int], rows: int, partitioner: Partitioner) -> Division:
    """Stretches of examples, one after the other, to each of the `readers` one.

    Args:
      lengths: of the stretches; some may be empty.
      rows: that a device takes of each batch.
      partitioner: of the mesh over which batches are split.
    """
    groups = list(readers(partitioner).values())
    batches = max(-(-length // (len(pieces) * rows)) for length, pieces in zip(lengths, groups, strict=True))
    examples = np.full((batches, partitioner.batch_shards, rows), -1)
    first = 0
    for length, pieces in zip(lengths, groups, strict=True):
        stretch = np.full(batches * len(pieces) * rows, -1)
        stretch[:length] = np.arange(first, first + length)
        examples[:, pieces] = stretch.reshape(batches, len(pieces), rows)
        first += length
    own = (piece for piece, processes in enumerate(_holders(partitioner)) if jax.process_index() in processes)
    return Division(examples, tuple(own))


def rows_per_device(count: int) -> int:
    """The rows that a device takes at a time of so many examples; few of them fill a smaller batch, of few sizes."""
    return min(ROWS_PER_DEVICE, 2 ** max(0, count - 1).bit_length())


def readers(partitioner: Partitioner) -> dict[int, list[int]]:
    """The processes that read a stretch each, and the pieces of a batch that it fills.

    Where several processes hold the same piece, as with `mesh.tensor` over hosts, all of them read its rows, but the
    stretch counts as the first one's.
    """
    groups = {}
    for piece, processes in enumerate(_holders(partitioner)):
        groups.setdefault(min(processes), []).append(piece)
    return dict(sorted(groups.items()))


def _holders(partitioner: Partitioner) -> list[set[int]]:
    """The processes that have a device for each piece of a batch."""
    holders = [set() for _ in range(partitioner.batch_shards)]
    for device, (piece,) in partitioner.batch_sharding.devices_indices_map((len(holders),)).items():
        holders[piece.start or 0].add(device.process_index)
    return holders
