"""The global order of training samples, as pure functions of (seed, position).

Position p counts the samples that a run has seen on all its hosts. Nothing here has state, so any position is
reached in constant time, a resumed run continues exactly, and the number of hosts changes nothing.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from clip_jax.errors import UserError

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WINDOW_KEYS, _BLOCK_KEYS, _REPLACEMENT_KEYS = np.uint64(1) << np.array([61, 62, 63], np.uint64)
_SHARE_BITS = 20  # weights are resolved to 2**-20 of their sum, so that shares are exact integers


def sample_index(seed: int, position: Int64[np.ndarray, "n"], size: int) -> Int64[np.ndarray, "n"]:
    """The sample that stands at each position of an endless sequence of shuffled epochs.

    Epoch e covers the positions from e * size to (e + 1) * size - 1 and holds each sample once, in a permutation that
    (seed, epoch) decides.

    Args:
      seed: non-negative; another seed gives other permutations.
      position: non-negative positions, in any order.
      size: the number of samples of an epoch.

    Returns:
      the indices, each in [0, size).
    """
    epoch, start = np.divmod(position.astype(np.uint64), np.uint64(size))
    return _permuted(start, _epoch_keys(seed, epoch), size).astype(np.int64)


@dataclass(frozen=True)
class Windows:
    """How samples are shuffled that should be read in blocks of neighbours, as those of shards.

    The blocks of an epoch are permuted; then samples are permuted within windows of so many blocks. A batch is divided
    into lanes, contiguous equal parts that read from windows of their own, so that a host, whose part of each batch is
    one or several lanes, reads its own blocks only. A sample and its neighbour in the shard come `block * window`
    positions of their lane apart at most; what is open at a time is `block * window * lanes` samples. The end of an
    epoch, shorter than this, is permuted as a whole.

    Attributes:
      block: neighbouring samples that stay together until they are mixed in their window.
      window: blocks whose samples are mixed.
      lanes: parts of a batch; a multiple of the number of hosts, so that no two of them read the same blocks.
    """

    block: int
    window: int
    lanes: int


def windowed_index(
    seed: int, position: Int64[np.ndarray, "n"], size: int, windows: Windows, batch_size: int
) -> Int64[np.ndarray, "n"]:
    """The sample that stands at each position, in an order that reads blocks; as `sample_index` otherwise.

    Args:
      seed: non-negative; another seed gives other permutations.
      position: non-negative positions, in any order.
      size: the number of samples of an epoch.
      windows: blocks, windows and lanes.
      batch_size: how many consecutive positions the lanes divide among them: the source's part of a global batch.

    Returns:
      the indices, each in [0, size); those of an epoch, from e * size to (e + 1) * size - 1, hold each sample once.
    """
    epoch, start = np.divmod(position.astype(np.uint64), np.uint64(size))
    keys = _epoch_keys(seed, epoch)
    rank = _rank_in_windows(start.astype(np.int64), keys + _WINDOW_KEYS, size, windows, batch_size)
    return _sample_of_rank(rank, keys, size, windows.block)


def replacement_index(seed: int, position: int, attempt: int, size: int) -> int:
    """The sample that stands in for a damaged one, and for a damaged stand-in at the next attempt: any of the source's.

    Args:
      seed: the run's seed.
      position: of the damaged sample in the global order.
      attempt: 0 for the first.
      size: the number of samples of the source.
    """
    key = np.full(1, seed, np.uint64) + _REPLACEMENT_KEYS
    for part in (position, attempt):
        key = _mix(key) + np.uint64(part)
    return int(_mix(key)[0] % np.uint64(size))


def mixture_index(
    position: Int64[np.ndarray, "n"], weights: Sequence[float]
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Which source each position of a mixture reads, and the position within that source.

    The sources are interleaved as evenly as integers allow: the first takes every position at which
    floor(position * share) steps up, and the others divide the remaining positions in the same way. So among
    any number of consecutive positions each source has its share, give or take one or two samples.

    Args:
      position: non-negative positions in the mixture, in any order.
      weights: the relative weight of each source, positive.

    Returns:
      the source numbers, in [0, len(weights)), and the positions inside those sources, which count up from
      0 for each source.

    Raises:
      UserError: for a weight that is not positive, or negligible beside the others.
    """
    source = np.full_like(position, len(weights) - 1)
    inside = position.copy()
    undecided = np.arange(len(position))
    shares = _integer_shares(tuple(weights))
    for number, share in enumerate(shares[:-1]):
        rest = sum(shares[number:])
        before = inside[undecided] * share // rest
        taken = (inside[undecided] + 1) * share // rest > before
        source[undecided[taken]] = number
        inside[undecided] = np.where(taken, before, inside[undecided] - before)
        undecided = undecided[~taken]
    return source, inside


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """The random generator of one sample, for its crop and the choice of its caption.

    Args:
      seed: the run's seed, in [0, 2**63).
      position: the sample's position in the global order.
    """
    return np.random.Generator(np.random.Philox(key=seed << 64 | position))


