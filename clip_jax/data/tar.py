"""Tar shards in the WebDataset layout: neighbouring members whose names differ in their extension are one sample.

`000/17.jpg`, `000/17.txt` and `000/17.json` are the sample `000/17`. Headers are parsed by the standard library's
`tarfile.TarInfo`, one at a time, because its readers take a damaged header for the end of the archive. Nothing is ever
extracted.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from clip_jax.data.damage import Damaged

Read = Callable[[int, int], bytes]  # (offset, size) to bytes, fewer at the end

MAX_MEMBER = 2**28  # bytes of a member, or of all members of a sample; far above any image with its captions
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_RESYNC_PIECE = 2**20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAME = tarfile.GNUTYPE_LONGNAME
_LONG_LINK = tarfile.GNUTYPE_LONGLINK
_SKIPPED = ("link", "unsafe_path")  # damage that leaves what is around it readable
_MAX_EXTENDED = 2**20  # bytes of a header's long name or pax records


@dataclass(frozen=True)
class Member:
    """A regular file of an archive.

    Attributes:
      key: its name up to the first dot of its last part.
      extension: the rest in lower case, without that dot.
      start: where its first header begins.
      offset: where its content begins.
      size: of the content, in bytes.
    """

    key: str
    extension: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header is."""
        return self.offset + _padded(self.size)


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    start: int
    members: dict[str, Member] = field(default_factory=dict)
    suspect: bool = False  # a neighbour is damaged, so a member may be missing

    @property
    def end(self) -> int:
        return max(member.end for member in self.members.values())


def scan(read: Read, size: int) -> tuple[list[tuple[int, int]], list[Damaged]]:
    """Find every sample of a shard.

    Where a header is damaged, the search goes on at the next valid one. A sample beside damage counts only if it has
    all the members that most samples have.

    Args:
      read: gives a range of the shard.
      size: of the shard, in bytes.

    Returns:
      the (offset, size) of each sample, in the order of the shard, and what is damaged.
    """
    groups, damage = [], []
    suspect = torn = False
    for item in members(read, size):
        if isinstance(item, Damaged):
            damage.append(item)
            suspect, torn = True, torn or item.reason not in _SKIPPED
            if groups:
                groups[-1].suspect = True
            continue
        group = groups[-1] if groups else None
        if group is None or torn or group.key != item.key or item.extension in group.members:
            group = _Group(item.key, item.start, suspect=suspect)
            groups.append(group)
        group.members[item.extension] = item
        suspect = torn = False
    usual = Counter(frozenset(group.members) for group in groups if not group.suspect).most_common(1)
    wanted = usual[0][0] if usual else frozenset()
    samples, seen = [], set()
    for group in groups:
        if group.suspect and not wanted <= set(group.members):
            continue
        if group.key in seen:
            damage.append(Damaged("duplicate_key", f"offset {group.start}: key {group.key!r} comes a second time"))
            continue
        seen.add(group.key)
        if group.end - group.start > MAX_MEMBER:
            what = f"offset {group.start}: the members of key {group.key!r} have over {MAX_MEMBER} bytes together"
            damage.append(Damaged("too_large", what))
            continue
        samples.append((group.start, group.end - group.start))
    return samples, damage


def parse(content: bytes) -> tuple[str, dict[str, bytes]]:
    """Take a sample apart.

    Args:
      content: the range of the shard that `scan` gave.

    Returns:
      its key, and the content of its members by extension.

    Raises:
      Damaged: the content is not what was scanned.
    """
    found: dict[str, bytes] = {}
    key = ""
    for member in members(lambda offset, size: content[offset : offset + size], len(content), whole=False):
        if isinstance(member, Damaged):
            if member.reason in _SKIPPED:
                continue
            raise member
        key = member.key
        found[member.extension] = content[member.offset : member.offset + member.size]
    if not found:
        raise Damaged("cut", "expected a sample, got no member")
    return key, found


