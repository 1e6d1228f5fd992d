"""The global order of training samples, as pure functions of (seed, position).

Position p counts the samples that a run has seen on all its hosts. Nothing here has state, so any position is
reached in constant time, a resumed run continues exactly, and the number of hosts changes nothing.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from clip_jax.errors import UserError

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARE_BITS = 20  # weights are resolved to 2**-20 of their sum, so that shares are exact integers


def sample_index(seed: int, position: Int64[np.ndarray, "n"], size: int) -> Int64[np.ndarray, "n"]:
    """The sample that stands at each position of an endless sequence of shuffled epochs.

    Epoch e covers the positions from e * size to (e + 1) * size - 1 and holds each sample once. Its
    permutation is a Feistel network over the next power of four, keyed by (seed, epoch), that is walked until
    the value falls below `size` (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").

    Args:
      seed: non-negative; another seed gives other permutations.
      position: non-negative positions, in any order.
      size: the number of samples of an epoch.

    Returns:
      the indices, each in [0, size).
    """
    half_bits = max(1, math.ceil((size - 1).bit_length() / 2))
    epoch, start = np.divmod(position.astype(np.uint64), np.uint64(size))
    keys = _mix(_mix(np.full_like(epoch, seed)) + epoch)
    index = _feistel(start, keys, half_bits)
    while (outside := np.flatnonzero(index >= size)).size:
        index[outside] = _feistel(index[outside], keys[outside], half_bits)
    return index.astype(np.int64)


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