@functools.cache
def _integer_shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """The weights as integers whose sum is about 2**20."""
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"expected a positive weight for each data source, got {list(weights)}")
    shares = tuple(round(weight / sum(weights) * 2**_SHARE_BITS) for weight in weights)
    if 0 in shares:
        raise UserError(f"the smallest weight is under a millionth of {list(weights)}: leave that source out")
    return shares


def _rank_in_windows(
    start: Int64[np.ndarray, "n"], keys: UInt64[np.ndarray, "n"], size: int, windows: Windows, batch_size: int
) -> Int64[np.ndarray, "n"]:
    """Positions of an epoch to ranks in its sequence of shuffled blocks: lane by lane, permuted within each window."""
    run = max(1, round(batch_size / windows.lanes))  # consecutive positions of a lane
    period = run * windows.lanes
    window = math.ceil(windows.block * windows.window / run) * run  # samples, so that a window ends with a batch
    span = window * windows.lanes
    number, inside = np.divmod(start, span)
    whole = (number + 1) * span <= size
    lane = np.where(whole, inside % period // run, 0)
    row = np.where(whole, inside // period * run + inside % run, inside)
    window_keys = _mix(keys + (number * windows.lanes + lane).astype(np.uint64))
    rank = number * span + lane * window
    rank[whole] += _permuted(row[whole].astype(np.uint64), window_keys[whole], window).astype(np.int64)
    if not whole.all():
        rest = _permuted(row[~whole].astype(np.uint64), window_keys[~whole], size % span)
        rank[~whole] += rest.astype(np.int64)
    return rank


def _sample_of_rank(
    rank: Int64[np.ndarray, "n"], keys: UInt64[np.ndarray, "n"], size: int, block: int
) -> Int64[np.ndarray, "n"]:
    """What stands at each place of an epoch's shuffled blocks; the rest that fills no block is put between two."""
    blocks, rest = divmod(size, block)
    place = (_mix(keys + _BLOCK_KEYS) % np.uint64(blocks + 1)).astype(np.int64) * block  # where the rest begins
    in_rest = (place <= rank) & (rank < place + rest)
    number, inside = np.divmod(np.where(rank < place, rank, rank - rest), block)
    sample = blocks * block + rank - place
    if blocks:
        number = np.where(in_rest, 0, number)
        shuffled = _permuted(number.astype(np.uint64), keys + _BLOCK_KEYS, blocks).astype(np.int64)
        sample = np.where(in_rest, sample, shuffled * block + inside)
    return sample


def _epoch_keys(seed: int, epoch: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    return _mix(_mix(np.full_like(epoch, seed)) + epoch)


def _permuted(values: UInt64[np.ndarray, "n"], keys: UInt64[np.ndarray, "n"], size: int) -> UInt64[np.ndarray, "n"]:
    """A permutation of [0, size) for each key, element by element.

    A Feistel network over the next power of four, walked until the value falls below `size` (Black and Rogaway, 2002,
    "Ciphers with arbitrary finite domains").
    """
    half_bits = max(1, math.ceil((size - 1).bit_length() / 2))
    index = _feistel(values, keys, half_bits)
    while (outside := np.flatnonzero(index >= size)).size:
        index[outside] = _feistel(index[outside], keys[outside], half_bits)
    return index


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """A permutation of [0, 4**half_bits) for each key, element by element (uint64)."""
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for _ in range(_ROUNDS):
        keys = keys + _GOLDEN
        left, right = right, left ^ (_mix(right + keys) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    values = values + _GOLDEN
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
