"""TFRecord shards: each record has its length, a checksum of the length, the content, a checksum of the content.

The checksum is a masked CRC-32C (TensorFlow, `tensorflow/core/lib/io/record_writer.h`). Read without TensorFlow.
"""

import struct
from collections.abc import Callable

import google_crc32c
import numpy as np

from clip_jax.data.damage import Damaged

Read = Callable[[int, int], bytes]  # (offset, size) to bytes, fewer at the end

MAX_RECORD = 2**28  # bytes
_HEADER, _FOOTER = 12, 4
_RESYNC_PIECE = 2**20


def scan(read: Read, size: int) -> tuple[list[tuple[int, int]], list[Damaged]]:
    """Find every record of a shard.

    Where a header is damaged, the search goes on at the next bytes that are a valid one. Contents are checked when they
    are read.

    Args:
      read: gives a range of the shard.
      size: of the shard, in bytes.

    Returns:
      the (offset, size) of each record, and what is damaged.
    """
    records, damage = [], []
    offset = 0
    if size == 0:
        damage.append(Damaged("cut", "offset 0: the file is empty"))
    while offset < size:
        header = read(offset, _HEADER)
        if len(header) < _HEADER:
            damage.append(Damaged("cut", f"offset {offset}: the file ends within a record's header"))
            break
        length = _length(header)
        if length is None or length > MAX_RECORD:
            what = "header" if length is None else "too_large"
            found = "is not valid" if length is None else f"claims {length} bytes, at most {MAX_RECORD} are read"
            following = _next_header(read, offset + 1, size)
            damage.append(Damaged(what, f"offset {offset}: the header {found}; {following - offset} bytes are lost"))
            offset = following
            continue
        end = offset + _HEADER + length + _FOOTER
        if end > size:
            damage.append(Damaged("cut", f"offset {offset}: the file ends within a record of {length} bytes"))
            break
        records.append((offset, end - offset))
        offset = end
    return records, damage


def content(record: bytes) -> bytes:
    """What is in a record.

    Args:
      record: the range of the shard that `scan` gave.

    Raises:
      Damaged: it is cut, or does not match its checksums.
    """
    if len(record) < _HEADER + _FOOTER:
        raise Damaged("cut", f"expected a record, got {len(record)} bytes")
    length = _length(record[:_HEADER])
    if length is None:
        raise Damaged("header", "the record's header is not valid")
    if length != len(record) - _HEADER - _FOOTER:
        raise Damaged("cut", f"expected a record of {length} bytes, got {len(record) - _HEADER - _FOOTER}")
    data = record[_HEADER:-_FOOTER]
    if _masked_crc(data) != struct.unpack("<I", record[-_FOOTER:])[0]:
        raise Damaged("checksum", "the record does not match its checksum")
    return data


def parse(record: bytes) -> tuple[str, dict[str, bytes | list]]:
    """Take a record with a `tf.train.Example` apart, as img2dataset writes it.

    Args:
      record: the range of the shard that `scan` gave.

    Returns:
      its key (the feature called key, or empty), and its features: bytes where there is one value, else a list.

    Raises:
      Damaged: the record is damaged, or holds no `tf.train.Example`.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # brings no TensorFlow along

    try:
        example = tf_example_pb2.Example.FromString(content(record))
    except DecodeError as error:
        raise Damaged("header", f"expected a tf.train.Example: {error}") from error
    fields = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        fields[name] = values[0] if len(values) == 1 and kind == "bytes_list" else values
    key = fields.get("key", b"")
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else "", fields


def _length(header: bytes) -> int | None:
    """The length in a header; None if it does not match its checksum."""
    length, checksum = struct.unpack("<QI", header)
    return length if _masked_crc(header[:8]) == checksum else None


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _next_header(read: Read, offset: int, size: int) -> int:
    """The first place from `offset` on with a valid header whose record fits; the end without one."""
    while offset + _HEADER + _FOOTER <= size:
        piece = np.frombuffer(read(offset, _RESYNC_PIECE + _HEADER), np.uint8)
        starts = len(piece) - _HEADER + 1
        if starts < 1:
            break
        # A length below 2**32 has four zero bytes: few places do, and only these are tried.
        upper = np.stack([piece[byte : byte + starts] for byte in range(4, 8)])
        for start in np.flatnonzero(~upper.any(axis=0)).tolist():
            length = _length(piece[start : start + _HEADER].tobytes())
            if length is not None and offset + start + _HEADER + length + _FOOTER <= size:
                return offset + start
        offset += starts
    return size
