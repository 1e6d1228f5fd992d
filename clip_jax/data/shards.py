"""Random access to the samples of tar and TFRecord shards, by an index of where each of them lies.

The index of a shard is built once, by reading the shard's headers, and kept in a file of its own: beside the shards in
`.clip_jax_index/`, or in the user's cache where that cannot be written. It holds the size and the time (or tag) of its
shard; a shard that has changed is indexed again. Twelve bytes a sample, loaded a shard at a time: 100 million samples
need no more memory than the shards in use.
"""

import gzip
import hashlib
import io
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from clip_jax.data import files
from clip_jax.data.bucket import Stream
from clip_jax.data.damage import Damaged, Unreachable, naming
from clip_jax.data.files import File
from clip_jax.data.processes import process_pool
from clip_jax.errors import UserError
from clip_jax.platform import cache_folder, usable_cores

Read = Callable[[int, int], bytes]
Scan = Callable[[Read, int], tuple[list[tuple[int, int]], list[Damaged]]]

SPAN = np.dtype([("offset", "<u8"), ("size", "<u4")])

logger = logging.getLogger(__name__)

_VERSION = 1
_FOLDER = ".clip_jax_index"
_INDEXES_IN_MEMORY = 512
_GZIP = (".gz", ".tgz")
_FEW_SHARDS = 8  # indexed without starting processes
_READ_AHEAD = 2**22  # bytes, of a shard in a bucket that is indexed
_MAX_UNPACKED = 50  # times its size: photographs do not get 50 times smaller, a gzip bomb does


@dataclass(frozen=True)
class Index:
    """Where the samples of one shard lie.

    Attributes:
      path: what is read: the shard, or what was unpacked from it.
      spans: offset and size of each sample, in bytes.
      damage: what is wrong with the shard.
    """

    path: str
    spans: Shaped[np.ndarray, "samples"]
    damage: tuple[Damaged, ...]


