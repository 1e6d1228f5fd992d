"""Which samples repeat the image of an earlier one: a pure function of the hashes of all of them."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, Shaped, UInt64
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.data.preparation.job import Options, Shape
from clip_jax.data.preparation.samples import decode_rgb, open_checked, prepare_captions

HASH = np.dtype([("known", "?"), ("high", "<u8"), ("low", "<u8")])

_HASHED_SIDE = 64  # pixels, of which the perceptual hash takes 32: enough to decode large JPEGs at an eighth
_COMPARED = 2**23  # pairs of hashes at a time, which bounds the memory


def image_hash(example: Example, shape: Shape, options: Options) -> tuple[bool, int, int]:
    """The hash of a sample that no filter leaves out, as one element of `HASH`.

    An exact hash is 128 bits of SHA-256 over the file, and looks at captions only: equal files are equally damaged. A
    perceptual one is the 64-bit pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions"): signs of the low frequencies of the grey image, which resizing and compression leave alone.

    Raises:
      Damaged: as `samples.prepare`.
      Dropped: as `samples.prepare`, without duplicates.
    """
    prepare_captions(example, shape, options)
    if options.dedup == "exact":
        digest = hashlib.sha256(_content(example.image)).digest()
        return True, *(int.from_bytes(digest[start : start + 8], "little") for start in (0, 8))
    import imagehash

    image = decode_rgb(open_checked(example.image, options), _HASHED_SIDE)
    return True, 0, int(str(imagehash.phash(image)), 16)


def duplicates(hashes: Shaped[np.ndarray, "n"], distance: int) -> Int64[np.ndarray, "n"]:
    """For each sample the earlier one that it repeats, which itself repeats none; -1 where there is no such.

    Args:
      hashes: of type `HASH`; a sample without a hash repeats nothing.
      distance: the bits in which two `low` parts may differ.
    """
    repeats = np.full(len(hashes), -1, np.int64)
    known = np.flatnonzero(hashes["known"])
    order = known[np.lexsort((hashes["low"][known], hashes["high"][known]))]  # stable: the first sample comes first
    ordered = hashes[order]
    starts = np.ones(len(order), bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = order[starts][np.cumsum(starts) - 1]
    repeats[order] = np.where(first == order, -1, first)
    if distance:
        _mark_near(repeats, np.sort(order[starts]), hashes["low"], distance)
    return repeats


def _mark_near(
    repeats: Int64[np.ndarray, "n"], distinct: Int64[np.ndarray, "m"], low: UInt64[np.ndarray, "n"], distance: int
) -> None:
    """Let samples repeat those that are near, of the samples with distinct hashes; their own repetitions follow."""
    pairs = np.unique(np.concatenate(list(_near_pairs(low[distinct], distance))), axis=0)
    for later, earlier in distinct[pairs].tolist():
        if repeats[later] < 0 and repeats[earlier] < 0:
            repeats[later] = earlier
    followed = repeats[repeats]
    np.copyto(repeats, followed, where=(repeats >= 0) & (followed >= 0))


def _near_pairs(low: UInt64[np.ndarray, "m"], distance: int) -> Iterator[Int64[np.ndarray, "k 2"]]:
    """Pairs (later, earlier) of hashes that differ in at most `distance` bits; a pair may come several times.

    Of distance + 1 bands of bits, such hashes have one in common (the pigeonhole principle), so only hashes with an
    equal band are compared.
    """
    yield np.zeros((0, 2), np.int64)
    for start, end in itertools.pairwise(np.linspace(0, 64, distance + 2).astype(int).tolist()):
        band = low << np.uint64(64 - end) >> np.uint64(64 - end + start)
        order = np.argsort(band, kind="stable")  # so that each group is in the order of the samples
        for group in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            step = max(1, _COMPARED // max(1, len(group)))
            for row in range(1, len(group), step):
                later, earlier = group[row : row + step], group[: row + step]
                near = np.bitwise_count(low[later][:, None] ^ low[earlier]) <= distance
                rows, columns = np.nonzero(near & (earlier < later[:, None]))
                if len(rows):
                    yield np.stack([later[rows], earlier[columns]], axis=1)


def _content(image: bytes | Image.Image) -> bytes:
    return image if isinstance(image, bytes) else repr((image.mode, image.size)).encode() + image.tobytes()
