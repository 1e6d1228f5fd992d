"""Files on this machine and in buckets (`gs://`, `s3://`, what else fsspec opens), found by pattern, read by range."""

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from clip_jax.data.bucket import ask
from clip_jax.errors import UserError

_OPEN_FILES = 256


@dataclass(frozen=True)
class File:
    """One file as a listing gives it.

    Attributes:
      path: as it can be opened; a URL for files in a bucket.
      size: in bytes.
      stamp: changes when the file does: its time, or its tag in a bucket.
    """

    path: str
    size: int
    stamp: str


def find(pattern: str) -> list[File]:
    """The files of a pattern such as `gs://bucket/{00000..00099}.tar` or `shards/*.tar`, sorted by path.

    Args:
      pattern: braces are expanded, then `*`, `?` and `[...]` matched; `**` matches folders too.

    Raises:
      UserError: a file that the pattern names is missing, or none matches.
      Unreachable: the bucket does not answer, or refuses.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        names = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise UserError(f"{pattern}: {error}; expected braces such as {{00000..00099}}") from error
    files = {file.path: file for found in _by_kind(names) for file in found}
    if not files:
        raise UserError(f"no file matches {pattern}")
    return [files[path] for path in sorted(files)]


def one(path: str) -> File:
    """The file of a path, in which no character has a special meaning.

    Raises:
      UserError: it is missing.
      Unreachable: the bucket does not answer, or refuses.
    """
    if not is_remote(path):
        return _local(path, magic=False)[0]
    try:
        return _remote(path, ask(path, "info"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error


def is_remote(path: str) -> bool:
    """Whether a path is a URL, of a bucket for instance."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """The path of a file in a folder or in a folder of a bucket; an absolute name or a URL stays as it is."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder that a file is in."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """A range of a file, shorter where the file ends early; by default the whole file.

    Raises:
      OSError: the file cannot be read.
      UserError: its kind of bucket needs a package that is missing.
      Unreachable: the bucket does not answer, or refuses.
    """
    if is_remote(path):
        return ask(path, "cat_file", start=offset, end=None if size is None else offset + size)
    descriptor, length = _open(path)
    wanted = length - offset if size is None else size
    pieces = []
    while wanted > 0 and (piece := os.pread(descriptor.number, wanted, offset)):
        pieces.append(piece)
        offset, wanted = offset + len(piece), wanted - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def will_read(path: str, offset: int, size: int) -> None:
    """Let the system begin to fetch a range of a file that is here."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(_open(path)[0].number, offset, size, os.POSIX_FADV_WILLNEED)


def write(path: str, content: bytes) -> None:
    """Write a small file whole or not at all, with the folders above it.

    Raises:
      OSError: it cannot be written.
      Unreachable: the bucket does not answer, or refuses.
    """
    if is_remote(path):
        ask(path, "pipe_file", content)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.part"
    with open(temporary, "wb") as file:
        file.write(content)
    os.replace(temporary, path)


def _by_kind(names: Iterable[str]) -> Iterator[list[File]]:
    """The files of each pattern, and those that are named outright; in buckets by one listing of each folder."""
    folders: dict[str, dict[str, File]] = {}
    for name in names:
        magic = any(character in name for character in "*?[")
        if not is_remote(name):
            yield _local(name, magic)
        elif "::" in name:
            raise UserError(f"{name}: expected a plain URL, such as gs://bucket/folder/*.tar, without ::")
        elif magic:
            found = ask(name, "glob", detail=True)
            yield [_remote(name, info) for info in found.values() if info["type"] == "file"]
        else:
            folder = parent(name)
            if folder not in folders:
                folders[folder] = {file.path: file for file in _listed(folder)}
            if name not in folders[folder]:
                raise UserError(f"{name} is missing")
            yield [folders[folder][name]]


def _listed(folder: str) -> list[File]:
    """The files in a folder of a bucket."""
    try:
        infos = ask(folder, "ls", detail=True)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is missing") from error
    return [_remote(folder, info) for info in infos if info["type"] == "file"]


def _local(name: str, magic: bool) -> list[File]:
    import glob

    paths = glob.glob(name, recursive=True) if magic else [name]
    files = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}") from error
        if os.path.isfile(path):
            files.append(File(path, status.st_size, str(status.st_mtime_ns)))
        elif not magic:
            raise UserError(f"{path} is not a file")
    return files


def _remote(url: str, info: dict[str, Any]) -> File:
    scheme = url.partition("://")[0]
    stamps = (info.get(key) for key in ("etag", "ETag", "md5Hash", "mtime", "LastModified", "created"))
    stamp = next((str(value) for value in stamps if value), "")
    return File(f"{scheme}://{info['name'].partition('://')[2] or info['name']}", info["size"], stamp)


class _Descriptor:
    """An open file that closes when nobody reads from it any more, so that threads can share it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def _open(path: str) -> tuple[_Descriptor, int]:
    """A file that is here, and its size."""
    status = os.stat(path)
    return _descriptor(path, status.st_ino, status.st_mtime_ns), status.st_size


@functools.lru_cache(_OPEN_FILES)
def _descriptor(path: str, inode: int, time: int) -> _Descriptor:
    """The file that the path names now: one that took its place has another inode or time."""
    return _Descriptor(path)
