"""The records of a split as TFDS wrote them, by number, in each of its file formats that can be read so."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.utils.shard_utils import FileInstruction

from clip_jax.data import files, parquet, tfrecord
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.shards import Shards

Parts = Sequence[FileInstruction]  # files, and which of their examples belong to a split or a slice of one

_FILES_AT_ONCE = 16


@runtime_checkable
class Records(Protocol):
    """Serialised examples, numbered from 0; `damage` says what is wrong with their files, where a format can tell."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...


class _TfrecordFiles:
    """All records of TFRecord files, by an index that is made when they are first opened."""

    def __init__(self, found: list[files.File]):
        self._shards = Shards(found, tfrecord.scan)
        self.damage, self.file_starts = self._shards.damage, self._shards.starts

    def __getitem__(self, index: int) -> bytes:
        path, offset, _ = self._shards.where(index)
        with naming(f"{path}, offset {offset}"):
            return tfrecord.content(self._shards.read(index))


class _ParquetFiles:
    """All records of Parquet files as TFDS writes them, which have one column."""

    def __init__(self, found: list[files.File]):
        footers, damage = parquet.read_footers(found)
        if damage:
            raise damage[0]
        self._rows = parquet.ParquetRows(footers, footers[0].schema.names[:1])
        self.damage, self.file_starts = (), self._rows.file_starts

    def __getitem__(self, index: int) -> bytes:
        (cell,) = self._rows[index].values()
        return cell.as_py()


class _Chosen:
    """Of the records in files, those that belong to a split or a slice of one.

    Attributes:
      damage: what is wrong with the files; one with fewer examples than TFDS wrote is cut.
    """

    def __init__(self, open_files: Callable[[list[files.File]], _TfrecordFiles | _ParquetFiles], parts: Parts):
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            self._records = open_files(list(pool.map(files.one, [os.fspath(part.filename) for part in parts])))
        counts = np.diff(self._records.file_starts).tolist()
        cut = [
            Damaged("cut", f"{part.filename} holds {count} examples, where TFDS wrote {part.examples_in_shard}")
            for part, count in zip(parts, counts, strict=True)
            if count != part.examples_in_shard
        ]
        self.damage = (*self._records.damage, *cut)
        takes = [max(0, min(part.take, count - part.skip)) for part, count in zip(parts, counts, strict=True)]
        self._firsts = self._records.file_starts[:-1] + np.array([part.skip for part in parts])
        self._starts = np.concatenate([[0], np.cumsum(takes)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> bytes:
        part = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._records[int(self._firsts[part] + index - self._starts[part])]


OPENERS: dict[FileFormat, Callable[[Parts], Records]] = {
    FileFormat.ARRAY_RECORD: ArrayRecordDataSource,
    FileFormat.TFRECORD: lambda parts: _Chosen(_TfrecordFiles, parts),
    FileFormat.PARQUET: lambda parts: _Chosen(_ParquetFiles, parts),  # TFDS's own reader takes no notice of slices
}