class Shards:
    """The samples of many shards, as bytes, numbered from 0 in the order of the shards.

    Args:
      shards: in their order, as `files.find` gives them.
      scan: finds the samples of a shard: `tar.scan` or `tfrecord.scan`.
      index_dir: where indexes are kept; "" for beside the shards, or the cache.

    Attributes:
      damage: what is wrong with the shards.

    Raises:
      UserError: one cannot be read, or none has a sample.
    """

    def __init__(self, shards: Sequence[File], scan: Scan, index_dir: str = ""):
        self._shards = shards
        self._scan, self._index_dir = scan, index_dir
        counts, damage = _count_all(self._shards, scan, index_dir)
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.damage = damage
        if not len(self):
            first = f"; {damage[0]}" if damage else ""
            raise UserError(f"no sample in {len(shards)} shards, of which the first is {shards[0].path}{first}")
        self._recent: OrderedDict[int, Index] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def paths(self) -> list[str]:
        """Of the shards, in their order."""
        return [shard.path for shard in self._shards]

    def where(self, index: int) -> tuple[str, int, int]:
        """The file, offset and size of a sample."""
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        shard = self._index(number)
        offset, size = shard.spans[index - self.starts[number]].tolist()
        return shard.path, offset, size

    def read(self, index: int) -> bytes:
        """The bytes of a sample.

        Raises:
          Damaged: the shard ends before them.
        """
        path, offset, size = self.where(index)
        return whole(files.read(path, offset, size), size)

    def ranges(self, first: int, end: int) -> Iterator[tuple[str, int, int]]:
        """The file, offset and size that hold the samples from `first` to before `end`: one range for each shard."""
        for path, spans in self._spans(first, end):
            offset = int(spans["offset"][0])
            yield path, offset, int(spans["offset"][-1] + spans["size"][-1]) - offset

    def read_range(self, first: int, end: int) -> list[bytes]:
        """The bytes of the samples from `first` to before `end`, by one reading of each shard; short where it is."""
        samples = []
        for (path, offset, size), (_, spans) in zip(self.ranges(first, end), self._spans(first, end), strict=True):
            content = files.read(path, offset, size)
            starts = (spans["offset"] - np.uint64(offset)).tolist()
            ends = (spans["offset"] - np.uint64(offset) + spans["size"]).tolist()
            samples += [content[start:end] for start, end in zip(starts, ends, strict=True)]
        return samples

    def _spans(self, first: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
        """The samples from `first` to before `end`, shard by shard."""
        while first < end:
            number = int(np.searchsorted(self.starts, first, "right")) - 1
            start, stop = self.starts[number], min(end, int(self.starts[number + 1]))
            shard = self._index(number)
            yield shard.path, shard.spans[first - start : stop - start]
            first = stop

    def _index(self, number: int) -> Index:
        with self._lock:
            if number in self._recent:
                self._recent.move_to_end(number)
                return self._recent[number]
        index = load_index(self._shards[number], self._scan, self._index_dir)
        with self._lock:
            self._recent[number] = index
            if len(self._recent) > _INDEXES_IN_MEMORY:
                self._recent.popitem(last=False)
        return index

    def __getstate__(self):  # for worker processes
        return self.__dict__ | {"_recent": OrderedDict(), "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state | {"_lock": Lock()})


def whole(content: bytes, size: int) -> bytes:
    """What was read, if all of it is there.

    Raises:
      Damaged: the shard ends before it.
    """
    if len(content) < size:
        raise Damaged("cut", f"expected {size} bytes, got {len(content)}")
    return content


def load_index(shard: File, scan: Scan, index_dir: str = "") -> Index:
    """The index of a shard: from its file, or made and written there.

    Args:
      shard: the shard.
      scan: finds its samples.
      index_dir: where indexes are kept; "" for beside the shards, or the cache.
    """
    index = _ready_index(shard, index_dir)
    if index is not None:
        return index
    index = _make_index(shard, scan, _content(shard, index_dir))
    for place in _places(shard, index_dir):
        try:
            files.write(place, _packed(index, shard))
            break
        except (OSError, Unreachable) as error:
            logger.debug("no index in %s: %s", place, error)
    return index


def _ready_index(shard: File, index_dir: str) -> Index | None:
    """The index of a shard from one of the files where it may be, if it is that of the shard as it is now."""
    for place in _places(shard, index_dir):
        index = _read_index(place, shard, _content(shard, index_dir))
        if index is not None:
            return index
    return None


def _places(shard: File, index_dir: str) -> list[str]:
    """The files that may hold the index of a shard, the best one first."""
    name, own = f"{os.path.basename(shard.path)}.npz", _own_place(shard, index_dir)
    folders = [own] if index_dir else [files.join(files.parent(shard.path), _FOLDER), own]
    return [files.join(folder, name) for folder in folders]


def _content(shard: File, index_dir: str) -> str:
    """The file that samples are read from: the shard, or what a gzip shard is unpacked to."""
    if not shard.path.endswith(_GZIP):
        return shard.path
    place = _own_place(shard, "" if files.is_remote(index_dir) else index_dir)
    return os.path.join(place, os.path.basename(shard.path) + ".unpacked")


def _count_all(shards: Sequence[File], scan: Scan, index_dir: str) -> tuple[list[int], tuple[Damaged, ...]]:
    """The number of samples of each shard, and all damage; indexes that are missing are made."""
    counted: dict[File, tuple[int, tuple[Damaged, ...]]] = {}
    with ThreadPoolExecutor(_FEW_SHARDS) as pool:
        ready = pool.map(partial(_ready_count, index_dir=index_dir), shards)
        counted |= {shard: count for shard, count in zip(shards, ready, strict=True) if count is not None}
    missing = [shard for shard in shards if shard not in counted]
    with _executor(missing) as pool:
        results = pool.map(partial(_count, scan=scan, index_dir=index_dir), missing)
        bar = tqdm(results, total=len(missing), desc="indexing shards", unit="shard", delay=2, leave=False)
        counted |= zip(missing, bar, strict=True)
    return [counted[shard][0] for shard in shards], tuple(item for shard in shards for item in counted[shard][1])


def _executor(shards: Sequence[File]) -> Executor:
    """Processes for many shards that are here (parsing headers holds the lock), threads where waiting is the work."""
    if len(shards) <= _FEW_SHARDS or files.is_remote(shards[0].path):
        return ThreadPoolExecutor(_FEW_SHARDS)
    return process_pool(usable_cores())


def _ready_count(shard: File, index_dir: str) -> tuple[int, tuple[Damaged, ...]] | None:
    index = _ready_index(shard, index_dir)
    return None if index is None else (len(index.spans), index.damage)


def _count(shard: File, scan: Scan, index_dir: str) -> tuple[int, tuple[Damaged, ...]]:
    index = load_index(shard, scan, index_dir)
    return len(index.spans), index.damage


def _own_place(shard: File, index_dir: str) -> str:
    """Where the indexes of a shard's folder are kept apart from it: below `index_dir`, or below the user's cache."""
    folder = hashlib.sha256(files.parent(shard.path).encode()).hexdigest()[:16]
    return files.join(index_dir or str(cache_folder() / "index"), folder)


def _make_index(shard: File, scan: Scan, content: str) -> Index:
    with naming(shard.path):
        damage = _unpack(shard, content) if content != shard.path else []
        size = os.stat(content).st_size if content != shard.path else shard.size
        spans, found = scan(_reader(content, size), size)
    if size:  # of what gzip spoils, the scan says where it hurts
        damage = found or damage
    damage = [Damaged(item.reason, f"{shard.path}, {item}") for item in damage or found]
    return Index(content, np.array(spans, SPAN), tuple(damage))


def _reader(path: str, length: int) -> Read:
    """Reads ranges of a file; of one in a bucket, pieces ahead, because a scan goes from front to back."""
    if not files.is_remote(path):
        return partial(files.read, path)
    piece, start = b"", 0

    def read(offset: int, size: int) -> bytes:
        nonlocal piece, start
        size = max(0, min(size, length - offset))
        if not start <= offset <= offset + size <= start + len(piece):
            piece, start = files.read(path, offset, min(max(size, _READ_AHEAD), length - offset)), offset
        return piece[offset - start : offset - start + size]

    return read


def _unpack(shard: File, target: str) -> list[Damaged]:
    """Write a gzip shard's content, whose middle could not be read otherwise, to a file; returns what is wrong."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary, damage, room = f"{target}.{os.getpid()}.part", [], _MAX_UNPACKED * shard.size + 2**20
    with _stream(shard) as source, gzip.GzipFile(fileobj=source) as packed, open(temporary, "wb") as file:
        try:
            while piece := packed.read1(2**20):  # not `read`, which drops what comes before an error
                file.write(piece)
                room -= len(piece)
                if room < 0:
                    file.truncate(0)
                    damage.append(Damaged("too_large", f"it unpacks to over {_MAX_UNPACKED} times its size"))
                    break
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            damage.append(Damaged("checksum", f"the gzip data is damaged: {error}"))
    os.replace(temporary, target)
    return damage


def _stream(shard: File) -> io.BufferedReader:
    if files.is_remote(shard.path):
        return io.BufferedReader(Stream(shard.path, shard.size), _READ_AHEAD)
    return open(shard.path, "rb")


def _packed(index: Index, shard: File) -> bytes:
    """The file of an index."""
    about = {
        "version": _VERSION,
        "size": shard.size,
        "stamp": shard.stamp,
        "damage": [[item.reason, str(item)] for item in index.damage],
    }
    buffer = io.BytesIO()
    np.savez(buffer, spans=index.spans, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    return buffer.getvalue()


def _read_index(path: str, shard: File, content: str) -> Index | None:
    """An index from its file; None where there is none, or it is damaged, or not of the shard as it is now."""
    try:
        with naming(path), np.load(io.BytesIO(files.read(path)), allow_pickle=False) as arrays:
            spans, about = arrays["spans"], json.loads(arrays["about"].tobytes())
        same = (about["version"], about["size"], about["stamp"]) == (_VERSION, shard.size, shard.stamp)
        if not same or spans.dtype != SPAN or (content != shard.path and not os.path.exists(content)):
            return None
        return Index(content, spans, tuple(Damaged(*item) for item in about["damage"]))
    except Exception as error:
        logger.debug("%s is not used: %s", path, error)
        return None