def members(read: Read, size: int, whole: bool = True) -> Iterator[Member | Damaged]:
    """Every regular member of an archive, with the damage between them.

    Members without an extension and hidden ones are left out, as in WebDataset.

    Args:
      read: gives a range of the archive.
      size: of the archive, in bytes.
      whole: whether the mark that ends an archive must be there.
    """
    offset = start = 0
    long_name = None
    while offset < size:
        block = read(offset, _BLOCK)
        if len(block) < _BLOCK:
            yield Damaged("cut", f"offset {offset}: the archive ends within a header")
            return
        if block == _ZEROS and (following := _first_nonzero(read, offset, size)) is None:
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            damaged, search = offset, following if block == _ZEROS else offset + _BLOCK
            offset = start = _next_header(read, search, size)
            long_name = None
            yield Damaged("header", f"offset {damaged}: {error}; {offset - damaged} bytes are lost")
            if offset == size:
                return
            continue
        content = offset + _BLOCK
        extended = info.type in (*_PAX, _LONG_NAME, _LONG_LINK)
        limit = _MAX_EXTENDED if extended else MAX_MEMBER
        name = long_name or info.name
        if info.size > limit or info.size < 0:
            yield Damaged("too_large", f"offset {offset}: {name!r} claims {info.size} bytes, at most {limit} are read")
            offset = start = _next_header(read, content, size)
            long_name = None
            if offset == size:
                return
            continue
        if content + _padded(info.size) > size:
            yield Damaged("cut", f"offset {offset}: the archive ends within {name!r}, which claims {info.size} bytes")
            return
        offset = content + _padded(info.size)
        if extended:
            long_name = _extended_name(info.type, read(content, info.size)) or long_name
            continue
        problem = _problem(info.type, name)
        if problem:
            yield Damaged(problem[0], f"offset {start}: {name!r} {problem[1]}")
        elif info.type in _REGULAR and (split := _split(name)):
            yield Member(*split, start, content, info.size)
        start, long_name = offset, None
    if whole:
        yield Damaged("cut", f"offset {offset}: the mark that ends an archive is missing")


def _problem(kind: bytes, name: str) -> tuple[str, str] | None:
    """Why a member is never used: the reason, and words for it."""
    if kind not in (*_REGULAR, tarfile.DIRTYPE):
        return "link", "is a link, a device or another special file"
    if name.startswith("/") or ".." in name.split("/"):
        return "unsafe_path", "is absolute or leaves the archive"
    return None


def _split(name: str) -> tuple[str, str] | None:
    """The key and the extension of a member's name; None for what belongs to no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot or not extension:
        return None
    return folder + slash + stem, extension.lower()


def _extended_name(kind: bytes, content: bytes) -> str | None:
    """The name that a long-name or pax header gives the next member, if it gives one."""
    if kind == _LONG_NAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if kind == tarfile.XHDTYPE:
        while content:
            length, space, _ = content.partition(b" ")
            if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
                return None
            record, content = content[len(length) + 1 : int(length) - 1], content[int(length) :]
            keyword, _, value = record.partition(b"=")
            if keyword == b"path":
                return value.decode("utf-8", "surrogateescape")
    return None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _first_nonzero(read: Read, offset: int, size: int) -> int | None:
    """The first block from `offset` on that is not all zeros; None where only zeros are left."""
    while offset < size:
        piece = read(offset, _RESYNC_PIECE)
        if not piece:
            return None
        stripped = piece.lstrip(b"\0")
        if stripped:
            return offset + (len(piece) - len(stripped)) // _BLOCK * _BLOCK
        offset += len(piece)
    return None


def _next_header(read: Read, offset: int, size: int) -> int:
    """The first block from `offset` on that is a valid header; the end without one."""
    while offset < size:
        piece = read(offset, _RESYNC_PIECE)
        if not piece:
            break
        for start in range(0, len(piece) - _BLOCK + 1, _BLOCK):
            if piece.startswith(b"ustar", start + 257) and _is_header(piece[start : start + _BLOCK]):
                return offset + start
        offset += len(piece)
    return size


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
